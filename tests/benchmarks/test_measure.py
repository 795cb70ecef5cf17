"""The figures are of what happened: bills, wrong rows, failures, and cells that say why."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from compare import child, corpus, picture, roster, table, truth
from compare.clients import contract, limit
from compare.limits import Limit
from compare.measure import Bill, disk_bytes, share
from compare.runner import Runner

if TYPE_CHECKING:
    from compare.serving import Serving
    from compare.tokens import Counter

TEXTS = corpus.texts(120)


def test_the_bill_has_all_tokens_and_those_of_different_texts(counter: Counter) -> None:
    texts = ["one two", "three", "one two", "three", "four five six"]
    bill = Bill.of(texts, counter)
    assert bill.all == [0, 2, 3, 5, 6, 9]
    assert bill.unique == [0, 2, 3, 3, 3, 6]


def test_a_child_measures_the_limit(serving: Serving) -> None:
    runner = Runner(serving, {"limit": Path(sys.executable)})
    outcome = runner.run(limit.CLIENT, limit.CLIENT.rows[0], "cpu", texts=300)
    assert (outcome.used.delivered, outcome.used.wrong, outcome.used.error) == (300, 0, None)
    assert outcome.used.cpu > 0
    # The warm-up before is not on the meter.
    assert (outcome.meter["texts"], outcome.meter["requests"]) == (300, 2)


def test_warming_up_meets_no_limit_of_the_run_before(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compare.runner.TIMEOUT", 15.0)
    runner = Runner(serving, {"limit": Path(sys.executable)})
    # The warm-up has 20 texts: under this limit it would wait for minutes.
    serving.reset(limit=Limit(tokens_per_minute=60, burst_tokens=30))
    outcome = runner.run(limit.CLIENT, limit.CLIENT.rows[0], "cpu", texts=20)
    assert outcome.used.delivered == 20


def test_a_process_that_dies_is_a_failure_with_its_last_words(serving: Serving) -> None:
    runner = Runner(serving, {"limit": Path(sys.executable)})
    row = replace(limit.CLIENT.rows[0], name="nobody")
    outcome = runner.run(limit.CLIENT, row, "cpu", texts=10)
    assert outcome.used.error is not None
    assert "StopIteration" in outcome.used.error


def test_nobody_used_more_than_the_whole_limit() -> None:
    # 0.5M tokens are there at once, and 6M come each minute.
    whole = child.Used(texts=100, delivered=100, wall=25.0)
    assert share(3_000_000, 3_000_000, whole) == 1.0
    assert share(3_000_000, 3_000_000, replace(whole, delivered=50)) == 0.4
    # The half that came had the short texts.
    assert share(3_000_000, 1_000_000, replace(whole, delivered=50)) == 0.2
    assert share(3_000_000, 3_000_000, replace(whole, delivered=0)) == 0.0


def test_swapped_and_missing_rows_are_seen() -> None:
    rows = list(truth.vectors(TEXTS))
    rows[0], rows[1] = rows[1], rows[0]
    used = child._measured(TEXTS, lambda: [None if place == 9 else rows[place] for place in RANGE])
    different = 2 if TEXTS[0] != TEXTS[1] else 0
    assert (used.wrong, used.delivered) == (different, len(TEXTS) - 1)


def test_too_few_vectors_are_a_failure() -> None:
    used = child._measured(TEXTS, lambda: truth.vectors(TEXTS[1:]))
    assert used.delivered == 0
    assert used.error is not None


def test_what_was_delivered_before_a_failure_counts() -> None:
    def work() -> contract.Found:
        rows = [None, *truth.vectors(TEXTS[1:])]
        raise contract.Partly(rows, "the first one failed")

    used = child._measured(TEXTS, work)
    assert (used.delivered, used.wrong) == (len(TEXTS) - 1, 0)
    assert used.error == "the first one failed"


def test_threads_keep_the_order_and_what_others_have_paid_for() -> None:
    def embed(texts: list[str]) -> list[list[float]]:
        if "5" in texts:
            raise RuntimeError("refused")
        return [[float(text)] for text in texts]

    texts = [str(number) for number in range(10)]
    with pytest.raises(contract.Partly, match="refused") as caught:
        contract.in_threads(embed, size=2, threads=3)(texts)
    found = caught.value.found
    assert [None if one is None else one[0] for one in found] == [
        0,
        1,
        2,
        3,
        None,
        None,
        6,
        7,
        8,
        9,
    ]


def test_a_list_of_lists_becomes_the_array() -> None:
    right = truth.vectors(TEXTS[:3])
    assert np.array_equal(child.as_array(right.tolist()), right)
    assert child.as_array(right.tolist()).dtype == np.float32


def test_disk_bytes_counts_whole_folders(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"x" * 10_000)
    assert disk_bytes(tmp_path) >= 10_000


def test_only_takes_names_of_clients_and_rows_and_always_the_limit() -> None:
    names = [row.name for _, rows in roster.chosen("openai,haystack") for row in rows]
    assert names == ["limit", "openai", "haystack"]
    names = [row.name for _, rows in roster.chosen("embedcore-tls") for row in rows]
    assert names == ["limit", "limit-tls", "embedcore-tls"]
    with pytest.raises(ValueError, match="no client nobody"):
        roster.chosen("nobody")


def test_a_cell_without_a_figure_says_why() -> None:
    text = table.markdown(RESULTS)
    assert "| good | 0.50 | 1.0 |" in text
    assert "| absent | – [1] | – [1] |" in text
    assert "| broken | failed [2] | failed [2] |" in text
    assert "1. not installed: no wheel" in text
    assert "2. RuntimeError: no" in text


def test_only_what_was_measured_is_in_table_and_picture() -> None:
    part = {
        **RESULTS,
        "clients": {"a": {}},
        "rows": {
            "asked": {
                "title": "asked",
                "label": "asked",
                "client": "a",
                "query": {"milliseconds": 1.5, "times_limit": 3.0},
                "gather": {"seconds": {"200": 0.25}, "times_limit": {"200": 1.5}},
                "checked": {"vectors": 205, "wrong": 1},
            },
            "other": {"title": "other", "label": "other", "client": "a"},
        },
    }
    text = table.markdown(part)
    assert "| asked | 1.50 | 3.0 | 0.25 (1.5 ×) |" in text
    assert "other" not in text
    assert "texts/s" not in text
    assert "1,000 at once" not in text
    assert picture.drawn(part) == ([], [])
    part["rows"]["asked"]["cpu"] = {"times_limit": 2.0}
    rows, panels = picture.drawn(part)
    assert ([row["label"] for row in rows], [panel.measure for panel in panels]) == (
        ["asked"],
        ["cpu"],
    )


def test_results_of_an_older_run_are_drawn_without_the_figures_that_it_has_not() -> None:
    older = {"seconds_per_10k": 0.51, "billed_again": 0, "bytes_per_vector": 3362.0, "how": "it"}
    rows = {"old": {"title": "old", "client": "a", "reuse": older}}
    text = table.markdown({**RESULTS, "clients": {"a": {}}, "rows": rows})
    assert "| old | 0.51 [1] | 0 | 3,362 |" in text
    assert "same process" not in text


RANGE = range(len(TEXTS))
RESULTS = {
    "when": "2026-11-24T00:00:00",
    "machine": {"processor": "one", "cores": 2, "python": "3.11"},
    "limit": {"tokens_per_minute": 6e6, "requests_per_minute": 3000},
    "corpus": {"mean_tokens": 193.0},
    "clients": {
        "a": {"versions": {"a": "1"}},
        "b": {"error": "not installed: no wheel"},
    },
    "rows": {
        "good": {
            "title": "good",
            "client": "a",
            "cpu": {"seconds_per_10k": 0.5, "times_limit": 1.0, "billed_over_unique": 1.05},
        },
        "absent": {"title": "absent", "client": "b"},
        "broken": {"title": "broken", "client": "a", "cpu": {"error": "RuntimeError: no"}},
    },
}
