"""Verdicts on a failed request: a text, the request itself, or the server is at fault."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from embedcore.errors import (
    BudgetExceeded,
    EmbeddingError,
    InputRejected,
    TransientProviderError,
)
from embedcore.policy.cache import PROBE_TEXT
from embedcore.policy.immediate.attempts import Attempts, blocked, priced_alone, send_alone
from embedcore.policy.threads import LOOK_SECONDS

if TYPE_CHECKING:
    from embedcore.policy.immediate.call import Call


# After so many requests in a row that failed alike, a text without fault is sent.
_ALIKE_IN_A_ROW: Final = 64
# Texts of fewer letters are as likely to be at fault as very long ones.
_FEW_LETTERS: Final = 4
_LOOKED_AT: Final = 100


@dataclass(kw_only=True, slots=True)
class Inquiry:
    """One request that failed, and what is found out about it.

    - ``error``: why it failed.
    - ``tokens_left``: what may still be charged for parts that fail.
    - ``retries``: what was taken from the retry quota for it.
    - ``asked``: the ways in which the provider has asked otherwise for it; none is tried again.
    - ``culprit``: the first text that is known to be at fault.
    """

    error: EmbeddingError
    tokens_left: int
    retries: int = 0
    asked: set[str] = field(default_factory=set)
    culprit: tuple[int, EmbeddingError] | None = None

    def blame(self, index: int, error: EmbeddingError) -> None:
        if self.culprit is None or index < self.culprit[0]:
            self.culprit = index, error


def nature(error: EmbeddingError) -> tuple[object, ...]:
    """What two errors have in common that tell of the same reason, as far as can be known.

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
    """One of its own for each place where it is said: it gets the rows that it is about there."""
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
        # The last request that had left when our sentence was not answered.
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

    def both_failed(self, inquiry: Inquiry, one: EmbeddingError, other: EmbeddingError) -> None:
        """Two texts of different halves failed, each alone. Raises what is no text's fault."""
        if nature(one) == nature(other) and not isinstance(one, InputRejected):
            self._check_request(inquiry, one)

    def failed_alone(self, inquiry: Inquiry, index: int, error: EmbeddingError) -> None:
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
                self._check_request(inquiry, error)

    def is_outage(self, inquiry: Inquiry, error: EmbeddingError, served: int) -> bool:
        """The retry quota is used up by a failure for the moment: does nothing pass any more?

        ``served``: the last request that had been answered when the one that failed was sent. A
        size that the server cannot do uses up the quota too, where many of it leave at once.
        """
        learned = self._engine.learned
        with self.one_at_a_time():
            if self._outage_at is not None and learned.served <= self._outage_at:
                # What was answered since may have been answered before our sentence was not.
                return True
            if learned.served != served:
                return False
            passes = self._serves(inquiry, error)
            if passes is False:
                self._outage_at = learned.left
            return not passes

    def pair(self, indices: Sequence[int]) -> tuple[int, int] | None:
        """A short text of each half that is not blank; None if a half has none."""
        middle = len(indices) // 2
        one, other = self._shortest(indices[:middle]), self._shortest(indices[middle:])
        return None if one is None or other is None else (one, other)

    @contextlib.contextmanager
    def one_at_a_time(self) -> Iterator[None]:
        """Held by the thread that finds out for all of the client why requests fail."""
        lock = self._engine.learned.probing
        while not lock.acquire(timeout=LOOK_SECONDS):
            self._call.pause(0.0)
        try:
            self._call.pause(0.0)
            yield
        except EmbeddingError as error:
            # Before the lock is free: a thread that waits for it must not ask the same again.
            self._call.workers.fail(error)
            raise
        finally:
            lock.release()

    def _check_request(self, inquiry: Inquiry, error: EmbeddingError) -> None:
        # The two that failed may both be bad: bad texts are often short.
        if not self._serves(inquiry, error):
            raise self._request_at_fault(error)

    def _serves(self, inquiry: Inquiry, error: EmbeddingError) -> bool | None:
        """Whether a short sentence of ours passes, which is sent because of this error; None if it
        is not sent, for what it may cost."""
        charged = error.billed != "no"
        amount = priced_alone(self._call, PROBE_TEXT).amount
        if charged and amount.tokens > inquiry.tokens_left:
            return None
        attempts = Attempts(text=PROBE_TEXT, fresh=True, once=True, asked=inquiry.asked)
        try:
            return self._passes(attempts)
        except BudgetExceeded:
            return None
        finally:
            inquiry.tokens_left -= attempts.unconfirmed

    def _passes(self, attempts: Attempts) -> bool:
        """Whether the provider embeds this text, which is none of the call's. It is paid for.

        Raises ``BudgetExceeded`` if it cannot be.
        """
        try:
            send_alone(self._call, attempts)
        except BudgetExceeded:
            raise
        except EmbeddingError:
            return False
        return True

    def _check_server(self, error: EmbeddingError) -> None:
        """Raises ``error`` if a text without fault is refused as well, unless one just passed."""
        if self._in_a_row < _ALIKE_IN_A_ROW:
            return
        try:
            serves = self._passes(Attempts(text=PROBE_TEXT, fresh=True, once=True))
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
