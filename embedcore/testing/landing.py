"""What was asked of the fake, answered with a loss, and has not happened yet?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from embedcore.errors import EmbeddingError
from embedcore.testing.api import ApiError

Effect: TypeAlias = Callable[[], str]


@dataclass(kw_only=True, slots=True)
class _Pending:
    effect: Effect
    requests: int | None
    at: float | None


class Landings:
    """Effects that happen late. Not locked: its owner is.

    ``landed`` says what came of each: what the effect returned, or the refusal it met.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.landed: list[str] = []
        self._clock = clock
        self._pending: list[_Pending] = []
        self._busy = False

    def __len__(self) -> int:
        return len(self._pending)

    def defer(self, effect: Effect, *, requests: int | None, seconds: float | None) -> None:
        at = None if seconds is None else self._clock() + seconds
        self._pending.append(_Pending(effect=effect, requests=requests, at=at))

    def tick(self) -> None:
        """Another request arrives: what is due by now happens before it."""
        if self._busy or not self._pending:
            return
        now = self._clock()
        due = []
        for each in self._pending:
            if each.requests == 0 or (each.at is not None and each.at <= now):
                due.append(each)
            elif each.requests is not None:
                each.requests -= 1
        self._land(due)

    def land(self) -> int:
        """Everything happens now. How many there were."""
        due = list(self._pending)
        self._land(due)
        return len(due)

    def _land(self, due: list[_Pending]) -> None:
        self._pending = [each for each in self._pending if each not in due]
        self._busy = True
        try:
            for each in due:
                try:
                    self.landed.append(each.effect())
                except (ApiError, EmbeddingError) as error:
                    self.landed.append(str(error))
        finally:
            self._busy = False
