"""Other members of each kind: servers that count, answer and write their lines in odd ways.

Over real sockets. Whatever they do, each row has its own vector or a reason, nothing is billed
twice, and what was billed is in the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from embedcore import EmbeddingClient
from embedcore.policy.batch.job import BatchJob
from embedcore.storage import usage
from embedcore.testing import FakeOpenAI, vectors_of
from embedcore.testing.openai.batch_settings import BatchSettings, Progress
from embedcore.testing.openai.http import HttpReply, HttpRequest

TEXTS = [f"text number {number}" for number in range(6)]
Twist = Callable[[HttpRequest, HttpReply], HttpReply | None]


class Odd(FakeOpenAI):
    """Its answers are changed on their way out, as often as ``times`` says; None: always.

    ``refuses``: what it says to a job that is asked for, instead of creating one.
    """

    twist: Twist | None = None
    times: int | None = None
    refuses: HttpReply | None = None

    def answer(self, request: HttpRequest) -> HttpReply:
        if self.refuses and (request.method, request.path) == ("POST", "/v1/batches"):
            return self.refuses
        reply = super().answer(request)
        if self.twist is None or self.times == 0:
            return reply
        changed = self.twist(request, reply)
        if changed is not None and self.times is not None:
            self.times -= 1
        return reply if changed is None else changed


class Desk:
    """One client of one odd server, and one clock."""

    def __init__(self, server: Odd, home: Path, opened: ExitStack) -> None:
        self.server = server
        self.home = home
        self._opened = opened

    def submit(self, **options: Any) -> BatchJob:
        given = {"base_url": self.server.base_url, "api_key": self.server.api_key, "batch": True}
        client = EmbeddingClient(
            "openai:text-embedding-3-small",
            options={**given, **options},
            # It is looked for twice again: how long is the matter of test_late_results.py.
            config={"home": self.home, "batch": {"output_wait": 100.0}},
        )
        self._opened.enter_context(client)
        self.ledger = client._engine.account.ledger
        assert self.ledger is not None
        self.ledger._clock = self.server.batches.clock
        return client.submit_batch(TEXTS, on_error="keep")

    def work(self, job: BatchJob, *, asked: bool = False) -> BatchJob:
        for _ in range(60):
            for one in self.server.batches.jobs:
                if not one.ended:
                    self.server.batches.finish(one.id)
            job.advance(asked=asked)
            if job.record.has_ended:
                return job
            self.server.batches.clock.advance(61)
        raise AssertionError(job.status(poll=False))

    def check(self, job: BatchJob, *, without: Sequence[int] = ()) -> dict[int, str]:
        """What the rows without a vector say."""
        result = job.result(timeout=0, on_error="keep")
        assert [row for row in range(6) if not result.ok[row]] == list(without)
        assert (result.vectors[result.ok] == vectors_of(TEXTS, 1536)[result.ok]).all()
        meter = self.server.batches.meter
        assert len(self.server.batches.jobs) == 1
        assert meter.billed_twice == {}
        assert self.ledger is not None
        used = usage.of_scope(self.ledger, "default", "total")
        assert used.spent.tokens >= meter.billed_tokens
        assert used.held.tokens == 0
        return {row: error.message for row, error in result.errors.items()}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with Odd(batch=BatchSettings(progress=Progress())) as server, ExitStack() as opened:
        yield Desk(server, tmp_path / "state", opened)


def reply(body: object, status: int = 200, **headers: str) -> HttpReply:
    written = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpReply(
        status=status, headers={"content-type": "application/json", **headers}, body=written
    )


def _of_job(request: HttpRequest) -> bool:
    return request.method == "GET" and request.path.startswith("/v1/batches/")


def _of_results(request: HttpRequest) -> bool:
    return request.path.endswith("/content")


def job_with(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Twist:
    """The object of a job that has completed is another one."""

    def twist(request: HttpRequest, given: HttpReply) -> HttpReply | None:
        if not _of_job(request) or given.status != 200:
            return None
        document = json.loads(given.body)
        return reply(change(document)) if document["status"] == "completed" else None

    return twist


def lines_with(change: Callable[[list[Any]], list[Any] | bytes]) -> Twist:
    """The lines of the results are others."""

    def twist(request: HttpRequest, given: HttpReply) -> HttpReply | None:
        if not _of_results(request) or given.status != 200:
            return None
        lines = [json.loads(line) for line in b"".join(given.blocks()).splitlines()]
        changed = change(lines)
        if not isinstance(changed, bytes):
            changed = b"".join(json.dumps(line).encode() + b"\n" for line in changed)
        return HttpReply(body=changed)

    return twist


def both(one: Twist, other: Twist) -> Twist:
    return lambda request, given: one(request, given) or other(request, given)


# How far it is

COUNTS: dict[str, Any] = {
    "texts": {"total": "6", "completed": "5", "failed": "1"},
    "floats": {"total": 6.0, "completed": 5.0, "failed": 1.0},
    "nulls": {"total": None, "completed": None, "failed": None},
    "negative": {"total": 6, "completed": -5, "failed": 1},
    "endless": {"total": 10**30, "completed": 10**30, "failed": 0},
    "booleans": {"total": True, "completed": True, "failed": False},
    "nothing": {"total": 0, "completed": 0, "failed": 0},
    "short": {"total": 6, "completed": 5, "failed": 0},
    "of another job": {"total": 5, "completed": 5, "failed": 0},
    "no object": "5/6",
    "none": None,
}


@pytest.mark.case("E2")
@pytest.mark.parametrize(
    ("counts", "lost"),
    # Each of them once; all of it in a campaign.
    [
        pytest.param(
            counts,
            lost,
            id=f"{name}-{lost}",
            marks=[] if number % 2 == lost else pytest.mark.campaign(short=True),
        )
        for number, (name, counts) in enumerate(COUNTS.items())
        for lost in (False, True)
    ],
)
def test_counts_that_say_nothing_buy_nothing(desk: Desk, counts: Any, lost: bool) -> None:
    odd = job_with(lambda job: {**job, "request_counts": counts, "usage": None})
    missing = lines_with(lambda lines: lines[1:])
    desk.server.twist = both(odd, missing) if lost else odd
    job = desk.work(desk.submit())
    result = job.result(timeout=0, on_error="keep")
    without = [row for row in range(6) if not result.ok[row]]
    assert len(without) == lost
    reasons = desk.check(job, without=without)
    assert all("output_gone" in reason for reason in reasons.values())


@pytest.mark.case("E7")
@pytest.mark.parametrize("word", [" Completed ", "COMPLETED", "com-pleted", "Succeeded"])
def test_words_for_the_end(desk: Desk, word: str) -> None:
    desk.server.twist = job_with(lambda job: {**job, "status": word})
    assert desk.check(desk.work(desk.submit())) == {}


# The file with the results

ANSWERS = {
    "404": reply({"error": {"message": "no such file"}}, 404),
    "404, a page": HttpReply(status=404, body=b"<html>nothing here</html>"),
    "410": reply({"error": {"message": "gone"}}, 410),
    "403": reply({"error": {"message": "not yours"}}, 403),
    "400": reply({"error": {"message": "not ready"}}, 400),
    "409": reply({"error": {"message": "not now"}}, 409),
    "425": reply({"error": {"message": "too early"}}, 425),
    "429": reply({"error": {"message": "slowly"}}, 429, **{"retry-after": "30"}),
    "500": reply({"error": {"message": "broken"}}, 500),
    "503, a page": HttpReply(status=503, body=b"<html>soon</html>"),
    "elsewhere": HttpReply(status=302, headers={"location": "http://127.0.0.1:1/"}),
    "202": HttpReply(status=202),
    "204": HttpReply(status=204),
    "a page": HttpReply(body=b"<!doctype html>\n<html><body>Please log in</body></html>"),
    "an error": reply({"error": {"message": "not ready", "code": 404}}),
    "a state": reply({"status": "processing"}),
}


@pytest.mark.case("E2")
@pytest.mark.case("E3")
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_whatever_is_answered_instead_of_results_for_a_while(desk: Desk, answer: HttpReply) -> None:
    desk.server.twist = lambda request, _: answer if _of_results(request) else None
    desk.server.times = 3
    assert desk.check(desk.work(desk.submit())) == {}


@pytest.mark.case("E2")
@pytest.mark.parametrize("answer", ["404", "400", "a page", "an error", "204", "500"])
def test_whatever_is_answered_instead_of_results_for_ever(desk: Desk, answer: str) -> None:
    desk.server.twist = lambda request, _: ANSWERS[answer] if _of_results(request) else None
    reasons = desk.check(desk.work(desk.submit()), without=range(6))
    gone = "could not be read" if answer == "500" else "output_gone"
    assert all(gone in reason for reason in reasons.values())


@pytest.mark.case("E2")
def test_the_same_file_named_twice_is_read_once(desk: Desk) -> None:
    desk.server.twist = job_with(lambda job: {**job, "error_file_id": job["output_file_id"]})
    assert desk.check(desk.work(desk.submit())) == {}


# Its lines


def renamed(name: Callable[[str], object]) -> Twist:
    return lines_with(
        lambda lines: [{**line, "custom_id": name(line["custom_id"])} for line in lines]
    )


@pytest.mark.case("E1")
@pytest.mark.parametrize(
    "name",
    [
        lambda name: int(name.rpartition("-")[2]),
        lambda name: name.rpartition("-")[2],
        lambda name: f"\ufeff{name}",
        lambda name: f"request-{name}",
        lambda name: f"{name} ",
        lambda name: f"0000000000000000-{name.rpartition('-')[2]}",
        lambda name: [name],
    ],
    ids=["number", "place", "BOM", "prefix", "space", "another job", "list"],
)
def test_a_name_that_is_not_ours_is_nobodys(desk: Desk, name: Callable[[str], object]) -> None:
    desk.server.twist = renamed(name)
    reasons = desk.check(desk.work(desk.submit()), without=range(6))
    assert all("output_gone" in reason for reason in reasons.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[::-1],
        lambda lines: lines + lines,
        lambda lines: [None, [], 5, "", *lines],
        lambda lines: b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(one).encode() for one in lines),
        lambda lines: [{**lines[0], "error": {"code": "server_error"}}, *lines],
    ],
    ids=["reversed", "twice", "no objects", "BOM and CRLF", "an error before its vector"],
)
def test_lines_in_other_forms(desk: Desk, change: Callable[[list[Any]], list[Any] | bytes]) -> None:
    desk.server.twist = lines_with(change)
    assert desk.check(desk.work(desk.submit())) == {}


@pytest.mark.parametrize("first", [True, False])
def test_two_vectors_of_one_text_are_none(desk: Desk, first: bool) -> None:
    def change(lines: list[Any]) -> list[Any]:
        other = {**lines[0], "response": lines[1]["response"]}
        return [other, *lines] if first else [*lines, other]

    desk.server.twist = lines_with(change)
    job = desk.work(desk.submit())
    result = job.result(timeout=0, on_error="keep")
    (row,) = (row for row in range(6) if not result.ok[row])
    assert "two different vectors" in desk.check(job, without=[row])[row]


NO_ERRORS = [{}, [], "", " ", None, False, 0, [{}], "null", "None", {"code": None, "message": ""}]


@pytest.mark.case("E8")
@pytest.mark.parametrize("error", NO_ERRORS, ids=repr)
def test_an_error_that_says_nothing_beside_a_vector(desk: Desk, error: object) -> None:
    desk.server.twist = lines_with(lambda lines: [{**line, "error": error} for line in lines])
    assert desk.check(desk.work(desk.submit())) == {}


# Creating

REFUSALS = {
    "404": (404, {"error": {"message": "no such file"}}),
    "state": (400, {"error": {"message": "The input is not in processed state"}}),
    "detail": (422, {"detail": [{"loc": ["body", "input_file_id"], "msg": "invalid state"}]}),
    "locked": (423, {"error": {"message": "Locked"}}),
    "early": (425, {"error": {"message": "Too early"}}),
    "other words": (400, {"error": {"message": "文件尚未就绪"}}),
}


@pytest.mark.case("E4")
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("state", ["uploaded", "In Progress"])
def test_a_job_that_is_refused_right_after_the_upload(
    desk: Desk, refusal: tuple[int, Any], state: str | None
) -> None:
    def twist(request: HttpRequest, given: HttpReply) -> HttpReply | None:
        if request.method == "GET" and request.path.startswith("/v1/files/"):
            return reply({**json.loads(given.body), "status": state})
        return None

    desk.server.twist = twist
    desk.server.refuses = reply(refusal[1], refusal[0])
    job = desk.submit()
    trouble = job.status().jobs[0].trouble
    assert trouble is not None, "what was said is shown meanwhile"
    assert f"HTTP {refusal[0]}" in trouble
    desk.server.twist = desk.server.refuses = None
    assert desk.check(desk.work(job, asked=True)) == {}
