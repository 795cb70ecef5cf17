"""The threads that wait for replies: a bounded number for each client, started when needed."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import TypeAlias

Task: TypeAlias = Callable[[], None]


class Pool:
    """Runs tasks in at most ``size`` threads, first come, first served.

    The threads are daemons, unlike those of ``concurrent.futures``: a provider that hangs must not
    keep the program from ending. A task must not raise.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        self._closed = False
        self._finalizer = weakref.finalize(self, _end, self._tasks, size)

    def submit(self, task: Task) -> None:
        """Run the task as soon as a thread is free."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._tasks.put(task)
            if self._idle:
                self._idle -= 1
            elif self._threads < self._size:
                self._threads += 1
                self._start_thread()

    def replace_lost_thread(self) -> None:
        """One thread hangs in a provider, perhaps for good: another takes its place."""
        with self._lock:
            if not self._closed:
                self._start_thread()

    def close(self) -> None:
        """Let the threads end once they have done what was submitted. Harmless when repeated."""
        with self._lock:
            self._closed = True
        self._finalizer()

    def _start_thread(self) -> None:
        serve = threading.Thread(
            target=_serve, args=(self._tasks, weakref.ref(self)), name="embedcore", daemon=True
        )
        serve.start()

    def became_idle(self) -> None:
        with self._lock:
            self._idle += 1


def _serve(tasks: queue.SimpleQueue[Task | None], pool: weakref.ref[Pool]) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task
        if (owner := pool()) is None:
            return
        owner.became_idle()
        del owner


def _end(tasks: queue.SimpleQueue[Task | None], size: int) -> None:
    for _ in range(size):
        tasks.put(None)
