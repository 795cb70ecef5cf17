"""Keeping and finding vectors that are a function of their text, for the tests of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedcore.storage.database import VECTORS as CONTENTS, Database, driver
from embedcore.storage.keys import Keys, Origin
from embedcore.storage.schema import VECTORS
from embedcore.storage.vector_format import Encoder, checksums
from embedcore.storage.vectors import VectorStore
from embedcore.testing import vectors_of

WIDTH = 8
ORIGIN = Origin(model="p:m", fingerprint="f")
TEXTS = [f"text {number}" for number in range(20)]


def keys_of(texts: Sequence[str]) -> list[bytes]:
    return Keys(provider="p", model="m", fingerprint="f", input_type=None).of(texts)


def buy(store: VectorStore, texts: Sequence[str], *, width: int = WIDTH, **rest: Any) -> None:
    salt = rest.pop("salt", "")
    origin = rest.pop("origin", ORIGIN)
    store.put(keys_of(texts), vectors_of(texts, width, salt=salt), origin, **rest)


def found(
    store: VectorStore, texts: Sequence[str], *, width: int | None = WIDTH, salt: str = ""
) -> set[str]:
    """The texts whose vectors are there; each must be its own, bit for bit."""
    there: list[int] = []

    def take(places: Sequence[int], vectors: Any) -> None:
        chosen = [texts[place] for place in places]
        assert vectors.dtype == np.float32
        assert vectors.tobytes() == vectors_of(chosen, vectors.shape[1], salt=salt).tobytes()
        there.extend(places)

    store.get(keys_of(texts), width, take)
    assert there == sorted(set(there))
    return {texts[place] for place in there}


def change(path: Path, statement: str, *values: object, schema: bool = False) -> None:
    """Go behind the store's back."""
    connection = driver().connect(path, isolation_level=None)
    try:
        if schema:
            connection.execute("PRAGMA writable_schema=ON")
        connection.execute("PRAGMA ignore_check_constraints=ON")
        connection.execute(statement, values)
    finally:
        connection.close()


def count(path: Path) -> int:
    connection = driver().connect(path)
    try:
        return int(connection.execute("SELECT count(*) FROM vector").fetchone()[0])
    finally:
        connection.close()


def keep_as_before(path: Path, texts: Sequence[str], **more: Any) -> None:
    """Rows in the old file, as earlier versions wrote them.

    ``more``: ``day``, ``until``, ``width``, ``salt``, ``origin``, ``vectors`` and ``keys``.
    """
    database = Database(
        path.with_name(f"{path.name}.db"),
        VECTORS,
        at_creation=("page_size=32768", "auto_vacuum=INCREMENTAL"),
        contents=CONTENTS,
    )
    origin = more.get("origin", ORIGIN)
    vectors = more.get("vectors")
    if vectors is None:
        vectors = vectors_of(texts, more.get("width", WIDTH), salt=more.get("salt", ""))
    stored = Encoder().encode(vectors)
    keys = more.get("keys") or keys_of(texts)
    with database.transaction() as connection:
        name = (origin.model, origin.fingerprint, origin.input_type or "")
        connection.execute(
            "INSERT INTO origin (model, fingerprint, input_type, answered_as) VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING",
            (*name, origin.answered_as or ""),
        )
        (number,) = connection.execute(
            "SELECT id FROM origin WHERE (model, fingerprint, input_type) = (?, ?, ?)", name
        ).fetchone()
        added = 0
        for key, one, row in zip(keys, checksums(stored, keys).tolist(), stored, strict=True):
            added += connection.execute(
                "INSERT INTO vector (key, origin, stored, keep_until, width, checksum, data) "
                "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (
                    key,
                    number,
                    more.get("day", 20_000),
                    more.get("until", 0),
                    vectors.shape[1],
                    one,
                    row,
                ),
            ).rowcount
        connection.execute("UPDATE origin SET vectors = vectors + ? WHERE id = ?", (added, number))
    database.close()
