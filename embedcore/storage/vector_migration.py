"""Moving the vectors of the old file into segments, some at a time.

Each step puts rows into the segments and then deletes them from the old file. After a kill in
between they are in both, and the next run finds them there and deletes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from embedcore.storage.database import driver
from embedcore.storage.filesystem import from_os_error
from embedcore.storage.keys import Origin
from embedcore.storage.vector_format import all_zero, is_intact
from embedcore.storage.vector_table import of_types

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.vectors import VectorStore

_ROWS_AT_ONCE: Final = 500
_COLUMNS: Final = (
    "vector.id AS id, data, checksum, width, key, stored, keep_until, model, fingerprint, "
    "input_type, answered_as"
)


class Moved(NamedTuple):
    """Vectors so far: moved, in the segments already, damaged; and whether the file is gone."""

    moved: int = 0
    there: int = 0
    damaged: int = 0
    removed: bool = False


def migrate(store: VectorStore) -> Iterator[Moved]:
    """Move all of them. Yields after each step; the old file is removed at the end.

    It stays, empty, where another program has it open: the next run removes it. No cap keeps them
    out, since they are in the cache already.
    """
    so_far = Moved()
    while store.has_old:
        rows = _next(store)
        if not rows:
            _move_tally(store)
            yield so_far._replace(removed=_remove(store))
            return
        sound = [row for row in rows if _is_sound(row)]
        with store.index.database.transaction() as connection:
            new = sum(
                _add(store, connection, list(group)) for _, group in groupby(sound, key=_alike)
            )
        with store.old.database.transaction() as connection:
            store.old.delete_rows(connection, [row["id"] for row in rows])
        so_far = Moved(
            moved=so_far.moved + new,
            there=so_far.there + len(sound) - new,
            damaged=so_far.damaged + len(rows) - len(sound),
        )
        yield so_far


def _next(store: VectorStore) -> list[Any]:
    with store.old.database.read() as connection:
        return connection.execute(
            f"SELECT {_COLUMNS} FROM vector LEFT JOIN origin ON origin.id = origin "
            "ORDER BY vector.id LIMIT ?",
            (_ROWS_AT_ONCE,),
        ).fetchall()


def _is_sound(row: Any) -> bool:
    *vector, stored, keep_until, model, fingerprint, input_type, answered_as = tuple(row)[1:]
    return is_intact(*vector) and of_types(
        (stored, keep_until, model, fingerprint, input_type, answered_as),
        (int, int, str, str, str, str),
    )


def _alike(row: Any) -> tuple[Any, ...]:
    """What rows share that are kept together."""
    return (*tuple(row)[5:], row["width"], len(row["data"]))


def _add(store: VectorStore, connection: sqlite3.Connection, rows: Sequence[Any]) -> int:
    first = rows[0]
    origin, _ = store.index.origin(
        connection,
        Origin(
            model=first["model"],
            fingerprint=first["fingerprint"],
            input_type=first["input_type"] or None,
            answered_as=first["answered_as"] or None,
        ),
    )
    kind = np.dtype(f"<f{len(first['data']) // first['width']}")
    raw = b"".join(row["data"] for row in rows)
    stored = np.frombuffer(raw, dtype=kind).reshape(len(rows), first["width"])
    return store.index.add(
        connection,
        [row["key"] for row in rows],
        stored,
        all_zero(stored),
        origin=origin,
        day=first["stored"],
        keep_until=first["keep_until"],
    )


def _move_tally(store: VectorStore) -> None:
    # A kill between the two loses how often the cache helped, and counts nothing twice.
    with store.old.database.transaction() as connection:
        counts = connection.execute("SELECT day, hits, misses FROM tally").fetchall()
        connection.execute("DELETE FROM tally")
    with store.index.database.transaction() as connection:
        store.index.add_to_tally(connection, [tuple(row) for row in counts])


def _remove(store: VectorStore) -> bool:
    """Delete the old file if nothing is in it, and no other program has it open."""
    path = store.old.path.absolute()
    store.old.database.close()
    try:
        # What is not there is not made by that.
        connection = driver().connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0)
        connection.isolation_level = None
        try:
            is_empty = _is_empty(connection)
            if is_empty and os.name == "posix":
                path.unlink()
        finally:
            connection.close()
        if is_empty:
            # Windows deletes no file that is open.
            path.unlink(missing_ok=True)
    except driver().OperationalError:
        # Another program has it locked.
        return not store.has_old
    except OSError as error:
        raise from_os_error(error, path) from error
    return not store.has_old


def _is_empty(connection: sqlite3.Connection) -> bool:
    """Whether it is, which no other program can change before the connection is closed."""
    # Only where no other program has it open; and then it leaves no log.
    if connection.execute("PRAGMA journal_mode = DELETE").fetchone()[0] != "delete":
        return False
    connection.execute("BEGIN EXCLUSIVE")
    return connection.execute("SELECT 1 FROM vector LIMIT 1").fetchone() is None
