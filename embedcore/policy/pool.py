"""The threads that wait for replies: a bounded number for each client, started when needed."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Final, TypeAlias

from embedcore.errors import ConfigurationError, EmbeddingError

Task: TypeAlias = Callable[[], None]

_NONE_LEFT: Final = "can't start new thread"


class Pool:
    """Runs tasks in at most ``size`` threads, first come, first served.

    The threads are daemons, unlike those of ``concurrent.futures``: a provider that hangs must not
    keep the program from ending. A task must not raise.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._busy: set[threading.Thread] = set()
        # Threads without a task; below zero, tasks without a thread.
        self._free = 0
        self._closed = False
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

    def _start_thread(self) -> bool:
        """False: the system has no more threads; those that there are must do."""
        thread = threading.Thread(
            target=_serve,
            args=(self._tasks, self._busy, weakref.ref(self)),
            name="embedcore",
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
