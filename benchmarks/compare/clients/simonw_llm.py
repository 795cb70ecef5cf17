"""simonw's ``llm``: ``Collection.embed_multi`` as ``llm embed-multi`` calls it, SQLite included.

The collection is how it keeps vectors, and how a second run finds that it has them.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Final

import numpy as np

from compare.clients.contract import KEY, Client, Embed, Row, Setting, Vector

_MODEL: Final = "3-small"


def _open(setting: Setting) -> Embed:
    return _embed_multi(setting, again=False)


def _reuse(setting: Setting) -> Embed:
    return _embed_multi(setting, again=True)


def _embed_multi(setting: Setting, *, again: bool) -> Embed:
    """``again``: the same ids as in the run before. Otherwise no call finds anything."""
    import llm
    import sqlite_utils

    database = sqlite_utils.Database(setting.folder / "embeddings.db")
    collection = llm.Collection("corpus", database, model_id=_MODEL)
    calls = count()

    def embed(texts: list[str]) -> list[Vector | None]:
        call = 0 if again else next(calls)
        ids = [f"{call}-{place}" for place in range(len(texts))]
        collection.embed_multi(zip(ids, texts, strict=True))
        rows: dict[str, Any] = {
            row["id"]: row["embedding"]
            for row in database.query(
                "select id, embedding from embeddings where collection_id = ?", [collection.id]
            )
        }
        # As its documentation reads them with numpy.
        return [np.frombuffer(rows[name], dtype="<f4") if name in rows else None for name in ids]

    return embed


CLIENT = Client(
    name="simonw_llm",
    packages=("llm", "numpy"),
    shown=("llm", "openai"),
    statement="import llm",
    ready=f"import llm; llm.get_embedding_model('{_MODEL}').key = '{KEY}'",
    rows=(
        Row(
            name="llm",
            title="llm embed_multi, with its SQLite table",
            label="llm",
            open=_open,
            reuse=_reuse,
            reuse_how="the same ids in its own table",
        ),
    ),
)
