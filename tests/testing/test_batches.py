"""Does the fake Batch API run jobs as the real one does, and bill each line it ran once?"""

from __future__ import annotations

import base64
import json
import threading

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.testing import FakeClock, openai_tokens, vector_of
from embedcore.testing.openai.batches import (
    BatchService,
    BatchSettings,
    FileLimits,
    Listing,
    Progress,
    Quirks,
)
from embedcore.testing.openai.embeddings import ApiError

SMALL = "text-embedding-3-small"
WIDTH = 8


def line(custom_id, text, **changes):
    body = {"model": SMALL, "input": text, "dimensions": WIDTH, **changes.pop("body", {})}
    full = {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}
    return json.dumps({**full, **changes}).encode()


def texts(count):
    return [f"text {number}" for number in range(count)]


def started(service, *lines, create=None):
    """A job on a file with these lines (or so many ordinary ones)."""
    if len(lines) == 1 and isinstance(lines[0], int):
        lines = [line(str(place), text) for place, text in enumerate(texts(lines[0]))]
    file = service.upload(b"\n".join(lines))
    return service.create(file["id"], **(create or {}))["id"]


def by_hand(**settings):
    return BatchService(settings=BatchSettings(progress=Progress(), **settings))


def content(service, file_id):
    return b"".join(service.content(file_id).blocks())


def output(service, job_id, which="output_file_id"):
    """The lines of a job's file, parsed; none if there is no file."""
    file_id = service.retrieve(job_id)[which]
    if file_id is None:
        return []
    return [json.loads(one) for one in content(service, file_id).splitlines() if one.strip()]


def vector(entry, place=0):
    found = entry["response"]["body"]["data"][place]["embedding"]
    return np.frombuffer(base64.b64decode(found), "<f4") if isinstance(found, str) else found


def right(entry, text, width=WIDTH):
    return np.array_equal(np.asarray(vector(entry), np.float32), vector_of(text, width))


@pytest.fixture
def service():
    return by_hand()


# A job's life


def test_by_hand_a_job_passes_every_state(service):
    job = started(service, 4)
    seen = [service.retrieve(job)]
    for _ in range(3):
        service.step(job)
        seen.append(service.retrieve(job))
    assert [one["status"] for one in seen] == [
        "validating",
        "in_progress",
        "finalizing",
        "completed",
    ]
    assert [one["model"] for one in seen] == [None, SMALL, SMALL, SMALL]
    assert [one["request_counts"]["total"] for one in seen] == [0, 4, 4, 4]
    assert [one["usage"]["total_tokens"] for one in seen] == [0, 0, 0, service.meter.billed_tokens]
    assert seen[-1]["usage"]["input_tokens"] == sum(openai_tokens(texts(4)))
    assert seen[-1]["output_file_id"]
    assert seen[-1]["error_file_id"] is None


@given(st.integers(1, 12), st.integers(1, 40))
def test_by_polls_it_is_complete_at_the_last_and_never_goes_back(polls, lines):
    service = BatchService(settings=BatchSettings(progress=Progress(polls=polls)))
    job = started(service, lines)
    order = ["validating", "in_progress", "finalizing", "completed"]
    seen = [service.retrieve(job) for _ in range(polls)]
    places = [order.index(one["status"]) for one in seen]
    done = [one["request_counts"]["completed"] for one in seen]
    assert places == sorted(places)
    assert done == sorted(done)
    assert places.index(3) == polls - 1
    assert service.meter.billed_requests == lines


def test_by_time_it_goes_on_when_nobody_looks():
    clock = FakeClock()
    settings = BatchSettings(progress=Progress(seconds=100))
    service = BatchService(settings=settings, clock=clock.time)
    job = started(service, 10)
    assert service.retrieve(job)["status"] == "validating"
    clock.advance(60)
    service.refresh()
    assert 0 < service.meter.billed_requests < 10
    service.clock.advance(40)
    found = service.retrieve(job)
    assert found["status"] == "completed"
    assert found["completed_at"] == found["created_at"] + 100


def test_a_window_that_is_over_expires_the_job_by_itself(service):
    job = started(service, 5)
    service.step(job, done=2)
    service.clock.advance(86400)
    found = service.retrieve(job)
    assert (found["status"], found["expired_at"]) == ("expired", found["created_at"] + 86400)
    assert len(output(service, job)) == 2
    assert len(output(service, job, "error_file_id")) == 3


def test_looking_by_hand_is_no_poll():
    service = BatchService(settings=BatchSettings(progress=Progress(polls=1)))
    job = started(service, 1)
    assert service.job(job).status == service.jobs[0].status == "validating"
    assert service.batches()["data"][0]["status"] == "validating"
    assert service.retrieve(job)["status"] == "completed"


@given(total=st.integers(1, 8), done=st.integers(0, 10))
@pytest.mark.parametrize("end", ["finish", "expire", "end_cancel"])
def test_an_end_with_part_of_the_lines_has_and_bills_just_those(end, total, done):
    service = by_hand()
    job = started(service, total)
    if end == "end_cancel":
        assert service.cancel(job)["status"] == "cancelling"
    getattr(service, end)(job, done=done)
    run = min(total, done)
    good, bad = output(service, job), output(service, job, "error_file_id")
    assert len(good) == service.meter.billed_requests == run
    assert all(right(one, f"text {one['custom_id']}") for one in good)
    assert not service.meter.billed_twice
    expired = [one for one in bad if one["error"]["code"] == "batch_expired"]
    assert len(bad) == len(expired) == (total - run if end == "expire" else 0)
    assert service.retrieve(job)["usage"]["total_tokens"] == service.meter.billed_tokens
    assert {one["custom_id"] for one in good}.isdisjoint(one["custom_id"] for one in bad)


def test_cancelling_before_it_began_costs_nothing(service):
    job = started(service, 3)
    service.cancel(job)
    assert service.cancel(job)["status"] == "cancelling"  # once more changes nothing
    service.step(job)
    found = service.retrieve(job)
    assert (found["status"], found["output_file_id"], found["error_file_id"]) == (
        "cancelled",
        None,
        None,
    )
    assert service.meter.requests == 0
    with pytest.raises(ApiError, match="cancelled") as refused:
        service.cancel(job)
    assert refused.value.status == 409


@pytest.mark.parametrize("measure", ["polls", "seconds"])
def test_cancelling_takes_its_time(measure):
    progress = Progress(cancel_polls=2, cancel_seconds=600, **{measure: 50})
    service = BatchService(settings=BatchSettings(progress=progress))
    job = started(service, 2)
    service.cancel(job)
    seen = []
    for _ in range(3):
        service.clock.advance(300)
        seen.append(service.retrieve(job)["status"])
    assert seen == ["cancelling", "cancelled", "cancelled"]


def test_cancelling_may_still_end_as_completed(service):
    job = started(service, 2)
    service.cancel(job)
    service.finish(job)
    assert service.retrieve(job)["status"] == "completed"


def test_what_has_ended_cannot_end_again(service):
    job = started(service, 2)
    service.finish(job)
    for end in (service.finish, service.expire, service.end_cancel):
        with pytest.raises(ValueError, match="already"):
            end(job)
    assert service.meter.billed_requests == 2


# Validation


@pytest.mark.parametrize(
    ("lines", "code", "place"),
    [
        ([b"{nonsense", line("1", "a")], "invalid_json_line", 1),
        ([line("0", "a"), b"[1]"], "invalid_json_line", 2),
        ([b"\xef\xbb\xbf" + line("0", "a")], "invalid_json_line", 1),
        ([line("0", "a"), line("0", "b")], "duplicate_custom_id", 2),
        ([line("0", "a"), line(None, "b")], "missing_required_parameter", 2),
        ([line("", "a")], "missing_required_parameter", 1),
        ([line("0", "a", body={"model": None})], "missing_required_parameter", 1),
        ([line("0", "a", body={"model": "nonesuch"})], "model_not_found", 1),
        (
            [line("0", "a"), line("1", "a", body={"model": "text-embedding-3-large"})],
            "model_mismatch",
            2,
        ),
        ([line("0", "a", url="/v1/completions")], "url_mismatch", 1),
        ([line("0", "a", method="GET")], "invalid_method", 1),
        ([line("0", "a") + b"\n\n", b'{"custom_id"'], "invalid_json_line", 4),
        ([b" \n"], "empty_file", None),
    ],
)
def test_a_wrong_file_fails_later_and_costs_nothing(service, lines, code, place):
    job = started(service, *lines)
    assert service.retrieve(job)["errors"] is None
    service.step(job)
    found = service.retrieve(job)
    assert (found["status"], found["output_file_id"]) == ("failed", None)
    (error,) = found["errors"]["data"]
    assert (error["code"], error["line"]) == (code, place)
    assert error["message"]
    assert service.meter.requests == 0


def test_every_wrong_line_is_named(service):
    job = started(service, b"{", line("1", "a"), b"}")
    service.finish(job)
    found = service.retrieve(job)["errors"]
    assert found["object"] == "list"
    assert [error["line"] for error in found["data"]] == [1, 3]


def test_a_file_may_be_as_large_as_its_limits_and_no_larger():
    limits = FileLimits(max_lines=3, max_inputs=4, max_bytes=1000)
    for lines, code in (
        ([line(str(n), ["a"]) for n in range(3)], None),
        ([line(str(n), ["a"]) for n in range(4)], "too_many_tasks"),
        ([line("0", ["a"] * 4)], None),
        ([line("0", ["a"] * 5)], "too_many_inputs"),
        ([line("0", "a" * 1000)], "file_too_large"),
    ):
        service = by_hand(file_limits=limits)
        job = started(service, *lines)
        service.step(job)
        errors = service.job(job).errors
        assert [error.code for error in errors] == ([code] if code else [])


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data + b"\n",
        lambda data: data.replace(b"\n", b"\n\n"),
    ],
)
def test_the_form_of_an_input_is_free(service, edit):
    data = b"\n".join([line("0", "a"), line("1", "b")])
    job = service.create(service.upload(edit(data))["id"])["id"]
    service.finish(job)
    assert len(output(service, job)) == 2


def test_too_much_in_the_queue_fails_later_and_may_be_tried_again(service):
    tokens = sum(openai_tokens(texts(4)))
    service.settings.enqueued_token_limit = tokens + 1
    first, second = started(service, 4), started(service, 4)
    service.step(first)
    service.step(second)
    (error,) = service.retrieve(second)["errors"]["data"]
    assert (error["code"], error["line"]) == ("token_limit_exceeded", None)
    assert f"Limit: {tokens + 1:,} enqueued" in error["message"]
    service.finish(first)
    third = service.create(service.job(second).input_file_id)["id"]
    service.finish(third)
    assert service.retrieve(third)["status"] == "completed"


# Inputs that are gone


def test_a_job_needs_its_input_at_creation_and_at_validation(service):
    with pytest.raises(ApiError) as refused:
        service.create("file-nonesuch")
    assert (refused.value.status, refused.value.error["param"]) == (400, "input_file_id")
    service.settings.missing_input_status = 404
    file = service.upload(line("0", "a"))["id"]
    job, ran = service.create(file)["id"], service.create(file)["id"]
    service.step(ran)
    assert service.delete(file) == {"object": "file", "id": file, "deleted": True}
    with pytest.raises(ApiError) as refused:
        service.create(file)
    assert refused.value.status == 404
    service.step(job)
    assert service.retrieve(job)["errors"]["data"][0]["code"] == "file_not_found"
    service.finish(ran)  # it was read before
    assert service.retrieve(ran)["status"] == "completed"
    for gone in (service.file, service.content, service.delete):
        with pytest.raises(ApiError) as refused:
            gone(file)
        assert refused.value.status == 404


def test_the_switch_lets_jobs_run_on_deleted_inputs(service):
    service.settings.accepts_deleted_input = True
    file = service.upload(line("0", "a"))["id"]
    service.delete(file)
    job = service.create(file)["id"]
    service.finish(job)
    assert len(output(service, job)) == 1
    with pytest.raises(ApiError):
        service.create("file-that-never-was")


def test_files_expire(service):
    short = service.upload(line("0", "a"), expires_after=3600)
    assert short["expires_at"] == short["created_at"] + 3600
    job = service.create(short["id"], output_expires_after=7200)["id"]
    service.finish(job)
    found = service.file(service.job(job).output_file_id)
    assert found["expires_at"] == found["created_at"] + 7200
    service.clock.advance(3600)
    with pytest.raises(ApiError):
        service.file(short["id"])
    assert [one["id"] for one in service.files()["data"]] == [found["id"]]
    service.clock.advance(3601)
    with pytest.raises(ApiError):
        service.content(found["id"])


# Lines


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True))
@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_each_vector_is_that_of_its_text(encoding, found):
    service = by_hand()
    body = {} if encoding is None else {"encoding_format": encoding}
    job = started(service, *(line(f"id {text}", text, body=body) for text in found))
    service.finish(job)
    lines = {one["custom_id"]: one for one in output(service, job)}
    assert set(lines) == {f"id {text}" for text in found}
    for text in found:
        one = lines[f"id {text}"]
        assert right(one, text)
        assert isinstance(vector(one), np.ndarray) == (encoding == "base64")
        assert one["response"]["body"]["usage"]["prompt_tokens"] == openai_tokens([text])[0]
    assert service.meter.billed_texts == dict.fromkeys(found, 1)


@pytest.mark.parametrize("width", [1, 256, 3072])
def test_numbers_of_a_list_give_the_vector_back_exactly(service, width):
    body = {"model": "text-embedding-3-large", "dimensions": width}
    job = started(service, *(line(str(n), text, body=body) for n, text in enumerate(texts(70))))
    service.finish(job)
    for one in output(service, job):
        assert right(one, f"text {one['custom_id']}", width)


def test_several_texts_in_one_line(service):
    job = started(service, line("0", ["a", "b"]), line("1", ["c"]))
    service.finish(job)
    (two,) = [one for one in output(service, job) if one["custom_id"] == "0"]
    assert [item["index"] for item in two["response"]["body"]["data"]] == [0, 1]
    for place, text in enumerate("ab"):
        assert np.array_equal(np.asarray(vector(two, place), np.float32), vector_of(text, WIDTH))
    assert service.meter.billed_texts == {"a": 1, "b": 1, "c": 1}
    assert service.meter.billed_requests == 2


def test_lines_that_the_endpoint_refuses_are_in_the_error_file_and_free(service):
    bad = [line("1", ""), line("2", "a", body={"dimensions": 9999}), line("3", ["a", 7])]
    job = started(service, line("0", "good"), *bad)
    service.finish(job)
    found = service.retrieve(job)
    assert found["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    errors = output(service, job, "error_file_id")
    assert {one["custom_id"] for one in errors} == {"1", "2", "3"}
    for one in errors:
        assert one["error"] is None
        assert one["response"]["status_code"] == 400
        assert set(one["response"]["body"]["error"]) == {"message", "type", "param", "code"}
    assert service.meter.billed_texts == {"good": 1}


def test_lines_fail_by_marker_in_both_forms(service):
    service.fail_lines("BUSY", status=429, code="rate_limit_exceeded")
    service.fail_lines("ODD", http=False, code="batch_expired", message="too late")
    service.fail_lines("PAID", status=500, billed=True)
    service.fail_lines("ONCE", times=1)
    marked = ["BUSY", "ODD", "PAID", "ONCE 1", "ONCE 2", "fine"]
    job = started(service, *(line(text, text) for text in marked))
    service.finish(job)
    errors = {one["custom_id"]: one for one in output(service, job, "error_file_id")}
    assert set(errors) == {"BUSY", "ODD", "PAID", "ONCE 1"}
    assert errors["BUSY"]["response"]["status_code"] == 429
    assert errors["BUSY"]["response"]["body"]["error"]["code"] == "rate_limit_exceeded"
    assert errors["ODD"]["response"] is None
    assert errors["ODD"]["error"] == {"code": "batch_expired", "message": "too late"}
    assert service.meter.billed_texts == {"PAID": 1, "ONCE 2": 1, "fine": 1}


def test_a_job_without_a_good_line_is_completed_without_an_output_file(service):
    job = started(service, line("0", ""))
    service.finish(job)
    found = service.retrieve(job)
    assert (found["status"], found["output_file_id"]) == ("completed", None)
    assert found["error_file_id"]


# Oddities


def odd(count=6, marked=(), **quirks):
    service = by_hand(quirks=Quirks(**quirks))
    lines = [line(str(place), text) for place, text in enumerate([*texts(count), *marked])]
    job = started(service, *lines)
    service.finish(job)
    return service, job


@pytest.mark.parametrize("order", ["input", "reversed", "shuffled"])
def test_order(order):
    service, job = odd(20, order=order)
    ids = [int(one["custom_id"]) for one in output(service, job)]
    assert sorted(ids) == list(range(20))
    assert (ids == sorted(ids)) == (order == "input")
    assert (ids == sorted(ids, reverse=True)) == (order == "reversed")
    service, job = odd(2)
    assert [one["custom_id"] for one in output(service, job)] == ["1", "0"]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_body_as_a_string(encoding):
    service = by_hand(quirks=Quirks(string_body=True))
    service.fail_lines("BAD")
    body = {"encoding_format": encoding}
    job = started(service, line('"0"', "a", body=body), line("1", "BAD"))
    service.finish(job)
    (good,) = output(service, job)
    (bad,) = output(service, job, "error_file_id")
    for one in (good, bad):
        assert isinstance(one["response"]["body"], str)
        one["response"]["body"] = json.loads(one["response"]["body"])
    assert right(good, "a")
    assert bad["response"]["body"]["error"]["message"]


def test_base64_may_be_ignored():
    service = by_hand(quirks=Quirks(ignores_base64=True))
    job = started(service, line("0", "a", body={"encoding_format": "base64"}))
    service.finish(job)
    (one,) = output(service, job)
    assert isinstance(vector(one), list)
    assert right(one, "a")


@pytest.mark.parametrize(
    ("quirks", "shows"),
    [
        ({"bom": True}, lambda data: data.startswith(b"\xef\xbb\xbf{")),
        ({"line_end": "\r\n"}, lambda data: data.count(b"\r\n") == 6),
        ({"blank_lines": True}, lambda data: data.count(b"}\n\n") == 6),
        ({"final_newline": False}, lambda data: data.endswith(b"}") and data.count(b"\n") == 5),
        ({"cut": 0.4}, lambda data: not data.endswith(b"}\n") and 1 < data.count(b"\n") < 5),
    ],
)
def test_form_of_the_file(quirks, shows):
    service, job = odd(**quirks)
    file = service.job(job).output_file_id
    data = content(service, file)
    assert shows(data)
    assert len(data) == service.file(file)["bytes"]


def test_lines_that_are_double_missing_or_nobodys():
    marked = ["SAME", "OTHER", "LOST", "NAMELESS"]
    service, job = odd(
        1,
        marked,
        duplicate_equal="SAME",
        duplicate_different="OTHER",
        missing="LOST",
        no_id="NAMELESS",
        unknown_id=True,
    )
    found = {}
    for one in output(service, job):
        found.setdefault(one.get("custom_id"), []).append(one)
    assert {name: len(lines) for name, lines in found.items()} == {
        "0": 1,
        "1": 2,
        "2": 2,
        None: 1,
        "nobody-sent-this": 1,
    }
    assert [right(one, "SAME") for one in found["1"]] == [True, True]
    assert sorted(right(one, "OTHER") for one in found["2"]) == [False, True]
    # What is written twice was run once; what is lost was run as well.
    assert not service.meter.billed_twice
    assert service.meter.billed_requests == 5


def test_objects_that_say_too_little():
    service, job = odd(2, counts="null", usage="absent")
    found = service.retrieve(job)
    assert found["request_counts"] == {"total": 2, "completed": None, "failed": None}
    assert "usage" not in found
    service.settings.quirks = Quirks(counts="absent", usage="null")
    found = service.retrieve(job)
    assert "request_counts" not in found
    assert found["usage"] is None
    service.settings.quirks = Quirks(counts="wrong", usage="zero")
    found = service.retrieve(job)
    assert found["request_counts"]["completed"] == 3
    assert found["usage"]["total_tokens"] == 0


def test_a_status_that_nobody_knows_hides_none_that_is_final(service):
    service.settings.quirks.status_word = "scheduling"
    job = started(service, 1)
    service.step(job)
    assert service.retrieve(job)["status"] == "scheduling"
    service.finish(job)
    assert service.retrieve(job)["status"] == "completed"


def test_files_that_are_not_there_or_empty():
    service, job = odd(2, no_output_file=True, empty_error_file=True)
    found = service.retrieve(job)
    assert found["output_file_id"] is None
    assert service.file(found["error_file_id"])["bytes"] == 0
    assert service.meter.billed_requests == 2


def test_lines_without_usage_and_with_another_model():
    service, job = odd(1, line_usage=False, reply_model="another")
    (one,) = output(service, job)
    assert "usage" not in one["response"]["body"]
    assert one["response"]["body"]["model"] == "another"


def test_jobs_and_outputs_vanish(service):
    job, other = started(service, 2), started(service, 2)
    service.finish(job)
    file = service.job(job).output_file_id
    service.vanish_output(job)
    with pytest.raises(ApiError, match="No such File"):
        service.content(file)
    assert service.retrieve(job)["output_file_id"] == file
    service.vanish(job)
    for call in (service.retrieve, service.cancel):
        with pytest.raises(ApiError) as refused:
            call(job)
        assert refused.value.status == 404
    assert [one["id"] for one in service.batches()["data"]] == [other]


@given(st.integers(0, 40), st.data())
def test_content_can_be_read_from_any_byte(lines, data):
    service, job = odd(lines, ["BAD"], bom=True, line_end="\r\n")
    file = service.content(service.job(job).output_file_id)
    whole = b"".join(file.blocks())
    start = data.draw(st.integers(0, len(whole)))
    assert b"".join(file.blocks(start)) == whole[start:]


# Lists


def listed(service, **more):
    page = service.batches(**more)
    assert page["first_id"] == (page["data"][0]["id"] if page["data"] else None)
    assert page["last_id"] == (page["data"][-1]["id"] if page["data"] else None)
    return [one["id"] for one in page["data"]], page["has_more"]


def test_lists_are_paged_newest_first(service):
    jobs = [started(service, 1) for _ in range(5)][::-1]
    assert listed(service, limit=2) == (jobs[:2], True)
    assert listed(service, limit=2, after=jobs[1]) == (jobs[2:4], True)
    assert listed(service, limit=2, after=jobs[3]) == (jobs[4:], False)
    assert listed(service, limit=5) == (jobs, False)
    files = [one["id"] for one in service.files(limit=4)["data"]]
    assert files == [service.job(job).input_file_id for job in jobs[:4]]
    with pytest.raises(ApiError):
        service.batches(after="batch_nonesuch")


def test_a_list_may_lag_by_listings_or_by_time(service):
    service.settings.listing = Listing(lag_listings=2)
    job = started(service, 1)
    assert [listed(service)[0] for _ in range(3)] == [[], [], [job]]
    service.settings.listing = Listing(lag_seconds=30)
    late = started(service, 1)
    service.clock.advance(29)
    assert late not in listed(service)[0]
    assert service.retrieve(late)["id"] == late
    service.clock.advance(2)
    assert late in listed(service)[0]


def test_a_list_may_lie_about_more_and_repeat_itself(service):
    jobs = [started(service, 1) for _ in range(3)][::-1]
    service.settings.listing = Listing(has_more=False)
    assert listed(service, limit=1) == (jobs[:1], False)
    service.settings.listing = Listing(has_more=True)
    assert listed(service, after=jobs[-1]) == ([], True)
    service.settings.listing = Listing(repeats=True)
    assert listed(service, limit=2, after=jobs[1]) == (jobs[:2], True)


# Late effects


def test_what_is_late_lands_by_requests_by_time_or_by_hand(service):
    file = service.upload(line("0", "a"))["id"]
    for when in ({"requests": 2}, {"seconds": 60}, {}):
        service.defer(lambda: str(service.create(file)["id"]), **when)
    service.batches()
    service.batches()
    assert (len(service.jobs), service.pending) == (0, 3)
    assert len(service.batches()["data"]) == 1  # the third request is the first to see it
    service.clock.advance(60)
    assert len(service.batches()["data"]) == 2
    assert service.land() == 1
    assert len(service.batches()["data"]) == 3
    assert service.landed == [job.id for job in service.jobs]
    assert (service.pending, service.land()) == (0, 0)


@pytest.mark.parametrize("accepts", [False, True])
def test_a_late_create_on_a_deleted_input_is_refused_unless_switched(service, accepts):
    service.settings.accepts_deleted_input = accepts
    file = service.upload(line("0", "a"))["id"]
    service.defer(lambda: str(service.create(file)["id"]))
    service.delete(file)
    service.land()
    assert len(service.jobs) == accepts
    assert ("No such File" in service.landed[0]) == (not accepts)


def test_many_threads_bill_each_line_once():
    service = BatchService(settings=BatchSettings(progress=Progress(polls=40)))
    job = started(service, 200)
    threads = [
        threading.Thread(target=lambda: [service.retrieve(job) for _ in range(10)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert service.retrieve(job)["status"] == "completed"
    assert service.meter.billed_texts == dict.fromkeys(texts(200), 1)
    assert len({one["custom_id"] for one in output(service, job)}) == 200
