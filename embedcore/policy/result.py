"""The result of a call: vectors, and what became of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, overload

from embedcore import money
from embedcore.errors import BudgetExceeded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.errors import EmbeddingError
    from embedcore.provider.types import Vectors

RowState: TypeAlias = Literal["ok", "reused", "failed", "not_done"]
CutState: TypeAlias = Literal["no", "yes", "unknown"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """What a call cost, in US dollars. ``requests`` counts every attempt that was sent.

    ``tokens`` and ``cost`` include what is ``unconfirmed``: charged to the budget without
    proof that the provider billed it. ``exact``: the provider named every figure itself.

    What is ``free_by_status`` is not in them: so many of the requests, for which so much was
    reserved, were refused with a status that says that they were not billed, and nothing else says
    so.
    """

    tokens: int = 0
    cost: Decimal = Decimal(0)
    requests: int = 0
    unconfirmed_tokens: int = 0
    unconfirmed_cost: Decimal = Decimal(0)
    free_by_status_tokens: int = 0
    free_by_status_cost: Decimal = Decimal(0)
    free_by_status_requests: int = 0
    exact: bool = True

    def __add__(self, other: Spending) -> Spending:
        return Spending(
            tokens=self.tokens + other.tokens,
            cost=money.added(self.cost, other.cost),
            requests=self.requests + other.requests,
            unconfirmed_tokens=self.unconfirmed_tokens + other.unconfirmed_tokens,
            unconfirmed_cost=money.added(self.unconfirmed_cost, other.unconfirmed_cost),
            free_by_status_tokens=self.free_by_status_tokens + other.free_by_status_tokens,
            free_by_status_cost=money.added(self.free_by_status_cost, other.free_by_status_cost),
            free_by_status_requests=self.free_by_status_requests + other.free_by_status_requests,
            exact=self.exact and other.exact,
        )


class TextCut(NamedTuple):
    """What was cut off the end of a text.

    ``tokens``: how many, by an exact tokenizer; None: not counted. ``characters``: how many,
    where the server's refusal led to the cut. Neither: whether anything was cut is not known. The
    text may be longer than the model takes, and its server accepted it.
    """

    tokens: int | None = None
    characters: int | None = None

    @property
    def is_known(self) -> bool:
        """Something was cut."""
        return self.tokens is not None or self.characters is not None

    def and_then(self, other: TextCut) -> TextCut:
        """This, and then that was cut off what was left."""
        if not self.is_known:
            return other
        if self.tokens is not None and other.tokens is not None:
            return TextCut(tokens=self.tokens + other.tokens)
        return TextCut(characters=(self.characters or 0) + (other.characters or 0))


class CutViews:
    """What ``cuts`` of a result, an arrival or a block says, in three views.

    Their keys are its keys: rows of the caller, or places in a block.
    """

    __slots__ = ()
    cuts: Mapping[int, TextCut]

    @property
    def tokens_cut(self) -> Mapping[int, int | None]:
        """Tokens cut off, None where they were not counted; only the rows that were cut."""
        return {row: cut.tokens for row, cut in self.cuts.items() if cut.is_known}

    @property
    def characters_cut(self) -> Mapping[int, int]:
        """Characters cut off; only rows that were cut, and whose tokens were not counted."""
        return {
            row: cut.characters
            for row, cut in self.cuts.items()
            if cut.characters is not None and cut.tokens is None
        }

    @property
    def perhaps_cut(self) -> frozenset[int]:
        """Rows that may be longer than the model takes, and that the server accepted: whether it
        cut them is not known."""
        return frozenset(row for row, cut in self.cuts.items() if not cut.is_known)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowOutcome:
    """What became of one row.

    ``ok``: embedded now. ``reused``: a vector that was cached, or is of an equal text of the
    same call. ``failed``: no vector; ``error`` says why. ``not_done``: nothing of it was paid for,
    since the budget ended before it (``on_budget="stop"``).

    ``tokens_cut``: how many tokens of the text's end were cut off to fit the model; 0 if none, None
    if they were not counted. ``characters_cut``: how many characters, where the tokens were not
    counted; None otherwise.
    """

    state: RowState = "ok"
    tokens_cut: int | None = 0
    characters_cut: int | None = None
    error: EmbeddingError | None = None

    @property
    def cut(self) -> CutState:
        """Whether the text was cut. "unknown": it may be longer than the model takes, its tokens
        were not counted, and the server accepted it."""
        if self.tokens_cut is None and self.characters_cut is None:
            return "unknown"
        return "yes" if self.tokens_cut or self.characters_cut else "no"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival(CutViews):
    """Vectors that just came, while the call they belong to goes on.

    - ``rows``: the caller's rows they are for, shape (m,), intp.
    - ``vectors``: float32, shape (m, d), vector i for ``rows[i]``.
    - ``cuts``: row → what was cut off its text; only the rows that were cut, or may have been.
    """

    rows: NDArray[np.intp]
    vectors: Vectors
    cuts: Mapping[int, TextCut] = field(default_factory=dict)


OnArrival: TypeAlias = Callable[[Arrival], None]


def zero_rows(vectors: Vectors) -> NDArray[np.bool_]:
    """Which vectors are all zeros; none that is NaN."""
    from embedcore.storage.vector_format import all_zero

    return all_zero(vectors)


class _Outcomes(Sequence[RowOutcome]):
    """The outcomes of all rows, made when asked for: a million rows need no million objects."""

    def __init__(self, result: EmbeddingResult) -> None:
        self._result = result

    def __len__(self) -> int:
        return len(self._result.ok)

    @overload
    def __getitem__(self, row: int) -> RowOutcome: ...
    @overload
    def __getitem__(self, row: slice) -> list[RowOutcome]: ...
    def __getitem__(self, row: int | slice) -> RowOutcome | list[RowOutcome]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        index = range(len(self))[row]
        result = self._result
        error = result.errors.get(index)
        state: RowState = "not_done" if isinstance(error, BudgetExceeded) else "failed"
        if result.ok[index]:
            state = "reused" if result.reused[index] else "ok"
        cut = result.cuts.get(index)
        if cut is None:
            return RowOutcome(state=state, error=error)
        return RowOutcome(
            state=state,
            tokens_cut=cut.tokens,
            characters_cut=None if cut.tokens is not None else cut.characters,
            error=error,
        )

    def __iter__(self) -> Iterator[RowOutcome]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppedAt:
    """Where the budget ended a call or a stream: the first row that was not embedded.

    ``key``: of a stream's row, or the position. ``position``: from 0; to go on with the rows from
    there is enough. ``error``: which limit, and when it resets.
    """

    key: Any
    position: int
    error: BudgetExceeded


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingResult(CutViews):
    """Row i of everything belongs to text i.

    - ``vectors``: float32, shape (n, d); a failed row is NaN.
    - ``ok``: bool, shape (n,).
    - ``reused``: bool, shape (n,): not embedded by a request of its own.
    - ``cuts``: row → what was cut off its text; only the rows that were cut, or may have been.
      ``tokens_cut``, ``characters_cut`` and ``perhaps_cut`` say the same one by one.
    - ``errors``: row → why it failed; only the rows that failed or were not done.
    - ``stopped_at``: the first row that was not done, with ``on_budget="stop"``; None: all were.
    - ``model``: ``provider:model``. ``fingerprint``: everything that decides the vectors.
    """

    vectors: Vectors
    ok: NDArray[np.bool_]
    reused: NDArray[np.bool_]
    usage: Spending = Spending()
    model: str = ""
    fingerprint: str = ""
    cuts: Mapping[int, TextCut] = field(default_factory=dict)
    errors: Mapping[int, EmbeddingError] = field(default_factory=dict)
    stopped_at: StoppedAt | None = None

    @property
    def outcomes(self) -> Sequence[RowOutcome]:
        return _Outcomes(self)

    def split(self, row: int) -> tuple[EmbeddingResult, EmbeddingResult]:
        """The rows before ``row`` and those from it on. What was spent is with the first, if it
        has any row."""
        empty = row == 0
        before = replace(
            self,
            vectors=self.vectors[:row],
            ok=self.ok[:row],
            reused=self.reused[:row],
            usage=Spending() if empty else self.usage,
            cuts={at: cut for at, cut in self.cuts.items() if at < row},
            errors={at: error for at, error in self.errors.items() if at < row},
            stopped_at=None,
        )
        rest = replace(
            self,
            vectors=self.vectors[row:],
            ok=self.ok[row:],
            reused=self.reused[row:],
            usage=self.usage if empty else Spending(),
            cuts={at - row: cut for at, cut in self.cuts.items() if at >= row},
            errors={at - row: error for at, error in self.errors.items() if at >= row},
        )
        return before, rest

    @property
    def zeros(self) -> NDArray[np.bool_]:
        """Rows whose vector is all zeros, which says nothing of their text; bool, shape (n,). Such
        a vector is never used for another call."""
        return zero_rows(self.vectors)

    def __len__(self) -> int:
        return len(self.ok)

    def __repr__(self) -> str:
        rows, width = self.vectors.shape
        return (
            f"EmbeddingResult({rows} rows × {width}, {int(self.ok.sum())} ok, "
            f"model={self.model!r}, tokens={self.usage.tokens}, "
            f"cost=${money.exact(self.usage.cost)})"
        )


def listed(result: EmbeddingResult) -> list[list[float]]:
    """The vectors of all rows, or of those before the one where the budget ended."""
    end = None if result.stopped_at is None else result.stopped_at.position
    vectors: list[list[float]] = result.vectors[:end].tolist()
    return vectors
