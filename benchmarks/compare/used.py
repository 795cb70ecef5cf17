"""What one run used, and how that is found out in the process that runs."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compare import truth
from compare.clients.contract import Array, Found, Partly


@dataclass(kw_only=True)
class Used:
    """What one run used. ``cpu`` and ``wall`` in seconds, ``growth`` in bytes of resident memory
    above what was there before; ``wrong`` rows hold another text's vector, or that of none.
    ``laps``: seconds of each of several equal parts, CPU or wall as the purpose has it."""

    texts: int = 0
    delivered: int = 0
    wrong: int = 0
    cpu: float = 0.0
    wall: float = 0.0
    growth: int = 0
    laps: list[float] = field(default_factory=list)
    error: str | None = None
    missing: str | None = None
    profile: str | None = None


class Stopwatch:
    """CPU of all threads of this process, and wall time, since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def note(self, used: Used) -> None:
        used.cpu, used.wall = self.cpu, time.perf_counter() - self._wall

    @property
    def cpu(self) -> float:
        return time.process_time() - self._cpu


def as_array(found: Found) -> Array:
    """What the client gave as one float32 array; a row that failed is NaN."""
    if isinstance(found, np.ndarray):
        return np.asarray(found, dtype=np.float32)
    if any(vector is None for vector in found):
        vectors = np.full((len(found), truth.WIDTH), np.nan, dtype=np.float32)
        for place, vector in enumerate(found):
            if vector is not None:
                vectors[place] = vector
        return vectors
    return np.array(found, dtype=np.float32)


def start_of_peak() -> int:
    """Resident bytes now; the peak counts from here where the kernel lets us say so."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
        return _status("VmRSS")
    return peak()


def peak() -> int:
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def short(error: Exception) -> str:
    text = str(error) if isinstance(error, Partly) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]
