"""The cache in one SQLite file, as it was before segments: nothing is added to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from embedcore.storage.database import VECTORS as CONTENTS, Database
from embedcore.storage.schema import VECTORS
from embedcore.storage.vector_format import decode, is_intact
from embedcore.storage.vector_table import (
    KEYS_PER_QUERY,
    NOTHING,
    ROWS_AT_ONCE,
    Damaged,
    Found,
    VectorTable,
    marks,
    pages_used,
)

if TYPE_CHECKING:
    from embedcore.storage.keys import Origin
    from embedcore.storage.vector_table import Room

_ROW: Final = "id, data, checksum, width, key"


class Known(NamedTuple):
    """What the old file has of some keys: vectors, and vectors of zeros only.

    ``used``: its bytes; ``answered_as``: the model's name in the last reply of that origin.
    """

    vectors: set[bytes]
    zeros: set[bytes]
    used: int
    answered_as: str


class OldVectors(VectorTable):
    """The file ``vectors.db``, if there is one: it is never made here."""

    SIZE = "length(data)"

    def __init__(
        self, path: Path, *, busy_timeout: float, allow_network_filesystem: bool = False
    ) -> None:
        self.path = path
        super().__init__(
            Database(
                path,
                VECTORS,
                timeout=busy_timeout,
                allow_network_filesystem=allow_network_filesystem,
                contents=CONTENTS,
                creates=False,
            )
        )

    def get(self, keys: Sequence[bytes], width: int | None, room: Room | None) -> Found:
        with self.database.read() as connection:
            # Materialised at once: a cursor left open would hold back the checkpoint.
            rows = connection.execute(
                f"SELECT {_ROW} FROM vector WHERE key IN ({marks(keys)})", keys
            ).fetchall()
        if not rows:
            return Found([], NOTHING, [])
        bad: list[int] = []
        # One by one only where it must be: without a known width, a damaged row might decide it.
        if width is None or not _of_expected_types(rows):
            bad = [place for place, *row in rows if not is_intact(*row)]
        by_key = {row[-1]: row for row in rows if row[0] not in bad}
        places = [place for place, key in enumerate(keys) if key in by_key]
        if not places:
            return Found([], NOTHING, _as_damaged(bad))
        ids, blobs, sums, widths, found = zip(*(by_key[keys[one]] for one in places), strict=True)
        into = None
        if room is not None and width is not None:
            into = room(places)
        vectors, sound = decode(blobs, sums, widths, found, width=width or max(widths), into=into)
        if sound.all():
            return Found(places, vectors, _as_damaged(bad))
        bad += [ids[place] for place in np.flatnonzero(~sound).tolist()]
        kept = np.flatnonzero(sound)
        return Found([places[place] for place in kept.tolist()], vectors[kept], _as_damaged(bad))

    def known(self, keys: Sequence[bytes], origin: Origin) -> Known:
        """What it has of these keys."""
        vectors: set[bytes] = set()
        zeros: set[bytes] = set()
        with self.database.read() as connection:
            for start in range(0, len(keys), KEYS_PER_QUERY):
                chunk = keys[start : start + KEYS_PER_QUERY]
                for key, is_zero in connection.execute(
                    "SELECT key, data = zeroblob(length(data)) FROM vector "
                    f"WHERE key IN ({marks(chunk)})",
                    chunk,
                ):
                    (zeros if is_zero else vectors).add(key)
            named = self.answered_as(connection, origin)
            used = pages_used(connection)
        return Known(vectors, zeros, used, named[1] if named else "")

    def delete(self, damaged: Sequence[Damaged]) -> None:
        with self.database.transaction() as connection:
            self.delete_rows(connection, [row.id for row in damaged])

    def checked(self) -> Iterator[tuple[int, list[Damaged]]]:
        last = 0
        while rows := self.after(last, ROWS_AT_ONCE):
            bad = [place for place, *row in rows if not is_intact(*row)]
            last = rows[-1][0]
            yield len(rows), _as_damaged(bad)

    def after(self, last: int, count: int) -> list[Any]:
        """The next rows by their numbers: id, data, checksum, width and key."""
        with self.database.read() as connection:
            return connection.execute(
                f"SELECT {_ROW} FROM vector WHERE id > ? ORDER BY id LIMIT ?", (last, count)
            ).fetchall()


def _of_expected_types(rows: Sequence[tuple[object, ...]]) -> bool:
    """A damaged file can hold what its columns forbid."""
    _, blobs, sums, widths, keys = zip(*rows, strict=True)
    numbers, texts = {*map(type, sums), *map(type, widths)}, {*map(type, blobs), *map(type, keys)}
    return numbers == {int} and texts == {bytes}


def _as_damaged(ids: Sequence[int]) -> list[Damaged]:
    return [Damaged(True, one) for one in ids]
