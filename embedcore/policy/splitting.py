"""Which text of a refused request is to blame? Halve it until the culprit is found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from embedcore.errors import (
    EmbeddingError,
    InputRejected,
    InputTooLong,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.policy.planning import PlannedRequest, plan_requests

if TYPE_CHECKING:
    from embedcore.policy.planning import Sizes
    from embedcore.policy.sending import Sender

_MOST_EXTRA_REQUESTS: Final = 96
# From 2,048 texts down to one and its neighbour.
_FRUITLESS_REQUESTS: Final = 24
# So many dead ends in a row, with no success between them, end a call: the first number before
# the provider has ever answered, the second after it has.
_DEAD_ENDS: Final = (2, 8)

Fail: TypeAlias = Callable[[Sequence[int], EmbeddingError, bool], None]


class Splitter:
    """Sends a request, and where it is refused, smaller ones. One for each call.

    ``fail(indices, error, hopeless)`` is told which texts end without a vector; it raises when the
    call must end, as it must when it is hopeless to send anything more.
    ``shorten`` cuts one text further, once, and tells whether that was possible.
    """

    def __init__(
        self,
        sender: Sender,
        sizes: Callable[[], Sizes],
        *,
        fail: Fail,
        shorten: Callable[[int], bool],
    ) -> None:
        self._sender = sender
        self._sizes = sizes
        self._fail = fail
        self._shorten = shorten
        self._lock = threading.Lock()
        self._dead_ends = 0

    def run(self, request: PlannedRequest, after: EmbeddingError | None = None) -> None:
        """Give every text of the request its vector or its error.

        ``after``: the error of a larger request that had these texts.
        """
        learned = self._sender.engine.learned
        for part in self._plan(request.indices) if learned.smaller else [request]:
            error = self._try(part, after)
            if error is not None:
                self._divide(part, error)

    def _try(
        self, request: PlannedRequest, after: EmbeddingError | None = None
    ) -> EmbeddingError | None:
        """Send; a refusal that a smaller request may avoid is returned, anything else ends here."""
        try:
            self._sender.send(request, after=after)
        except (RequestRejected, RequestTooLarge, InputRejected) as error:
            if not error.budget_blocked:
                return error
            self._fail(request.indices, error, True)
        except EmbeddingError as error:
            self._fail(request.indices, error, False)
        else:
            with self._lock:
                self._dead_ends = 0
        return None

    def _divide(self, request: PlannedRequest, error: EmbeddingError) -> None:
        if len(request) == 1:
            self._blame(request.indices[0], error)
        elif _is_to_be_searched(request, error):
            self._search(request, error)
        elif isinstance(error, RequestTooLarge):
            self._smaller(request, error)
        else:
            self._without_named(request, error)

    def _smaller(self, request: PlannedRequest, error: EmbeddingError) -> None:
        # Others are about to meet the same limit: all of the client's requests shrink at once.
        in_bytes = sum(self._sizes().in_bytes[index] for index in request.indices)
        self._sender.engine.learned.shrink(texts=len(request), in_bytes=in_bytes)
        for part in self._plan(request.indices):
            self.run(part, after=error)

    def _search(self, request: PlannedRequest, error: EmbeddingError) -> None:
        """One bad text costs at most 2·log₂ n requests; the good ones keep their vectors."""
        pending = [(request, error)]
        sent = good = 0
        while pending:
            part, problem = pending.pop()
            if sent >= _MOST_EXTRA_REQUESTS and len(part) > 1:
                self._fail(part.indices, problem, False)
            elif len(part) == 1 or not _is_to_be_searched(part, problem):
                self._divide(part, problem)
            else:
                found = [(half, self._try(half, after=problem)) for half in self._halves(part)]
                failed = [(half, again) for half, again in found if again is not None]
                sent, good, pending = sent + 2, good + 2 - len(failed), pending + failed
                if not good and self._is_no_text(request, sent):
                    # Whatever is tried fails alike: it is the request itself.
                    indices = sorted(index for each, _ in pending for index in each.indices)
                    self._fail(indices, error, self._dead_end())
                    return

    def _is_no_text(self, request: PlannedRequest, sent: int) -> bool:
        """Nothing of it has succeeded: can that still be the fault of a text?"""
        if len(request) <= 2:
            return False
        # Where vectors were got before, both halves may well have bad texts.
        return not self._sender.engine.learned.proven or sent >= _FRUITLESS_REQUESTS

    def _without_named(self, request: PlannedRequest, error: EmbeddingError) -> None:
        """The server says which text it is: the others go without it."""
        for _ in range(_MOST_EXTRA_REQUESTS):
            culprit = request.indices[error.position or 0]
            self._blame(culprit, error)
            request = self._part([index for index in request.indices if index != culprit])
            again = self._try(request, after=error)
            if again is None:
                return
            if len(request) == 1 or not _names_one_of(request, again):
                self._divide(request, again)
                return
            error = again
        self._fail(request.indices, error, False)

    def _blame(self, index: int, error: EmbeddingError) -> None:
        """One text was refused by itself: shorten it once if it is too long, else it has failed."""
        if isinstance(error, InputTooLong) and self._shorten(index):
            again = self._try(self._part([index]), after=error)
            if again is None:
                return
            error = again
        self._fail([index], error, isinstance(error, RequestTooLarge) and self._dead_end())

    def _dead_end(self) -> bool:
        """A server that refuses whatever it is sent must not be asked once for each text."""
        with self._lock:
            self._dead_ends += 1
            return self._dead_ends >= _DEAD_ENDS[self._sender.engine.learned.proven]

    def _halves(self, request: PlannedRequest) -> tuple[PlannedRequest, PlannedRequest]:
        middle = len(request) // 2
        return self._part(request.indices[:middle]), self._part(request.indices[middle:])

    def _part(self, indices: Sequence[int]) -> PlannedRequest:
        engine = self._sender.engine
        return self._sizes().request(indices, engine.info, engine.learned.scale)

    def _plan(self, indices: Sequence[int]) -> list[PlannedRequest]:
        engine = self._sender.engine
        return plan_requests(
            indices,
            self._sizes(),
            engine.info,
            smaller=engine.learned.smaller,
            scale=engine.learned.scale,
        )


def _names_one_of(request: PlannedRequest, error: EmbeddingError) -> bool:
    """Whether the provider said which text of the request it refuses."""
    place = error.position
    return isinstance(error, InputRejected) and place is not None and 0 <= place < len(request)


def _is_to_be_searched(request: PlannedRequest, error: EmbeddingError) -> bool:
    return not isinstance(error, RequestTooLarge) and not _names_one_of(request, error)
