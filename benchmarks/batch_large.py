"""How much memory and disk does a batch of five million rows take, from its submission to Parquet?

The three commands of the terminal, each in a process of its own: submit, status --watch, fetch. The
highest resident memory of each, its CPU, and the most disk that was taken meanwhile by the state
folder and the output, beside the size of the inputs and of the finished output. The provider is the
fake server of embedcore.testing; its process and its files are not counted.

    python benchmarks/batch_large.py                             5 million rows in 100 jobs: hours
    python benchmarks/batch_large.py --rows 100000 --dimensions 256
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROWS_PER_JOB = 50_000
MOST_MEGABYTES = 300.0
MOST_DISK = 1.2
SECONDS_BETWEEN_LOOKS = 2.0
# An account has a limit; without one, as here, all jobs could run at once.
CONFIG = "[options.openai]\nbatch = true\n{dimensions}\n[batch]\nparts = {parts}\n"


@dataclass(frozen=True, kw_only=True)
class Used:
    """What one command took: seconds, seconds of CPU, and bytes of memory at its most."""

    seconds: float
    cpu: float
    memory: int
    output: dict[str, Any]


class Disk:
    """Watches how many bytes the files of some folders take: ``most`` at their most."""

    def __init__(self, *folders: Path) -> None:
        self.most = 0
        self._folders = folders
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.look()

    def look(self) -> int:
        now = sum(taken(folder) for folder in self._folders)
        self.most = max(self.most, now)
        return now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()


def taken(folder: Path) -> int:
    """Whole blocks, as the disk counts them. A file may go while it is looked at."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def write_texts(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for row in range(rows):
            file.write(f'{{"id": {row}, "text": "text number {row} of a large batch"}}\n')


def run(command: Sequence[str], place: Path, variables: Mapping[str, str]) -> Used:
    """Raises ``SystemExit`` with its last words if the command fails."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as log:
        full = [sys.executable, "-m", "embedcore", *command, "--json"]
        process = subprocess.Popen(full, stdout=said, stderr=log, cwd=place, env={**variables})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        log.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: {log.read().decode()[-2000:]}")
        lines = said.read().decode().strip().splitlines()
    return Used(
        seconds=time.monotonic() - began,
        cpu=usage.ru_utime + usage.ru_stime,
        memory=usage.ru_maxrss * 1024,
        output=json.loads(lines[-1]) if lines else {},
    )


@contextmanager
def fake_server() -> Iterator[dict[str, str]]:
    command = [sys.executable, "-m", "embedcore.testing.openai.server", "--until-eof"]
    with subprocess.Popen(
        [*command, "--batch-seconds", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        yield json.loads(server.stdout.readline())
        server.stdin.close()


def measure(folder: Path, rows: int, dimensions: int | None, parts: int) -> bool:
    home, place = folder / "home", folder / "work"
    home.mkdir()
    place.mkdir()
    texts, output = place / "texts.jsonl", place / "vectors.parquet"
    write_texts(texts, rows)
    width = f"dimensions = {dimensions}" if dimensions else ""
    (place / "embedcore.toml").write_text(CONFIG.format(dimensions=width, parts=parts))
    inputs = texts.stat().st_size
    with fake_server() as server, Disk(home, place) as disk:
        variables = {
            **os.environ,
            "EMBEDCORE_HOME": str(home),
            "OPENAI_BASE_URL": server["base_url"],
            "OPENAI_API_KEY": server["api_key"],
        }
        submitted = run(["batch", "submit", texts.name, "--yes"], place, variables)
        name = submitted.output["id"]
        watching = ["batch", "status", name, "--watch", "--interval", str(SECONDS_BETWEEN_LOOKS)]
        watched = run(watching, place, variables)
        fetched = run(["batch", "fetch", name, "-o", output.name], place, variables)
        left = disk.look()
    finished = output.stat().st_size
    return report(
        {"submit": submitted, "status --watch": watched, "fetch": fetched},
        rows=rows,
        # The inputs lie there before, and stay.
        most=disk.most,
        left=left,
        allowed=MOST_DISK * finished + inputs,
        sizes=f"output {finished / 1e6:,.0f} MB, inputs {inputs / 1e6:,.0f} MB",
    )


def report(
    used: Mapping[str, Used], *, rows: int, most: int, left: int, allowed: float, sizes: str
) -> bool:
    for command, one in used.items():
        print(
            f"{command:15} {one.seconds:8.1f} s, {one.cpu / rows * 10_000:6.2f} s of CPU for "
            f"10,000 rows, at most {one.memory / 1e6:,.0f} MB of memory"
        )
    print(f"disk: at most {most / 1e6:,.0f} MB, {left / 1e6:,.0f} MB at the end ({sizes})")
    memory = max(one.memory for one in used.values()) / 1e6
    met = memory <= MOST_MEGABYTES and most <= allowed
    print(
        f"memory ≤ {MOST_MEGABYTES:.0f} MB: {memory:,.0f}; disk ≤ {MOST_DISK:g} × output + inputs: "
        f"{most / allowed:.2f} of that: {'met' if met else 'missed'}"
    )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000, help="50,000 of them are one job")
    parser.add_argument("--dimensions", type=int, help="of the vectors, instead of 1,536")
    parser.add_argument("--parts", type=int, default=8, help="jobs at once")
    parser.add_argument("--folder", type=Path, help="on which disk; default: the temporary folder")
    given = parser.parse_args()
    # The output in float32, the cache beside it, and the uploads of the fake server.
    needed = given.rows * ((given.dimensions or 1536) * 8 + 500)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        free = shutil.disk_usage(name).free
        if free < needed:
            print(f"needs about {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} GB are free")
            return 2
        jobs = -(-given.rows // ROWS_PER_JOB)
        print(f"{given.rows:,} rows in {jobs} jobs, {given.parts} at once", flush=True)
        return 0 if measure(Path(name), given.rows, given.dimensions, given.parts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
