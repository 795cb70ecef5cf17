"""Fork safety: locks, things made once, and connections that a fork must not share.

A fork copies the memory of every thread and lets only one of them go on. A lock that another thread
held is held for ever in the child; and what the system keeps for a process, such as its locks on
files, is not copied at all, while libraries whose memory was copied believe that it was. So there
are three ways, and each thing that outlives one call takes one of them:

- ``Lock``: taken before the fork, together with all others of its kind, and free on both sides
  after it. What it guards is whole in the child, and closed where two processes must not share it.
- ``Lazy`` and ``in_child``: forgotten in the child, which makes its own.
- ``process``: for what cannot go on in a child and says so.

Locks that belong to one call need none of them: no thread of the child ever meets them.

What was forked in C, past all handlers, is noticed by the first ``process`` or ``Lock`` in the
child: then nothing was at rest.
"""

from __future__ import annotations

import atexit

# Not used, but its handler takes a lock that does not nest. Handlers run in the opposite order of
# their registration: had it run before ours, a signal that forks during ours would wait for ever.
import concurrent.futures.thread  # noqa: F401
import contextlib
import itertools
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, Self, TypeVar, overload

Thing = TypeVar("Thing")

WAIT_SECONDS: Final = 10.0
"""For so long a fork waits for the locks, all of them together."""


class Guarded(Protocol):
    """What a ``Lock`` guards, where a fork must find it at rest. No method may call a user's code.

    - ``rest()``: before the fork, with every lock taken: let go of what two processes must not
      share.
    - ``is_at_rest()``: asked when all have rested.
    - ``forked(at_rest)``: in the child. False: the lock was not had in time or ``rest`` failed, or
      no handler ran; another thread may have been in the middle of anything.
    """

    def rest(self) -> None: ...

    def is_at_rest(self) -> bool: ...

    def forked(self, *, at_rest: bool) -> None: ...


if TYPE_CHECKING:

    class _RLock:
        def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
        def release(self) -> None: ...
        def _is_owned(self) -> bool: ...
        def _at_fork_reinit(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

else:
    _RLock = type(threading.RLock())


class Lock(_RLock):
    """A lock that every fork takes first. Does not nest with itself: raises ``RuntimeError``.

    No thread may wait for a user's code, or for another process without an end, while holding it.
    Where one is taken inside another, the outer one is made first: a fork takes them in that order.
    """

    # An RLock knows its owner from the same moment on from which it is locked. It is left without
    # a step of ours: there is one such lock, and more, in every transaction.

    def __init__(self, guarded: Guarded | None = None) -> None:
        self._guarded = None if guarded is None else weakref.ref(guarded)
        _register(_locks, self)

    is_mine = _RLock._is_owned
    """Whether this thread has it."""

    def __enter__(self) -> None:
        self.approach()
        self.acquire()

    def approach(self) -> None:
        """What comes before every ``acquire``.

        There is nothing to do, and no need to call this, while ``forking.process`` is this process,
        no fork ``is_near`` and the lock is not ``is_mine``.
        """
        process()
        # A thread that holds one of them may take another: the fork waits for both.
        if forking.is_near and not any(lock.is_mine() for lock in _all(_locks)):
            forking.passed.wait(WAIT_SECONDS)
        if self.is_mine():
            raise RuntimeError("this thread has this lock already")


class Lazy(Generic[Thing]):
    """Something that the first thread to need it makes, until it is taken away.

    In a child of a fork it is not there, and the child makes its own. What the parent had is kept
    as it is, since to close it would be felt there. ``shared``: it is plain memory and stays.

    A fork waits for the thread that is making it: libraries have locks of their own while they are
    set up. But where that takes too long the child only makes it itself.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self._lock = Lock()
        self._thing: Thing | None = None
        self._shared = shared
        _register(_lazy, self)

    def get(self, make: Callable[[], Thing]) -> Thing:
        """What there is; ``make`` makes it if there is nothing."""
        process()
        thing = self._thing
        if thing is None:
            with self._lock:
                thing = self._thing
                if thing is None:
                    thing = self._thing = make()
        return thing

    @property
    def is_there(self) -> bool:
        """Whether ``get`` would make nothing."""
        process()
        return self._thing is not None

    def take(self) -> Thing | None:
        """What there was, for the caller to close. The next ``get`` makes it anew."""
        process()
        with self._lock:
            thing, self._thing = self._thing, None
        return thing

    def _forked(self) -> None:
        if not self._shared:
            _inherited.append(self._thing)
            self._thing = None


class cached(Generic[Thing]):  # noqa: N801 - used as a decorator
    """``functools.cached_property`` as it is from Python 3.12 on.

    Before, it holds one lock for all instances of a class while it computes.
    """

    def __init__(self, compute: Callable[[Any], Thing]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> Thing: ...

    def __get__(self, instance: object | None, owner: type) -> Self | Thing:
        if instance is None:
            return self
        # Not a data descriptor: from now on the instance's own value is found first.
        known: dict[str, Any] = instance.__dict__
        value: Thing = known.setdefault(self._name, self._compute(instance))
        return value


def in_child(forget: Callable[[], object]) -> None:
    """Call ``forget`` in every child of a fork, before anything else of ours is used there."""
    _forgets.append(forget)


def before_fork(finish: Callable[[], object]) -> None:
    """Call ``finish`` before every fork, while nothing waits for the fork yet. It takes no longer
    than ``WAIT_SECONDS``, and what it raises is lost."""
    _finishes.append(finish)


def process() -> int:
    """The number of this process. In a child of a fork that no handler saw it is the first to
    know."""
    number = os.getpid()
    if number != forking.process:
        _seen_late(number)
    return number


def keep_for_ever(thing: object) -> None:
    """Not even the end of the program may free it: to do so would touch what the parent uses."""
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


@dataclass(slots=True)
class Forking:
    """``process``: the one that was seen last. ``is_near``: new entrants wait until it has
    ``passed``."""

    process: int = field(default_factory=os.getpid)
    is_near: bool = False
    passed: threading.Event = field(default_factory=threading.Event)
    turn: Any = field(default_factory=threading.RLock)


class _Preparation:
    """What was done before one fork: the locks that the thread held anyway, those that were taken
    for it, and those of them whose things are at rest."""

    def __init__(self) -> None:
        self.own: set[Lock] = set()
        self.had: set[Lock] = set()
        self.rested: set[Lock] = set()
        self.has_turn = False


class _Prepared(threading.local):
    """The forks that this thread is in the middle of, the innermost last: while one is prepared a
    signal may come, whose handler forks as well."""

    def __init__(self) -> None:
        self.forks: list[_Preparation] = []


_numbers = itertools.count()
_locks: dict[int, weakref.ref[Lock]] = {}
_lazy: dict[int, weakref.ref[Lazy[Any]]] = {}
_forgets: list[Callable[[], object]] = []
_finishes: list[Callable[[], object]] = []
_inherited: list[object] = []
forking: Final = Forking()
_prepared = _Prepared()
_latecomers: dict[int, Any] = {}


def _register(where: dict[int, weakref.ref[Any]], thing: object) -> None:
    number = next(_numbers)
    where[number] = weakref.ref(thing, lambda _: where.pop(number, None))


def _all(where: dict[int, weakref.ref[Thing]]) -> list[Thing]:
    """Those that are left, in the order in which they were made."""
    # Copied in one step: other threads make and drop some meanwhile.
    numbered = sorted(where.copy().items())
    return [thing for _, reference in numbered if (thing := reference()) is not None]


def _guarded_by(lock: Lock) -> Guarded | None:
    return None if lock._guarded is None else lock._guarded()


def _before() -> None:
    for finish in _finishes:
        with contextlib.suppress(Exception):
            finish()
    fork = _Preparation()
    outer = _taken_for(_prepared.forks)
    _prepared.forks.append(fork)
    process()
    until = time.monotonic() + WAIT_SECONDS
    fork.has_turn = forking.turn.acquire(timeout=WAIT_SECONDS)
    if not fork.has_turn:
        return
    forking.passed.clear()
    forking.is_near = True
    _take_all(fork, outer, until)
    rested = fork.had | outer
    for step in (_rest, _is_at_rest):
        for lock in _all(_locks):
            guarded = _guarded_by(lock) if lock in rested else None
            if guarded is not None and not step(guarded):
                rested.discard(lock)
    # Only now: what interrupts this leaves nothing at rest.
    fork.rested = rested
    _wait_for_imports(until)


def _taken_for(forks: Sequence[_Preparation]) -> set[Lock]:
    return set[Lock]().union(*(one.had for one in forks))


def _take_all(fork: _Preparation, outer: set[Lock], until: float) -> None:
    """``fork`` learns which were had; what this very thread holds already is its ``own``, a signal
    handler that forks, say, unless it was taken for a fork that is under way (``outer``)."""
    seen = set(outer)
    # A thread that holds one of them may make another and take it.
    while new := [lock for lock in _all(_locks) if lock not in seen]:
        seen.update(new)
        for lock in new:
            if lock._is_owned():
                fork.own.add(lock)
            elif lock.acquire(timeout=max(until - time.monotonic(), 0.0)):
                fork.had.add(lock)


def _wait_for_imports(until: float) -> None:
    """Python's locks on modules are held for ever in a child, too: there the import never ends."""
    # A thread that goes on with it now leaves this one alone for a few milliseconds afterwards.
    time.sleep(0)
    while _imports_go_on() and time.monotonic() < until:
        time.sleep(0.001)


def _imports_go_on() -> bool:
    """Whether another thread is in the middle of an import that something of ours began."""
    importlib = sys.modules["_frozen_importlib"]
    locks = [reference() for reference in list(getattr(importlib, "_module_locks", {}).values())]
    owners = {getattr(lock, "owner", None) for lock in locks} - {None, threading.get_ident()}
    return bool(owners) and any(
        _is_ours(frame) for thread, frame in sys._current_frames().items() if thread in owners
    )


def _is_ours(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "embedcore":
            return True
        frame = frame.f_back
    return False


def _rest(guarded: Guarded) -> bool:
    try:
        guarded.rest()
    except Exception:  # noqa: BLE001 - what fails here is raised in the child, when it is used there
        return False
    return True


def _is_at_rest(guarded: Guarded) -> bool:
    try:
        return guarded.is_at_rest()
    except Exception:  # noqa: BLE001 - as above
        return False


def _after_in_parent() -> None:
    if not _prepared.forks:
        return
    *others, fork = _prepared.forks
    outer = _taken_for(others)
    if fork.has_turn:
        # By their owner: whatever interrupted the preparation, none stays behind.
        for lock in _all(_locks):
            if lock not in fork.own and lock not in outer and lock._is_owned():
                lock.release()
        if not any(one.has_turn for one in others):
            forking.is_near = False
            forking.passed.set()
        # In a child of a fork within this one it is another lock.
        if forking.turn._is_owned():
            forking.turn.release()
    _prepared.forks.pop()


def _after_in_child() -> None:
    fork = _prepared.forks.pop() if _prepared.forks else _Preparation()
    for outer in _prepared.forks:
        # Should the handler return, that fork finds these free.
        outer.had.clear()
    _begin(os.getpid(), fork.own, fork.rested)


def _seen_late(number: int) -> None:
    # The locks of this module may be held for ever as well: one is made for this process.
    with _latecomers.setdefault(number, threading.RLock()):
        if number != forking.process:
            _begin(number, set(), set())


def _begin(number: int, own: set[Lock], rested: set[Lock]) -> None:
    """The first thing to happen in a child."""
    forking.is_near, forking.passed, forking.turn = False, threading.Event(), threading.RLock()
    for lock in _all(_locks):
        if lock not in own:
            lock._at_fork_reinit()
        guarded = _guarded_by(lock)
        if guarded is not None:
            guarded.forked(at_rest=lock in rested)
    for thing in _all(_lazy):
        thing._forked()
    for forget in _forgets:
        forget()
    forking.process = number


# A child forked in C that ends without having used anything must not free it either.
atexit.register(process)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
