"""Which text of a refused request is to blame? Halve it until the culprit is found."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from embedcore.errors import (
    EmbeddingError,
    InputTooLong,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.policy.planning import PlannedRequest, plan_requests

if TYPE_CHECKING:
    from embedcore.policy.planning import Sizes
    from embedcore.policy.sending import Sender

_MOST_EXTRA_REQUESTS: Final = 96
_LONE_REFUSALS: Final = 2

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
        self._lone_refusals = 0

    def run(self, request: PlannedRequest) -> None:
        """Give every text of the request its vector or its error."""
        most = self._sender.engine.learned.max_texts
        if most is not None and len(request) > most:
            for part in self._plan(request.indices):
                self._run(part)
        else:
            self._run(request)

    def _run(self, request: PlannedRequest) -> None:
        error = self._try(request)
        if error is None:
            return
        if len(request) == 1:
            self._blame(request.indices[0], error)
        elif isinstance(error, InputTooLong):
            self._without_long_one(request, error)
        elif isinstance(error, RequestTooLarge):
            self._smaller(request)
        else:
            self._search(request, error)

    def _try(self, request: PlannedRequest) -> EmbeddingError | None:
        """Send; a refusal that a smaller request may avoid is returned, anything else ends here."""
        try:
            self._sender.send(request)
        except (RequestRejected, RequestTooLarge, InputTooLong) as error:
            return error
        except EmbeddingError as error:
            self._fail(request.indices, error, False)
        return None

    def _smaller(self, request: PlannedRequest) -> None:
        # Others are about to meet the same limit: all of the client's requests shrink at once.
        learned = self._sender.engine.learned
        half = max(len(request) // 2, 1)
        learned.max_texts = min(learned.max_texts or half, half)
        for part in self._plan(request.indices):
            self._run(part)

    def _search(self, request: PlannedRequest, error: EmbeddingError) -> None:
        """One bad text costs at most 2·log₂ n requests; the good ones keep their vectors."""
        left, right = self._halves(request)
        errors = [self._try(left), self._try(right)]
        if all(errors) and not self._sender.engine.learned.proven:
            # Both halves fail alike, and nothing ever worked: it is the request itself.
            self._fail(request.indices, error, False)
            return
        pending = [
            (half, problem)
            for half, problem in zip((left, right), errors, strict=True)
            if problem is not None
        ]
        sent = 2
        while pending:
            part, problem = pending.pop()
            if len(part) == 1 or sent >= _MOST_EXTRA_REQUESTS:
                self._fail(part.indices, problem, False)
                continue
            for half in self._halves(part):
                sent += 1
                half_problem = self._try(half)
                if half_problem is not None:
                    pending.append((half, half_problem))

    def _without_long_one(self, request: PlannedRequest, error: InputTooLong) -> None:
        position = error.position
        if position is None or not 0 <= position < len(request):
            self._search(request, error)
            return
        culprit = request.indices[position]
        others = [index for index in request.indices if index != culprit]
        self._blame(culprit, error)
        for part in self._plan(others):
            self._run(part)

    def _blame(self, index: int, error: EmbeddingError) -> None:
        """One text was refused by itself: shorten it once if it is too long, else it has failed."""
        if isinstance(error, InputTooLong) and self._shorten(index):
            (shorter,) = self._plan([index])
            again = self._try(shorter)
            if again is None:
                return
            error = again
        self._fail([index], error, isinstance(error, RequestTooLarge) and self._hopeless())

    def _hopeless(self) -> bool:
        """A server that calls everything too large must not be asked once for each text."""
        with self._lock:
            self._lone_refusals += 1
            return self._lone_refusals >= _LONE_REFUSALS and not self._sender.engine.learned.proven

    def _halves(self, request: PlannedRequest) -> tuple[PlannedRequest, PlannedRequest]:
        middle = len(request) // 2
        return self._part(request.indices[:middle]), self._part(request.indices[middle:])

    def _part(self, indices: Sequence[int]) -> PlannedRequest:
        engine = self._sender.engine
        amount = self._sizes().amount(indices, engine.info, engine.learned.scale)
        return PlannedRequest(indices=tuple(indices), amount=amount)

    def _plan(self, indices: Sequence[int]) -> list[PlannedRequest]:
        engine = self._sender.engine
        return plan_requests(
            indices,
            self._sizes(),
            engine.info,
            max_texts=engine.learned.max_texts,
            scale=engine.learned.scale,
        )
