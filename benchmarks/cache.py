"""The vector cache: what it costs to keep and to find 10,000 vectors, and what is written for it.

    python benchmarks/cache.py                  an empty cache, and one of a million vectors
    python benchmarks/cache.py --rows 20000000  a larger one; of its vectors only the index is made

Both formats in one run: segments, and the one SQLite file that there was before, which embedcore
only reads now; its writer is here. CPU is user and system time of this process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from embedcore.storage.keys import Origin
from embedcore.storage.old_vectors import OldVectors
from embedcore.storage.segments import HEADER_BYTES, SEGMENT_BYTES
from embedcore.storage.vector_format import checksums, encode
from embedcore.storage.vectors import VectorStore

WIDTH: Final = 1536
TEXTS: Final = 10_000
REQUEST: Final = 250
ORIGIN: Final = Origin(model="p:m", fingerprint="f")
_AT_ONCE: Final = 100_000
_DAY: Final = 20_000


class Cost(NamedTuple):
    """Of 10,000 vectors: seconds of CPU to keep and to find them, and megabytes written."""

    put: float
    written: float
    get: float


def random_keys(count: int) -> list[bytes]:
    """As they are: nothing in them says where they belong."""
    raw = os.urandom(32 * count)
    return [raw[at : at + 32] for at in range(0, len(raw), 32)]


def written_bytes() -> int:
    """Of this process, down to the disk; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


class Segments:
    """The cache as it is."""

    def __init__(self, folder: Path) -> None:
        self.store = VectorStore(folder / "vectors", cap=2**50)

    def put(self, keys: Sequence[bytes], vectors: Any) -> None:
        self.store.put(keys, vectors, ORIGIN)

    def get(self, keys: Sequence[bytes], into: Any) -> None:
        self.store.get(
            keys, WIDTH, lambda *_: None, room=lambda places: into[places[0] : places[-1] + 1]
        )

    def fill(self, rows: int) -> None:
        """So many rows, whose vectors lie in holes of files: they are never read."""
        stride = WIDTH * 4
        each = (SEGMENT_BYTES - HEADER_BYTES) // stride
        index = self.store.index
        with index.database.transaction() as connection:
            connection.execute("PRAGMA cache_size = -200000")
            origin, _ = index.origin(connection, ORIGIN)
            for number in range(1, rows // each + 2):
                connection.execute(
                    "INSERT INTO segment (id, tail) VALUES (?, ?)", (number, SEGMENT_BYTES)
                )
                index.segments.create(number - 1)
                os.truncate(index.segments.path(number), SEGMENT_BYTES)
            _in_parts(
                connection,
                "INSERT INTO vector (key, origin, segment, offset, width, itemsize, checksum, "
                "zeros, stored, keep_until) VALUES (?, ?, ?, ?, ?, 4, ?, 0, ?, 0)",
                (
                    (
                        key,
                        origin,
                        1 + at // each,
                        HEADER_BYTES + at % each * stride,
                        WIDTH,
                        sums,
                        _DAY,
                    )
                    for at, (key, sums) in enumerate(_keys_and_sums(rows))
                ),
            )


class OneFile:
    """The cache as it was."""

    def __init__(self, folder: Path) -> None:
        self.old = OldVectors(folder / "old.db", busy_timeout=10.0)
        self.old.database._creates = True
        self.old.database._at_creation = ("page_size=32768", "auto_vacuum=INCREMENTAL")

    def put(self, keys: Sequence[bytes], vectors: Any) -> None:
        stored = encode(vectors)
        sums = checksums(stored, keys).tolist()
        with self.old.database.transaction() as connection:
            connection.executemany(
                "INSERT INTO vector (key, origin, stored, keep_until, width, checksum, data) "
                "VALUES (?, 1, ?, 0, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    (key, _DAY, WIDTH, one, row)
                    for key, one, row in zip(keys, sums, stored, strict=True)
                ),
            )

    def get(self, keys: Sequence[bytes], into: Any) -> None:
        for start in range(0, len(keys), 500):
            part = into[start : start + 500]
            self.old.get(keys[start : start + 500], WIDTH, lambda _, part=part: part)

    def fill(self, rows: int) -> None:
        """So many rows, whose vectors are a few bytes: their size changes nothing of the index."""
        with self.old.database.transaction() as connection:
            connection.execute("PRAGMA cache_size = -200000")
            connection.execute("INSERT INTO origin VALUES (1, 'p:m', 'f', '', '', ?)", (rows,))
            _in_parts(
                connection,
                "INSERT INTO vector (key, origin, stored, keep_until, width, checksum, data) "
                "VALUES (?, 1, ?, 0, ?, ?, x'00000000')",
                ((key, _DAY, WIDTH, sums) for key, sums in _keys_and_sums(rows)),
            )


def _keys_and_sums(rows: int) -> Iterator[tuple[bytes, int]]:
    for start in range(0, rows, _AT_ONCE):
        count = min(_AT_ONCE, rows - start)
        sums = np.random.default_rng(start).integers(-(2**62), 2**62, count).tolist()
        yield from zip(random_keys(count), sums, strict=True)


def _in_parts(connection: Any, statement: str, rows: Iterator[Any]) -> None:
    """Sorted by key as far as memory goes: it is many times faster."""
    while part := sorted(islice(rows, 10 * _AT_ONCE)):
        connection.executemany(statement, part)


def measured(kind: Callable[[Path], Any], folder: Path, rows: int) -> Cost:
    """What 10,000 more cost, beside so many rows."""
    cache = kind(folder)
    cache.fill(rows)
    vectors = np.random.default_rng(1).standard_normal((TEXTS, WIDTH), dtype=np.float32)
    into = np.empty_like(vectors)
    into.fill(0)
    # Before the measurement: the first pages of the log, and of the memory.
    cache.put(random_keys(REQUEST), vectors[:REQUEST])
    keys = random_keys(TEXTS)
    written, began = written_bytes(), time.process_time()
    for start in range(0, TEXTS, REQUEST):
        cache.put(keys[start : start + REQUEST], vectors[start : start + REQUEST])
    put, written = time.process_time() - began, written_bytes() - written
    best = min(_timed(cache, keys, into) for _ in range(3))
    if not (into.view("<u4") == vectors.view("<u4")).all():
        raise SystemExit(f"{kind.__name__}: other bits than were kept")
    return Cost(put, written / 1e6, best)


def _timed(cache: Any, keys: Sequence[bytes], into: Any) -> float:
    began = time.process_time()
    cache.get(keys, into)
    return time.process_time() - began


def medians(kind: Callable[[Path], Any], rows: int, rounds: int, disk: Path | None) -> Cost:
    """Each measurement in a folder of its own."""
    costs = []
    for _ in range(rounds):
        folder = Path(tempfile.mkdtemp(dir=disk))
        try:
            costs.append(measured(kind, folder, rows))
        finally:
            shutil.rmtree(folder)
    return Cost(*(float(np.median(column)) for column in zip(*costs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk that is meant")
    chosen = parser.parse_args()
    print(f"{'rows':>12}  {'cache':<10}{'put s':>8}{'MB written':>12}{'get s':>8}")
    for rows in (0, chosen.rows):
        old, new = (
            medians(kind, rows, chosen.rounds, chosen.folder) for kind in (OneFile, Segments)
        )
        for name, cost in (("one file", old), ("segments", new)):
            numbers = f"{cost.put:>8.3f}{cost.written:>12.0f}{cost.get:>8.3f}"
            print(f"{rows:>12,}  {name:<10}{numbers}")
        ratios = [after / before if before else 1.0 for after, before in zip(new, old, strict=True)]
        print(f"{'':>12}  {'ratio':<10}{ratios[0]:>8.2f}{ratios[1]:>12.2f}{ratios[2]:>8.2f}")


if __name__ == "__main__":
    main()
