"""Is what is said of a batch true, short, and on one line where it must be?"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from embedcore import Spending
from embedcore.cli.batch.status import (
    ago,
    change_text,
    code_of_all,
    code_of_report,
    commonest,
    report_text,
    troubles,
)
from embedcore.policy.batch.report import BatchReport, RemoteJob

RUNNING = BatchReport(
    id="20261124-00000000",
    state="running",
    model="openai:m",
    scope="default",
    rows=12,
    texts=10,
    reused=1,
    stored=4,
    failed=0,
    to_submit=0,
    in_flight=6,
    stopped=0,
    done=5,
    blocked=None,
    jobs=(),
    usage=Spending(),
    reserved_tokens=0,
    reserved_cost=Decimal(0),
    created=datetime(2026, 11, 24, tzinfo=UTC),
    ended=None,
)
ENDED = replace(RUNNING, state="done", stored=10, in_flight=0, done=10, ended=RUNNING.created)


def job(number, phase="submitted", **more):
    fields = {"status": "in_progress", "texts": 5, "completed": 2, "failed": 0, "total": 5}
    return RemoteJob(id=f"batch_{number}", phase=phase, **{**fields, "trouble": None, **more})


@pytest.mark.parametrize(
    ("report", "code"),
    [
        (RUNNING, 4),
        (replace(RUNNING, state="cancelling"), 4),
        (replace(RUNNING, state="blocked", blocked="budget: x"), 3),
        (replace(RUNNING, state="blocked", blocked="queue: x"), 4),
        (ENDED, 0),
        (replace(ENDED, stored=9, failed=1), 1),
        (replace(ENDED, state="cancelled", stored=9), 1),
        (replace(ENDED, state="cancelled"), 0),
        (replace(ENDED, state="abandoned", stored=0), 1),
    ],
)
def test_the_code_says_how_it_stands(report, code):
    assert code_of_report(report) == code


@pytest.mark.parametrize(
    ("codes", "code"), [([], 0), ([0, 0], 0), ([0, 4], 4), ([4, 3, 0], 3), ([4, 1, 3], 1)]
)
def test_what_needs_a_person_comes_first(codes, code):
    assert code_of_all(codes) == code


def test_only_a_budget_is_called_one():
    assert "waiting for budget" in change_text(replace(RUNNING, state="blocked", blocked="budget:"))
    assert "budget" not in change_text(replace(RUNNING, state="blocked", blocked="queue: full"))


def test_of_many_jobs_those_at_work_are_shown():
    jobs = [job(n, "done", status="completed") for n in range(30)] + [job(n) for n in (40, 41)]
    shown = report_text(replace(RUNNING, jobs=tuple(jobs)))
    assert "batch_40  in_progress, 2 of 5" in shown
    assert "batch_41" in shown
    assert "batch_7 " not in shown
    assert "and 30 more, of which 30 have ended" in shown
    many = report_text(replace(RUNNING, jobs=tuple(job(n) for n in range(30))))
    assert "and 20 more, of which 0 have ended" in many
    assert "30 jobs at work" in change_text(replace(RUNNING, jobs=tuple(map(job, range(30)))))


def test_the_same_trouble_is_told_once_and_on_one_line():
    jobs = tuple(job(n, trouble="no\nway \x1b[2J" + "x" * 1_000) for n in range(3))
    (told,) = troubles(replace(RUNNING, jobs=jobs))
    assert told.startswith("no way x")
    assert len(told) <= 300
    assert "\x1b" not in told


def test_the_commonest_reasons_come_first():
    reasons = {f"reason {n}": n for n in range(1, 7)}
    assert list(commonest(reasons)) == [
        "6 × reason 6",
        "5 × reason 5",
        "4 × reason 4",
        "and 3 other reasons",
    ]


def test_a_change_is_one_line():
    blocked = replace(RUNNING, jobs=(job(1), job(2)))
    assert change_text(blocked) == (
        "20261124-00000000: under way, 5 of 10 texts, batch_1 in_progress, batch_2 in_progress"
    )
    assert "3 texts without a vector" in change_text(replace(ENDED, stored=7, failed=3))


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        (timedelta(seconds=5), "less than a minute ago"),
        (timedelta(hours=2, minutes=5), "2 h 5 min ago"),
        (timedelta(days=9, hours=3), "9 days ago"),
        (timedelta(seconds=-90), "less than a minute ago"),
    ],
)
def test_how_long_ago(passed, said):
    assert ago(datetime.now(UTC) - passed).endswith(said)
