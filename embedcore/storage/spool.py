"""The spool: what became of requests, until it is written into the ledger.

It is written with the next commit of the ledger, within a second, before usage is read, a limit
refuses, the process forks or ends. Until then it counts with all that was reserved for it, so that
the limits see what is true or more; and where the process is killed, it counts like that for good.
So nothing waits for a commit once a request has its answer, and no call fails for one.
"""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from embedcore.errors import BudgetExceeded, StorageCorrupt, StorageError, UnsafeStorage
from embedcore.forksafe import WAIT_SECONDS, Lazy, before_fork
from embedcore.storage.amounts import HeldLoosely, TighterBoundNeeded

if TYPE_CHECKING:
    from embedcore.storage.outcomes import Outcome

_logger = logging.getLogger("embedcore")

# Written by then; the commit itself takes what is left of the second.
_WITHIN_SECONDS: Final = 0.75
# For others of this process, whose file another process may keep locked.
_OTHERS_SECONDS: Final = 2.0

Found = TypeVar("Found")
# Raised after the commit.
_REFUSALS: Final = (BudgetExceeded, HeldLoosely, TighterBoundNeeded)


class Ledger(Protocol):
    """What is asked of a ledger here."""

    def now(self) -> int: ...

    def write(self, outcomes: Iterable[Outcome], *, within: float | None = None) -> None: ...


class _Own:
    """What waits in this process, and not in a child of a fork.

    - ``waiting``: in the order in which it happened. ``under_way``: in transactions.
    - ``since``: when the first of them came, or was last tried. ``is_failing``: in vain.
    """

    # What threads share is changed in single steps: a signal handler may come in between.

    def __init__(self) -> None:
        self.waiting: deque[Outcome] = deque()
        self.under_way: set[_Carried] = set()
        self.since = 0.0
        self.is_failing = False

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.under_way


class _Carried:
    """What one transaction takes along. To be gone through inside of it, one transaction at a time,
    so that none misses what another has taken and not yet committed."""

    def __init__(self, own: _Own) -> None:
        self._own = own
        self.taken: list[Outcome] = []
        own.under_way.add(self)

    def __iter__(self) -> Iterator[Outcome]:
        waiting = self._own.waiting
        while waiting:
            outcome = waiting.popleft()
            self.taken.append(outcome)
            yield outcome

    def put_back(self) -> None:
        """Nothing was committed, or that is not known: to write it twice changes nothing."""
        self._own.waiting.extendleft(reversed(self.taken))
        self._own.under_way.discard(self)

    def was_written(self) -> None:
        self._own.under_way.discard(self)
        self._own.is_failing = False
        for outcome in self.taken:
            if outcome.unknown is not None:
                _logger.error("what a request cost was not written down: %s", outcome.unknown)
            for limit in outcome.near:
                outcome.tell(limit)


class Spool:
    """The outcomes that wait for the next commit of one ledger. Safe to share between threads,
    and across a fork: a child has none of them."""

    def __init__(self, ledger: Ledger) -> None:
        # Not for its own sake: what is no longer used closes its file at once.
        self._ledger = weakref.ref(ledger)
        self._own: Lazy[_Own] = Lazy()

    def add(self, *outcomes: Outcome, at_once: bool = False) -> None:
        """These will be written. Never fails for that.

        ``at_once``: now, if that is possible; what may bring a limit near its end always is.
        """
        ledger, own = self._ledger(), self._own.get(_Own)
        if ledger is None:
            return
        if own.is_empty:
            own.since = time.monotonic()
        for outcome in outcomes:
            outcome.at = ledger.now()
            own.waiting.append(outcome)
            at_once = at_once or outcome.grant.is_near
        if not _writers.get(_Writer).watch(self, ledger) or at_once:
            self.flush()

    def asked(self, ask: Callable[..., Found]) -> Found:
        """``ask(outcomes=…)`` in a commit with what waits here.

        A refusal is final only if nothing waits in this process that may free money.
        """
        try:
            return self._carry(ask)
        except _REFUSALS:
            if not flush_all():
                raise
        return self._carry(ask)

    def flush(self, *, within: float | None = None) -> bool:
        """Write what waits; returns whether there was anything. What fails is said once, and tried
        again. ``within``: as for ``Ledger.write``."""
        ledger, own = self._ledger(), self._own.get(_Own)
        if ledger is None or own.is_empty:
            return False
        try:
            self._carry(partial(ledger.write, within=within))
        except (StorageCorrupt, UnsafeStorage) as error:
            # The file in which they were sent is not there any more.
            self._drop(own, error)
        except StorageError as error:
            own.since = time.monotonic()
            if not own.is_failing:
                own.is_failing = True
                _logger.warning(
                    "what %d requests cost is not written down yet, and counts with all that was "
                    "reserved for it; it is tried again: %s",
                    len(own.waiting),
                    error,
                )
        return True

    def give_up(self) -> None:
        """What could not be written until now never will be."""
        own = self._own.get(_Own)
        if own.waiting:
            self._drop(own, None)

    @property
    def due(self) -> float | None:
        """When it should be written, by the monotonic clock; None: there is nothing."""
        own = self._own.get(_Own)
        return None if own.is_empty else own.since + _WITHIN_SECONDS

    def _carry(self, ask: Callable[..., Found]) -> Found:
        carried = _Carried(self._own.get(_Own))
        try:
            found = ask(outcomes=carried)
        except _REFUSALS:
            carried.was_written()
            raise
        except BaseException:
            carried.put_back()
            raise
        carried.was_written()
        return found

    def _drop(self, own: _Own, error: StorageError | None) -> None:
        lost = len(own.waiting)
        own.waiting.clear()
        why = "the file was closed" if error is None else str(error)
        _logger.warning(
            "what %d requests cost could not be written down: all that was reserved for them "
            "counts as spent when their leases end (%s)",
            lost,
            why,
        )


class _Writer:
    """The thread that writes what no commit took along in time. There is none while nothing waits,
    and it keeps no program from ending."""

    def __init__(self) -> None:
        # With their ledgers, which nothing else may use any more.
        self._spools: dict[Spool, Ledger] = {}
        self._turn = threading.Lock()
        self.is_ending = False
        _at_the_end_of_a_child()

    def watch(self, spool: Spool, ledger: Ledger) -> bool:
        """False: what waits in it must be written now, as no thread will."""
        self._spools[spool] = ledger
        if self.is_ending:
            return False
        # No thread waits here: a signal handler may have interrupted one that starts it.
        return not self._turn.acquire(blocking=False) or self._start()

    def flush(self, *, within: float | None) -> bool:
        """Write all that waits, within so many seconds; whether there was anything."""
        until = None if within is None else time.monotonic() + within
        found = False
        for spool in list(self._spools):
            left = None if until is None else max(until - time.monotonic(), 0.0)
            found = spool.flush(within=left) or found
        return found

    def _start(self) -> bool:
        try:
            threading.Thread(target=self._run, name="embedcore-outcomes", daemon=True).start()
        except RuntimeError:
            # The system has no more threads, or the interpreter is to have none.
            self._turn.release()
            return False
        return True

    def _run(self) -> None:
        while True:
            while self._spools:
                self._look()
            self._turn.release()
            # What came meanwhile found the turn taken.
            if not self._spools or not self._turn.acquire(blocking=False):
                return

    def _look(self) -> None:
        """Wait until something is due, and write it."""
        due = [when for spool in list(self._spools) if (when := spool.due) is not None]
        now = time.monotonic()
        time.sleep(max(min(due, default=now + _WITHIN_SECONDS) - now, 0.0))
        now = time.monotonic()
        for spool, ledger in list(self._spools.items()):
            when = spool.due
            if when is not None and when <= now:
                spool.flush()
            elif when is None:
                del self._spools[spool]
                # It may just have got something.
                if spool.due is not None:
                    self._spools[spool] = ledger


def flush_all(within: float = _OTHERS_SECONDS) -> bool:
    """Write all that waits in this process, for whichever file; whether there was anything."""
    return _writers.is_there and _writers.get(_Writer).flush(within=within)


def _at_the_end() -> None:
    if _writers.is_there:
        writer = _writers.get(_Writer)
        writer.is_ending = True
        writer.flush(within=None)


def _at_the_end_of_a_child() -> None:
    """A child of multiprocessing may end without ``atexit``: it has a list of its own."""
    processes, util = map(sys.modules.get, ("multiprocessing.process", "multiprocessing.util"))
    if processes is not None and util is not None and processes.parent_process() is not None:
        util.Finalize(None, _at_the_end, exitpriority=0)


_writers: Final[Lazy[_Writer]] = Lazy()
atexit.register(_at_the_end)
# The child has none of it, and its parent may end at once.
# It may wait so long for a thread, and once more for a process.
before_fork(partial(flush_all, WAIT_SECONDS / 4))
