"""The batch API's objects, as OpenAI and as other servers send them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, strategies as st

from embedcore.provider.batch_objects import file_of, is_id, job_of, results_of, status_of
from embedcore.provider.batchstates import batch_state
from embedcore.provider.replies import BadReply
from embedcore.provider.types import BatchStatus

Recordings = Callable[[str], list[dict[str, Any]]]
JOB = "batch_1"


def status(job: str = JOB, **document: object) -> BatchStatus:
    return status_of({"id": job, **document}, job_id=JOB, shown=str)


RECORDED = [
    ("openai_embedding_batch_lifecycle.json", ["validating", "completed"]),
    ("openai_chat_basic_batch_completion.json", ["validating", "in_progress", "completed"]),
    ("openai_chat_batch_cancel.json", ["validating", "cancelling"]),
    ("openai_batches_list.json", ["validating"]),
    ("openai_batches_create.json", ["validating"]),
    ("openai_batches_retrieve.json", ["validating"]),
    ("openai_batches_cancel.json", ["cancelling"]),
]


@pytest.mark.parametrize(("name", "words"), RECORDED)
def test_recorded_jobs_are_understood(name: str, words: list[str], recordings: Recordings) -> None:
    seen = []
    for exchange in recordings(name):
        body = exchange["response_body"]
        jobs = body.get("data", [body]) if isinstance(body, dict) else []
        for job in (job for job in jobs if job.get("object") == "batch"):
            found = status_of(job, job_id=job["id"], shown=str)
            seen.append(found.detail)
            ended = job["status"] in ("completed", "failed", "expired", "cancelled")
            assert (found.state != "running") == ended
            listed = job_of(job)
            assert listed.found is not None
            assert (listed.found.id, listed.input_ref) == (job["id"], job["input_file_id"])
            assert listed.found.created_at == datetime.fromtimestamp(job["created_at"], UTC)
    assert set(words) <= set(seen)


def test_the_recorded_embedding_job_ends_with_what_it_cost(recordings: Recordings) -> None:
    jobs = [each["response_body"] for each in recordings("openai_embedding_batch_lifecycle.json")]
    jobs = [job for job in jobs if isinstance(job, dict) and job.get("object") == "batch"]
    told = [status_of(job, job_id=job["id"], shown=str) for job in jobs]
    assert told[-1] == BatchStatus(
        state="completed", detail="completed", completed=2, failed=0, total=2, tokens=13
    )
    assert all(each.tokens is None for each in told if each.state == "running")
    found = results_of(jobs[-1], job_id=jobs[-1]["id"], shown=str)
    assert found is not None
    assert (found.files, found.counted) == ([jobs[-1]["output_file_id"]], 2)
    assert results_of(jobs[0], job_id=jobs[0]["id"], shown=str) is None


@pytest.mark.fault(81)
@given(st.text(min_size=1).filter(lambda word: batch_state(word) == "running"))
def test_a_word_that_is_not_known_means_running(word: str) -> None:
    found = status(status=word, request_counts=None, usage={"total_tokens": 9})
    assert (found.state, found.detail, found.tokens) == ("running", word[:80], None)


@pytest.mark.case("E7")
@pytest.mark.parametrize(
    ("word", "state"),
    [("Completed", "completed"), ("CANCELED", "cancelled"), ("succeeded", "completed")],
)
def test_an_end_in_other_words_is_one(word: str, state: str) -> None:
    found = status(status=word, usage={"total_tokens": 9}, output_file_id="file-1")
    assert (found.state, found.detail, found.tokens) == (state, word, 9)
    listed = job_of({"id": JOB, "status": word})
    assert listed.found is not None
    assert listed.found.state == state


@pytest.mark.parametrize("wrong", [{}, {"status": None}, {"status": 3}, {"status": ""}])
def test_a_job_without_a_state_is_no_job(wrong: dict[str, object]) -> None:
    with pytest.raises(BadReply, match="status"):
        status(**wrong)


def test_the_state_of_another_job_is_refused() -> None:
    with pytest.raises(BadReply, match="another job"):
        status("batch_2", status="completed")


@pytest.mark.parametrize(
    "counts",
    [None, [], "3", {}, {"completed": None, "failed": None, "total": None}, {"total": -1}],
)
def test_counts_may_be_missing(counts: object) -> None:
    found = status(status="in_progress", request_counts=counts)
    assert (found.completed, found.failed, found.total) == (None, None, None)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"input_tokens": 7, "output_tokens": 0, "total_tokens": 7}, 7),
        ({"prompt_tokens": 5}, 5),
        ({"input_tokens": 0, "total_tokens": 0}, None),
        ({"input_tokens": True, "total_tokens": "7"}, None),
        ({"total_tokens": 2**70}, None),
        (None, None),
        ([], None),
    ],
)
def test_what_was_billed_is_known_at_the_end_if_at_all(usage: object, tokens: int | None) -> None:
    assert status(status="completed", usage=usage).tokens == tokens
    assert status(status="finalizing", usage=usage).tokens is None


@pytest.mark.fault(62)
def test_the_reasons_of_a_failed_job_belong_to_its_items() -> None:
    data = [
        {"code": "invalid_json_line", "message": "not JSON", "param": None, "line": 2},
        {"code": "too_long", "message": None, "line": 2},
        {"code": None, "message": "bad", "line": 50_000},
        {"message": "the whole of it", "line": None},
        {"code": "x", "line": 0},
        {"code": "y", "line": True},
        "nonsense",
    ]
    found = status(status="failed", errors={"object": "list", "data": data})
    assert found.errors == {
        "1": "invalid_json_line: not JSON",
        "49999": "bad",
        "": "the whole of it",
    }
    assert not found.queue_full


@pytest.mark.parametrize("errors", [None, {}, {"data": None}, [], "no"])
def test_reasons_may_be_missing(errors: object) -> None:
    assert status(status="failed", errors=errors).errors == {}


QUEUE = (
    "Enqueued token limit reached for text-embedding-3-small in organization org-1. "
    "Limit: {} enqueued tokens. Please try again once some in_progress batches have been completed."
)


@pytest.mark.fault(74)
@pytest.mark.parametrize(
    ("limit", "parsed"),
    [("20,000,000", 20_000_000), ("90000", 90_000), ("some", None), ("1,2", None)],
)
def test_a_full_queue_says_how_much_it_takes(limit: str, parsed: int | None) -> None:
    entry = {"code": "token_limit_exceeded", "message": QUEUE.format(limit), "line": None}
    found = status(status="failed", errors={"data": [entry]})
    assert (found.state, found.queue_full, found.queue_limit) == ("failed", True, parsed)
    both = status(status="failed", errors={"data": [entry, {"code": "empty_file"}]})
    assert (both.queue_full, both.queue_limit) == (False, None)
    assert not status(status="in_progress", errors={"data": [entry]}).queue_full


@pytest.mark.fault(135)
@given(st.text())
def test_only_plain_ids_are_ids(value: str) -> None:
    plain = set(value) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
    assert is_id(value) == (plain and 0 < len(value) <= 128)


@pytest.mark.fault(135)
@pytest.mark.parametrize(
    "value", ["../../x", "/etc/x", "a\0", "x" * 129, "a b", "ü", "a\n", 3, None]
)
def test_odd_ids_go_nowhere(value: object) -> None:
    assert not is_id(value)
    assert job_of({"id": value, "status": "completed"}).found is None
    assert file_of({"id": value}) is None
    if value is not None:
        document = {"id": JOB, "status": "completed", "output_file_id": value}
        with pytest.raises(BadReply, match="result file"):
            results_of(document, job_id=JOB, shown=str)


@pytest.mark.fault(65)
@pytest.mark.parametrize(
    ("output", "error", "files"),
    [
        ("file-1", None, ["file-1"]),
        (None, "file-2", ["file-2"]),
        ("file-1", "file-2", ["file-1", "file-2"]),
        ("file-1", "file-1", ["file-1"]),
        (None, None, []),
        ("", "", []),
    ],
)
def test_either_file_may_be_missing(output: object, error: object, files: list[str]) -> None:
    document = {"id": JOB, "status": "expired", "output_file_id": output, "error_file_id": error}
    found = results_of(document, job_id=JOB, shown=str)
    assert found is not None
    assert found.files == files


@pytest.mark.fault(77)
@pytest.mark.parametrize("moment", [None, "yesterday", True, 10**20, float("nan"), float("inf")])
def test_a_time_may_be_missing_or_absurd(moment: object) -> None:
    listed = job_of({"id": JOB, "created_at": moment})
    assert listed.found is not None
    assert listed.created_at is listed.found.created_at is None


OURS = {"metadata": {"embedcore": "k"}}


@pytest.mark.fault(78)
@pytest.mark.parametrize(
    ("entry", "is_ours"),
    [
        ({"id": JOB, **OURS}, True),
        ({"id": JOB, "input_file_id": "file-1"}, True),
        ({"id": JOB, "input_file_id": "file-1", "metadata": {"embedcore": "other"}}, True),
        ({"id": JOB, "input_file_id": 3, **OURS, "status": 5}, True),
        ({"id": JOB, "input_file_id": "file-2"}, False),
        ({"id": JOB, "input_file_id": "file-2", "metadata": "{}"}, False),
        ({"id": None, "input_file_id": "file-2", "metadata": 7}, False),
        ({"id": JOB, "metadata": {"embedcore": "other"}, "input_file_id": []}, False),
        ({"metadata": {"embedcore": "other"}}, False),
        ({"metadata": {"somebody": "else"}, "input_file_id": {}}, False),
        ({"id": JOB}, False),
        ({"id": JOB, "metadata": None, "input_file_id": None}, False),
        ({"id": JOB, "metadata": {}, "status": "odd"}, False),
        # What may be ours, and cannot be used.
        (None, None),
        (3, None),
        ("batch_1", None),
        ([], None),
        ({}, None),
        ({"id": 3}, None),
        ({"id": "../x", **OURS}, None),
        ({"input_file_id": "file-1"}, None),
        ({"id": JOB, "metadata": "embedcore"}, None),
        ({"id": JOB, "metadata": {"embedcore": 3}}, None),
        ({"id": JOB, "metadata": None, "input_file_id": 3}, None),
    ],
)
def test_whose_an_entry_is_that_cannot_all_be_read(entry: object, is_ours: bool | None) -> None:
    assert job_of(entry).is_of("k", "file-1") is is_ours


@pytest.mark.parametrize(
    ("document", "ours"),
    [
        ({"filename": "embedcore-k.jsonl", "purpose": "batch"}, True),
        ({"filename": "embedcore-k.jsonl"}, True),
        ({"filename": "embedcore-k.jsonl", "purpose": "fine-tune"}, False),
        ({"filename": "my-embedcore-k.jsonl", "purpose": "batch"}, False),
        ({"filename": "corpus.jsonl", "purpose": "batch"}, False),
        ({"filename": None}, False),
        ({}, False),
    ],
)
def test_files_of_others_are_not_ours(document: dict[str, object], ours: bool) -> None:
    listed = file_of({"id": "file-1", **document})
    assert listed is not None
    assert (listed.key == "k") == ours
