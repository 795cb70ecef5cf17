"""One request for the texts of several callers: each reserves, pays and hears of its own share.

Only a plain good reply is shared. What an error, or a text without a vector, means to a caller is
written down for each by the usual rules, and each goes on alone by the recipe.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from embedcore.errors import EmbeddingError, InvalidResponse, TransientProviderError
from embedcore.policy.budget import require_price, settle_all
from embedcore.policy.coroutines import outcome
from embedcore.policy.immediate.attempts import (
    Attempts,
    came,
    checked_reply,
    failed,
    tell_failed,
    tell_rates,
    tell_sent,
    timeout_of,
    with_vectors,
)
from embedcore.policy.immediate.call import Call
from embedcore.policy.immediate.recipe import finish, left_by_others
from embedcore.policy.immediate.reuse import Asking, ask_together, billed_together
from embedcore.policy.immediate.verdict import copied
from embedcore.policy.reply_checks import Checked, billed_tokens, identity
from embedcore.policy.retry import is_about_no_text
from embedcore.policy.threads import LOOK_SECONDS, InFlight, Pause, SentRequest, Stopped
from embedcore.provider.types import EmbedReply, EmbedRequest
from embedcore.storage.amounts import Attempt

if TYPE_CHECKING:
    from embedcore.policy.budget import Bill
    from embedcore.policy.engine import Engine, Stop
    from embedcore.policy.immediate.workers import Workers
    from embedcore.policy.planning import PlannedRequest
    from embedcore.policy.ratelimit.share import Permit
    from embedcore.policy.result import EmbeddingResult


@dataclass(kw_only=True, slots=True, eq=False)
class Member:
    """One caller with a few texts.

    - ``open``: takes its texts in. ``work``: brings it to its end, alone; ``is_free`` as of
      ``embed_now``.
    - ``key``: only members with equal ones share a request. ``in_bytes``: of its texts.
    - ``deadline``: by the engine's clock, or None. ``stop``: set when the caller has gone.
    - ``tell``: takes the result, or the error.
    - ``is_alone``: it shares no request, any more.
    """

    open: Callable[[], Call]
    work: Callable[..., EmbeddingResult]
    key: tuple[Any, ...]
    texts: int
    in_bytes: int
    stop: Stop
    tell: Callable[[Any, BaseException | None], None]
    deadline: float | None = None
    is_alone: bool = False
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def do(self, work: Callable[[], EmbeddingResult]) -> None:
        """Do it in the caller's context, and tell the caller what came of it."""
        self.tell(*self.run(outcome, work))

    def run(self, work: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        """In a copy of the caller's context: two threads may have to do with one caller at once,
        one that gives it up and one that has its answer."""
        return self.context.copy().run(work, *arguments, **how)

    def go_alone(
        self, call: Call, todo: Sequence[int], after: EmbeddingError | None = None
    ) -> None:
        """From now on it is a call like any other, that has these texts to embed.

        Until its turn comes, other calls may have them, and the money reserved for them.
        """
        let_go(call)
        self.is_alone = True
        self.work = partial(finish, call, lambda: todo, after=after)


@dataclass(kw_only=True, slots=True, eq=False)
class _Part:
    """A member's part of the request. ``ended``: when it was first seen that its caller has gone.

    ``on_time``: it was not given up before the answer came. A call that has ended is empty: what is
    watched of it is here.
    """

    member: Member
    call: Call
    request: PlannedRequest
    attempts: Attempts = field(default_factory=Attempts)
    sent: SentRequest | None = None
    ended: float | None = None
    on_time: bool = True
    has_left: bool = False
    pause: Pause = field(init=False)
    in_flight: InFlight = field(init=False)
    workers: Workers = field(init=False)

    def __post_init__(self) -> None:
        call = self.call
        self.pause, self.in_flight, self.workers = call.pause, call.in_flight, call.workers

    def run(self, work: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
        return self.member.run(work, *arguments, **how)


class Together:
    """Embeds the texts of these members, of one client, in one request.

    ``is_free`` is called once, when the request is no longer in flight; ``again`` with each member
    that goes on alone, and ``ended`` with how it went: texts, and whether all was well.
    """

    def __init__(
        self,
        engine: Engine,
        members: Sequence[Member],
        *,
        is_free: Callable[[], None],
        again: Callable[[Member], None],
        ended: Callable[[int, bool], None],
    ) -> None:
        self._engine = engine
        self._members = members
        self._is_free = is_free
        self._again = again
        self._ended = ended
        self._waiting: list[tuple[Member, Call]] = []
        self._parts: list[_Part] = []
        # Those that have no outcome yet, and are not on their way alone.
        self._open: list[_Part] = []
        self._over = threading.Event()

    def run(self) -> None:
        """Give every member its outcome, or send it on its way alone. Never raises."""
        try:
            for part in self._opened():
                self._parts.append(part)
                self._open.append(part)
            self._leave()
        except BaseException as error:  # noqa: BLE001 - a thread of the front must not end with it
            self._fail_all(error)
        finally:
            self._is_free()
        # Nothing that others wait for is left to be sent here: now it may be waited for them.
        for member, call in self._waiting:
            member.do(partial(finish, call, partial(left_by_others, call)))

    def _opened(self) -> Iterator[_Part]:
        """The members' parts: of those of whom there is something to send here."""
        opened: list[tuple[Member, Call]] = []
        for member in self._members:
            call, error = member.run(outcome, member.open)
            if call is None:
                member.tell(None, error)
            else:
                opened.append((member, call))
        for (member, call), (todo, error) in zip(opened, self._missing(opened), strict=True):
            if todo is None:
                member.do(partial(finish, call, partial(_raise, error)))
            elif not todo:
                self._waits_or_ends(member, call)
            elif (part := self._planned(member, call, todo)) is not None:
                yield part

    def _missing(
        self, opened: Sequence[tuple[Member, Call]]
    ) -> list[tuple[Sequence[int] | None, BaseException | None]]:
        """What each must pay for, or why it cannot go on. They are looked up and claim at once."""
        asking = [
            Asking(reuse=call.reuse, indices=range(len(call.prepared.texts)), run=member.run)
            for member, call in opened
            if call.reuse is not None
        ]
        if not asking:
            return [(range(len(call.prepared.texts)), None) for _, call in opened]
        _, failed = outcome(partial(ask_together, asking))
        errors = [one.error or failed for one in asking]
        return [
            (one.missing, None) if error is None else (None, _own(error))
            for one, error in zip(asking, errors, strict=True)
        ]

    def _planned(self, member: Member, call: Call, todo: Sequence[int]) -> _Part | None:
        """A member's part; None if it cannot be sent here, and goes alone."""
        requests, _ = member.run(outcome, partial(call.prepared.plan, exact=False, indices=todo))
        if requests is None or len(requests) != 1 or call.is_late:
            member.go_alone(call, todo)
            self._again(member)
            return None
        return _Part(member=member, call=call, request=requests[0])

    def _end(self, part: _Part, begin: Callable[[], Sequence[int]]) -> None:
        """Bring it to its end, here and now."""
        self._open.remove(part)
        part.member.do(partial(finish, part.call, begin))

    def _send_alone(
        self, part: _Part, todo: Sequence[int], after: EmbeddingError | None = None
    ) -> None:
        self._open.remove(part)
        part.member.go_alone(part.call, todo, after)
        self._again(part.member)

    def _fail_all(self, error: BaseException) -> None:
        """Whatever went wrong here, no caller waits for ever."""
        for part in list(self._open):
            self._end(part, partial(_raise, error))

    def _wait_later(self, member: Member, call: Call) -> None:
        """It waits for what others pay for, once all others of this request have their outcome.

        Until then it has nothing, not even what it has claimed from another process.
        """
        let_go(call)
        self._waiting.append((member, call))

    def _waits_or_ends(self, member: Member, call: Call) -> None:
        if call.buffer.left():
            self._wait_later(member, call)
        else:
            member.do(partial(finish, call, list))

    # On the way out

    def _leave(self) -> None:
        if not self._parts:
            return
        engine, permit = self._engine, None
        try:
            engine.load()
            engine.pool.check_open()
            permit = engine.gate.admit(
                sum(engine.learned.expected_tokens(part.request) for part in self._parts),
                self._pause,
                meanwhile=_nothing,
                texts=sum(len(part.request.indices) for part in self._parts),
                rates=engine.rates,
                share=engine.share,
            )
            self._take_money()
            self._start()
            if self._parts:
                engine.pool.submit(partial(self._exchange, permit))
                permit = None
                self._watch()
        except (EmbeddingError, Stopped):
            # Nothing was sent: each finds out for itself why not.
            for part in list(self._parts):
                self._drop(part)
        finally:
            if permit is not None:
                engine.gate.lost(permit)

    def _pause(self, seconds: float) -> None:
        """Wait for the rate limit; who has gone, or is late, waits for it alone."""
        self._engine.wait_for(self._over, seconds)
        self._engine.renew_claims()
        for part in list(self._parts):
            if part.pause.ended or part.call.is_late:
                self._drop(part)
        if not self._parts:
            raise Stopped

    def _drop(self, part: _Part) -> None:
        """It goes on alone; what was reserved for it and not sent is free again."""
        self._parts.remove(part)
        if part.sent is not None and not part.has_left:
            part.run(part.call.budget.not_sent, part.sent.attempt)
        self._send_alone(part, part.request.indices)

    def _take_money(self) -> None:
        """Reserved for all in one commit. What is refused has its reason when it goes alone."""
        account, engine = self._engine.account, self._engine
        for part in self._parts:
            part.request = part.request.at_scale(engine.learned.scale, engine.info.price)
        ledger = self._parts[0].call.budget.ledger
        found: Sequence[Attempt | Exception | None] = [None] * len(self._parts)
        if ledger is not None:
            account = self._parts[0].call.engine.account
            require_price(account, engine.info)
            found = ledger.spool.asked(
                partial(
                    ledger.hold_and_send_all,
                    account.scope,
                    [(part.request.amount, len(part.request)) for part in self._parts],
                    account.limits,
                    lane=self._parts[0].call.budget.lane,
                    loose=True,
                    final=False,
                    model=engine.label,
                )
            )
        number = engine.learned.leaves()
        for part, attempt in zip(list(self._parts), found, strict=True):
            if isinstance(attempt, Exception):
                self._drop(part)
                continue
            part.run(part.call.budget.began, attempt)
            texts = tuple(part.call.prepared.texts[index] for index in part.request.indices)
            part.sent = SentRequest(
                attempt=attempt, texts=texts, started=engine.monotonic(), number=number
            )

    def _start(self) -> None:
        for part in list(self._parts):
            gone = part.pause.ended
            if gone or part.sent is None or not part.in_flight.start(part.sent):
                self._drop(part)
                continue
            part.has_left = True
            part.attempts.number = 1
            part.run(tell_sent, part.call.engine, part.request, 1)

    def _watch(self) -> None:
        """Until the answer is there, or is waited for by none of them any more."""
        engine, parts = self._engine, list(self._parts)
        while parts and not self._over.wait(LOOK_SECONDS):
            engine.renew_claims()
            for part in list(parts):
                if part.pause.ended and part.ended is None:
                    part.ended = engine.monotonic()
                gone = part.ended is not None and engine.monotonic() > part.ended + engine.grace
                if gone or part.workers.is_late():
                    parts.remove(part)
                    self._give_up(part)
        if not parts:
            # It hangs in the provider, perhaps for good.
            for part in self._parts:
                if part.sent is not None:
                    engine.pool.replace(part.sent.thread)

    def _give_up(self, part: _Part) -> None:
        """It is waited for no longer, and charged; should its answer come, that is corrected."""
        late = part.workers.is_late()
        why = "the call's deadline passed" if late else "the call was interrupted"
        given_up = part.in_flight.give_up()
        for sent in given_up:
            part.run(part.workers.give_up, sent, why)
        if given_up:
            error = part.workers.too_late() if late else Stopped()
            self._end(part, partial(_raise, error))

    # On the way back, in a thread of the pool

    def _exchange(self, permit: Permit) -> None:
        try:
            self._embed(permit)
        except BaseException as error:  # noqa: BLE001 - a task of the pool must not raise
            self._fail_all(error)
        finally:
            self._engine.gate.lost(permit)
            self._over.set()

    def _embed(self, permit: Permit) -> None:
        parts, engine = self._parts, self._engine
        first, failure = parts[0], None
        first.attempts.permit = permit
        texts: list[str] = []
        for part in parts:
            if part.sent is not None:
                part.sent.thread = threading.current_thread()
                texts += part.sent.texts
        try:
            reply = engine.embedder.embed(
                EmbedRequest(
                    texts=texts,
                    input_type=first.call.input_type,
                    timeout=min(timeout_of(part.call) for part in parts),
                )
            )
            self._is_free()
            tell_rates(first.call, reply, first.attempts)
            checked = checked_reply(first.call, reply, len(texts))
        except BaseException as error:  # noqa: BLE001 - each caller gets its own
            failure = error
        self._is_free()
        # Not inside the handler, where the raw error, a key perhaps in it, would become a context.
        if failure is not None:
            self._failed(failure)
            self._ended(len(texts), False)
        else:
            self._arrived(reply, checked)
            self._ended(len(texts), not checked.missing)

    def _failed(self, failure: BaseException) -> None:
        """What happened costs each its own share, and each goes on alone from there."""
        typed = self._engine.typed(failure)
        for part in self._parts:
            own, call, sent = copied(typed), part.call, part.sent
            if sent is None:
                continue
            _, error = part.run(
                outcome, partial(failed, call, own, sent, part.request, part.attempts)
            )
            part.in_flight.finish(sent)
            if error is not own:
                # It was given up before and has its outcome, or the ledger cannot be written.
                if not isinstance(error, Stopped):
                    self._end(part, partial(_raise, error))
                continue
            if isinstance(own, TransientProviderError):
                seconds = part.attempts.seconds
                part.run(tell_failed, call.engine, own, part.request, seconds=seconds, wait=None)
            elif is_about_no_text(own):
                self._end(part, partial(_fails, part, own))
                continue
            self._send_alone(part, part.request.indices, own)

    def _arrived(self, reply: EmbedReply, checked: Checked) -> None:
        shares = self._shares(billed_tokens(reply))
        own = list(self._divided(checked))
        for part in self._parts:
            if part.sent is not None:
                part.on_time = part.in_flight.answered(part.sent)
        troubles: dict[_Part, BaseException] = {}
        # Kept before it is settled: what can fail there must not lose the vectors.
        try:
            self._keep(own, reply.model, troubles)
        finally:
            bills = self._settle(own, shares, reply)
        for (part, mine), share in zip(own, shares, strict=True):
            if part in bills:
                self._came(part, mine, bills[part], share, reply, troubles.get(part))

    def _divided(self, checked: Checked) -> list[tuple[_Part, Checked]]:
        """What of the reply is whose."""
        own, start, lacking = [], 0, set(checked.missing)
        for part in self._parts:
            end = start + len(part.request)
            places = [place - start for place in range(start, end) if place in lacking]
            zeros = [place - start for place in checked.zeros if start <= place < end]
            vectors = checked.vectors[start:end]
            own.append((part, replace(checked, vectors=vectors, missing=places, zeros=zeros)))
            start = end
        return own

    def _keep(
        self,
        own: Sequence[tuple[_Part, Checked]],
        model: str | None,
        troubles: dict[_Part, BaseException],
    ) -> None:
        theirs = [(part, *with_vectors(part.request, mine)) for part, mine in own]
        theirs = [(part, indices, vectors) for part, indices, vectors in theirs if len(indices)]
        cached = [
            (part.call.reuse, indices, vectors)
            for part, indices, vectors in theirs
            if part.call.reuse is not None
        ]
        if cached:
            billed_together(cached, model)
        for part, indices, vectors in theirs:
            if part.on_time:
                try:
                    part.call.buffer.put(indices, vectors)
                except Exception as error:  # noqa: BLE001 - only its own call ends with it
                    troubles[part] = error

    def _shares(self, tokens: int | None) -> list[int | None]:
        """Of the tokens that the server says it billed, by the counts of the texts."""
        if tokens is None:
            return [None] * len(self._parts)
        counts = [
            (None if part.sent is None else self._engine.counted(part.sent.texts))
            for part in self._parts
        ]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            known = [part.request.amount.tokens for part in self._parts]
        return list(divided(tokens, known))

    def _settle(
        self,
        own: Sequence[tuple[_Part, Checked]],
        shares: Sequence[int | None],
        reply: EmbedReply,
    ) -> dict[_Part, tuple[Bill, int | None]]:
        bills: dict[_Part, tuple[Bill, int | None]] = {}
        for (part, mine), share in zip(own, shares, strict=True):
            if part.sent is None:
                continue
            if not part.on_time:
                part.run(part.call.budget.correct, part.sent.attempt, share)
                continue
            self._engine.learned.was_served(part.sent.number)
            counted = None if share is not None else self._engine.counted(part.sent.texts)
            bill = part.run(
                part.call.budget.bill,
                part.sent.attempt,
                share,
                counted=counted,
                complete=not mine.missing,
            )
            bills[part] = bill, counted
        ledger = self._parts[0].call.budget.ledger
        settle_all(ledger, [bill for bill, _ in bills.values()], identity(reply))
        return bills

    def _came(
        self,
        part: _Part,
        mine: Checked,
        billed: tuple[Bill, int | None],
        share: int | None,
        reply: EmbedReply,
        trouble: BaseException | None,
    ) -> None:
        """The vectors of one member are kept and settled: it ends, or goes on for the others."""
        (bill, counted), call = billed, part.call
        if part.sent is None:
            return
        if trouble is not None:
            part.in_flight.finish(part.sent)
            self._end(part, partial(_raise, _own(trouble)))
            return
        part.run(call.budget.was_settled, bill)
        left = part.run(
            came,
            call,
            part.sent,
            part.request,
            mine,
            bill.actual,
            tokens=share,
            counted=counted,
            of=identity(reply),
        )
        part.in_flight.finish(part.sent)
        part.run(call.progress.add, len(part.request) - len(left))
        if left:
            error = InvalidResponse(
                f"{call.engine.label} returned null, nothing or NaN instead of a vector for "
                f"{len(left)} of {len(part.request)} texts",
                billed="yes",
            )
            self._send_alone(part, left, error)
        elif call.buffer.left():
            self._open.remove(part)
            self._wait_later(part.member, call)
        else:
            self._end(part, list)


def let_go(call: Call) -> None:
    """It claims nothing any more, and has no money. What one has who stands in a queue could be
    waited for by those who have all the places, and for whose end it stands there."""
    call.release(range(len(call.prepared.texts)))
    call.budget.release()


def divided(whole: int, weights: Sequence[int]) -> list[int]:
    """So much for each, in proportion to the weights, and exactly the whole together.

    What is left after rounding down goes to the largest remainders, the first ones first.
    """
    total = sum(weights)
    if not total:
        weights, total = [1] * len(weights), len(weights)
    shares = [whole * weight // total for weight in weights]
    order = sorted(range(len(weights)), key=lambda place: -(whole * weights[place] % total))
    for place in order[: whole - sum(shares)]:
        shares[place] += 1
    return shares


def _fails(part: _Part, error: EmbeddingError) -> Sequence[int]:
    part.call.fail(part.request.indices, error)
    return left_by_others(part.call)


def _own(error: BaseException) -> BaseException:
    """One for each caller: what was paid for until then goes with it."""
    return copied(error) if isinstance(error, EmbeddingError) else error


def _raise(error: BaseException | None) -> Sequence[int]:
    raise error or Stopped()


def _nothing() -> None:
    """Nothing is reserved yet, whose lease could end."""
