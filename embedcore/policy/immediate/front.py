"""The front of a client: calls of a few texts leave at once, or together when many do.

While fewer than ``PLACES`` requests of such calls are in flight, each leaves at once and by itself.
Else they wait, and leave together as soon as a place is free: no window of time is waited for.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import ConfigurationError, TransientProviderError
from embedcore.policy.coroutines import Awaiting
from embedcore.policy.engine import Engine, Stop
from embedcore.policy.immediate.call import Call
from embedcore.policy.immediate.recipe import embed_now
from embedcore.policy.immediate.together import Member, Together
from embedcore.policy.planning import fits
from embedcore.policy.threads import LOOK_SECONDS, Pool, Stopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from embedcore.policy.result import EmbeddingResult


# Requests of calls of few texts that are in flight at once. Few texts: so many at most.
PLACES: Final = 8
_FEW: Final = 8
_THREADS: Final = 64
# So many requests that went well, and larger ones are tried again.
_GROW_AFTER: Final = 8
_ANY: Final = 1 << 30


class _Waiting:
    """A thread that waits until some other tells it how its call ended."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._found: EmbeddingResult | None = None
        self._error: BaseException | None = None

    def tell(self, found: EmbeddingResult | None, error: BaseException | None) -> None:
        if not self._told.is_set():
            self._found, self._error = found, error
            self._told.set()

    def wait(self, seconds: float) -> bool:
        return self._told.wait(seconds)

    def result(self) -> EmbeddingResult:
        if self._found is None:
            raise self._error or Stopped
        return self._found


class Front:
    """What calls of few texts of one client pass. Safe to share between threads.

    Never more texts leave together than were taken lately: a request that was refused halves what
    the next ones have, and some that went well double it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._free = min(PLACES, engine.pool.size)
        self._queues: dict[tuple[Any, ...], deque[Member]] = {}
        # Those go first that have been on their way already.
        self._alone: deque[Member] = deque()
        self._pool = Pool(_THREADS, name="asyncio-embedcore")
        self._most = _ANY
        self._went_well = 0
        self._closed = False

    def takes(self, texts: object, how: dict[str, Any]) -> bool:
        """Whether a call of these texts is one for the front; the others are requests enough."""
        info = self._engine.info
        longest = info.max_input_tokens
        return (
            isinstance(texts, list)
            and 0 < len(texts) <= _FEW
            and how.get("on_budget", "raise") == "raise"
            and how.get("on_arrival") is None
            and all(type(text) is str for text in texts)
            and (longest is None or max(map(_size, texts)) * info.tokens_per_byte <= longest)
        )

    def embed(
        self, engine: Engine, texts: list[str], *, stop: Stop | None = None, **how: Any
    ) -> EmbeddingResult:
        """As ``embed_now``, in the caller's thread where a place is free."""
        if self._enter():
            is_free = self._once_free()
            try:
                return embed_now(engine, texts, stop=stop, is_free=is_free, **how)
            finally:
                is_free()
        waiting = _Waiting()
        member = self._member(engine, texts, stop or Stop(), waiting.tell, how)
        self._add(member)
        self._dispatch()
        try:
            while not waiting.wait(LOOK_SECONDS):
                if member.stop.is_set() and self._forget(member):
                    raise Stopped
                self._expire(member)
        except BaseException:
            member.stop.set()
            self._forget(member)
            raise
        return waiting.result()

    async def aembed(self, engine: Engine, texts: list[str], **how: Any) -> EmbeddingResult:
        """The same for a coroutine. No thread waits for it."""
        stop = Stop()
        awaiting: Awaiting[EmbeddingResult] = Awaiting(stop)
        member = self._member(engine, list(texts), stop, awaiting.tell, how)
        timer = None
        if member.deadline is not None:
            seconds = max(member.deadline - engine.monotonic(), 0.0)
            timer = awaiting.loop.call_later(seconds, self._expire, member)
        self._add(member)
        # Once all that ask in this turn of the loop have asked.
        awaiting.loop.call_soon(self._dispatch)
        try:
            return await awaiting.wait()
        except asyncio.CancelledError:
            if self._forget(member):
                member.tell(None, Stopped())
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Nothing more leaves."""
        with self._lock:
            self._closed = True
            left = [member for queue in self._queues.values() for member in queue]
            self._queues.clear()
        for member in left:
            member.tell(None, _closed())
        self._pool.close()

    def _member(
        self,
        engine: Engine,
        texts: list[str],
        stop: Stop,
        tell: Callable[[Any, BaseException | None], None],
        how: dict[str, Any],
    ) -> Member:
        began, seconds = engine.monotonic(), engine.retry.deadline
        opened = {
            "keep": how.get("on_error", "raise") == "keep",
            "on_budget": "raise",
            "stop": stop,
            "on_arrival": None,
            "began": began,
        }
        if not how.get("check_budget", True):
            engine = replace(engine, account=replace(engine.account, limits=()))
        account = engine.account
        return Member(
            open=partial(Call, engine, texts, how.get("input_type"), **opened),
            work=partial(embed_now, engine, texts, stop=stop, began=began, **how),
            key=(how.get("input_type"), account.limits, account.scope, engine.cache is None),
            texts=len(texts),
            in_bytes=sum(map(_size, texts)),
            stop=stop,
            tell=tell,
            deadline=None if seconds is None else began + seconds,
        )

    # Places

    def _enter(self) -> bool:
        """Whether a place was free, and is taken now."""
        with self._lock:
            is_free = self._free > 0 and not self._queues and not self._alone
            self._free -= is_free
            return is_free

    def _leave(self) -> None:
        with self._lock:
            self._free += 1
            if not (self._queues or self._alone):
                return
        self._dispatch()

    def _once_free(self) -> Callable[[], None]:
        """Leaves a place that was taken, the first time that it is called, in whichever thread."""
        left = threading.Lock()

        def is_free() -> None:
            if left.acquire(blocking=False):
                self._leave()

        return is_free

    def _add(self, member: Member) -> None:
        with self._lock:
            if self._closed:
                raise _closed()
            if member.is_alone:
                self._alone.append(member)
            else:
                self._queues.setdefault(member.key, deque()).append(member)

    def _again(self, member: Member) -> None:
        """It goes on alone, when a place is free."""
        try:
            self._add(member)
        except ConfigurationError:
            # Its recipe says so, and gives back what it has.
            member.do(member.work)
        else:
            self._dispatch()

    def _forget(self, member: Member) -> bool:
        """Whether it was waiting still, and nothing was done for it yet."""
        with self._lock:
            queue = self._queues.get(member.key)
            if queue is None or member not in queue:
                return False
            queue.remove(member)
            if not queue:
                del self._queues[member.key]
            return True

    def _expire(self, member: Member) -> None:
        late = member.deadline is not None and self._engine.monotonic() >= member.deadline
        if late and self._forget(member):
            member.tell(None, self._too_late())

    def _too_late(self) -> TransientProviderError:
        return TransientProviderError(
            f"{self._engine.label}: {PLACES} requests are in flight, and the deadline of "
            f"{self._engine.retry.deadline} s has passed before this one could leave",
            billed="no",
        )

    def _dispatch(self) -> None:
        """Fill the places that are free."""
        while True:
            with self._lock:
                members = self._next()
                if not members:
                    return
                self._free -= 1
            try:
                self._pool.submit(partial(self._send, members))
            except BaseException as error:  # noqa: BLE001 - told to who waits
                with self._lock:
                    self._free += 1
                for member in members:
                    if member.is_alone:
                        # Its recipe says so itself, and gives back what it has.
                        member.do(member.work)
                    else:
                        member.tell(None, error)

    def _next(self) -> list[Member]:
        """Who leaves next in one request; none if no place is free.

        Those who wait are spread over the places: no more share a request, and its faults, than
        must for all of them to leave now.
        """
        if self._free <= 0:
            return []
        if self._alone:
            return [self._alone.popleft()]
        if not self._queues:
            return []
        # The first that came to be in the queue; its like are with it.
        key, queue = next(iter(self._queues.items()))
        texts = in_bytes = 0
        members: list[Member] = []
        most = -(-len(queue) // self._free)
        while queue and len(members) < most:
            texts, in_bytes = texts + queue[0].texts, in_bytes + queue[0].in_bytes
            if members and not self._fits(texts, in_bytes):
                break
            members.append(queue.popleft())
        del self._queues[key]
        if queue:
            # Behind the others, so that all have their turns.
            self._queues[key] = queue
        return members

    def _fits(self, texts: int, in_bytes: int) -> bool:
        info = self._engine.info
        tokens = in_bytes * info.tokens_per_byte + texts * info.overhead_tokens_per_text
        most = min(self._most, info.best_texts_per_request or _ANY)
        return texts <= most and fits(texts, tokens, in_bytes, info, self._engine.sizes.wanted)

    # In a thread of the front

    def _send(self, members: list[Member]) -> None:
        if len(members) == 1:
            (member,) = members
            is_free = self._once_free()
            if member.is_alone or not self._is_over(member):
                member.do(partial(member.work, is_free=is_free))
            is_free()
            return
        is_free = self._once_free()
        there = [member for member in members if not self._is_over(member)]
        Together(self._engine, there, is_free=is_free, again=self._again, ended=self._ended).run()

    def _is_over(self, member: Member) -> bool:
        """Whether its caller has gone, or its time has passed, before anything was done for it."""
        if member.stop.is_set():
            member.tell(None, Stopped())
        elif member.deadline is not None and self._engine.monotonic() >= member.deadline:
            member.tell(None, self._too_late())
        else:
            return False
        return True

    def _ended(self, texts: int, well: bool) -> None:
        with self._lock:
            if not well:
                self._most, self._went_well = max(texts // 2, 2), 0
            elif texts * 2 > self._most:
                self._went_well += 1
                if self._went_well >= _GROW_AFTER:
                    self._most, self._went_well = min(self._most * 2, _ANY), 0


def _size(text: str) -> int:
    # Half a surrogate pair is refused by the call itself.
    return len(text.encode("utf-8", "surrogatepass"))


def _closed() -> ConfigurationError:
    return ConfigurationError("the client was closed while it was in use")
