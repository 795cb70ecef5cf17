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
from embedcore.testing.openai.batches import BatchService, BatchSettings, Progress
from embedcore.testing.openai.embeddings import FakeModel, Limits

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
def test_a_line_that_no_job_takes_shortened_says_what_to_do(
    uncounted: Any, monkeypatch: Any
) -> None:
    results = uncounted.strategy.results

    def refusing(job: str) -> Any:
        texts = dict(lines(uncounted))
        for outcome in results(job):
            if tokens_of(texts[outcome.id]) > LIMIT:
                yield BatchOutcome(id=outcome.id, error="invalid input", ran=True)
            else:
                yield outcome

    monkeypatch.setattr(uncounted.strategy, "results", refusing)
    job = uncounted.work(uncounted.submit(ROWS, on_error="keep", batch={"attempts": 1}))
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


# Refused for their length: the next job is sent less of them


def shortening(batch_desk: Any, *, most: int = LIMIT, exact: bool = False, **info: Any) -> Any:
    """A desk whose server takes so many tokens, as it counts them."""
    service = BatchService(
        models={INFO.model: FakeModel(dimensions=32)},
        count=lambda texts: list(map(tokens_of, texts)),
        limits=Limits(max_text_tokens=most),
        settings=BatchSettings(progress=Progress()),
        clock=batch_desk.clock.time,
    )
    batch_desk.provide(info=replace(INFO, **info), service=service)
    if not exact:
        batch_desk.embedder.tokenizer = EstimatingTokenizer()
    return batch_desk


def check_cut(desk: Any, job: Any, rows: list[str], most: int) -> list[str]:
    """Every row has the vector of what its text was cut to, in another process too, and the ledger
    are right. Returns what was sent of each text in the end."""
    result = desk.client().batch_job(job.id).result(on_error="keep")
    assert result.ok.all(), result.errors
    kept = []
    for row, text in enumerate(rows):
        cut = result.cuts.get(row)
        if cut is not None and cut.characters:
            text = text[: -cut.characters]
        elif cut is not None and cut.tokens:
            text = desk.embedder.tokenizer.prefix(text, tokens_of(text) - cut.tokens)
        kept.append(text)
    assert (result.vectors == vectors_of(kept, 32)).all()
    assert all(tokens_of(text) <= most for text in kept)
    for row, text in enumerate(rows):
        told = row in result.tokens_cut or row in result.characters_cut
        assert told == (kept[row] != text)
    desk.check_money()
    return kept


@pytest.mark.case("A8")
@pytest.mark.case("A9")
@pytest.mark.parametrize(
    ("most", "exact"),
    [*((most, False) for most in (LIMIT, LIMIT - 1, 60, 24)), (99, True), (97, True), (81, True)],
)
def test_a_line_refused_for_its_length_goes_into_the_next_job_shortened(
    batch_desk: Any, most: int, exact: bool
) -> None:
    desk = shortening(batch_desk, most=most, exact=exact)
    rows = ["x" * 4 * LIMIT if exact else LONG, "short", LONG[:90]]
    job = desk.work(desk.submit(rows))
    assert len(desk.jobs) <= 3
    kept = check_cut(desk, job, rows, most)
    assert kept[1:] == rows[1:]
    assert rows[0].startswith(kept[0])
    assert tokens_of(kept[0]) >= (0.75 * LIMIT if exact else 0.2 * LIMIT)


def said(desk: Any, monkeypatch: Any, **how: Any) -> None:
    """Its refusals say so much more of the length."""
    results = desk.strategy.results

    def saying(job: str) -> Any:
        texts = dict(lines(desk))
        for one in results(job):
            if one.vector is None:
                counted = tokens_of(texts[one.id])
                named = {
                    name: counted if value == "count" else value for name, value in how.items()
                }
                one = replace(one, **named)
            yield one

    monkeypatch.setattr(desk.strategy, "results", saying)


@pytest.mark.case("A8")
@pytest.mark.case("A9")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "how",
    [
        {"max_tokens": 50, "text_tokens": "count"},
        {"max_tokens": 50},
        {},
        {"max_tokens": 7_000_000},
        {"max_tokens": -3, "text_tokens": 0},
    ],
)
def test_what_the_refusal_names_is_a_hint(
    batch_desk: Any, monkeypatch: Any, how: Any, exact: bool
) -> None:
    desk = shortening(batch_desk, most=50, exact=exact)
    said(desk, monkeypatch, too_long=True, **how)
    rows = ["x" * 4 * LIMIT if exact else LONG, "short"]
    job = desk.work(desk.submit(rows))
    kept = check_cut(desk, job, rows, 50)
    if how.get("max_tokens") == 50:
        assert len(desk.jobs) == 2
        assert tokens_of(kept[0]) >= 40


@pytest.mark.case("A9")
@pytest.mark.parametrize("how", ["reject", "one job", "another reason", "no limit"])
def test_what_is_not_shortened_fails_with_its_own_reason(
    batch_desk: Any, monkeypatch: Any, how: str
) -> None:
    more = {"max_input_tokens": None} if how == "no limit" else {}
    desk = shortening(batch_desk, **more)
    if how == "another reason":
        said(desk, monkeypatch, too_long=False)
    config = {"overlong": "reject"} if how == "reject" else {}
    batch = {"attempts": 1 if how == "one job" else 3}
    rows = [LONG, "short"]
    if how == "reject":
        rows[0] = "x" * 90 + "END"
        desk.service.fail_lines("END", message="maximum context length exceeded")
    job = desk.work(desk.submit(rows, batch=batch, on_error="keep", **config))
    assert len(desk.jobs) == 1
    result = job.result(on_error="keep")
    assert result.ok.tolist() == [False, True]
    assert "maximum" in result.errors[0].message
    desk.check_money()


@pytest.mark.case("A9")
def test_a_text_that_is_refused_however_short_keeps_its_first_reason(batch_desk: Any) -> None:
    desk = shortening(batch_desk)
    desk.service.fail_lines("several", message="the first reason", times=1)
    desk.service.fail_lines("several", message="another reason")
    job = desk.work(desk.submit([LONG, "short"], on_error="keep"))
    result = job.result(on_error="keep")
    assert result.ok.tolist() == [False, True]
    assert len(desk.jobs) <= 3
    desk.check_money()


@pytest.mark.case("A9")
def test_who_joined_hears_of_the_cut_and_nothing_is_billed_twice(batch_desk: Any) -> None:
    desk = shortening(batch_desk)
    first, joined = desk.submit([LONG, "short"]), desk.submit(["other", LONG])
    desk.work(first)
    desk.work(joined)
    (kept, _) = check_cut(desk, first, [LONG, "short"], LIMIT)
    assert check_cut(desk, joined, ["other", LONG], LIMIT) == ["other", kept]
    billed, jobs = desk.meter.billed_tokens, len(desk.jobs)
    later = desk.work(desk.submit([LONG]))
    assert check_cut(desk, later, [LONG], LIMIT) == [kept]
    assert desk.meter.billed_tokens == billed, "what it was cut to is there"
    assert len(desk.jobs) == jobs + 1, "and only whether it is taken whole by now was asked"


@pytest.mark.case("A9")
def test_a_shortened_text_whose_result_was_late_is_read_later(batch_desk: Any) -> None:
    desk = shortening(batch_desk)
    job = desk.submit([LONG, "short"])
    desk.finish_all()
    job.advance()
    desk.service.settings.quirks.late = "missing"
    desk.service.settings.quirks.late_looks = None
    desk.work(job)
    assert job.status().failed == 1
    desk.service.settings.quirks.late = None
    assert desk.client().batch_job(job.id).read_again() == 1
    result = job.result()
    assert result.ok.all()
    assert 0 in result.cuts
