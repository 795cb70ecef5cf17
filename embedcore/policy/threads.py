"""Threads of a client, and requests in flight."""

from __future__ import annotations

import queue
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from embedcore.errors import ConfigurationError, EmbeddingError

if TYPE_CHECKING:
    from embedcore.storage.amounts import Attempt


# How often a thread that waits looks whether its call has ended. Never for ever: on Windows nothing
# interrupts a wait without an end.
LOOK_SECONDS: Final = 0.25


class Stopped(Exception):
    """The call has ended; whatever has not been sent stays unsent."""


@dataclass(kw_only=True, slots=True, eq=False)
class SentRequest:
    """One attempt that a thread is waiting for, and what is sent in it.

    ``number``: its place in the order in which requests of the client left.
    """

    attempt: Attempt | None
    texts: Sequence[str]
    started: float
    number: int = 0
    thread: threading.Thread = field(default_factory=threading.current_thread)
    is_answered: bool = False
    is_given_up: bool = False


class InFlight:
    """The attempts under way, so that a call that ends early can account for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight: set[SentRequest] = set()
        self._closed = False

    def start(self, sent: SentRequest) -> bool:
        """Just before it is sent. False: the call has ended, and it must not be sent."""
        with self._lock:
            if not self._closed:
                self._in_flight.add(sent)
            return not self._closed

    def answered(self, sent: SentRequest) -> bool:
        """The reply, or an error, is here. False: too late, the call has given it up."""
        with self._lock:
            sent.is_answered = True
            return not sent.is_given_up

    def finish(self, sent: SentRequest) -> None:
        """What it brought is kept and accounted for."""
        with self._lock:
            self._in_flight.discard(sent)

    @property
    def under_way(self) -> int:
        """How many have no answer, or one that is not yet kept and accounted for."""
        with self._lock:
            return len(self._in_flight)

    def close(self) -> None:
        """Nothing starts any more."""
        with self._lock:
            self._closed = True

    def give_up(self) -> list[SentRequest]:
        """Take what has no answer out of its threads' hands; nothing starts any more."""
        with self._lock:
            self._closed = True
            lost = [sent for sent in self._in_flight if not sent.is_answered]
            for sent in lost:
                sent.is_given_up = True
                self._in_flight.discard(sent)
            return lost


class Pause:
    """Sleeps for a call, and wakes up when it ends.

    Called with 0 it only looks whether the call has ended. Raises ``Stopped`` then. ``ended`` may
    be set from outside the call as well. ``wait_for``: of the engine.
    """

    def __init__(
        self,
        ended: threading.Event | None = None,
        wait_for: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._ended = ended if ended is not None else threading.Event()
        self._wait_for = wait_for

    def end(self) -> None:
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    def __call__(self, seconds: float) -> None:
        if self._wait_for(self._ended, seconds) if seconds > 0 else self._ended.is_set():
            raise Stopped


Task: TypeAlias = Callable[[], None]

_NONE_LEFT: Final = "can't start new thread"
# Under a limit of addresses (``ulimit -v``, some batch systems) it is these that run out: the C
# library sets 64 MiB aside for the heap of each thread, and takes twice that while it does so.
_ADDRESSES_PER_THREAD: Final = 80 << 20
_ADDRESSES_FOR_THE_REST: Final = 128 << 20
_MEMORY: Final = Path("/proc/self/statm")


class Pool:
    """Runs tasks in at most ``size`` threads, first come, first served.

    The threads are daemons, unlike those of ``concurrent.futures``: a provider that hangs must not
    keep the program from ending. A task must not raise. ``name``: of each thread.
    """

    def __init__(self, size: int, *, name: str = "embedcore") -> None:
        self.size = size
        self._name = name
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._busy: set[threading.Thread] = set()
        # Threads without a task; below zero, tasks without a thread.
        self._free = 0
        self._closed = False
        self._affordable = size
        # Why the last thread could not be started.
        self._refusal: RuntimeError | None = None
        self._finalizer = weakref.finalize(self, self._tasks.put, None)

    def submit(self, task: Task) -> None:
        """Run the task as soon as a thread is free. Raises ``ConfigurationError`` when closed."""
        with self._lock:
            self.check_open()
            if self._free > 0 or len(self._threads) == self.size or not self._start_thread():
                self._free -= 1
            if not self._threads:
                self._free += 1
                raise _no_thread(self._refusal)
            self._tasks.put(task)

    def check_open(self) -> None:
        """Raises ``ConfigurationError`` when closed."""
        if self._closed:
            raise ConfigurationError("the client was closed while it was in use")

    def replace(self, thread: threading.Thread) -> None:
        """That thread hangs in a provider, perhaps for good: another takes its place.

        If it comes back after all, it ends. Nothing is done if it is back already.
        """
        with self._lock:
            if thread in self._threads and thread in self._busy and not self._closed:
                self._threads.discard(thread)
                self._free += self._start_thread()

    def close(self) -> None:
        """Let the threads end once they have done what was submitted. Harmless when repeated."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def goes_on(self, thread: threading.Thread) -> bool:
        """The thread has done its task. False: it was replaced meanwhile."""
        with self._lock:
            self._free += thread in self._threads
            return thread in self._threads

    def _threads_at_most(self) -> int:
        affordable = affordable_threads()
        return self.size if affordable is None else max(affordable, 1)

    def _start_thread(self) -> bool:
        """False: the system has no more threads; those that there are must do."""
        if not self._threads:
            self._affordable = self._threads_at_most()
        elif len(self._threads) >= self._affordable:
            return False
        thread = threading.Thread(
            target=_serve,
            args=(self._tasks, self._busy, weakref.ref(self)),
            name=self._name,
            daemon=True,
        )
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            self._threads.discard(thread)
            self._refusal = error
            return False
        return True


def _no_thread(why: RuntimeError | None) -> EmbeddingError:
    return EmbeddingError(
        f"no thread can be started to send from: {why}. Try again if the system has none left; a "
        "sub-interpreter may have none: use embedcore in the main one, or in a process of its own",
        # What the system may give later; what an interpreter refuses it refuses for ever.
        retryable=str(why) == _NONE_LEFT,
    )


def _serve(
    tasks: queue.SimpleQueue[Task | None], busy: set[threading.Thread], pool: weakref.ref[Pool]
) -> None:
    thread = threading.current_thread()
    while (task := tasks.get()) is not None:
        busy.add(thread)
        task()
        del task
        busy.discard(thread)
        owner = pool()
        if owner is None or not owner.goes_on(thread):
            return
        del owner
    # The end is for all of them, however many there are.
    tasks.put(None)


if sys.platform == "win32":

    def affordable_threads(*, memory: Path = _MEMORY) -> int | None:  # noqa: ARG001
        """How many more threads this process has addresses for, perhaps none; None: any number."""
        return None

else:
    # Not where it is needed: nothing is imported once a client is open.
    import resource

    def affordable_threads(*, memory: Path = _MEMORY) -> int | None:
        """How many more threads this process has addresses for, perhaps none; None: any number."""
        try:
            limit, _ = resource.getrlimit(resource.RLIMIT_AS)
            if limit == resource.RLIM_INFINITY:
                return None
            used = int(memory.read_text().split()[0]) * resource.getpagesize()
        except (OSError, ValueError, IndexError):
            return None
        return max((limit - used - _ADDRESSES_FOR_THE_REST) // _ADDRESSES_PER_THREAD, 0)
