"""Contract tests of requests that fail: what is raised, what it cost, how long it took."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from embedcore.errors import EmbeddingError, ProviderUnavailable, TransientProviderError
from embedcore.provider.types import EmbedReply, EmbedRequest
from embedcore.testing.contract.base import PROBES, ContractBase, outcome_of, within

if TYPE_CHECKING:
    from types import FrameType

    from _typeshed import TraceFunction

    from embedcore.provider.protocol import Embedder

_TIMEOUT: Final = 0.5
_LATE: Final = 2.5  # a busy machine is late as well; what ignores the time is later by far
_NEVER: Final = 4.5
_LONGEST_WAIT: Final = 86_400.0
_POINTS: Final = 16


class FailuresContract(ContractBase):
    """Errors: their class, ``billed``, time; and that nothing is hidden or tried again."""

    def test_failure_is_not_hidden(self, broken_embedder: Embedder) -> None:
        outcome = outcome_of(broken_embedder)
        assert not isinstance(outcome, EmbedReply), (
            "make_broken_embedder() gave an embedder that works, or one that hides its failure: an "
            "error must be raised, never answered with vectors, and never sent to another model "
            "or address"
        )

    def test_errors_are_typed(self, broken_embedder: Embedder) -> None:
        error = failure_of(broken_embedder)
        assert isinstance(error, EmbeddingError), (
            f"a failing request raised {type(error).__module__}.{type(error).__qualname__}: "
            f"translate it into TransientProviderError, PermanentProviderError or a subclass"
        )
        assert str(error).strip(), "the error says nothing: say what happened and what to do next"
        assert error.billed in ("no", "yes", "unknown"), f"error.billed is {error.billed!r}"
        assert isinstance(error.retryable, bool), f"error.retryable is {error.retryable!r}"
        status = getattr(error, "status", None)
        assert status is None or (isinstance(status, int) and 100 <= status <= 599), (
            f"error.status is {status!r}: it must be the number of an HTTP status, or None"
        )

    def test_retry_after_is_seconds(self, broken_embedder: Embedder) -> None:
        error = failure_of(broken_embedder)
        if not isinstance(error, TransientProviderError) or error.retry_after is None:
            return
        wait: Any = error.retry_after
        assert isinstance(wait, int | float), (
            f"error.retry_after is {wait!r}: it must be a number of seconds, or None"
        )
        assert not isinstance(wait, bool), f"error.retry_after is {wait!r}"
        assert math.isfinite(wait), f"error.retry_after is {wait}"
        assert wait >= 0, f"error.retry_after is {wait}: no caller can wait for that"
        assert wait <= _LONGEST_WAIT, (
            f"error.retry_after is {wait}: seconds from now are wanted, not a date or milliseconds"
        )

    def test_error_fits_its_status(self, broken_embedder: Embedder) -> None:
        error = failure_of(broken_embedder)
        status, again = getattr(error, "status", None), getattr(error, "retryable", None)
        if status in (502, 503, 504):
            assert again, (
                f"status {status} became {type(error).__name__}, which is not tried again: raise "
                "ProviderUnavailable, or another TransientProviderError"
            )
        if status in (401, 403):
            assert not again, (
                f"status {status} became {type(error).__name__}, which is tried again: raise "
                "AuthenticationFailed or PermissionDenied"
            )

    def test_answered_failure_has_its_status(self, broken_embedder: Embedder) -> None:
        before = self.requests_so_far()
        error = failure_of(broken_embedder)
        if self.requests_so_far() == before or not isinstance(error, ProviderUnavailable):
            return
        assert error.billed != "no" or error.status is not None, (
            'the server was reached, and the error has billed="no" and no status: it is taken for '
            "a connection that never stood, and its texts are not divided. Pass status=…"
        )

    def test_failed_request_is_sent_once(self, broken_embedder: Embedder) -> None:
        before = self._asked("server_requests", "it seen that nothing is tried again")
        failure_of(broken_embedder)
        sent = self.requests_so_far() - before
        assert sent <= 1, (
            f"one call of embed sent {sent} requests: do not retry in a provider (SDKs "
            f"have a setting for it); embedcore does, within the budget and the rate limits"
        )

    def test_failed_request_does_not_wait(
        self, broken_embedder: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slept, sleep = [], time.sleep

        def seen(seconds: float) -> None:
            caller = sys._getframe(1).f_code.co_filename
            if "socketserver" not in caller:  # a fake server in this process
                slept.append(seconds)
            sleep(min(seconds, 0.01))

        monkeypatch.setattr(time, "sleep", seen)
        failure_of(broken_embedder)
        waited = sum(slept)
        assert waited < 0.05, (
            f"a failing call of embed slept {waited:.2g} seconds: do not wait in a provider, and "
            "do not retry (SDKs have a setting for it); give the wait as retry_after"
        )

    def test_unbilled_failure_was_not_billed(self, broken_embedder: Embedder) -> None:
        before = self._asked("server_bill", 'it seen that billed="no" is true')
        error = failure_of(broken_embedder)
        after = self.server_bill()
        assert after is not None
        if isinstance(error, EmbeddingError) and error.billed == "no":
            assert after == before, (
                f'the error says billed="no", and the server billed {after - before} tokens: say '
                '"no" only with proof that nothing was billed, otherwise "unknown"'
            )

    def test_failing_request_keeps_its_time(self, broken_embedder: Embedder) -> None:
        outcome_of(broken_embedder)  # what is loaded by the first one takes no part
        _check_time(broken_embedder)

    def test_time_out_is_kept(self, slow_embedder: Embedder) -> None:
        outcome = _check_time(slow_embedder)
        assert not isinstance(outcome, EmbedReply), (
            "make_slow_embedder() answers within half a second: it is to take five seconds or more"
        )

    def test_time_out_is_typed(self, slow_embedder: Embedder) -> None:
        error, _ = within(_NEVER, lambda: outcome_of(slow_embedder, timeout=_TIMEOUT))
        assert isinstance(error, TransientProviderError), (
            f"a request that was not answered in time raised {type(error).__name__}: raise "
            "TimedOut, or another TransientProviderError"
        )

    def test_time_out_may_have_been_billed(self, slow_embedder: Embedder) -> None:
        before = self.server_requests()
        error, _ = within(_NEVER, lambda: outcome_of(slow_embedder, timeout=_TIMEOUT))
        if before is not None and self.server_requests() == before:
            pytest.skip("the request did not reach the server: it cannot have been billed")
        assert getattr(error, "billed", "unknown") != "no", (
            'a request that was not answered in time says billed="no": the server may have done '
            'the work, so say "unknown"'
        )

    def test_interrupt_is_not_swallowed(self, embedder: Embedder) -> None:
        _check_interrupts(embedder)

    def test_interrupt_of_a_failing_request_is_not_swallowed(
        self, broken_embedder: Embedder
    ) -> None:
        _check_interrupts(broken_embedder)


def failure_of(broken: Embedder, text: str = PROBES[0]) -> BaseException:
    """What a request to a broken embedder raises; skips one that raises nothing."""
    outcome = outcome_of(broken, text)
    if isinstance(outcome, EmbedReply):
        raise AssertionError(
            "a request of the broken embedder was answered: test_failure_is_not_hidden says more"
        )
    return outcome


def _check_time(embedder: Embedder) -> EmbedReply | BaseException | None:
    """One request of half a second; tried twice, since the machine may be busy."""
    for _ in range(2):
        outcome, seconds = within(_NEVER, lambda: outcome_of(embedder, timeout=_TIMEOUT))
        if seconds <= _LATE:
            return outcome
        if outcome is None:
            break  # not even then
    raise AssertionError(
        f"a request with timeout={_TIMEOUT} came back after {seconds:.1f} seconds: bound the whole "
        "attempt by EmbedRequest.timeout, if it is shorter than your own"
    )


def _check_interrupts(embedder: Embedder) -> None:
    """A KeyboardInterrupt in any line of the provider's must leave ``embed`` as what it is."""
    package = type(embedder).__module__.partition(".")[0]
    count = _Lines(package, at=0)
    outcome_of(embedder)  # loads what it loads
    within(_NEVER, lambda: count.run(embedder))
    step = max(count.seen // _POINTS, 1)
    for at in range(1, count.seen + 1, step):
        lines = _Lines(package, at)
        outcome, _ = within(_NEVER, lambda lines=lines: lines.run(embedder))  # type: ignore[misc]
        if lines.where is None:
            continue  # another way through: a connection was there already
        assert outcome is not None, (
            f"after a KeyboardInterrupt at {lines.where} embed did not come back: release locks "
            "with a with statement"
        )
        assert isinstance(outcome, KeyboardInterrupt), (
            f"a KeyboardInterrupt at {lines.where} became "
            f"{type(outcome).__name__}: catch Exception, never BaseException"
        )


class _Lines:
    """Counts the lines of a package that one request runs, and interrupts one of them.

    Only lines that go forward: where a with statement ends, Python itself is not interrupted.
    """

    def __init__(self, package: str, at: int) -> None:
        self.package, self.at = package, at
        self.seen = 0
        self.where: str | None = None
        self.latest: dict[FrameType, int] = {}

    def run(self, embedder: Embedder) -> EmbedReply | BaseException:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            return embedder.embed(EmbedRequest(texts=[PROBES[0]]))
        except BaseException as error:  # noqa: BLE001 - it is what is looked at
            return error
        finally:
            sys.settrace(before)
            self.latest.clear()

    def trace(self, frame: FrameType, event: str, _: object) -> TraceFunction | None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != self.package:
            return None
        if frame.f_code.co_name in ("__del__", "__exit__"):
            return None
        if event == "line" and frame.f_lineno > self.latest.get(frame, 0):
            self.latest[frame] = frame.f_lineno
            self.seen += 1
            if self.seen == self.at:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                raise KeyboardInterrupt
        return self.trace
