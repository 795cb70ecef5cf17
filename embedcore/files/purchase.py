"""How is what is missing bought, so that no vector that was paid for is lost?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embedcore import Spending
from embedcore.errors import EmbeddingError, InputRejected, InvalidResponse, StorageError
from embedcore.events import Progress
from embedcore.files.digests import as_digests, content_digest
from embedcore.files.journal import Journal
from embedcore.files.types import OnError, Row

if TYPE_CHECKING:
    from embedcore import EmbeddingClient, EmbeddingResult
    from embedcore.files.types import Digests, Vectors


class Purchase:
    """Embeds blocks of rows with distinct texts into the journal, and counts.

    ``bought``: texts embedded now; ``usage``: what they cost; ``reasons``: digest → why it failed.
    """

    def __init__(
        self,
        client: EmbeddingClient,
        journal: Journal,
        *,
        input_type: str | None,
        on_error: OnError,
    ) -> None:
        self._client = client
        self._journal = journal
        self._input_type = input_type
        self._on_error = on_error
        self.bought = 0
        self.usage = Spending()
        self.reasons: dict[bytes, str] = {}

    def embed(self, rows: Sequence[Row], *, progress: Callable[[Progress], None]) -> None:
        """Buy one block; on return, or on any error, what was bought is on the disk.

        Raises what the client raises, with a note naming the row; the error of the first row that
        failed, unless failed rows are kept; ``StorageError`` with the vectors as its ``partial``.
        """
        texts = [row.text for row in rows]
        try:
            result = self._client.embed(
                texts, input_type=self._input_type, on_error="keep", progress=progress
            )
        except BaseException as error:
            partial: EmbeddingResult | None = getattr(error, "partial", None)
            if partial is not None:
                self._keep(rows, partial)
            if isinstance(error, InputRejected) and error.position is not None:
                _locate(error, rows[error.position])
            raise
        self._keep(rows, result)
        for number in np.flatnonzero(~result.ok).tolist():
            self._failed(rows[number], result.errors.get(number))

    def _failed(self, row: Row, error: EmbeddingError | None) -> None:
        error = error or EmbeddingError("the client gave no reason")
        if self._on_error == "raise":
            _locate(error, row)
            raise error
        reason = error.reason if isinstance(error, InputRejected) else str(error)
        self.reasons[content_digest(row.text)] = reason

    def _keep(self, rows: Sequence[Row], result: EmbeddingResult) -> None:
        self._require_sound(rows, result)
        self.usage += result.usage
        numbers = np.flatnonzero(result.ok).tolist()
        digests = as_digests(b"".join(content_digest(rows[number].text) for number in numbers))
        cuts = [result.tokens_cut.get(number, 0) for number in numbers]
        try:
            self._append(digests, np.array(cuts, dtype=np.uint32), result.vectors[numbers])
        except StorageError as error:
            error.partial = result
            raise
        self.bought += int(np.count_nonzero(result.ok & ~result.reused))

    def _append(self, digests: Digests, cuts: NDArray[np.uint32], vectors: Vectors) -> None:
        try:
            self._journal.append(digests, cuts, vectors)
        except KeyboardInterrupt:
            # The block is paid for: it is written once more, then the interrupt goes on.
            self._journal.append(digests, cuts, vectors)
            raise

    def _require_sound(self, rows: Sequence[Row], result: EmbeddingResult) -> None:
        vectors, ok = result.vectors, result.ok
        if vectors.ndim != 2 or not len(rows) == len(vectors) == len(ok) == len(result.reused):
            raise InvalidResponse(
                f"{len(rows)} texts came back as vectors of shape {vectors.shape}; none is used"
            )
        if not np.isfinite(vectors[ok]).all():
            raise InvalidResponse(
                "a vector came back with numbers that are not finite; none is used"
            )


def _locate(error: EmbeddingError, row: Row) -> None:
    """Say which row of the input it is: the client only knows the place within its block."""
    if isinstance(error, InputRejected):
        error.position = row.position
    error.add_note(f"this is row {row.position} of the input, {row.where}")
