"""What is at fault where a request fails: its size, one of its texts, or the request itself."""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from embedcore.errors import (
    AuthenticationFailed,
    BudgetExceeded,
    EmbeddingError,
    InputRejected,
    InputTooLong,
    InvalidResponse,
    ModelNotFound,
    PermissionDenied,
    ProviderError,
    QuotaExhausted,
    RemoteGone,
    ReplyMismatch,
    RequestTooLarge,
    TimedOut,
    TransientProviderError,
)
from embedcore.policy.planning import PlannedRequest, plan_requests
from embedcore.policy.probing import PROBE_TEXT
from embedcore.policy.retry import is_about_the_moment
from embedcore.policy.sending import Attempts, blocked
from embedcore.policy.shortening import Shortening, may_be_length
from embedcore.policy.sizes import Size

if TYPE_CHECKING:
    from embedcore.policy.immediate import Call

# After so many requests in a row that failed alike, a text without fault is sent.
_ALIKE_IN_A_ROW: Final = 64
# A search charges no more than this, times the amount of the request with which it began.
_MOST_CHARGED: Final = 2
_LOOK_SECONDS: Final = 0.25
# Texts of fewer letters are as likely to be at fault as very long ones.
_FEW_LETTERS: Final = 4
_LOOKED_AT: Final = 100


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


@dataclass(kw_only=True, slots=True)
class _Siblings:
    """The parts into which one request was divided."""

    one_passed: bool = False


@dataclass(kw_only=True, slots=True)
class _Suspect:
    """Texts that failed together, or are left of such, and the error of that.

    - ``size``: of the request that failed.
    - ``named``: the text that the error names, if it names one.
    - ``untried``: these very texts were not sent together yet.
    - ``waited``: they have had all their attempts.
    - ``siblings``: the parts of the same request.
    """

    part: PlannedRequest
    error: EmbeddingError
    size: Size
    named: int | None = None
    untried: bool = False
    waited: bool = False
    siblings: _Siblings = field(default_factory=_Siblings)


@dataclass(kw_only=True, slots=True)
class _Inquiry:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """``passed``: vectors came, ``whole``: for every text. ``error``: to be searched for further.

    Neither: it failed for a reason that no smaller request avoids, and that was noted.
    """

    passed: bool = False
    whole: bool = False
    error: EmbeddingError | None = None


class Search:
    """Sends the requests of one call, and divides one that fails until what is at fault is alone.

    The rules and their bounds: ``docs/decisions/0017-one-search.md``.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._engine = call.engine
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._last: tuple[object, ...] | None = None
        self._first_refused: tuple[int, tuple[object, ...]] | None = None

    def run(self, request: PlannedRequest) -> None:
        """Give every text of the request its vector or its error. Raises what ends the call."""
        with self._engine.sizes.turn(request.size) as may_leave:
            if may_leave:
                self._send(request)
                return
        for part in self._planned(request.indices):
            self.run(part)

    def _send(self, request: PlannedRequest) -> None:
        inquiry, attempts = None, Attempts()
        try:
            missing = self._call.sender.send(request, attempts)
        except EmbeddingError as error:
            if error.budget_blocked or is_about_no_text(error):
                self._call.fail(request.indices, error)
                return
            inquiry = self._inquiry(request, self._failed(error))
            inquiry.retries, inquiry.asked = attempts.retries, attempts.asked
            self._search(inquiry, request)
        else:
            self._passed(request, missing)
            if missing:
                inquiry = self._inquiry(request, self._without_vectors(missing, request))
                self._each_alone(inquiry, missing, inquiry.error)
        if inquiry is not None and inquiry.culprit is not None:
            index, reason = inquiry.culprit
            self._call.fail([index], reason)

    def _inquiry(self, request: PlannedRequest, error: EmbeddingError) -> _Inquiry:
        return _Inquiry(error=error, tokens_left=_MOST_CHARGED * request.amount.tokens)

    def _search(self, inquiry: _Inquiry, request: PlannedRequest) -> None:
        """Divide the request until each text of it has its vector or its own error.

        Without ``on_error="keep"`` only what comes before a text at fault is searched further.
        """
        whole = self._suspect(request, inquiry.error, waited=True)
        pending = [whole] if len(request) == 1 else self._begin(inquiry, whole)
        while pending:
            suspect = self._before_culprit(inquiry, pending.pop())
            if suspect is not None:
                pending += reversed(self._narrow(inquiry, suspect))

    def _begin(self, inquiry: _Inquiry, whole: _Suspect) -> list[_Suspect]:
        """Before anything has succeeded it may be the request itself: two texts tell, each alone.

        Returns what is to be searched, the last first.
        """
        learned = self._engine.learned
        if learned.proven or isinstance(whole.error, InputRejected):
            return [whole]
        pair = self._pair(whole.part.indices)
        if pair is None:
            return [whole]
        with self._one_at_a_time(learned.probing):
            if learned.proven:
                return [whole]
            return self._probe(inquiry, whole, pair)

    def _probe(self, inquiry: _Inquiry, whole: _Suspect, pair: tuple[int, int]) -> list[_Suspect]:
        siblings, failed, asked = _Siblings(), list[_Suspect](), set[int]()
        for index in pair:
            part = self._part([index])
            if not self._may_try(inquiry, part, whole, free=siblings.one_passed):
                self._give_up(inquiry, [i for i in whole.part.indices if i not in asked])
                return failed
            outcome = self._try(inquiry, part, Attempts(after=whole.error, once=True))
            asked.add(index)
            if outcome.error is not None:
                failed.append(self._suspect(part, outcome.error, siblings=siblings))
            elif outcome.passed:
                siblings.one_passed = True
                break
        if len(failed) == len(pair):
            self._judge_request(*failed)
        left = [index for index in whole.part.indices if index not in asked]
        if not left:
            return failed[::-1]
        # What is left may be good, if a text at fault is no longer among it.
        untried = bool(failed) or len(left) == 1
        rest = replace(whole, part=self._part(left), untried=untried, siblings=siblings)
        return [rest, *failed[::-1]]

    def _judge_request(self, one: _Suspect, other: _Suspect) -> None:
        if nature(one.error) == nature(other.error) and not isinstance(one.error, InputRejected):
            raise self._request_at_fault(one.error)

    def _narrow(self, inquiry: _Inquiry, suspect: _Suspect) -> list[_Suspect]:
        """One step closer to what is at fault: the parts of these texts that failed."""
        if suspect.untried and not self._may_try(inquiry, suspect.part, suspect):
            self._give_up(inquiry, suspect.part.indices)
            return []
        found: _Suspect | None = suspect
        if suspect.untried:
            found = self._tried(inquiry, suspect, Attempts(after=suspect.error, once=True))
        if found is not None and self._is_waited_for(inquiry, found):
            found = self._tried(inquiry, found, Attempts(after=found.error, resumed=True))
        if found is None:
            return []
        if len(found.part) == 1:
            self._alone(inquiry, found)
            return []
        return self._divide(inquiry, found)

    def _tried(self, inquiry: _Inquiry, suspect: _Suspect, attempts: Attempts) -> _Suspect | None:
        """The same texts after these attempts; None if there is nothing more to find out."""
        outcome = self._try(inquiry, suspect.part, attempts)
        suspect.siblings.one_passed |= outcome.passed
        if outcome.error is None:
            return None
        return self._suspect(suspect.part, outcome.error, siblings=suspect.siblings)

    def _is_waited_for(self, inquiry: _Inquiry, suspect: _Suspect) -> bool:
        """Whether these texts have the usual attempts before them, as any request has.

        Not once others of the same request have passed, or the size is known to be too large.
        """
        if suspect.waited or suspect.siblings.one_passed:
            return False
        known, most = self._engine.sizes.known, self._engine.retry.attempts - 1
        return (
            isinstance(suspect.error, TransientProviderError)
            and (known is None or known.allows(suspect.part.size))
            and suspect.part.amount.tokens * most <= inquiry.tokens_left
        )

    def _divide(self, inquiry: _Inquiry, suspect: _Suspect) -> list[_Suspect]:
        siblings, failed, passed = _Siblings(), list[_Suspect](), list[Size]()
        parts = self._parts(suspect)
        for number, part in enumerate(parts):
            if not self._may_try(inquiry, part, suspect, free=siblings.one_passed):
                left = [index for part in parts[number:] for index in part.indices]
                self._give_up(inquiry, left)
                break
            outcome = self._try(inquiry, part, Attempts(after=suspect.error, once=True))
            siblings.one_passed |= outcome.passed
            if outcome.whole:
                passed.append(part.size)
            elif outcome.error is not None:
                failed.append(self._suspect(part, outcome.error, siblings=siblings))
        if len(passed) == len(parts):
            # The same texts, and nothing failed: it was the size.
            error = suspect.error
            lasting = isinstance(error, TimedOut) or not isinstance(error, TransientProviderError)
            self._engine.sizes.learn(suspect.size, passed, lasting=lasting)
        return failed

    def _parts(self, suspect: _Suspect) -> list[PlannedRequest]:
        indices, error = suspect.part.indices, suspect.error
        known = self._engine.sizes.known
        if known is not None and not known.allows(suspect.part.size):
            return self._planned(indices)
        if suspect.named in indices and suspect.named is not None:
            others = [index for index in indices if index != suspect.named]
            return [self._part([suspect.named]), self._part(others)]
        most = error.max_texts if isinstance(error, RequestTooLarge) else None
        if most is None or not 0 < most < len(indices):
            most = len(indices) - len(indices) // 2
        return [self._part(indices[at : at + most]) for at in range(0, len(indices), most)]

    def _try(self, inquiry: _Inquiry, part: PlannedRequest, attempts: Attempts) -> _Outcome:
        attempts.asked = inquiry.asked
        try:
            missing = self._call.sender.send(part, attempts)
        except EmbeddingError as error:
            if not error.budget_blocked and not is_about_no_text(error):
                return _Outcome(error=self._failed(error))
            self._call.fail(part.indices, error)
            return _Outcome()
        finally:
            inquiry.tokens_left -= attempts.uncertain
            inquiry.retries += attempts.retries
        self._passed(part, missing)
        # A part of what failed has passed: it is no outage that retries would make worse.
        self._engine.quota.give_back(inquiry.retries)
        inquiry.retries = 0
        if missing:
            self._each_alone(inquiry, missing, self._without_vectors(missing, part))
        return _Outcome(passed=True, whole=not missing)

    def _may_try(
        self,
        inquiry: _Inquiry,
        part: PlannedRequest,
        suspect: _Suspect | None = None,
        *,
        free: bool = False,
    ) -> bool:
        """Whether a part of what failed may be sent, by the deadline, what was charged so far and
        the retry quota.

        What is sent because of an error that may be over by now takes from the quota, unless
        others of the same request have passed (``free``).
        """
        if self._call.sender.is_late or part.amount.tokens > inquiry.tokens_left:
            return False
        if free or suspect is None or suspect.siblings.one_passed:
            return True
        if not isinstance(suspect.error, TransientProviderError):
            return True
        taken = self._engine.quota.take()
        inquiry.retries += taken
        return taken

    def _give_up(self, inquiry: _Inquiry, indices: Sequence[int]) -> None:
        """These are not searched further: they fail for the reason with which it began."""
        if inquiry.culprit is None and indices:
            error = _copied(inquiry.error)
            error.message += "; which of its texts is at fault was not found out"
            self._call.fail(sorted(indices), error, blame=False)

    def _each_alone(self, inquiry: _Inquiry, missing: Sequence[int], error: EmbeddingError) -> None:
        """Texts without a vector in a reply that had others: each is asked once more, alone."""
        for index in missing:
            self._narrow(inquiry, self._suspect(self._part([index]), error, untried=True))
            if inquiry.culprit is not None:
                return

    def _alone(self, inquiry: _Inquiry, suspect: _Suspect) -> None:
        """One text failed by itself. What is too long can be cut; anything else is its own."""
        (index,), error = suspect.part.indices, suspect.error
        if may_be_length(self._call, index, error) and self._shorten(inquiry, index, error):
            return
        self._say_how_to_cut(error)
        if isinstance(error, TransientProviderError):
            if suspect.siblings.one_passed:
                error.retryable = False
                error.message += "; others of the same request passed without this text"
        else:
            self._ask_other_half(index, error)
        if self._call.keeps:
            self._call.fail([index], error)
        else:
            inquiry.blame(index, error)

    def _shorten(self, inquiry: _Inquiry, index: int, error: EmbeddingError) -> bool:
        """Whether the text's row has its outcome: the vector of its beginning, or why the search
        for that ended."""

        ending: EmbeddingError | None = None

        def may_send(tokens: int) -> bool:
            return not self._call.sender.is_late and tokens <= inquiry.tokens_left

        def sent(attempts: Attempts, refusal: EmbeddingError | None) -> None:
            inquiry.tokens_left -= attempts.uncertain
            inquiry.retries += attempts.retries
            if refusal is not None:
                try:
                    self._failed(refusal)
                except EmbeddingError as error:
                    nonlocal ending
                    ending = error
                    raise

        shortening = Shortening(
            self._call, index, error, may_send=may_send, sent=sent, asked=inquiry.asked
        )
        try:
            if not shortening.run():
                return False
        except EmbeddingError as other:
            if other is ending:
                raise
            self._call.fail([index], other)
            return True
        with self._lock:
            self._in_a_row, self._last = 0, None
        self._engine.quota.give_back(inquiry.retries)
        inquiry.retries = 0
        return True

    def _say_how_to_cut(self, error: EmbeddingError) -> None:
        unknown = self._engine.info.max_input_tokens is None
        if isinstance(error, InputTooLong) and unknown and self._engine.overlong == "truncate":
            error.message += (
                "; to have such texts cut, say how long a text may be: max_input_tokens, where the "
                "provider has that option"
            )

    def _failed(self, error: EmbeddingError) -> EmbeddingError:
        """A server that refuses whatever it is sent must not be asked once for each text."""
        if isinstance(error, TransientProviderError) or not self._call.keeps:
            return error
        with self._lock:
            before, self._last = self._last, nature(error)
            self._in_a_row = self._in_a_row + 1 if self._last == before else 1
            is_time = self._in_a_row >= _ALIKE_IN_A_ROW
        if is_time:
            with self._one_at_a_time(self._engine.learned.probing):
                self._check_server(error)
        return error

    def _check_server(self, error: EmbeddingError) -> None:
        """Raises ``error`` if a text without fault is refused as well, unless one just passed."""
        if self._in_a_row < _ALIKE_IN_A_ROW:
            return
        try:
            serves = self._call.serves(PROBE_TEXT)
        except BudgetExceeded as refusal:
            raise blocked(_copied(error), refusal) from refusal
        if not serves:
            raise self._serves_nothing(error)
        with self._lock:
            self._in_a_row = 0

    def _ask_other_half(self, index: int, error: EmbeddingError) -> None:
        """Where requests have one text, two alike from different halves tell that it is no text."""
        texts, learned = self._call.prepared.texts, self._engine.learned
        if learned.proven or isinstance(error, InputRejected) or not _speaks(texts[index]):
            return
        with self._one_at_a_time(learned.probing):
            if learned.proven:
                return
            first, middle = self._first_refused, len(texts) // 2
            if first is None:
                self._first_refused = index, nature(error)
                self._call.crew.do_last()
            elif first[1] == nature(error) and (first[0] < middle) != (index < middle):
                raise self._request_at_fault(error)

    def _passed(self, request: PlannedRequest, missing: Sequence[int]) -> None:
        with self._lock:
            self._in_a_row, self._last = 0, None
        if not missing:
            self._engine.sizes.passed(request.size)

    def _without_vectors(self, missing: Sequence[int], request: PlannedRequest) -> InvalidResponse:
        return InvalidResponse(
            f"{self._engine.label} returned null, nothing or NaN instead of a vector for "
            f"{len(missing)} of {len(request)} texts",
            billed="yes",
        )

    def _request_at_fault(self, error: EmbeddingError) -> EmbeddingError:
        error = _copied(error)
        error.position = None
        error.message += (
            ". It is no text's fault: two of them failed alike, each alone, and nothing has "
            "succeeded with these settings yet"
        )
        return error

    def _serves_nothing(self, error: EmbeddingError) -> EmbeddingError:
        error = _copied(error)
        error.position = None
        error.message += (
            f". The last {_ALIKE_IN_A_ROW} requests failed alike, and so did a short sentence: "
            "nothing more is sent"
        )
        return error

    def _before_culprit(self, inquiry: _Inquiry, suspect: _Suspect) -> _Suspect | None:
        if inquiry.culprit is None or suspect.untried:
            return suspect
        indices = suspect.part.indices
        before = [index for index in indices if index < inquiry.culprit[0]]
        if len(before) == len(indices):
            return suspect
        return replace(suspect, part=self._part(before), untried=True) if before else None

    def _pair(self, indices: Sequence[int]) -> tuple[int, int] | None:
        """A short text of each half that is not blank; None if a half has none."""
        middle = len(indices) // 2
        one, other = self._shortest(indices[:middle]), self._shortest(indices[middle:])
        return None if one is None or other is None else (one, other)

    def _shortest(self, indices: Sequence[int]) -> int | None:
        """The shortest text that says something; one of a few letters only if there is no other."""
        prepared = self._call.prepared

        def rank(index: int) -> tuple[bool, int]:
            letters = sum(map(str.isalnum, prepared.texts[index][:_LOOKED_AT]))
            return letters < _FEW_LETTERS, prepared.sizes[index]

        speaking = [index for index in indices if _speaks(prepared.texts[index])]
        return min(speaking, key=rank, default=None)

    def _suspect(
        self,
        part: PlannedRequest,
        error: EmbeddingError,
        *,
        siblings: _Siblings | None = None,
        untried: bool = False,
        waited: bool = False,
    ) -> _Suspect:
        place = error.position if isinstance(error, InputRejected) else None
        is_named = place is not None and 0 <= place < len(part)
        return _Suspect(
            part=part,
            error=error,
            size=part.size,
            named=part.indices[place] if place is not None and is_named else None,
            siblings=siblings or _Siblings(),
            untried=untried,
            waited=waited,
        )

    def _part(self, indices: Sequence[int]) -> PlannedRequest:
        engine = self._engine
        sizes = self._call.prepared.measured(exact=False)
        return sizes.request(indices, engine.info, engine.learned.scale)

    def _planned(self, indices: Sequence[int]) -> list[PlannedRequest]:
        engine = self._engine
        return plan_requests(
            indices,
            self._call.prepared.measured(exact=False),
            engine.info,
            size=engine.sizes.known,
            scale=engine.learned.scale,
        )

    @contextlib.contextmanager
    def _one_at_a_time(self, lock: threading.RLock) -> Iterator[None]:
        while not lock.acquire(timeout=_LOOK_SECONDS):
            self._call.pause(0.0)
        try:
            self._call.pause(0.0)
            yield
        except EmbeddingError as error:
            # Before the lock is free: whoever waits for it must not ask the same again.
            self._call.crew.fail(error)
            raise
        finally:
            lock.release()


def _speaks(text: str) -> bool:
    """Whether it is more than white space, marks and characters that cannot be seen."""
    return any(map(str.isalnum, text))


def _copied(error: EmbeddingError) -> EmbeddingError:
    """One of its own for each place where it is said: it is told which rows it is about there."""
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin
