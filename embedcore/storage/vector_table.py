"""What both formats of the cache share: a table of vectors by key, with origins and days."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from numpy.typing import NDArray

    from embedcore.storage.database import Database
    from embedcore.storage.keys import Origin

    Vectors = NDArray[np.float32]
    Room = Callable[[Sequence[int]], Vectors | None]

KEYS_PER_QUERY: Final = 500
# No other process can write while these are changed.
ROWS_AT_ONCE: Final = 200


class Damaged(NamedTuple):
    """A row whose vector is not what was written, and where it was looked for."""

    is_old: bool
    id: int
    segment: int = 0
    offset: int = 0


class Found(NamedTuple):
    """Places in the keys, ascending; their vectors, (m, d); and rows that are damaged."""

    places: list[int]
    vectors: Vectors
    damaged: list[Damaged]


NOTHING: Final = np.empty((0, 0), dtype=np.float32)


class VectorTable(ABC):
    """The SQLite file of one format. ``SIZE``: the bytes of a row's vector, in SQL."""

    SIZE: ClassVar[str]

    def __init__(self, database: Database) -> None:
        self.database = database

    @abstractmethod
    def get(self, keys: Sequence[bytes], width: int | None, room: Room | None) -> Found:
        """The vectors of at most ``KEYS_PER_QUERY`` keys, written to ``room`` if that can be.

        Where the width is not known, that of the first vectors that are sound decides.
        """

    @abstractmethod
    def delete(self, damaged: Sequence[Damaged]) -> None:
        """Delete these, unless something else took their place meanwhile."""

    @abstractmethod
    def checked(self) -> Iterator[tuple[int, list[Damaged]]]:
        """Read all vectors, some at a time: how many were read, and which of them are damaged."""

    def outside(self, connection: sqlite3.Connection) -> int:  # noqa: ARG002 - of other formats
        """Bytes of its vectors that lie in other files."""
        return 0

    @property
    def needed(self) -> int:
        """Bytes that what is in it needs."""
        with self.database.read() as connection:
            return pages_used(connection) + self.outside(connection)

    @property
    def used(self) -> int:
        """Bytes in use on the disk."""
        return self.needed

    def keep(self, keys: Sequence[bytes], day: int) -> None:
        """Pin at most ``KEYS_PER_QUERY`` of them."""
        with self.database.transaction() as connection:
            connection.execute(
                f"UPDATE vector SET keep_until = ? WHERE key IN ({marks(keys)}) AND keep_until < ?",
                (day, *keys, day),
            )

    def drop(self, key: bytes) -> None:
        with self.database.transaction() as connection:
            row = connection.execute("SELECT id FROM vector WHERE key = ?", (key,)).fetchone()
            if row is not None:
                self.delete_rows(connection, row)

    def delete_rows(self, connection: sqlite3.Connection, ids: Sequence[int]) -> tuple[int, int]:
        """Delete rows, inside a transaction, and count them off their origins.

        Returns how many there were, and the bytes of their vectors.
        """
        gone: Counter[int] = Counter()
        freed = 0
        for one in ids:
            row = connection.execute(
                f"DELETE FROM vector WHERE id = ? RETURNING origin, {self.SIZE}", (one,)
            ).fetchone()
            if row is not None:
                gone[row[0]] += 1
                freed += row[1]
        connection.executemany(
            "UPDATE origin SET vectors = max(vectors - ?, 0) WHERE id = ?",
            [(count, origin) for origin, count in gone.items()],
        )
        return gone.total(), freed

    def answered_as(self, connection: sqlite3.Connection, origin: Origin) -> tuple[int, str] | None:
        """The number of an origin, and the model's name in its latest reply."""
        found = connection.execute(
            "SELECT id, answered_as FROM origin "
            "WHERE model = ? AND fingerprint = ? AND input_type = ?",
            (origin.model, origin.fingerprint, origin.input_type or ""),
        ).fetchone()
        return None if found is None else (found[0], found[1])

    def models(self) -> dict[str, int]:
        """Model → how many vectors."""
        with self.database.read() as connection:
            found = connection.execute(
                "SELECT model, sum(vectors) FROM origin GROUP BY model"
            ).fetchall()
        return dict(found)

    def tally(self) -> tuple[int, int]:
        """Texts that were found, and those that were not."""
        with self.database.read() as connection:
            hits, misses = connection.execute(
                "SELECT coalesce(sum(hits), 0), coalesce(sum(misses), 0) FROM tally"
            ).fetchone()
        return hits, misses

    def add_to_tally(
        self, connection: sqlite3.Connection, counts: Sequence[tuple[int, int, int]]
    ) -> None:
        """Add days, hits and misses."""
        connection.executemany(
            "INSERT INTO tally (day, hits, misses) VALUES (?, ?, ?) ON CONFLICT (day) "
            "DO UPDATE SET hits = hits + excluded.hits, misses = misses + excluded.misses",
            counts,
        )


def marks(values: Sequence[object]) -> str:
    """Question marks for an ``IN``."""
    return ",".join("?" * len(values))


def pages_used(connection: sqlite3.Connection) -> int:
    """What is in use of a SQLite file, without the pages that are free for reuse."""
    pages, free, size = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def of_types(row: Sequence[Any], kinds: Sequence[type]) -> bool:
    """A damaged file can hold what its columns forbid."""
    return all(type(value) is kind for value, kind in zip(row, kinds, strict=True))
