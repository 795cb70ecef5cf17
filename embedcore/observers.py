"""The two observers that come with embedcore: the log, and a line of progress."""

from __future__ import annotations

import logging
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import singledispatch
from typing import Any, Final, TextIO

from embedcore import money
from embedcore.events import (
    BatchChanged,
    BatchDuplicate,
    BatchStopped,
    BatchWaits,
    BoundViolated,
    BudgetWait,
    Cached,
    CacheProblem,
    Event,
    LimitNear,
    LimitsLearned,
    Observer,
    Progress,
    Refused,
    RequestFailed,
    RequestFinished,
    Throttled,
)
from embedcore.provider.registry import load_observers, plugin_observers

logger = logging.getLogger("embedcore")

_LINE_SECONDS: Final = 0.2
_LOG_SECONDS: Final = 10.0


@singledispatch
def log(event: object) -> None:
    """Write an event to the log. Neither a text nor a key is in any event."""


@log.register
def _(event: RequestFinished) -> None:
    logger.info(
        "%s:%s: %d inputs, %s%d tokens%s, request %s, %.2f s",
        event.provider,
        event.model,
        event.inputs,
        "" if event.exact else "at most ",
        event.tokens,
        "" if event.reported else " (not reported)",
        event.request_id or "-",
        event.seconds,
    )


@log.register
def _(event: RequestFailed) -> None:
    what_next = "not tried again" if event.wait is None else f"again in {event.wait:.2f} s"
    logger.info(
        "%s:%s: %d inputs, %s%s, billed: %s, request %s, %.2f s; %s",
        event.provider,
        event.model,
        event.inputs,
        event.error,
        f" (HTTP {event.status})" if event.status else "",
        event.billed,
        event.request_id or "-",
        event.seconds,
        what_next,
    )


@log.register
def _(event: Throttled) -> None:
    logger.info("%s: rate limited, waiting %.1f s", event.endpoint or "provider", event.seconds)


@log.register
def _(event: LimitsLearned) -> None:
    logger.info(
        "%s, %s: %s requests and %s tokens per minute are allowed",
        event.endpoint or "provider",
        event.model,
        _limit(event.requests_per_minute),
        _limit(event.tokens_per_minute),
    )


def _limit(amount: int | None) -> str:
    return "any number of" if amount is None else f"{amount:,}"


@log.register
def _(event: BudgetWait) -> None:
    logger.warning(
        "scope %s: waiting for its budget until %s: %s",
        event.scope,
        event.until.isoformat(sep=" ", timespec="seconds"),
        event.message,
    )


@log.register
def _(event: Cached) -> None:
    logger.info("%s:%s: %d inputs not paid for again", event.provider, event.model, event.texts)


@log.register
def _(event: CacheProblem) -> None:
    logger.warning("cache: %s", event.message)


@log.register
def _(event: LimitNear) -> None:
    logger.warning(
        "scope %s: %d %% of %s %s are used: %s",
        event.scope,
        event.used * 100 // event.limit if event.limit else 100,
        shown(event.unit, event.limit),
        "in total" if event.period == "total" else f"per {event.period}",
        shown(event.unit, event.used),
    )


@log.register
def _(event: Refused) -> None:
    logger.error("scope %s: %s", event.scope, event.message)


@log.register
def _(event: BoundViolated) -> None:
    logger.warning(
        "%s:%s billed %d tokens where %d were reserved: its count is wrong; "
        "from now on more is reserved",
        event.provider,
        event.model,
        event.billed,
        event.reserved,
    )


@log.register
def _(event: BatchChanged) -> None:
    logger.info(
        "Batch %s: %s (%d/%d complete)", event.job, event.status, event.completed, event.total
    )


@log.register
def _(event: BatchDuplicate) -> None:
    logger.warning(
        "Batch %s: created twice, or after it was given up; told to stop. %s, %s count as spent",
        event.job,
        shown("tokens", event.tokens),
        shown("cost", event.cost),
    )


@log.register
def _(event: BatchStopped) -> None:
    logger.warning(
        "Batch %s: cancelled at the provider, and not by embedcore; %d texts of batch %s are sent "
        "again when you say so: embedcore batch resume --resubmit-cancelled %s",
        event.job,
        event.texts,
        event.batch,
        event.batch,
    )


@log.register
def _(event: BatchWaits) -> None:
    until = "its budget is raised"
    if event.until is not None:
        until = event.until.isoformat(sep=" ", timespec="seconds")
    logger.warning("batch %s waits until %s: %s", event.batch, until, event.message)


def shown(unit: str, amount: int | Decimal) -> str:
    """An amount of tokens or of US dollars, with its unit."""
    return f"{amount:,} tokens" if unit == "tokens" else money.shown(Decimal(amount))


class ProgressLine:
    """Shows progress on a terminal or in a notebook as one line that is written over, elsewhere as
    log lines.

    ``stream``: where to; default: standard error, which a program without a console has not.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        chosen = sys.stderr if stream is None else stream
        self._screen = chosen if _is_screen(chosen) else None
        self._width = self._done = 0
        self._monotonic = monotonic
        self._next = 0.0

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Progress):
            return
        # Told by several threads, of which the slower may have the older news; and the end is the
        # end.
        if event.done < self._done or event.done == event.total == self._done:
            return
        self._done = event.done
        now = self._monotonic()
        finished = event.total is not None and event.done >= event.total
        if now < self._next and not finished:
            return
        self._next = now + (_LOG_SECONDS if self._screen is None else _LINE_SECONDS)
        total = "" if event.total is None else f" of {event.total:,}"
        line = (
            f"{event.done:,}{total} texts, {'' if event.exact else 'at most '}"
            f"{event.tokens:,} tokens, "
            f"{money.shown(event.cost)}"
        )
        if self._screen is None:
            logger.info("%s", line)
            return
        # What was longer must not look out from under it.
        padded, self._width = line.ljust(self._width), len(line)
        self._screen.write(f"\r{padded}" + ("\n" if finished else ""))
        self._screen.flush()


def _is_screen(stream: TextIO | None) -> bool:
    """Whether a line that is written there is seen, and can be written over."""
    if stream is None or stream.closed:
        return False
    return stream.isatty() or (stream is sys.stderr and _in_notebook())


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook, whose standard error is shown below the cell."""
    # Only what the notebook itself has imported is looked at.
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_shell is not None and getattr(get_shell(), "kernel", None) is not None


def notify(observer: Observer, event: Event) -> None:
    """Call one observer, guarded."""
    try:
        observer(event)
    except Exception:
        logger.exception("an observer failed on %s", type(event).__name__)


def observed_by(observers: Sequence[Observer]) -> Observer:
    """One observer for the log, the plugins and these; none can disturb the others."""
    load_observers()

    def observe(event: Event) -> None:
        log(event)
        for observer in (*plugin_observers, *observers):
            notify(observer, event)

    return observe


def with_progress(observe: Observer, progress: bool | Callable[[Progress], None]) -> Observer:
    """``observe``, and after it a line of progress or the caller's own function, guarded."""
    show: Observer = ProgressLine() if progress is True else _only_progress(progress)

    def both(event: Event) -> None:
        observe(event)
        notify(show, event)

    return both


def picklable(observers: Sequence[Observer], *, warn: bool) -> tuple[Observer, ...]:
    """Those of a client's observers that can be pickled with it; a warning names the others."""
    if getattr(_pickling, "tried", False):
        # One of them holds the client, which is being pickled already.
        return ()
    _pickling.tried = True
    try:
        kept = tuple(observer for observer in observers if _pickles(observer))
    finally:
        _pickling.tried = False
    if warn and len(kept) < len(observers):
        lost = [_name_of(one) for one in observers if not any(one is other for other in kept)]
        logger.warning(
            "a client is pickled without observers that cannot be pickled: %s. Who unpickles it is "
            "told of nothing by them: use functions of a module, or add them there",
            ", ".join(lost),
        )
    return kept


_pickling = threading.local()


def _pickles(observer: Observer) -> bool:
    try:
        pickle.dumps(observer)
    except Exception:  # noqa: BLE001 - whatever it is that cannot be pickled has its own error
        return False
    return True


def _name_of(observer: Observer) -> str:
    named = observer if hasattr(observer, "__qualname__") else type(observer)
    return ".".join(filter(None, (named.__module__, named.__qualname__)))


def _only_progress(callback: Any) -> Observer:
    def tell(event: Event) -> None:
        if isinstance(event, Progress):
            callback(event)

    return tell
