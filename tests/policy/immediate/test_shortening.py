"""A text that nobody counted is sent whole, and shortened only when the server refuses it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import (
    AuthenticationFailed,
    BudgetExceeded,
    EmbeddingError,
    InputTooLong,
    ProviderUnavailable,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.settings import RetrySettings
from embedcore.testing import FakeClock, FakeEmbedder, tokens_of
from embedcore.testing.fakes.embedder import FAKE_INFO, FakeTokenizer, Outcome
from tests.policy.immediate.test_fitting import UNITS, longest

LIMIT = 100
INFO = replace(FAKE_INFO, dimensions=8, max_input_tokens=LIMIT)
WORDS = "several words of a text that goes on "


def refusing(limit, measure=tokens_of, *, refusal=None, billed="no"):
    """A server with a limit of its own. ``refusal(text, units)`` makes its error."""

    def script(request, number):
        for text in request.texts:
            if measure(text) > limit:
                if refusal is not None:
                    return refusal(measure(text))
                return InputTooLong("too long", billed=billed)
        return None

    return script


def named(limit, *, most=None, tokens=None):
    def refusal(units):
        return InputTooLong(
            "too long", max_tokens=most or limit, tokens=tokens or units, billed="no"
        )

    return refusal


def loose(limit=LIMIT, measure=tokens_of, *, info=INFO, **how):
    """An embedder that nobody can count for, with a server of that limit."""
    return FakeEmbedder(
        info=info,
        tokenizer=how.pop("tokenizer", EstimatingTokenizer()),
        reports_tokens=how.pop("reports_tokens", True),
        script=refusing(limit, measure, **how),
    )


def kept_of(text, outcome):
    assert outcome.cut == "yes"
    assert outcome.tokens_cut is None
    return text[: -outcome.characters_cut]


@pytest.mark.case("A9")
def test_a_text_that_only_its_bytes_make_too_long_is_sent_whole(desk):
    text = WORDS * 8  # 74 tokens, 296 bytes
    with desk(loose()) as one:
        result = one.embed([text, "short"])
        one.right(result, [text, "short"])
        assert [call.texts for call in one.embedder.calls] == [(text, "short")]
        assert result.tokens_cut == {}
        assert result.perhaps_cut == {0}
        assert [row.cut for row in result.outcomes] == ["unknown", "no"]
        assert result.outcomes[0].tokens_cut is None
        assert result.outcomes[0].characters_cut is None
        one.check()


@pytest.mark.case("A9")
def test_what_the_server_refuses_is_cut_and_told_in_characters(desk):
    long, fits = WORDS * 40, WORDS * 8
    with desk(loose()) as one:
        result = one.embed([long, "short", fits, long])
        kept = kept_of(long, result.outcomes[0])
        one.right(result, [kept, "short", fits, kept])
        assert 0.8 * LIMIT <= tokens_of(kept) <= LIMIT
        assert result.tokens_cut == {0: None, 3: None}
        assert result.characters_cut == {0: len(long) - len(kept), 3: len(long) - len(kept)}
        # It refuses what is too long: what it takes is whole.
        assert result.perhaps_cut == frozenset()
        assert [row.cut for row in result.outcomes] == ["yes", "no", "no", "yes"]
        one.check()


@pytest.mark.case("A9")
@pytest.mark.parametrize("reports", [True, False])
def test_the_numbers_of_a_refusal_are_followed(desk, reports):
    text = WORDS * 30
    embedder = loose(refusal=named(LIMIT), reports_tokens=reports)
    with desk(embedder) as one:
        result = one.embed([text])
        kept = kept_of(text, result.outcomes[0])
        sent = [call.texts for call in embedder.calls]
        assert sent[:2] == [(text,), (kept,)]
        # A bill that agrees is proof enough; without one a longer text must be seen refused.
        assert len(sent) == (2 if reports else 3)
        assert 0.95 * LIMIT <= tokens_of(kept) <= LIMIT
        if reports:
            one.check()


@pytest.mark.case("A8")
@pytest.mark.parametrize("says", [True, False])
def test_a_counted_text_that_is_one_token_too_long_loses_a_few_per_cent(desk, says):
    def count(text):
        return tokens_of(text) + 1

    text, rows = "x" * 4 * LIMIT, ["a", "x" * 4 * LIMIT, "b"]
    refusal = named(LIMIT) if says else None
    embedder = FakeEmbedder(info=INFO, script=refusing(LIMIT, count, refusal=refusal))
    with desk(embedder) as one:
        result = one.embed(rows)
        least = LIMIT - 1 if says else 0.95 * LIMIT
        kept = text[: -result.cuts[1].characters]
        assert least <= tokens_of(kept) < LIMIT
        assert result.tokens_cut == {1: LIMIT - tokens_of(kept)}
        assert result.characters_cut == {}
        one.right(result, ["a", kept, "b"])
        assert embedder.meter.billed_twice == {}
        one.check()


@pytest.mark.case("A8")
def test_a_counted_text_is_cut_before_it_is_sent_and_again_by_little(desk):
    text = "y" * 4 * LIMIT * 3
    embedder = FakeEmbedder(info=INFO, script=refusing(LIMIT - 2))
    with desk(embedder) as one:
        result = one.embed([text])
        (sent, *_, last) = [call.texts[0] for call in embedder.calls]
        assert tokens_of(sent) == LIMIT
        assert 0.94 * LIMIT <= tokens_of(last) <= LIMIT - 2
        assert result.tokens_cut == {0: tokens_of(text) - tokens_of(last)}
        one.check()


WORDINGS = [
    lambda rng, units, limit: InputTooLong("zu lang", billed="no"),
    lambda rng, units, limit: InputTooLong("x", max_tokens=limit, tokens=units, billed="no"),
    lambda rng, units, limit: InputTooLong("x", max_tokens=limit, billed="no"),
    # Numbers that have nothing to do with it.
    lambda rng, units, limit: InputTooLong(
        "x", max_tokens=rng.randrange(1, 3000), tokens=rng.randrange(1, 9000), billed="no"
    ),
    lambda rng, units, limit: InputTooLong(
        "x", max_tokens=rng.randrange(1, 50), tokens=units * 7, billed="no"
    ),
    # Not a word of a length.
    lambda rng, units, limit: RequestRejected("invalid", status=422, billed="no"),
    lambda rng, units, limit: RequestTooLarge("payload", status=413),
]


@pytest.mark.case("A9")
@settings(max_examples=settings.default.max_examples, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["a word ", "日本語", "ü", "👩‍👩‍👧", "x", "the quick brown fox ", "1 2 3 "]
            ),
            st.integers(1, 400),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(sorted(UNITS)),
    st.integers(30, 400),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_whatever_the_unit_and_the_wording_four_fifths_are_kept(
    desk, pieces, unit, limit, rng, reports
):
    measure = UNITS[unit]
    rows = [piece * times for piece, times in pieces]
    refusal = rng.choice(WORDINGS)

    def script(request, number):
        for text in request.texts:
            if measure(text) > limit:
                return refusal(rng, measure(text), limit)
        return None

    # No text has more units than bytes, and the setting names the server's limit.
    info = replace(INFO, max_input_tokens=limit, max_texts_per_request=8)
    embedder = FakeEmbedder(
        info=info, tokenizer=EstimatingTokenizer(), script=script, reports_tokens=reports
    )
    with desk(embedder, threads=1) as one:
        one.embed(["warm up"])
        before = embedder.meter.requests
        result = one.embed(rows, on_error="keep")
        sent = list(rows)
        for row, text in enumerate(rows):
            if measure(text) <= limit:
                assert result.ok[row]
                assert result.outcomes[row].cut != "yes"
                continue
            whole = longest(text, lambda prefix: measure(prefix) <= limit)
            assert result.ok[row], result.errors[row]
            kept = sent[row] = kept_of(text, result.outcomes[row])
            assert measure(kept) <= limit
            if reports and 0.8 * limit <= tokens_of(kept) <= limit:
                # The bill of the fake is in a unit of its own. Where it happens to say what the
                # limit does, nothing shows that more would fit.
                continue
            assert len(kept) >= 0.8 * len(whole)
            assert len(kept.encode()) >= 0.8 * len(whole.encode())
        one.right(result, sent)
        texts = len(dict.fromkeys(rows))
        assert embedder.meter.requests - before <= texts * 18 + 4
        # Each refused amount went back, and what passed was held before it left.
        one.check(certain=reports)


@pytest.mark.case("A9")
def test_what_one_text_teaches_starts_the_next(desk):
    rows = [f"{number} " + "abcdefghi " * 300 for number in range(6)]
    with desk(
        loose(measure=len, limit=900, info=replace(INFO, max_input_tokens=900)), threads=1
    ) as one:
        counts = []
        for row in rows:
            before = one.embedder.meter.requests
            result = one.embed([row])
            assert len(kept_of(row, result.outcomes[0])) >= 720
            counts.append(one.embedder.meter.requests - before)
        assert max(counts[1:]) <= 3
        one.check()


@pytest.mark.case("A9")
def test_with_reject_nothing_is_refused_before_the_server_does(desk):
    long, fits = WORDS * 40, WORDS * 8
    with desk(loose(), overlong="reject") as one:
        result = one.embed([long, fits], on_error="keep")
        assert result.ok.tolist() == [False, True]
        assert isinstance(result.errors[0], InputTooLong)
        assert result.cuts.keys() == {1}
        one.right(result, [long, fits])
        assert {len(text) for call in one.embedder.calls for text in call.texts} == {
            len(long),
            len(fits),
        }
        one.check()


def test_without_a_known_limit_nothing_is_cut_and_the_error_says_how_to(desk):
    info = replace(INFO, max_input_tokens=None)
    with desk(loose(info=info)) as one:
        result = one.embed([WORDS * 40, "fine"], on_error="keep")
        assert result.ok.tolist() == [False, True]
        assert "max_input_tokens" in result.errors[0].message
        assert result.perhaps_cut == frozenset()


def test_a_text_that_is_refused_for_another_reason_keeps_its_reason(desk):
    text = "BAD " + WORDS * 20

    def script(request, number):
        if any(text.startswith("BAD") for text in request.texts):
            return RequestRejected("not this one", status=400, billed="no")
        return None

    embedder = FakeEmbedder(info=INFO, tokenizer=EstimatingTokenizer(), script=script)
    with desk(embedder) as one:
        one.embed(["warm up"])
        result = one.embed(["good", text, "fine"], on_error="keep")
        assert result.ok.tolist() == [True, False, True]
        assert str(result.errors[1]) == "row 1: not this one"
        # The three, the halves, and what must fit by its bytes.
        assert embedder.meter.requests <= 1 + 1 + 2 + 2 + 1
        one.check()


def test_a_server_that_calls_everything_too_long_is_asked_a_bounded_number_of_times(desk):
    rows = [f"{number} " + WORDS * 20 for number in range(300)]

    def script(request, number):
        return InputTooLong("too long", billed="no")

    embedder = FakeEmbedder(info=INFO, tokenizer=EstimatingTokenizer(), script=script)
    with desk(embedder, threads=1) as one:
        with pytest.raises(EmbeddingError):
            one.embed(rows, on_error="keep")
        assert embedder.meter.requests <= 100
        one.check()


# Bounds


@pytest.mark.case("A9")
@given(st.integers(0, 6_000), st.sampled_from(["yes", "unknown", "no"]), st.integers(5, 60))
def test_a_server_that_bills_what_it_refuses_is_never_paid_over_the_limit(
    desk, daily, billed, times
):
    embedder = loose(
        refusal=lambda units: InputTooLong("too long", billed=billed),
    )
    script = embedder._script

    def bills(request, number):
        error = script(request, number)
        return None if error is None else Outcome(error=error, bills=billed != "no")

    embedder._script = bills
    text = WORDS * times
    with desk(embedder, daily=daily, wait=0.0) as one:
        try:
            result = one.embed([text, "short"], on_error="keep")
        except EmbeddingError as error:
            result = error.partial
        one.check(certain=False)
        assert embedder.meter.billed_tokens <= one.spent <= daily
        if billed != "no":
            # Two of the amounts with which it began, and the first.
            assert one.spent <= 4 * (len(text) + len("short"))
        for row, outcome in enumerate(result.outcomes):
            assert outcome.cut != "yes" or row == 0


def test_a_search_is_charged_no_more_than_twice_what_it_began_with(desk):
    """It begins near the whole, and every refusal may have been billed."""
    text = WORDS * 60

    def script(request, number):
        if list(request.texts) == ["warm up"]:
            return None
        return Outcome(error=InputTooLong("too long", billed="unknown"), bills=True)

    embedder = FakeEmbedder(info=INFO, tokenizer=EstimatingTokenizer(), script=script)
    with desk(embedder) as one:
        one.embed(["warm up"])
        one.engine.sizes.learn_longest(int(0.84 * len(text)))
        result = one.embed([text], on_error="keep")
        assert not result.ok.any()
        assert 2 * len(text) < result.usage.unconfirmed_tokens <= 3 * len(text)
        one.check(certain=False)


@pytest.mark.case("A9")
def test_what_was_refused_is_given_back_before_the_rest_is_held(desk):
    text = WORDS * 30
    with desk(loose(), daily=len(text) + 10, wait=0.0) as one:
        result = one.embed([text])
        assert result.ok.all()
        one.check()


@pytest.mark.case("A9")
def test_a_budget_that_ends_in_the_search_leaves_what_was_taken(desk):
    """What passes first is far too short, and there is no money for a longer one."""
    text = "x" * 4000
    embedder = loose(
        limit=3000,
        measure=len,
        refusal=lambda units: InputTooLong("too long", max_tokens=1000, tokens=4000, billed="no"),
        info=replace(INFO, max_input_tokens=3000),
    )
    with desk(embedder, daily=4100, wait=0.0) as one:
        result = one.embed([text])
        assert result.ok.all()
        kept = kept_of(text, result.outcomes[0])
        assert 900 <= len(kept) <= 3000
        one.right(result, [kept])
        assert one.spent <= 4100
        one.check()


@pytest.mark.case("A9")
def test_the_deadline_ends_the_search(desk):
    clock = FakeClock()
    text = WORDS * 300
    embedder = loose(limit=10)
    script = embedder._script

    def slow(request, number):
        clock.advance(10.0)
        return script(request, number)

    embedder._script = slow
    with desk(embedder, clock=clock, retry=RetrySettings(deadline=25.0)) as one:
        with pytest.raises(InputTooLong):
            one.embed([text])
        assert embedder.meter.requests == 3
        one.check()


@pytest.mark.case("A9")
def test_what_fails_for_the_moment_within_the_search_is_tried_as_always(desk):
    text, failures = WORDS * 40, iter([ProviderUnavailable("busy", status=503, billed="no")] * 1)
    embedder = loose()
    script = embedder._script

    def busy(request, number):
        return script(request, number) or next(failures, None)

    embedder._script = busy
    with desk(embedder) as one:
        result = one.embed([text])
        assert 0.8 * LIMIT <= tokens_of(kept_of(text, result.outcomes[0])) <= LIMIT
        one.check()


def test_what_ends_the_call_within_the_search_loses_nothing_that_was_billed(desk):
    """One prefix is taken, and then the key expires: the row has its vector."""
    text = "x" * 4000
    embedder = loose(limit=3000, measure=len, info=replace(INFO, max_input_tokens=3000))
    script, taken = embedder._script, []

    def expiring(request, number):
        if taken:
            return AuthenticationFailed("expired")
        error = script(request, number)
        if error is None:
            taken.append(request.texts[0])
        return error

    embedder._script = expiring
    with desk(embedder) as one:
        result = one.embed([text])
        assert result.ok.all()
        one.right(result, taken)
        one.check()


def test_refusals_of_the_budget_are_said_as_bounds(desk):
    with (
        desk(loose(), daily=50, wait=0.0) as one,
        pytest.raises(BudgetExceeded, match="not sent: up to 370 tokens would be needed"),
    ):
        one.embed([WORDS * 10])
    exact = FakeEmbedder(info=INFO, tokenizer=FakeTokenizer())
    with (
        desk(exact, daily=50, wait=0.0) as one,
        pytest.raises(BudgetExceeded, match="not sent: 93 tokens would be needed"),
    ):
        one.embed([WORDS * 10])
