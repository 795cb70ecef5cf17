"""One measurement of one client, in a process of its own, with that client's interpreter.

Told what to do by one line of JSON as its argument, it gets ready (imports, one small request),
writes ``ready``, waits for a line on its input, works, and writes what it used as a line of JSON.
Vectors are checked against their texts afterwards, outside of what is measured.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from compare import corpus, truth
from compare.clients.contract import Array, Found, NotThere, Partly, Row, Setting
from compare.profiling import Profile

_WARM_UP = [f"warm-up {number}" for number in range(20)]


@dataclass(kw_only=True)
class Used:
    """What one run used. ``cpu`` and ``wall`` in seconds, ``growth`` in bytes of resident memory
    above what was there before; ``wrong`` rows hold another text's vector, or nobody's."""

    texts: int = 0
    delivered: int = 0
    wrong: int = 0
    cpu: float = 0.0
    wall: float = 0.0
    growth: int = 0
    error: str | None = None
    missing: str | None = None
    profile: str | None = None


def run(order: Mapping[str, Any], said: TextIO, told: TextIO) -> Used:
    """Do what the order says, and say what it took."""
    if order["cores"]:
        os.sched_setaffinity(0, order["cores"])
    row = _row(order["client"], order["row"])
    setting = Setting(
        base_url=order["base_url"], folder=Path(order["folder"]), purpose=order["purpose"]
    )

    def ready() -> None:
        said.write("ready\n")
        said.flush()
        told.readline()

    try:
        if setting.purpose == "stream":
            return _stream(row, setting, order, ready)
        if setting.purpose == "reuse":
            return _reuse(row, setting, order, ready)
        if order.get("profile"):
            ready()
            return _profiled(row, setting, order)
        return _call(row, setting, order, ready)
    except NotThere as reason:
        return Used(missing=str(reason))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the client's result
        return Used(texts=order["texts"], error=_short(error))


def _row(client: str, name: str) -> Row:
    rows = import_module(f"compare.clients.{client}").CLIENT.rows
    found: Row = next(row for row in rows if row.name == name)
    return found


def _texts(order: Mapping[str, Any]) -> list[str]:
    chosen = corpus.stream(seed=order["seed"], duplicates=order["duplicates"])
    return list(islice(chosen, order["first"], order["first"] + order["texts"]))


def _call(row: Row, setting: Setting, order: Mapping[str, Any], ready: Callable[[], None]) -> Used:
    embed = row.open(setting)
    texts = _texts(order)
    embed(_WARM_UP)
    ready()
    return _measured(texts, lambda: embed(texts))


def _profiled(row: Row, setting: Setting, order: Mapping[str, Any]) -> Used:
    """Opens the client a second time: its threads are profiled from their start."""
    texts = _texts(order)
    elsewhere = setting.folder.with_name("elsewhere")
    elsewhere.mkdir()
    row.open(replace(setting, folder=elsewhere))(_WARM_UP)
    with Profile() as profile:
        found = as_array(row.open(setting)(texts))
    return Used(texts=len(texts), delivered=len(found), profile=profile.table())


def _reuse(row: Row, setting: Setting, order: Mapping[str, Any], ready: Callable[[], None]) -> Used:
    """Opening the cache is part of it; importing is not."""
    if row.reuse is None:
        raise NotThere(row.missing.get("reuse", "has no cache of its own"))
    reopen = row.reuse
    texts = _texts(order)
    elsewhere = setting.folder.with_name(f"{setting.folder.name}-warm-up")
    elsewhere.mkdir(exist_ok=True)
    reopen(replace(setting, folder=elsewhere))(_WARM_UP)
    ready()
    return _measured(texts, lambda: reopen(setting)(texts))


def _measured(texts: list[str], work: Callable[[], Found]) -> Used:
    used = Used(texts=len(texts))
    base = _start_of_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        found: Found | None = work()
    except Partly as partly:
        found, used.error = partly.found, _short(partly)
    except NotThere:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the client's result
        found, used.error = None, _short(error)
    vectors = None if found is None else as_array(found)
    used.cpu, used.wall = time.process_time() - cpu, time.perf_counter() - wall
    used.growth = _peak() - base
    if vectors is None:
        return used
    if vectors.shape != (len(texts), truth.WIDTH):
        used.error = f"{len(texts)} texts became an array of {vectors.shape}"
        return used
    used.delivered = len(texts) - int(truth.missing(vectors).sum())
    used.wrong = truth.wrong_rows(texts, vectors)
    return used


def _stream(
    row: Row, setting: Setting, order: Mapping[str, Any], ready: Callable[[], None]
) -> Used:
    """Each block is checked as it comes and then let go."""
    if row.stream is None:
        raise NotThere(row.missing.get("stream", "has no stream of vectors with their texts"))
    row.open(setting)(_WARM_UP)
    chosen = corpus.stream(seed=order["seed"], duplicates=0.0)
    sent = _Digest(islice(chosen, order["texts"]))
    used = Used(texts=order["texts"])
    ready()
    base = _start_of_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    came = _Digest(iter(()))
    for texts, vectors in row.stream(setting, sent):
        came.add(texts)
        used.delivered += len(texts)
        # Small blocks: what the check needs is in the peak too.
        used.wrong += truth.wrong_rows(texts, vectors, block=50)
    used.cpu, used.wall = time.process_time() - cpu, time.perf_counter() - wall
    used.growth = _peak() - base
    if came.value != sent.value:
        used.error = "the texts that came back are not those that went in, in their order"
    return used


class _Digest:
    """Passes texts on and remembers no more of them than one number, in which order counts."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.value = 0

    def add(self, texts: Any) -> None:
        for text in texts:
            self.value = hash((self.value, text))

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.add((text,))
            yield text


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


def _start_of_peak() -> int:
    """Resident bytes now; the peak counts from here where the kernel lets us say so."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _short(error: Exception) -> str:
    text = str(error) if isinstance(error, Partly) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def main() -> None:
    # What a client prints must not be taken for a result.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    used = run(json.loads(sys.argv[1]), said, sys.stdin)
    said.write(json.dumps(asdict(used)) + "\n")
    said.flush()
    # Some clients leave threads behind that would keep the process alive.
    os._exit(0)


if __name__ == "__main__":
    main()
