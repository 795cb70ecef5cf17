"""Whatever a server calls the end of a job, it is one; and nothing else is."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from embedcore.provider.batchstates import batch_state, is_known, is_stopping

ENDS = {
    "completed": ["completed", "Completed", "COMPLETED", "Complete", "succeeded", "SUCCESS"],
    "failed": ["failed", "Failed", "FAILURE"],
    "expired": ["expired", "EXPIRED", "TIMEOUT_EXCEEDED", "timeout-exceeded"],
    "cancelled": ["cancelled", "canceled", "CANCELED", "Cancelled"],
}
PREFIXED = {
    "BATCH_STATE_SUCCEEDED": "completed",
    "JOB_STATE_PARTIALLY_SUCCEEDED": "completed",
    "BATCH_STATUS_CANCELED": "cancelled",
    "JobStateExpired": "expired",
    " completed\n": "completed",
}
AT_WORK = [
    "validating",
    "In Progress",
    "finalizing",
    "queued",
    "BATCH_STATE_RUNNING",
    "JOB_STATE_CANCELLING",
    "paused",
    "stopped",
    "not completed",
    "incomplete",
    "batch",
    "_",
    "完了",
]


@pytest.mark.case("E7")
@pytest.mark.parametrize(
    ("word", "state"),
    [(word, state) for state, words in ENDS.items() for word in words] + list(PREFIXED.items()),
)
def test_an_end_is_known_however_it_is_written(word: str, state: str) -> None:
    assert batch_state(word) == state
    assert is_known(word)
    assert not is_stopping(word)


@pytest.mark.case("E7")
@pytest.mark.fault(81)
@pytest.mark.parametrize("word", AT_WORK)
def test_any_other_word_means_running(word: str) -> None:
    assert batch_state(word) == "running"


@pytest.mark.parametrize(
    "word", ["cancelling", "CANCELING", "Cancelling", "CANCELLATION_REQUESTED", "cancel requested"]
)
def test_a_job_that_was_told_to_stop_is_recognised(word: str) -> None:
    assert (batch_state(word), is_stopping(word), is_known(word)) == ("running", True, True)


@given(st.text())
def test_every_word_means_something(word: str) -> None:
    assert batch_state(word) in ("running", *ENDS)
    assert not (is_stopping(word) and batch_state(word) != "running")
