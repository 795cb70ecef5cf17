"""Which call of the fake batch strategy goes wrong, and was its work done?

::

    batch.faults.push("create", "after")                   # done; the caller sees OutcomeUnknown
    batch.faults.push("create", "late", requests=2)        # done before the third further call
    batch.faults.push("upload", "before", crash=True)      # the process dies, nothing was sent
    batch.faults.push("results", "before", at=3)           # cut off after three outcomes
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from embedcore.errors import OutcomeUnknown, ProviderUnavailable

Method: TypeAlias = Literal[
    "upload", "create", "find", "discard", "orphans", "poll", "results", "cancel"
]
Effect: TypeAlias = Literal["before", "after", "late"]

METHODS: tuple[str, ...] = get_args(Method)
EFFECTS: tuple[str, ...] = get_args(Effect)


class Crashed(BaseException):
    """The process died here. Nothing may catch it but the test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallFault:
    """One call that fails: ``effect`` says when its work is done, ``error`` what is raised.

    ``requests`` and ``seconds``: when a late effect lands, by the calls and the time that pass;
    with neither, when the service is told to ``land``. ``at``: outcomes of ``results`` that are
    given before it strikes.
    """

    effect: Effect = "before"
    error: BaseException | None = None
    crash: bool = False
    requests: int | None = None
    seconds: float | None = None
    at: int = 0

    def raised(self) -> BaseException:
        if self.error is not None:
            return self.error
        if self.crash:
            return Crashed(f"crashed, with the effect {self.effect}")
        if self.effect == "before":
            return ProviderUnavailable("the connection was refused", billed="no")
        return OutcomeUnknown("the answer was lost")


class CallFaults:
    """The script of a fake strategy: the next calls of each method. Callable from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next: defaultdict[str, deque[CallFault]] = defaultdict(deque)

    def push(
        self,
        method: Method,
        effect: Effect = "before",
        *,
        error: BaseException | None = None,
        crash: bool = False,
        requests: int | None = None,
        seconds: float | None = None,
        at: int = 0,
        times: int = 1,
    ) -> None:
        """The next ``times`` calls of this method that have no fault yet."""
        if method not in METHODS or effect not in EFFECTS:
            raise ValueError(f"no fault {effect!r} of {method!r}; {METHODS}, {EFFECTS}")
        fault = CallFault(
            effect=effect, error=error, crash=crash, requests=requests, seconds=seconds, at=at
        )
        with self._lock:
            self._next[method].extend([fault] * times)

    def clear(self) -> None:
        with self._lock:
            self._next.clear()

    @property
    def pending(self) -> int:
        """Faults that no call has met yet."""
        with self._lock:
            return sum(map(len, self._next.values()))

    def take(self, method: Method) -> CallFault | None:
        with self._lock:
            waiting = self._next.get(method)
            return waiting.popleft() if waiting else None
