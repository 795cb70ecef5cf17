"""Figures are made of runs that take turns with the limit, and of its best number of texts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from compare import corpus, measure, table
from compare.clients import embedcore, limit, openai_sdk
from compare.clients.contract import Client, Row
from compare.measure import Bill, Measure
from compare.runner import Outcome, Runner
from compare.sizes import Sizes
from compare.used import Used

if TYPE_CHECKING:
    from compare.serving import Serving

SIZES = Sizes(rounds=3, streams=3, cpu=100, short=100, short_stream=100, throughput=100, strict=400)
METER = {
    "cpu": 0.1,
    "requests": 7,
    "billed": 10,
    "unknown_texts": 0,
    "most_in_flight": 4,
    "throttled": 2,
}
ROWS = {row.name: row for row in (*embedcore.CLIENT.rows, *limit.CLIENT.rows)}


class Scripted:
    """Stands for the runner: who ran, in which order, and what each run is said to have used."""

    base_url = "http://127.0.0.1:9/v1"

    def __init__(self, used: Callable[[Row, int, dict[str, Any]], Used]) -> None:
        self.runs: list[str] = []
        self.used = used

    def run(self, client: Client, row: Row, purpose: str, *, texts: int, **more: Any) -> Outcome:
        number = self.runs.count(row.name)
        self.runs.append(row.name)
        return Outcome(used=self.used(row, number, {"texts": texts, **more}), meter=METER)


def of(runner: Any) -> Measure:
    bill = Bill(all=range(10**6), unique=range(10**6))
    return Measure(runner, SIZES, bill, bill, limit=limit.CLIENT)


def whole(texts: int, **more: Any) -> Used:
    return Used(texts=texts, delivered=texts, **more)


def test_a_ratio_is_the_median_pairs_and_they_take_turns() -> None:
    def used(row: Row, number: int, order: dict[str, Any]) -> Used:
        # The machine is three times slower in the second round, for both.
        load = (1.0, 3.0, 1.0)[number]
        return whole(order["texts"], cpu=load * (2.0 if row.name == "embedcore" else 1.0))

    runner = Scripted(used)
    cell = of(runner).short(embedcore.CLIENT, ROWS["embedcore"])
    assert cell["times_limit"] == 2.0
    assert runner.runs == ["limit", "embedcore", "embedcore", "limit", "limit", "embedcore"]


def test_over_tls_the_limit_is_the_one_over_tls() -> None:
    runner = Scripted(lambda row, number, order: whole(order["texts"], cpu=1.0))
    of(runner).cpu(embedcore.CLIENT, ROWS["embedcore-tls"])
    assert set(runner.runs) == {"limit-tls", "embedcore-tls"}


def test_the_limit_of_throughput_is_its_best_number_of_texts_per_request() -> None:
    asked: list[int] = []

    def used(row: Row, number: int, order: dict[str, Any]) -> Used:
        if row.name == "embedcore":
            return whole(order["texts"], wall=4.0)
        asked.append(order["request_texts"])
        return whole(order["texts"], wall=1.0 if order["request_texts"] == 500 else 2.0)

    figures = of(Scripted(used))
    base = figures.throughput(limit.CLIENT, ROWS["limit"])
    assert (base["request_texts"], base["texts_per_second"]) == (500, 100.0)
    assert sorted(asked) == sorted(measure.REQUEST_TEXTS * 2)
    cell = figures.throughput(embedcore.CLIENT, ROWS["embedcore"])
    assert (cell["texts_per_second"], cell["share_of_limit"]) == (25.0, 0.25)
    # It is not looked for again.
    assert asked[len(measure.REQUEST_TEXTS) * 2 :] == [500, 500, 500]


def test_a_run_that_failed_leaves_a_reason_and_no_further_rounds() -> None:
    runner = Scripted(lambda row, number, order: Used(texts=order["texts"], error="RuntimeError"))
    cell = of(runner).arrivals(embedcore.CLIENT, ROWS["embedcore"])
    assert cell == {"error": "RuntimeError"}
    assert runner.runs.count("embedcore") == 1


def test_who_fails_with_a_thousand_questions_keeps_the_figure_of_two_hundred() -> None:
    def used(row: Row, number: int, order: dict[str, Any]) -> Used:
        if row.name == "openai" and order["texts"] == 1_000:
            return Used(texts=1_000, error="APITimeoutError: Request timed out.")
        return whole(order["texts"], wall=0.9 if row.name == "openai" else 0.3)

    row = next(row for row in openai_sdk.CLIENT.rows if row.name == "openai")
    cell = of(Scripted(used)).gather(openai_sdk.CLIENT, row)
    assert cell["times_limit"] == {"200": pytest.approx(3.0)}
    assert cell["failed"] == {"1000": {"error": "APITimeoutError: Request timed out."}}
    results = {
        "clients": {"openai_sdk": {}},
        "rows": {"openai": {"title": "openai", "client": "openai_sdk", "gather": cell}},
    }
    lines = table._table(results, table._ASKING, table._Notes())
    assert lines[-1] == "| openai | 0.90 (3.0 ×) | failed |"


def test_under_the_strict_limit_the_ideal_is_that_of_the_calls_which_came_back() -> None:
    def used(row: Row, number: int, order: dict[str, Any]) -> Used:
        assert (order["limit"].refused_count, order["limit"].burst_requests) == (True, 10)
        return Used(texts=order["texts"], delivered=40_000, wall=50.0, error="one failed")

    cell = of(Scripted(used)).strict(embedcore.CLIENT, ROWS["embedcore"])
    # 400 calls, of which 10 are free at the start and 10 more each second.
    assert (cell["ideal_seconds"], cell["share"]) == (39.0, 0.78)


@pytest.mark.parametrize("purpose", ["short", "short-stream", "query", "arrivals", "strict"])
def test_a_child_measures_short_texts_of_the_limit(serving: Serving, purpose: Any) -> None:
    runner = Runner(serving, {"limit": Path(sys.executable)})
    outcome = runner.run(limit.CLIENT, ROWS["limit"], purpose, texts=40)
    assert (outcome.used.delivered, outcome.used.wrong, outcome.used.error) == (40, 0, None)
    meter = outcome.meter
    assert (meter["texts"], meter["unknown_texts"], meter["answered"]) == (
        40,
        0,
        {"query": 40}.get(purpose, meter["requests"]),
    )


def test_a_child_trusts_the_certificate_where_its_row_is_over_tls(serving: Serving) -> None:
    pythons = {"limit": Path(sys.executable), "embedcore": Path(sys.executable)}
    runner = Runner(serving, pythons)
    for client, name in ((limit.CLIENT, "limit-tls"), (embedcore.CLIENT, "embedcore-tls")):
        used = runner.run(client, ROWS[name], "cpu", texts=60).used
        assert (used.delivered, used.wrong, used.error) == (60, 0, None)


@pytest.mark.campaign(short=True)
def test_a_full_cache_is_filled_put_into_and_read_by_two_processes(
    serving: Serving,
) -> None:
    small = Sizes(rounds=2, cpu=100, full_cache=300, cache_rows=700)
    bill = Bill(all=[0], unique=[0])
    pythons = {"limit": Path(sys.executable), "embedcore": Path(sys.executable)}
    figures = Measure(Runner(serving, pythons), small, bill, bill, limit=limit.CLIENT)
    cell = figures.full_cache(embedcore.CLIENT, ROWS["embedcore-cache"])
    assert (cell["rows"], len(cell["puts"])) == (700, 2)
    assert min(cell["get_seconds_per_10k"], cell["new_process_seconds_per_10k"]) > 0
    # float16, and what the file has besides.
    assert cell["bytes_per_vector"] > 2 * 1536
    assert figures.checked["embedcore-cache"] == {"vectors": 600, "wrong": 0}


@pytest.mark.campaign(short=True)
def test_texts_of_the_cache_are_billed_once_also_in_a_process_that_runs_on(
    serving: Serving,
) -> None:
    small = Sizes(rounds=1, cpu=60, reuse=60)
    texts = corpus.texts(60)
    bill = Bill(all=[0] * 61, unique=[0] * 61)
    pythons = {"limit": Path(sys.executable), "embedcore": Path(sys.executable)}
    figures = Measure(Runner(serving, pythons), small, bill, bill, limit=limit.CLIENT)
    cell = figures.reuse(embedcore.CLIENT, ROWS["embedcore-cache"])
    assert cell["billed_first"] > 0
    assert cell["billed_again"] == 0
    assert min(cell["running_seconds_per_10k"], cell["seconds_per_10k"]) > 0
    assert figures.checked["embedcore-cache"]["vectors"] == 3 * len(texts)
