"""The file of one batch: its rows and texts, for any process to go on with.

A text stays only until it has its outcome; rows and keys stay until the batch is forgotten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from embedcore.storage.database import BATCH as CONTENTS, Database
from embedcore.storage.schema import MANIFEST

if TYPE_CHECKING:
    import sqlite3

_KEYS_PER_QUERY: Final = 500


class ManifestRow(NamedTuple):
    """One row of the caller. ``text``: number of its text, or None if it was ``problem``.

    ``key``: the caller's name for it as JSON, or None where it has none. ``tokens_cut``: before its
    text was sent.
    """

    number: int
    text: int | None
    key: str | None
    tokens_cut: int
    problem: str | None


class Shortened(NamedTuple):
    """A text that the server took only when it was shorter: the cache's key of what it took, and
    what was cut off: tokens, or characters where they are not counted."""

    key: bytes
    tokens: int | None
    characters: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """What is sent of a text that was refused whole: how much less, with the cache's key, the
    tokens and the bytes of the rest. ``tokens_cut``: None where they are not counted."""

    characters_cut: int
    key: bytes
    tokens: int = 0
    in_bytes: int = 0
    tokens_cut: int | None = None

    def part_of(self, text: str) -> str:
        """What is sent of the whole text."""
        return text[: len(text) - self.characters_cut]


def sent_in(row: sqlite3.Row) -> Sent:
    return Sent(
        characters_cut=row["characters_cut"], key=row["sent_key"], tokens_cut=row["tokens_cut"]
    )


class Found(NamedTuple):
    """A row as it is read: the key of its text; whether that was cached, or is that of an earlier
    row; and what is known of a text that may be too long."""

    row: ManifestRow
    key: bytes | None
    reused: bool
    perhaps_long: bool = False
    shortened: Shortened | None = None


class Manifest:
    """The file of one batch. Every method raises ``StorageError`` when it cannot be used."""

    def __init__(self, path: Path, *, allow_network_filesystem: bool = False) -> None:
        self.path = path
        self.database = Database(
            path,
            MANIFEST,
            allow_network_filesystem=allow_network_filesystem,
            contents=CONTENTS,
        )

    def add(
        self, rows: Sequence[ManifestRow], keys: Sequence[bytes], texts: Sequence[str]
    ) -> list[int]:
        """Append rows whose ``text`` is a place in ``texts``. Returns the places of new texts.

        ``keys``: that of each text.
        """
        with self.database.transaction() as connection:
            known = _numbers(connection, keys)
            fresh = [place for place, key in enumerate(keys) if key not in known]
            first: dict[int | None, int] = {}
            for row in rows:
                first.setdefault(row.text, row.number)
            connection.executemany(
                "INSERT INTO text (key, text, first) VALUES (?, ?, ?)",
                [(keys[place], texts[place], first[place]) for place in fresh],
            )
            known.update(_numbers(connection, [keys[place] for place in fresh]))
            numbers = [known[key] for key in keys]
            connection.executemany(
                'INSERT INTO "row" (number, text, key, tokens_cut, problem) VALUES (?, ?, ?, ?, ?)',
                [
                    (
                        row.number,
                        None if row.text is None else numbers[row.text],
                        row.key,
                        row.tokens_cut,
                        row.problem,
                    )
                    for row in rows
                ],
            )
        return fresh

    def mark_reused(self, keys: Iterable[bytes]) -> None:
        """The vectors of these texts were there before."""
        with self.database.transaction() as connection:
            connection.executemany(
                "UPDATE text SET reused = 1 WHERE key = ?", ((key,) for key in keys)
            )

    def mark_long(self, keys: Iterable[bytes]) -> None:
        """These texts may be longer than the model takes: their tokens are not counted."""
        with self.database.transaction() as connection:
            connection.executemany(
                "UPDATE text SET perhaps_long = 1 WHERE key = ?", ((key,) for key in keys)
            )

    def shorten(self, key: bytes, shortened: Shortened) -> None:
        """The server refused the whole text, and took a shorter one."""
        with self.database.transaction() as connection:
            connection.execute(
                "UPDATE text SET sent_key = ?, tokens_cut = ?, characters_cut = ? WHERE key = ?",
                (*shortened, key),
            )

    def digest(self) -> bytes:
        """What the rows are, in their order: equal for two batches of the same texts and keys."""
        digest = hashlib.sha256()
        with self.database.read() as connection:
            for row in connection.execute(
                'SELECT r.key, t.key, r.problem FROM "row" r LEFT JOIN text t ON t.id = r.text '
                "ORDER BY r.number"
            ):
                digest.update(repr(tuple(row)).encode())
        return digest.digest()

    def texts(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """The texts of these keys that are still here."""
        found: dict[bytes, str] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            marks = ",".join("?" * len(some))
            with self.database.read() as connection:
                rows = connection.execute(
                    f"SELECT key, text FROM text WHERE text IS NOT NULL AND key IN ({marks})",
                    tuple(some),
                ).fetchall()
            found.update(rows)
        return found

    def rows(self, start: int, count: int) -> list[Found]:
        """``count`` rows from number ``start``."""
        with self.database.read() as connection:
            found = connection.execute(
                "SELECT r.number, r.text, r.key, r.tokens_cut, r.problem, t.key, "
                "t.reused OR t.first < r.number, t.perhaps_long, "
                "t.sent_key, t.tokens_cut, t.characters_cut "
                'FROM "row" r LEFT JOIN text t ON t.id = r.text '
                "WHERE r.number >= ? AND r.number < ? ORDER BY r.number",
                (start, start + count),
            ).fetchall()
        return [
            Found(
                row=ManifestRow(*one[:5]),
                key=one[5],
                reused=bool(one[6]),
                perhaps_long=bool(one[7]),
                shortened=None if one[8] is None else Shortened(*one[8:]),
            )
            for one in found
        ]

    def keys(self, per_block: int = 5_000) -> Iterator[list[bytes]]:
        """The keys of all texts, block by block: of each that of what was sent of it."""
        last = 0
        while True:
            with self.database.read() as connection:
                found = connection.execute(
                    "SELECT id, coalesce(sent_key, key) FROM text WHERE id > ? ORDER BY id LIMIT ?",
                    (last, per_block),
                ).fetchall()
            if not found:
                return
            last = found[-1][0]
            yield [key for _, key in found]

    def among(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these are keys of texts here."""
        with self.database.read() as connection:
            return set(_numbers(connection, keys))

    def sent_keys(self) -> set[bytes]:
        """The keys of what was sent of texts that were too long."""
        with self.database.read() as connection:
            found = connection.execute(
                "SELECT sent_key FROM text WHERE sent_key IS NOT NULL"
            ).fetchall()
        return {key for (key,) in found}

    def forget_texts(self, per_block: int = 20_000) -> None:
        """The batch has ended: they are not sent any more."""
        while True:
            with self.database.transaction() as connection:
                gone = connection.execute(
                    "UPDATE text SET text = NULL WHERE id IN "
                    "(SELECT id FROM text WHERE text IS NOT NULL LIMIT ?)",
                    (per_block,),
                ).rowcount
            if gone < per_block:
                break
        with self.database.read() as connection:
            connection.execute("ROLLBACK")
            # Otherwise they could still be read in the free space of the file.
            connection.execute("VACUUM")

    def close(self) -> None:
        self.database.close()

    def delete(self) -> None:
        """Delete the file. Gone already is fine."""
        self.close()
        for end in ("", "-wal", "-shm", "-journal"):
            self.path.with_name(self.path.name + end).unlink(missing_ok=True)


def _numbers(connection: sqlite3.Connection, keys: Iterable[bytes]) -> dict[bytes, int]:
    wanted = list(keys)
    found: dict[bytes, int] = {}
    for start in range(0, len(wanted), _KEYS_PER_QUERY):
        some = wanted[start : start + _KEYS_PER_QUERY]
        marks = ",".join("?" * len(some))
        rows = connection.execute(f"SELECT key, id FROM text WHERE key IN ({marks})", tuple(some))
        found.update(rows.fetchall())
    return found
