"""What does the harness ask of a client? A way to open it, for each row that it has in the table.

The files beside this one are imported by the harness without the client being installed: what they
need of it they import inside their functions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Purpose: TypeAlias = Literal[
    "cpu",
    "short",
    "throughput",
    "goodput",
    "strict",
    "memory",
    "stream",
    "short-stream",
    "reuse",
    "full-cache",
    "query",
    "gather",
    "arrivals",
]
Array: TypeAlias = NDArray[np.float32]
Vector: TypeAlias = Sequence[float] | Array
# As the client gives them. None: the client said that this text failed.
Found: TypeAlias = Array | Sequence[Vector | None]
Embed: TypeAlias = Callable[[list[str]], Found]
Block: TypeAlias = tuple[Sequence[str], Array]
Ask: TypeAlias = Callable[[str], Vector]
AskAsync: TypeAlias = Callable[[str], Awaitable[Vector]]

MODEL: Final = "text-embedding-3-small"
KEY: Final = "sk-not-a-key"
WIDTH: Final = 1536
BATCH: Final = 100
THREADS: Final = 16


class NotThere(Exception):
    """This version of the client cannot do that; the message is shown in the table."""


class Partly(Exception):
    """Some texts failed and their rows are None; the message is the first failure."""

    def __init__(self, found: Found, message: str) -> None:
        super().__init__(message)
        self.found = found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """``folder`` is empty and private to one measurement; the second run of ``reuse`` finds what
    the first one left. ``request_texts``: how many texts the limit puts into a request; everybody
    else decides that alone."""

    base_url: str
    folder: Path
    purpose: Purpose
    request_texts: int = 0


class Cache(Protocol):
    """A client's cache of vectors, without the client."""

    def put(self, keys: Sequence[bytes], vectors: Array) -> None: ...

    def get(self, keys: Sequence[bytes]) -> Array:
        """Row i for key i; NaN where there is none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. ``open`` builds the client, and may import it. ``label`` is the short
    form of ``title`` for the picture; a row without one is not in it.

    - ``reuse``: opens it with its own cache in ``folder``; ``reuse_how`` says which one that is.
    - ``stream``: yields texts with their vectors, block by block.
    - ``query`` and ``aquery``: embed one question at a time, and for ``await``.
    - ``cache``: opens the cache in ``folder`` by itself.
    - ``missing``: why a cell is empty, by purpose. ``only``: measures nothing else.
    - ``slow``: more than a millisecond of CPU per text; it gets fewer of them.
    - ``tls``: through TLS, compared with the limit's row that is. ``processes`` share a folder.
    - ``strict``: takes part where refused requests count.
    """

    name: str
    title: str
    label: str = ""
    open: Callable[[Setting], Embed]
    reuse: Callable[[Setting], Embed] | None = None
    reuse_how: str = ""
    stream: Callable[[Setting, Iterable[str]], Iterator[Block]] | None = None
    query: Callable[[Setting], Ask] | None = None
    aquery: Callable[[Setting], AskAsync] | None = None
    cache: Callable[[Setting], Cache] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    only: Sequence[str] = ()
    slow: bool = False
    tls: bool = False
    processes: int = 1
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Client:
    """``packages`` are what pip is given, a path standing for this repository; ``shown`` are the
    distributions whose versions are worth a line. ``ready``: code up to a client that could be
    used. ``first``: code up to the vector of ``text``; OPENAI_BASE_URL says where from."""

    name: str
    packages: Sequence[str]
    shown: Sequence[str]
    statement: str
    ready: str
    first: str = ""
    rows: Sequence[Row]


def in_batches(embed: Callable[[list[str]], Sequence[Vector]], size: int = BATCH) -> Embed:
    """The plain loop that users write around a call that takes a list."""

    def loop(texts: list[str]) -> list[Vector | None]:
        found: list[Vector | None] = []
        for start in range(0, len(texts), size):
            found.extend(embed(texts[start : start + size]))
        return found

    return loop


def in_threads(
    embed: Callable[[list[str]], Sequence[Vector]], size: int = BATCH, threads: int = THREADS
) -> Embed:
    """The pool that users write next. One that fails does not take the others with it: kinder than
    the usual ``executor.map``, which loses all that was paid for at the first exception."""

    def pool(texts: list[str]) -> list[Vector | None]:
        batches = [texts[start : start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(threads) as executor:
            futures = [executor.submit(embed, batch) for batch in batches]
        parts: list[Sequence[Vector | None]] = []
        failure: BaseException | None = None
        for future, batch in zip(futures, batches, strict=True):
            failure = failure or future.exception()
            parts.append([None] * len(batch) if future.exception() else future.result())
        found = list(chain.from_iterable(parts))
        if failure is not None:
            raise Partly(found, f"{type(failure).__name__}: {failure}")
        return found

    return pool
