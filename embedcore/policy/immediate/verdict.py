"""Verdicts on a failed request: a text, the request itself, or the server is at fault."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

from embedcore.errors import (
    AuthenticationFailed,
    BudgetExceeded,
    EmbeddingError,
    InputRejected,
    ModelNotFound,
    PermissionDenied,
    ProviderError,
    QuotaExhausted,
    RemoteGone,
    ReplyMismatch,
    TransientProviderError,
)
from embedcore.policy.cache import PROBE_TEXT
from embedcore.policy.immediate.attempts import Attempts, blocked
from embedcore.policy.retry import is_about_the_moment

if TYPE_CHECKING:
    from embedcore.policy.immediate.recipe import Call


# After so many requests in a row that failed alike, a text without fault is sent.
_ALIKE_IN_A_ROW: Final = 64
_LOOK_SECONDS: Final = 0.25
# Texts of fewer letters are as likely to be at fault as very long ones.
_FEW_LETTERS: Final = 4
_LOOKED_AT: Final = 100

Serves: TypeAlias = Callable[[], bool | None]
"""Sends a short sentence of ours: does it pass? None: it was not sent, for what it may cost."""


def is_about_no_text(error: EmbeddingError) -> bool:
    """Whether neither a text nor the size of a request can be the reason."""
    if isinstance(error, TransientProviderError):
        return is_about_the_moment(error)
    settings = (
        AuthenticationFailed,
        PermissionDenied,
        ModelNotFound,
        QuotaExhausted,
        RemoteGone,
        ReplyMismatch,
    )
    return isinstance(error, settings) or not isinstance(error, (ProviderError, InputRejected))


def may_be_kept(error: EmbeddingError) -> bool:
    """Whether ``on_error="keep"`` may turn this into failed rows instead of raising it."""
    return isinstance(error, TransientProviderError) or not is_about_no_text(error)


def nature(error: EmbeddingError) -> tuple[object, ...]:
    """What two errors have in common that tell of the same reason, as far as can be told.

    What differs from text to text does not count: numbers, names with numbers in them, and what is
    quoted.
    """
    unquoted = re.sub(r"\"[^\"]*\"|'[^']*'|`[^`]*`", " ", error.message)
    words = [word for word in unquoted.casefold().split() if not any(map(str.isdigit, word))]
    return (
        type(error),
        getattr(error, "status", None),
        getattr(error, "code", None),
        " ".join(words),
    )


def copied(error: EmbeddingError) -> EmbeddingError:
    """One of its own for each place where it is said: it is told which rows it is about there."""
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin


class Verdict:
    """What the failures of one call, together, say of the request and of the server.

    Where texts of the call cannot tell, one short sentence of ours is sent, and paid for.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._engine = call.engine
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._last: tuple[object, ...] | None = None
        self._first_refused: tuple[int, tuple[object, ...]] | None = None
        # How many requests had been answered when our sentence was not.
        self._outage_at: int | None = None

    def passed(self) -> None:
        """A request of the call brought vectors."""
        with self._lock:
            self._in_a_row, self._last = 0, None

    def failed(self, error: EmbeddingError) -> EmbeddingError:
        """A server that refuses whatever it is sent must not be asked once for each text."""
        if isinstance(error, TransientProviderError) or not self._call.keeps:
            return error
        with self._lock:
            before, self._last = self._last, nature(error)
            self._in_a_row = self._in_a_row + 1 if self._last == before else 1
            is_time = self._in_a_row >= _ALIKE_IN_A_ROW
        if is_time:
            with self.one_at_a_time():
                self._check_server(error)
        return error

    def both_failed(self, one: EmbeddingError, other: EmbeddingError, serves: Serves) -> None:
        """Two texts of different halves failed, each alone. Raises what is no text's fault."""
        if nature(one) == nature(other) and not isinstance(one, InputRejected):
            self._check_request(one, serves)

    def failed_alone(self, index: int, error: EmbeddingError, serves: Serves) -> None:
        """Where requests have one text, two alike from different halves tell that it is no text."""
        texts, learned = self._call.prepared.texts, self._engine.learned
        if learned.proven or isinstance(error, InputRejected) or not _speaks(texts[index]):
            return
        with self.one_at_a_time():
            if learned.proven:
                return
            first, middle = self._first_refused, len(texts) // 2
            if first is None:
                self._first_refused = index, nature(error)
                self._call.workers.do_last()
            elif first[1] == nature(error) and (first[0] < middle) != (index < middle):
                self._check_request(error, serves)

    def is_outage(self, served: int, serves: Serves) -> bool:
        """The retry quota is used up by a failure for the moment: does nothing pass any more?

        ``served``: how many requests had been answered when the one that failed was sent. A size
        that the server cannot do uses up the quota too, where many requests of it leave at once.
        """
        learned = self._engine.learned
        with self.one_at_a_time():
            if learned.served != served:
                return False
            if self._outage_at == served:
                return True
            passes = serves()
            if passes is False:
                self._outage_at = learned.served
            return not passes

    def pair(self, indices: Sequence[int]) -> tuple[int, int] | None:
        """A short text of each half that is not blank; None if a half has none."""
        middle = len(indices) // 2
        one, other = self._shortest(indices[:middle]), self._shortest(indices[middle:])
        return None if one is None or other is None else (one, other)

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Held by who finds out for all threads of the client why requests fail."""
        lock = self._engine.learned.probing
        while not lock.acquire(timeout=_LOOK_SECONDS):
            self._call.pause(0.0)
        try:
            self._call.pause(0.0)
            yield
        except EmbeddingError as error:
            # Before the lock is free: whoever waits for it must not ask the same again.
            self._call.workers.fail(error)
            raise
        finally:
            lock.release()

    def _check_request(self, error: EmbeddingError, serves: Serves) -> None:
        # The two that failed may both be bad: bad texts are often short.
        if not serves():
            raise self._request_at_fault(error)

    def _check_server(self, error: EmbeddingError) -> None:
        """Raises ``error`` if a text without fault is refused as well, unless one just passed."""
        if self._in_a_row < _ALIKE_IN_A_ROW:
            return
        try:
            serves = self._call.serves(PROBE_TEXT, Attempts(fresh=True, once=True))
        except BudgetExceeded as refusal:
            raise blocked(copied(error), refusal) from refusal
        if not serves:
            raise self._serves_nothing(error)
        with self._lock:
            self._in_a_row = 0

    def _request_at_fault(self, error: EmbeddingError) -> EmbeddingError:
        error = copied(error)
        error.position = None
        error.message += (
            ". It is no text's fault: two of them failed alike, each alone, and nothing has "
            "succeeded with these settings yet"
        )
        return error

    def _serves_nothing(self, error: EmbeddingError) -> EmbeddingError:
        error = copied(error)
        error.position = None
        error.message += (
            f". The last {_ALIKE_IN_A_ROW} requests failed alike, and so did a short sentence: "
            "nothing more is sent"
        )
        return error

    def _shortest(self, indices: Sequence[int]) -> int | None:
        """The shortest text that says something; one of a few letters only if there is no other."""
        prepared = self._call.prepared

        def rank(index: int) -> tuple[bool, int]:
            letters = sum(map(str.isalnum, prepared.texts[index][:_LOOKED_AT]))
            return letters < _FEW_LETTERS, prepared.sizes[index]

        speaking = [index for index in indices if _speaks(prepared.texts[index])]
        return min(speaking, key=rank, default=None)


def _speaks(text: str) -> bool:
    """Whether it is more than white space, marks and characters that cannot be seen."""
    return any(map(str.isalnum, text))
