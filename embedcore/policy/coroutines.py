"""Coroutines that wait for work done in threads: of ours, never those of the event loop.

An event loop has a handful of threads of its own for the whole program. What waits there for a
server keeps everybody else's work from them, and they keep ours from us.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar, cast

from embedcore.forksafe import Lazy, in_child
from embedcore.policy.threads import Pool

Found = TypeVar("Found")

# Each waits for one call, in which the client's own threads send.
_THREADS: Final = 32
# At the end of the program, for what is under way to be accounted for.
_LAST_SECONDS: Final = 10.0

_pool: Lazy[Pool] = Lazy()
_ending: set[asyncio.Task[None]] = set()
_under_way: dict[threading.Event, threading.Event | None] = {}
# Of the parent: in a child nothing of it goes on.
in_child(_under_way.clear)
in_child(_ending.clear)


def _new_pool() -> Pool:
    # They stand for callers: unlike a client's own they open it, and import what that takes.
    return Pool(_THREADS, name="asyncio-embedcore")


async def in_thread(work: Callable[[], Found], *, stop: threading.Event | None = None) -> Found:
    """What ``work`` returns or raises, in the caller's context, without blocking the event loop.

    Where the caller is cancelled, ``stop`` is set, and it hears of nothing more. ``asyncio.run``
    ends only once the work has, and so does the program, but for work that does not come to an end.
    """
    caller: Awaiting[Found] = Awaiting(stop)
    context = contextvars.copy_context()
    try:
        _pool.get(_new_pool).submit(lambda: caller.tell(*context.run(outcome, work)))
    except BaseException as error:  # noqa: BLE001 - raised where it is awaited
        caller.tell(None, error)
    return await caller.wait()


class Awaiting(Generic[Found]):
    """A coroutine that waits until some thread tells it how its work ended. As ``in_thread``."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self._done: asyncio.Future[Found] = self.loop.create_future()
        self._stop = stop
        self._ended = threading.Event()
        _under_way[self._ended] = stop

    def tell(self, found: Found | None, error: BaseException | None) -> None:
        """In any thread; only the first time counts."""
        if self._ended.is_set():
            return
        self._ended.set()
        _under_way.pop(self._ended, None)
        # The caller may have gone meanwhile, and its loop as well.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(_settle, self._done, found, error)

    async def wait(self) -> Found:
        try:
            return await asyncio.shield(self._done)
        except asyncio.CancelledError:
            if not self._done.done():
                _leave_behind(self.loop, self._done)
            raise
        finally:
            if self._stop is not None:
                self._stop.set()


def outcome(work: Callable[[], Found]) -> tuple[Found | None, BaseException | None]:
    """What the work returned, or what it raised."""
    try:
        return work(), None
    except StopIteration as error:
        # A future takes none of these.
        return None, RuntimeError(f"{error!r} was raised")
    except BaseException as error:  # noqa: BLE001 - raised where it is awaited
        return None, error


def _settle(done: asyncio.Future[Found], found: Found | None, error: BaseException | None) -> None:
    if done.done():
        return
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result(cast("Found", found))


def _leave_behind(loop: asyncio.AbstractEventLoop, done: asyncio.Future[Found]) -> None:
    """The caller is gone; its work must come to its end before the loop does."""
    ending = loop.create_task(_end_of(done))
    _ending.add(ending)
    ending.add_done_callback(_ending.discard)


async def _end_of(done: asyncio.Future[Found]) -> None:
    while not done.done():
        # ``asyncio.run`` cancels what is left, and then waits for it.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([done])
    # So that no caller is told that it was never asked for.
    done.exception()


@atexit.register
def _end_all() -> None:
    """The threads end with the program: what was left behind is accounted for before."""
    left = list(_under_way.items())
    for _, stop in left:
        if stop is not None:
            stop.set()
    until = time.monotonic() + _LAST_SECONDS
    for ended, _ in left:
        ended.wait(max(until - time.monotonic(), 0.0))
