"""Batches of texts that nobody counts: sent whole, and shortened only where that costs no job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from embedcore.errors import InputTooLong
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import BatchOutcome
from embedcore.testing import tokens_of, vectors_of
from embedcore.testing.fakes.batch import custom_id_of
from embedcore.testing.fakes.embedder import FAKE_INFO, Outcome

batch_desk = run_path(str(Path(__file__).with_name("batch_desk.py")))["batch_desk"]

LIMIT = 100
INFO = replace(FAKE_INFO, max_input_tokens=LIMIT)
WORDS = "several words of a text that goes on "
LONG, FITS = WORDS * 40, WORDS * 8
ROWS = [LONG, "short", FITS, LONG]


@pytest.fixture
def uncounted(batch_desk: Any) -> Any:
    batch_desk.provide(info=INFO)
    batch_desk.embedder.tokenizer = EstimatingTokenizer()
    return batch_desk


@pytest.mark.case("A9")
def test_texts_of_a_batch_are_sent_whole_and_the_outcome_is_unknown(uncounted: Any) -> None:
    job = uncounted.work(uncounted.submit(ROWS))
    result = uncounted.check(job, ROWS)
    assert uncounted.meter.billed_texts == {LONG: 1, "short": 1, FITS: 1}
    assert result.tokens_cut == {}
    assert result.perhaps_cut == {0, 2, 3}
    (block,) = uncounted.client().batch_job(job.id).blocks(9)
    assert block.perhaps_cut == {0, 2, 3}


@pytest.mark.case("A9")
def test_a_line_that_is_refused_says_what_to_do(uncounted: Any, monkeypatch: Any) -> None:
    results = uncounted.strategy.results

    def refusing(job: str) -> Any:
        texts = dict(lines(uncounted))
        for outcome in results(job):
            if tokens_of(texts[outcome.id]) > LIMIT:
                yield BatchOutcome(id=outcome.id, error="invalid input", ran=True)
            else:
                yield outcome

    monkeypatch.setattr(uncounted.strategy, "results", refusing)
    job = uncounted.work(uncounted.submit(ROWS, on_error="keep"))
    result = uncounted.check(job, ROWS, without=[0, 3])
    for row in (0, 3):
        assert "invalid input; if it is too long: embedded at once" in result.errors[row].message
    assert result.perhaps_cut == {2}


def lines(batch_desk: Any) -> Any:
    """Id and text of each line of every job."""
    for job in batch_desk.jobs:
        for line in batch_desk.service.input_lines(job.input_file_id):
            text = json.loads(line)["body"]["input"]
            yield custom_id_of(line), text if isinstance(text, str) else text[0]


@pytest.mark.case("A9")
@pytest.mark.parametrize("exact", [False, True])
def test_what_is_embedded_at_once_is_shortened_and_told(uncounted: Any, exact: bool) -> None:
    rows, limit = list(ROWS), LIMIT
    if exact:
        uncounted.provide(info=INFO)
        rows[0] = rows[3] = "x" * 4 * LIMIT
        limit = LIMIT - 1

    def script(request: Any, number: int) -> Any:
        if max(map(tokens_of, request.texts)) > limit:
            return Outcome(error=InputTooLong("too long", billed="no"))
        return None

    uncounted.embedder._script = script
    job = uncounted.client(strategy="immediate").submit_batch(rows)
    result = job.result(on_error="keep")
    assert result.ok.all()
    if exact:
        kept = "x" * 4 * (LIMIT - result.tokens_cut[0])
        assert result.characters_cut == {}
    else:
        kept = LONG[: -result.characters_cut[0]]
        assert result.tokens_cut == {0: None, 3: None}
    assert 0.8 * LIMIT <= tokens_of(kept) <= limit
    right = vectors_of([kept, "short", FITS, kept], 32)
    assert (result.vectors == right).all()
    # Whoever has the whole text must hear of the cut himself, in another process too.
    other = uncounted.client()
    again = other.batch_job(job.id).result(on_error="keep")
    assert (again.vectors == right).all()
    assert again.cuts[0] == result.cuts[0]
    before = uncounted.embedder.meter.billed_tokens
    now = other.embed(rows)
    assert now.outcomes[0].cut == "yes"
    assert (
        now.vectors[0] == vectors_of([rows[0][: len(rows[0]) - now.cuts[0].characters]], 32)[0]
    ).all()
    assert uncounted.embedder.meter.billed_tokens - before <= 2 * LIMIT
