"""Values that readers, outputs and runs pass to each other.

A million digests take 32 MB as one numpy array of 32-byte strings. Elements are only compared
inside numpy: taking one out as ``bytes`` would lose its trailing zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from embedcore import Spending

if TYPE_CHECKING:
    Vectors: TypeAlias = NDArray[np.float32]
    Digests: TypeAlias = NDArray[np.bytes_]


JsonValue: TypeAlias = "str | int | float | bool | list[JsonValue] | dict[str, JsonValue] | None"
InputFormat: TypeAlias = Literal["txt", "jsonl", "csv"]
OnError: TypeAlias = Literal["raise", "keep"]
OnBudget: TypeAlias = Literal["raise", "stop", "wait"]
Stage: TypeAlias = Literal["reading", "embedding", "writing"]

# By how much a text was cut. All of them are in the sum of a row.
CUT_COLUMNS = ("tokens_cut", "characters_cut")
RESERVED_COLUMNS = frozenset(
    {
        "id",
        "text_sha256",
        "model",
        "fingerprint",
        "input_type",
        *CUT_COLUMNS,
        "vector",
        "vector_crc32",
        "text",
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One text of the input. ``position``: its place over all inputs, from 0; ``where``: file:line.

    ``id`` may be left empty by a caller who supplies rows: it becomes the position.
    """

    id: str = ""
    text: str = ""
    kept: Mapping[str, JsonValue] = field(default_factory=dict)
    position: int = 0
    where: str = ""


Source: TypeAlias = str | PathLike[str] | Iterable[Row | str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Where a row's parts are. ``id`` None: column "id" if there is one, else the position."""

    text: str = "text"
    id: str | None = None
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What made a set of vectors. Sets of different origin never mix.

    ``model`` is "provider:model"; ``dimensions`` None: not known yet.
    """

    model: str = ""
    fingerprint: str = ""
    input_type: str | None = None
    dimensions: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredRow:
    """A row as an output holds it. ``text`` is None where the texts were left out."""

    id: str = ""
    text: str | None = None
    kept: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some consecutive rows of an output.

    ``digests`` (n,) of 32 bytes; ``cuts`` (n,) what was cut off, as ``files.cuts`` writes it;
    ``vectors`` (n, d) float32; ``sound`` (n,): the row is as it was written, or of a time that
    wrote no sums. ``row(i)`` reads the rest, None where that is damaged. ``foreign``: which row is
    of another maker or width than the first, and none if it is empty; such rows are not sound
    either.
    """

    digests: Digests
    cuts: NDArray[np.uint32]
    vectors: Vectors
    sound: NDArray[np.bool_]
    row: Callable[[int], StoredRow | None]
    foreign: str = ""

    @property
    def reusable(self) -> NDArray[np.bool_]:
        """Rows whose vectors may stand for their texts in another run: as in the cache, a vector of
        zeros, which says nothing of its text, is none of them."""
        return self.sound & self.vectors.any(axis=1)

    @property
    def damaged(self) -> int:
        """How many rows are not as they were written."""
        return len(self.sound) - int(self.sound.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePlan:
    """What a run would do.

    ``rows`` = ``empty`` + ``duplicates`` + ``rejected`` + ``texts``, and ``texts`` = ``reused`` +
    ``cached`` + ``in_flight`` + ``to_embed``.

    ``duplicates``: rows whose text an earlier row has; ``rejected``: texts that cannot be sent. Of
    the other distinct texts, ``reused`` are in the output or its journal, ``cached`` in the cache,
    ``in_flight`` in another batch (batches only), and ``to_embed`` must be paid for. ``tokens`` is
    an upper bound unless ``exact``; ``cost``: US dollars, None if the price is not known;
    ``truncated``: texts that will be cut; ``perhaps_long``: texts that may be too long, which
    cannot be counted: they are cut only if the server refuses them. ``damaged``: rows of the output
    that cannot be believed any more; what is needed of them is in ``to_embed``.
    """

    rows: int = 0
    empty: int = 0
    duplicates: int = 0
    rejected: int = 0
    reused: int = 0
    cached: int = 0
    in_flight: int = 0
    to_embed: int = 0
    tokens: int = 0
    exact: bool = True
    cost: Decimal | None = Decimal(0)
    requests: int = 0
    truncated: int = 0
    damaged: int = 0
    perhaps_long: int = 0

    @property
    def texts(self) -> int:
        """Distinct texts that can be embedded."""
        return self.reused + self.cached + self.in_flight + self.to_embed


@dataclass(frozen=True, kw_only=True, slots=True)
class FileProgress:
    """``done`` of ``total`` rows (reading, writing; total 0: not known) or texts (embedding).

    ``tokens``: at most so many, unless ``exact``.
    """

    stage: Stage
    done: int = 0
    total: int = 0
    tokens: int = 0
    cost: Decimal = Decimal(0)
    exact: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppedRow:
    """The first row that was not embedded, since the budget ended before it.

    ``where``: file:line. ``reason`` names the limit; ``resets_at``: when it does, None for never.
    """

    id: str = ""
    position: int = 0
    where: str = ""
    reason: str = ""
    resets_at: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What a run did.

    ``embedded`` (by this run) and ``reused`` count distinct texts; ``rows``, ``duplicates``,
    ``empty``, ``truncated``, ``perhaps_cut`` (accepted by the server whole, and perhaps longer than
    the model takes), ``failed`` (empty ones included) and ``not_done`` count rows. ``tokens_cut``:
    by how much the ``truncated`` ones were cut in all; ``characters_cut``: those whose tokens
    were not counted. ``damaged``: rows of the output as it was that were not believed; their texts
    were embedded anew, as far as they are in the input. ``retryable``: how many of the failed rows
    the same run may bring later, as after a network that was away. ``failed_path`` lists the rows
    that failed or were not done, if any; ``reason``: why, where all that failed did so for one
    reason; else why the first one did that may have a vector later. ``stopped_at``: where the
    budget ended the run.
    ``declined``: ``on_plan`` answered False; nothing was sent or written. ``unchanged``: there was
    nothing to write, and the output is as it was. ``journaled``: vectors of an earlier run whose
    texts are not in this input; they stay in the journal.
    """

    output: Path
    rows: int = 0
    empty: int = 0
    duplicates: int = 0
    reused: int = 0
    embedded: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    characters_cut: int = 0
    damaged: int = 0
    perhaps_cut: int = 0
    failed: int = 0
    retryable: int = 0
    not_done: int = 0
    failed_path: Path | None = None
    reason: str | None = None
    stopped_at: StoppedRow | None = None
    usage: Spending = field(default_factory=Spending)
    seconds: float = 0.0
    declined: bool = False
    journaled: int = 0
    unchanged: bool = False

    @property
    def has_vectors(self) -> bool:
        """Whether the output was written, with a vector at least."""
        return not self.unchanged and self.rows > self.failed + self.not_done


SIZE = 32


def content_digest(text: str) -> bytes:
    """SHA-256 of the text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).digest()


def parsed_digest(text: object) -> bytes | None:
    """The digest that is written as 64 hexadecimal digits; None for anything else."""
    try:
        digest = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        return None
    return digest if len(digest) == SIZE else None


def is_digest_of(digest: bytes, text: str) -> bool:
    """Whether the text has that digest. One with half a character has none."""
    try:
        return content_digest(text) == digest
    except UnicodeEncodeError:
        return False


def as_digests(raw: bytes | bytearray | memoryview) -> Digests:
    """An array of shape (n,) over ``32 * n`` bytes, without a copy."""
    return np.frombuffer(raw, dtype=f"S{SIZE}")


class DigestIndex:
    """Finds the place of a digest in an array. Building sorts; finding is a binary search."""

    def __init__(self, digests: Digests) -> None:
        self._order = np.argsort(digests, kind="stable")
        self._sorted = digests[self._order]

    def find(self, wanted: Digests) -> NDArray[np.intp]:
        """For each of ``wanted`` its first place in the array, or -1."""
        if not len(self._sorted):
            return np.full(len(wanted), -1, dtype=np.intp)
        near = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        places: NDArray[np.intp] = np.where(self._sorted[near] == wanted, self._order[near], -1)
        return places
