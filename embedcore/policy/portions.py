"""As much of a call as the budget allows, in the order of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

from embedcore.errors import BudgetExceeded, ConfigurationError
from embedcore.events import BudgetWait, Event, Observer, Refused

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine
    from embedcore.policy.planning import PlannedRequest
    from embedcore.policy.purse import Account

OnBudget: TypeAlias = Literal["raise", "stop", "wait"]

# What others give back, or a limit that was raised, is noticed after so long.
_LOOK_SECONDS: Final = 30.0


def check_on_budget(on_budget: str) -> None:
    """Raises ``ConfigurationError`` for anything but the three that there are."""
    if on_budget not in ("raise", "stop", "wait"):
        raise ConfigurationError(f'on_budget = {on_budget!r} must be "raise", "stop" or "wait"')


class Sending(Protocol):
    """What ``Portions`` needs of a call. Texts are named by their indices, in order."""

    def missing(self, wanted: Sequence[int]) -> Sequence[int]:
        """Those that must be paid for; they are claimed."""
        ...

    def hold(self, missing: Sequence[int]) -> list[PlannedRequest]:
        """Raises ``BudgetExceeded`` if the budget does not allow all of them."""
        ...

    def send_all(self, requests: Sequence[PlannedRequest]) -> None: ...

    def let_go(self, missing: Sequence[int]) -> None:
        """Others may have them: they are not claimed any more."""
        ...

    def wait_for_budget(self, refusal: BudgetExceeded) -> None:
        """Wait until there may be more. Raises the refusal where that does not help."""
        ...


class Portions:
    """Sends the texts of one call: all at once if the budget allows, else as many as it does.

    A portion is halved until it fits. Where not even one text does, ``on_budget`` decides: the
    refusal is raised; or the call stops, and ``refusal`` says why; or it waits.
    """

    def __init__(self, call: Sending, on_budget: OnBudget) -> None:
        self._call = call
        self._on_budget = on_budget
        self.refusal: BudgetExceeded | None = None
        self.is_over = False

    def send(self, wanted: Sequence[int], *, on_held: Callable[[], None] | None = None) -> None:
        """``on_held`` is called once no more money is needed for these texts."""
        for requests, are_last in self._held(self._call.missing(wanted)):
            if are_last and on_held is not None:
                on_held()
            self._send(requests)

    def _held(self, todo: Sequence[int]) -> Iterator[tuple[list[PlannedRequest], bool]]:
        """Requests that money is held for, portion by portion, and whether they are the last."""
        call, size = self._call, len(todo)
        while self.refusal is None:
            size = min(size, len(todo))
            try:
                requests = call.hold(todo[:size])
            except BudgetExceeded as error:
                if self._on_budget == "raise":
                    raise
                if size > 1:
                    size //= 2
                    continue
                # While it waits, or for good, others may have them.
                call.let_go(todo)
                if self._on_budget == "stop":
                    self.refusal = error
                    return
                call.wait_for_budget(error)
                todo = call.missing(todo)
                size = len(todo)
                continue
            todo = todo[size:]
            yield requests, not todo
            if not todo:
                return
        call.let_go(todo)

    def _send(self, requests: Sequence[PlannedRequest]) -> None:
        try:
            self._call.send_all(requests)
        except BudgetExceeded as error:
            # Money that a request needed on its way, for another attempt, was refused.
            if self._on_budget != "stop":
                raise
            self.refusal, self.is_over = error, True


def without_refusals(engine: Engine) -> Engine:
    """The engine for a call that tries again with less: it is told of the last refusal only."""
    observe = engine.observe

    def told(event: Event) -> None:
        if not isinstance(event, Refused):
            observe(event)

    return replace(engine, observe=told)


def await_budget(
    account: Account, refusal: BudgetExceeded, observe: Observer, pause: Callable[[float], None]
) -> None:
    """Wait until the window of the limit ends, or for a look before. Raises what cannot be waited
    for: more than the whole limit, or a limit in total; and what ``pause`` raises."""
    if refusal.never_fits or refusal.resets_at is None:
        observe(account.refused(refusal))
        raise refusal
    seconds = (refusal.resets_at - datetime.now(UTC)).total_seconds()
    observe(BudgetWait(scope=account.scope, until=refusal.resets_at, message=refusal.message))
    pause(min(max(seconds, 0.0) + 0.05, _LOOK_SECONDS))
