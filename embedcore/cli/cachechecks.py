"""Are bought vectors kept, where, and is there room for more?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Final

from embedcore.assembly import create_embedder, keeps_vectors, vector_store
from embedcore.choice import Choice, choose
from embedcore.cli.checks import Finding, Level
from embedcore.cli.text import size
from embedcore.config import Config
from embedcore.errors import EmbeddingError
from embedcore.policy.shelf import room_for
from embedcore.storage.filesystem import network_filesystem
from embedcore.storage.housekeeping import contents

if TYPE_CHECKING:
    from embedcore.provider.types import ModelInfo
    from embedcore.storage.vectors import VectorStore

_MILLION: Final = 1_000_000
_NEARLY_FULL: Final = 0.9


def cache(config: Config) -> Iterator[Finding]:
    """The store of bought vectors, for the model that the settings name."""
    choice = chosen(None, config)
    store = vector_store(choice)
    info, on = whether_on(choice)
    yield _finding("vectors", on)
    yield _finding("place", str(store.path))
    width = info.dimensions if info is not None else None
    each = f"; a million vectors take about {size(room_for(_MILLION, width))}" if width else ""
    yield _finding("cap", f"{size(store.cap)}{each}")
    yield from _place(store, config)
    if store.path.exists():
        yield from _inside(store)


def chosen(model: str | None, config: Config | None = None) -> Choice:
    """What a client of this model would be made from."""
    return choose(model, config=config, scope=None, options={})


def whether_on(choice: Choice) -> tuple[ModelInfo | None, str]:
    """What is known of the model that is chosen, and whether its vectors are kept, with the why."""
    name = f"{choice.provider}:{choice.model}"
    try:
        embedder, *_ = create_embedder(choice)
    except EmbeddingError as error:
        return None, f"not known for {name}: {error}"
    with closing(embedder):
        info = embedder.info
    on = "kept" if keeps_vectors(choice, info) else "not kept"
    return info, f"{on} for {name}: {_why(choice, info)}"


def _why(choice: Choice, info: ModelInfo) -> str:
    wanted = choice.setting("cache")
    if wanted is not None:
        return f"cache = {str(wanted).lower()}"
    if info.local:
        return "it is computed here (cache = true keeps them)"
    if info.price is None:
        return "its price is not known (cache = true keeps them)"
    return "it is free (cache = true keeps them)" if info.price.free else "they cost money"


def _place(store: VectorStore, config: Config) -> Iterator[Finding]:
    folder = next(one for one in store.path.absolute().parents if one.exists())
    kind = None if config.allow_network_filesystem else network_filesystem(folder)
    if kind is not None:
        yield _finding(
            "place",
            f"it is on a network file system ({kind}), where it is not used: set cache_dir to a "
            "local folder, or allow_network_filesystem = true if only one machine uses it",
            "problem",
        )
    elif not os.access(folder, os.W_OK):
        yield _finding("place", f"{folder} cannot be written: nothing is kept", "problem")


def _inside(store: VectorStore) -> Iterator[Finding]:
    if os.name == "posix" and store.path.stat().st_mode & 0o077:
        path = store.path
        yield _finding("file", f"{path} can be read by others: chmod 600 {path}", "problem")
    with closing(store):
        found = contents(store)
    full = found.used > found.cap * _NEARLY_FULL
    room = " and takes no more soon: raise cache_cap, or embedcore cache prune" if full else ""
    level: Level = "note" if full else "ok"
    vectors = sum(found.vectors.values())
    yield _finding("file", f"{vectors:,} vectors, {size(found.used)}{room}", level)


def _finding(name: str, value: str, level: Level = "ok") -> Finding:
    return Finding(section="cache", name=name, value=value, level=level)
