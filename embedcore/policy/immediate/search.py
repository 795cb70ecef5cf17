"""The search for what is at fault in a failed request: its size, a text, or the request itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from embedcore.errors import (
    EmbeddingError,
    InputRejected,
    InputTooLong,
    InvalidResponse,
    RateLimited,
    RequestTooLarge,
    TimedOut,
    TransientProviderError,
)
from embedcore.policy.immediate.attempts import Attempts, logger, send
from embedcore.policy.immediate.shortening import Shortening, may_be_length
from embedcore.policy.immediate.verdict import Inquiry, Verdict, copied
from embedcore.policy.planning import PlannedRequest, Size, plan_requests
from embedcore.policy.retry import is_about_no_text

if TYPE_CHECKING:
    from embedcore.policy.immediate.call import Call


# A search charges no more than this, times the amount of the request with which it began.
_MOST_CHARGED: Final = 2
# A text with so large a share of the bytes of a request is heavy.
_SHARE_OF_HEAVY: Final = 8
_SMALLER: Final = (
    "%s. Requests of fewer texts were answered as they should be, and are sent instead; what was "
    "billed for larger ones is lost"
)


@dataclass(kw_only=True, slots=True)
class _Siblings:
    """The parts into which one request was divided."""

    one_passed: bool = False


@dataclass(kw_only=True, slots=True)
class _Suspect:
    """Texts that failed together, or are left of such, and the error of that.

    - ``size``: of the request that failed.
    - ``served``: the last request that had been answered when it was sent.
    - ``named``: the text that the error names, if it names one.
    - ``untried``: these very texts were not sent together yet.
    - ``waited``: they have had all their attempts.
    - ``siblings``: the parts of the same request.
    """

    part: PlannedRequest
    error: EmbeddingError
    size: Size
    served: int
    named: int | None = None
    untried: bool = False
    waited: bool = False
    siblings: _Siblings = field(default_factory=_Siblings)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """``passed``: vectors came, ``whole``: for every text. ``error``: to be searched for further.

    Neither: it failed for a reason that no smaller request avoids, and that was noted. ``served``:
    the last request that had been answered before it was sent.
    """

    passed: bool = False
    whole: bool = False
    error: EmbeddingError | None = None
    served: int = 0


class Search:
    """Sends the requests of one call, and divides one that fails until what is at fault is alone.

    The rules and their bounds: ``docs/decisions/0017-one-search.md``.
    """

    def __init__(self, call: Call, after: EmbeddingError | None = None) -> None:
        """``after``: why a request failed that had the texts of the call, and those of others."""
        self._call = call
        self._engine = call.engine
        self._verdict = Verdict(call)
        self._after = after

    def run(self, request: PlannedRequest) -> None:
        """Give every text of the request its vector or its error. Raises what ends the call."""
        with self._engine.sizes.turn(request.size) as may_leave:
            if may_leave:
                self._send(request)
                return
        for part in self._planned(request.indices):
            self.run(part)

    def _send(self, request: PlannedRequest) -> None:
        inquiry, attempts = None, self._first_attempts()
        served = self._engine.learned.served
        try:
            missing = send(self._call, request, attempts)
        except EmbeddingError as error:
            if error.budget_blocked or is_about_no_text(error):
                self._call.fail(request.indices, error)
                return
            inquiry = self._inquiry(request, self._verdict.failed(error))
            inquiry.retries, inquiry.asked = attempts.retries, attempts.asked
            self._search(inquiry, request, served)
        else:
            self._passed(request, missing)
            if missing:
                inquiry = self._inquiry(request, self._without_vectors(missing, request))
                self._each_alone(inquiry, missing, inquiry.error)
        if inquiry is not None and inquiry.culprit is not None:
            index, reason = inquiry.culprit
            self._call.fail([index], reason)

    def _first_attempts(self) -> Attempts:
        after = self._after
        if after is None:
            return Attempts()
        attempts = Attempts(after=after, resumed=isinstance(after, TransientProviderError))
        # The call has reserved anew since.
        attempts.fresh = False
        if attempts.resumed and not isinstance(after, RateLimited):
            # One request failed, for many callers. That each is sent once by itself is no retry.
            self._engine.quota.give_back(1)
        return attempts

    def _inquiry(self, request: PlannedRequest, error: EmbeddingError) -> Inquiry:
        return Inquiry(error=error, tokens_left=_MOST_CHARGED * request.amount.tokens)

    def _search(self, inquiry: Inquiry, request: PlannedRequest, served: int) -> None:
        """Divide the request until each text of it has its vector or its own error.

        Without ``on_error="keep"`` only what comes before a text at fault is searched further.
        """
        whole = self._suspect(request, inquiry.error, served=served, waited=True)
        pending = [whole] if len(request.indices) == 1 else self._begin(inquiry, whole)
        while pending:
            suspect = self._before_culprit(inquiry, pending.pop())
            if suspect is not None:
                pending += reversed(self._narrow(inquiry, suspect))

    def _begin(self, inquiry: Inquiry, whole: _Suspect) -> list[_Suspect]:
        """Before anything has succeeded it may be the request itself: two texts tell, each alone.

        Returns what is to be searched, the last first.
        """
        learned = self._engine.learned
        if learned.proven or isinstance(whole.error, InputRejected):
            return [whole]
        pair = self._verdict.pair(whole.part.indices)
        if pair is None:
            return [whole]
        with self._verdict.one_at_a_time():
            if learned.proven:
                return [whole]
            return self._probe(inquiry, whole, pair)

    def _probe(self, inquiry: Inquiry, whole: _Suspect, pair: tuple[int, int]) -> list[_Suspect]:
        siblings, failed, asked = _Siblings(), list[_Suspect](), set[int]()
        for index in pair:
            part = self._part([index])
            if not self._may_try(inquiry, part, whole, free=siblings.one_passed):
                self._give_up(inquiry, [i for i in whole.part.indices if i not in asked])
                return failed
            outcome = self._try(inquiry, part, Attempts(after=whole.error, once=True))
            asked.add(index)
            if outcome.error is not None:
                failed.append(
                    self._suspect(part, outcome.error, served=outcome.served, siblings=siblings)
                )
            elif outcome.passed:
                siblings.one_passed = True
                break
        if len(failed) == len(pair):
            one, other = failed
            self._verdict.both_failed(inquiry, one.error, other.error)
        left = [index for index in whole.part.indices if index not in asked]
        if not left:
            return failed[::-1]
        # What is left may be good, if a text at fault is no longer among it.
        untried = bool(failed) or len(left) == 1
        rest = replace(whole, part=self._part(left), untried=untried, siblings=siblings)
        return [rest, *failed[::-1]]

    def _narrow(self, inquiry: Inquiry, suspect: _Suspect) -> list[_Suspect]:
        """One step closer to what is at fault: the parts of these texts that failed."""
        found: _Suspect | None = suspect
        known = self._engine.sizes.known
        if suspect.untried and (known is None or known.allows(suspect.part.size)):
            if not self._may_try(inquiry, suspect.part, suspect):
                self._give_up(inquiry, suspect.part.indices)
                return []
            found = self._tried(inquiry, suspect, Attempts(after=suspect.error, once=True))
        if found is not None and self._is_waited_for(inquiry, found):
            found = self._tried(inquiry, found, Attempts(after=found.error, resumed=True))
        if found is None:
            return []
        if len(found.part) == 1:
            self._alone(inquiry, found)
            return []
        return self._divide(inquiry, found)

    def _tried(self, inquiry: Inquiry, suspect: _Suspect, attempts: Attempts) -> _Suspect | None:
        """The same texts after these attempts; None if there is nothing more to find out."""
        outcome = self._try(inquiry, suspect.part, attempts)
        suspect.siblings.one_passed |= outcome.passed
        if outcome.error is None:
            return None
        return self._suspect(
            suspect.part, outcome.error, served=outcome.served, siblings=suspect.siblings
        )

    def _is_waited_for(self, inquiry: Inquiry, suspect: _Suspect) -> bool:
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

    def _divide(self, inquiry: Inquiry, suspect: _Suspect) -> list[_Suspect]:
        siblings, failed, passed = _Siblings(), list[_Suspect](), list[Size]()
        parts, left = 0, set(suspect.part.indices)
        for part in self._parts(suspect, passed):
            if not self._may_try(inquiry, part, suspect, free=siblings.one_passed):
                self._give_up(inquiry, sorted(left))
                return failed
            left.difference_update(part.indices)
            outcome = self._try(inquiry, part, Attempts(after=suspect.error, once=True))
            siblings.one_passed |= outcome.passed
            parts += 1
            if outcome.whole:
                passed.append(part.size)
            elif outcome.error is not None:
                failed.append(
                    self._suspect(part, outcome.error, served=outcome.served, siblings=siblings)
                )
        if left:
            rest = self._part(sorted(left))
            failed.append(replace(suspect, part=rest, untried=True, siblings=siblings))
        elif len(passed) == parts:
            self._was_size(suspect, passed)
        return failed

    def _was_size(self, suspect: _Suspect, passed: Sequence[Size]) -> None:
        """The same texts, and none of the parts failed."""
        error = suspect.error
        lasting = isinstance(error, TimedOut) or not isinstance(error, TransientProviderError)
        self._engine.sizes.learn(suspect.size, passed, lasting=lasting)
        if isinstance(error, InvalidResponse):
            # No error will say so: every text has its vector, for twice the money.
            self._engine.learned.smaller.do(partial(logger.warning, _SMALLER, error.message))

    def _parts(self, suspect: _Suspect, passed: Sequence[Size]) -> Iterable[PlannedRequest]:
        """What to send instead; ``passed``: which of it brought all of its vectors so far."""
        indices, error = suspect.part.indices, suspect.error
        known = self._engine.sizes.known
        if known is not None and not known.allows(suspect.part.size):
            return self._planned(indices)
        if suspect.named in indices and suspect.named is not None:
            others = [index for index in indices if index != suspect.named]
            return [self._part([suspect.named]), self._part(others)]
        heavy = self._heavy(suspect)
        if heavy:
            # The others first: once they have passed, the heavy ones are not waited for.
            others = [index for index in indices if index not in heavy]
            return [self._part(others), *(self._part([index]) for index in heavy)]
        most = error.max_texts if isinstance(error, RequestTooLarge) else None
        if most is not None and 0 < most < len(indices):
            return self._parts_as_named(indices, most, passed)
        middle = len(indices) - len(indices) // 2
        return [self._part(indices[:middle]), self._part(indices[middle:])]

    def _parts_as_named(
        self, indices: Sequence[int], most: int, passed: Sequence[Size]
    ) -> Iterator[PlannedRequest]:
        """As many texts as the server seems to allow, then twice as many, until one fails.

        The number may be wrong, or about something else: where it is too small, that is found out
        in about as few requests as without one. Where it is right, that costs one request. What is
        left waits until it is known why that one failed.
        """
        at, size, sent = 0, most, 0
        while at < len(indices) and len(passed) == sent:
            yield self._part(indices[at : at + size])
            at, size, sent = at + size, 2 * size, sent + 1

    def _heavy(self, suspect: _Suspect) -> list[int]:
        """The few texts that make up most of what an attempt costs, where failed ones are charged.

        Each part that has one costs nearly as much as the whole, and what may be charged would be
        used up before the others were sent without them.
        """
        if suspect.error.billed == "no":
            return []
        indices, sizes = suspect.part.indices, self._call.prepared.sizes
        whole = sum(sizes[index] for index in indices)
        heavy = [index for index in indices if _SHARE_OF_HEAVY * sizes[index] >= whole]
        is_most = 2 * sum(sizes[index] for index in heavy) > whole
        return heavy if is_most and len(heavy) < len(indices) else []

    def _try(self, inquiry: Inquiry, part: PlannedRequest, attempts: Attempts) -> _Outcome:
        attempts.asked, served = inquiry.asked, self._engine.learned.served
        try:
            missing = send(self._call, part, attempts)
        except EmbeddingError as error:
            if not error.budget_blocked and not is_about_no_text(error):
                return _Outcome(error=self._verdict.failed(error), served=served)
            self._call.fail(part.indices, error)
            return _Outcome()
        finally:
            inquiry.tokens_left -= attempts.unconfirmed
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
        inquiry: Inquiry,
        part: PlannedRequest,
        suspect: _Suspect | None = None,
        *,
        free: bool = False,
    ) -> bool:
        """Whether a part of what failed may be sent, by the deadline, what was charged so far and
        the retry quota.

        What is sent because of an error that may be over by now takes from the quota, unless
        others of the same request have passed (``free``). Where the quota is used up, it is not
        sent if no other request is answered either.
        """
        if self._call.is_late or part.amount.tokens > inquiry.tokens_left:
            return False
        if free or suspect is None or suspect.siblings.one_passed:
            return True
        if not isinstance(suspect.error, TransientProviderError):
            return True
        if self._engine.quota.take():
            inquiry.retries += 1
            return True
        return not self._verdict.is_outage(inquiry, suspect.error, suspect.served)

    def _give_up(self, inquiry: Inquiry, indices: Sequence[int]) -> None:
        """These are not searched further: they fail for the reason with which it began."""
        if inquiry.culprit is None and indices:
            error = copied(inquiry.error)
            error.message += "; which of its texts is at fault was not found out"
            self._call.fail(sorted(indices), error, blame=False)

    def _each_alone(self, inquiry: Inquiry, missing: Sequence[int], error: EmbeddingError) -> None:
        """Texts without a vector in a reply that had others: each is asked once more, alone."""
        served = self._engine.learned.served
        for index in missing:
            self._narrow(
                inquiry, self._suspect(self._part([index]), error, served=served, untried=True)
            )
            if inquiry.culprit is not None:
                return

    def _alone(self, inquiry: Inquiry, suspect: _Suspect) -> None:
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
            self._verdict.failed_alone(inquiry, index, error)
        if self._call.keeps:
            self._call.fail([index], error)
        else:
            inquiry.blame(index, error)

    def _shorten(self, inquiry: Inquiry, index: int, error: EmbeddingError) -> bool:
        """Whether the text's row has its outcome: the vector of its beginning, or why the search
        for that ended."""
        shortening = Shortening(self._call, self._verdict, inquiry, index, error)
        try:
            if not shortening.run():
                return False
        except EmbeddingError as other:
            if other is shortening.ending:
                raise
            self._call.fail([index], other)
            return True
        self._verdict.passed()
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

    def _passed(self, request: PlannedRequest, missing: Sequence[int]) -> None:
        self._verdict.passed()
        if not missing:
            self._engine.sizes.passed(request.size)

    def _without_vectors(self, missing: Sequence[int], request: PlannedRequest) -> InvalidResponse:
        return InvalidResponse(
            f"{self._engine.label} returned null, nothing or NaN instead of a vector for "
            f"{len(missing)} of {len(request.indices)} texts",
            billed="yes",
        )

    def _before_culprit(self, inquiry: Inquiry, suspect: _Suspect) -> _Suspect | None:
        if inquiry.culprit is None or suspect.untried:
            return suspect
        indices = suspect.part.indices
        before = [index for index in indices if index < inquiry.culprit[0]]
        if len(before) == len(indices):
            return suspect
        return replace(suspect, part=self._part(before), untried=True) if before else None

    def _suspect(
        self,
        part: PlannedRequest,
        error: EmbeddingError,
        *,
        served: int,
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
            served=served,
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
