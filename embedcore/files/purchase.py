"""How is what is missing bought, so that no vector that was paid for is lost?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embedcore import Arrival, Spending
from embedcore.errors import (
    BudgetExceeded,
    EmbeddingError,
    InputRejected,
    InvalidResponse,
    StorageError,
)
from embedcore.events import Progress
from embedcore.files.cuts import codes_of
from embedcore.files.digests import as_digests, content_digest
from embedcore.files.journal import Journal
from embedcore.files.types import OnBudget, OnError, Row, StoppedRow

if TYPE_CHECKING:
    from embedcore import EmbeddingClient, EmbeddingResult, TextCut
    from embedcore.files.types import Vectors


class Purchase:
    """Embeds blocks of rows with distinct texts into the journal, and counts.

    ``bought``: texts embedded now; ``arrived``: those and what the cache had; ``usage``: what they
    cost; ``reasons``: digest → why it failed; ``stopped_at``: where the budget ended it.
    """

    def __init__(
        self,
        client: EmbeddingClient,
        journal: Journal,
        *,
        input_type: str | None,
        on_error: OnError,
        on_budget: OnBudget = "raise",
    ) -> None:
        self._client = client
        self._journal = journal
        self._input_type = input_type
        self._on_error = on_error
        self._on_budget: OnBudget = on_budget
        self.bought = self.arrived = 0
        self.stopped_at: StoppedRow | None = None
        self.usage = Spending()
        self.reasons: dict[bytes, str] = {}

    def embed(self, rows: Sequence[Row], *, progress: Callable[[Progress], None]) -> None:
        """Buy one block; what was bought is on the disk, from each request on as it finishes.

        Raises what the client raises, with a note naming the row; the error of the first row that
        failed, unless failed rows are kept; ``StorageError`` with the vectors as its ``partial``.
        """
        block = _Block(rows, self._journal)
        try:
            result = self._client.embed(
                [row.text for row in rows],
                input_type=self._input_type,
                on_error="keep",
                on_budget=self._on_budget,
                progress=progress,
                on_arrival=block.arrived,
            )
        except BaseException as error:
            partial: EmbeddingResult | None = getattr(error, "partial", None)
            if partial is not None:
                self._keep(block, partial)
            if isinstance(error, InputRejected) and error.position is not None:
                _locate(error, rows[error.position])
            raise
        self._keep(block, result)
        stopped = result.stopped_at
        if stopped is not None:
            self.stopped_at = _stopped_row(rows[stopped.position], stopped.error)
        for number in np.flatnonzero(~result.ok).tolist():
            reason = result.errors.get(number)
            if stopped is None or not isinstance(reason, BudgetExceeded):
                self._failed(rows[number], reason)

    def _keep(self, block: _Block, result: EmbeddingResult) -> None:
        self.usage += result.usage
        block.complete(result)
        self.bought += int(np.count_nonzero(result.ok & ~result.reused))
        self.arrived += int(np.count_nonzero(result.ok))

    def _failed(self, row: Row, error: EmbeddingError | None) -> None:
        error = error or EmbeddingError("the client gave no reason")
        if self._on_error == "raise":
            # What names no row, say that no server can be reached, is no fault of this one.
            named = error.position is not None or error.message.startswith(("row ", "rows "))
            if named or isinstance(error, InputRejected):
                _locate(error, row)
            raise error
        reason = error.reason if isinstance(error, InputRejected) else str(error)
        self.reasons[content_digest(row.text)] = reason


class _Block:
    """The rows of one call, and which of them are in the journal."""

    def __init__(self, rows: Sequence[Row], journal: Journal) -> None:
        self._rows = rows
        self._journal = journal
        self._written: NDArray[np.bool_] = np.zeros(len(rows), dtype=np.bool_)
        self._complete = False
        self._lock = threading.Lock()

    def arrived(self, arrival: Arrival) -> None:
        """Write down what one request brought. Called in a thread of the client's."""
        with self._lock:
            # A reply that comes after the end of the call is in its result, or was given up.
            if not self._complete:
                _require_sound(len(arrival.rows), arrival.vectors)
                self._append(arrival.rows, arrival.vectors, arrival.cuts)

    def complete(self, result: EmbeddingResult) -> None:
        """Write down what is not there yet. ``StorageError`` has the vectors as its ``partial``."""
        with self._lock:
            self._complete = True
            if not len(self._rows) == len(result.ok) == len(result.reused):
                raise _unsound(len(self._rows), result.vectors)
            missing = np.flatnonzero(result.ok & ~self._written)
            _require_sound(len(self._rows), result.vectors, missing)
            try:
                self._append(missing, result.vectors[missing], result.cuts)
            except KeyboardInterrupt:
                # The block is paid for: it is written once more, then the interrupt goes on.
                self._append(missing, result.vectors[missing], result.cuts)
                raise
            except StorageError as error:
                error.partial = result
                raise

    def _append(
        self, numbers: NDArray[np.intp], vectors: Vectors, cuts: Mapping[int, TextCut]
    ) -> None:
        texts = (self._rows[number].text for number in numbers.tolist())
        digests = as_digests(b"".join(map(content_digest, texts)))
        self._journal.append(digests, codes_of(cuts, numbers.tolist()), vectors)
        self._written[numbers] = True


def _stopped_row(row: Row, error: BudgetExceeded) -> StoppedRow:
    return StoppedRow(
        id=row.id,
        position=row.position,
        where=row.where,
        reason=error.message.removeprefix("not sent: "),
        resets_at=error.resets_at,
    )


def _require_sound(
    rows: int, vectors: Vectors, used: NDArray[np.intp] | slice = slice(None)
) -> None:
    if vectors.ndim != 2 or len(vectors) != rows:
        raise _unsound(rows, vectors)
    if not np.isfinite(vectors[used]).all():
        raise InvalidResponse("a vector came back with numbers that are not finite; none is used")


def _unsound(rows: int, vectors: Vectors) -> InvalidResponse:
    return InvalidResponse(
        f"{rows} texts came back as vectors of shape {vectors.shape}; none is used"
    )


def _locate(error: EmbeddingError, row: Row) -> None:
    """Say which row of the input it is: the client only knows the place within its block."""
    if isinstance(error, InputRejected):
        error.position = row.position
    error.add_note(f"this is row {row.position} of the input, {row.where}")
