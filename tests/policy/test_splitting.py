"""Is the one bad text found, at little cost, and does hopeless asking end?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import (
    EmbeddingError,
    InputRejected,
    InputTooLong,
    RequestRejected,
    RequestTooLarge,
)
from embedcore.testing import FakeEmbedder, tokens_of
from embedcore.testing.fakes import FAKE_INFO

WIDE = replace(FAKE_INFO, dimensions=8, max_texts_per_request=2048, max_tokens_per_request=300_000)


def texts(count):
    return [f"text number {index}" for index in range(count)]


def refusing(bad, *, billed="no"):
    """A server that refuses, without a word on which, every request with one of these texts."""

    def script(request, number):
        return RequestRejected("no", billed=billed) if bad & set(request.texts) else None

    return script


def proven(one):
    one.embed(["warm up"])
    return one.embedder.meter.requests


@pytest.mark.fault(50)
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 2048), st.data())
def test_one_bad_text_costs_at_most_two_requests_for_each_halving(desk, count, data):
    place = data.draw(st.integers(0, count - 1))
    rows = texts(count)
    with desk(FakeEmbedder(info=WIDE, script=refusing({rows[place]}))) as one:
        result = one.embed(rows, on_error="keep")
        one.right(result, rows)
        assert set(result.errors) == {place}
        assert result.errors[place].position == place
        assert str(result.errors[place]).startswith(f"row {place}: ")
        assert result.usage.requests <= 1 + 2 * math.ceil(math.log2(count))
        one.check()


@pytest.mark.fault(50)
@pytest.mark.parametrize("place", [0, 1, 1023, 1024, 2047])
def test_raising_names_the_bad_text_and_keeps_the_good_ones(desk, place):
    rows = texts(2048)
    with desk(FakeEmbedder(info=WIDE, script=refusing({rows[place]}))) as one:
        with pytest.raises(RequestRejected, match=f"row {place}: ") as caught:
            one.embed(rows)
        assert caught.value.position == place
        partial = caught.value.partial
        one.right(partial, rows)
        assert [row for row in range(2048) if not partial.ok[row]] == [place]
        assert one.embedder.meter.billed_twice == {}
        assert one.embedder.meter.requests <= 1 + 22
        one.check()


@pytest.mark.fault(50)
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=6), st.booleans())
def test_several_bad_texts_are_all_found_once_the_provider_is_known_to_work(
    desk, count, places, charged
):
    rows = texts(count)
    bad = {rows[place] for place in places if place < count}
    billed = "unknown" if charged else "no"
    with desk(FakeEmbedder(info=WIDE, script=refusing(bad, billed=billed))) as one:
        proven(one)
        result = one.embed(rows, on_error="keep")
        one.right(result, rows)
        assert {rows[row] for row in result.errors} == bad
        one.check(certain=not (charged and bad))


@pytest.mark.fault(50)
@pytest.mark.parametrize("on_error", ["keep", "raise"])
def test_when_both_first_halves_fail_alike_it_is_the_request_itself(desk, on_error):
    rows = texts(64)
    with desk(FakeEmbedder(info=WIDE, script=refusing(set(rows)))) as one:
        try:
            result = one.embed(rows, on_error=on_error)
        except RequestRejected as error:
            assert on_error == "raise"
            result = error.partial
        assert one.embedder.meter.requests == 3
        assert sorted(result.errors) == list(range(64))
        one.check()


@pytest.mark.fault(50)
def test_a_server_that_refuses_everything_is_not_asked_for_every_request(desk):
    rows = texts(64 * 40)
    info = replace(WIDE, max_texts_per_request=64)
    with desk(FakeEmbedder(info=info, script=refusing(set(rows))), threads=2) as one:
        with pytest.raises(RequestRejected):
            one.embed(rows, on_error="keep")
        assert one.embedder.meter.requests <= 12
        one.check()
    with desk(FakeEmbedder(info=info, script=refusing(set(rows))), threads=2) as one:
        proven(one)
        with pytest.raises(RequestRejected):
            one.embed(rows, on_error="keep")
        assert one.embedder.meter.requests <= 10 * 25
        one.check()


# Too large


def at_most(texts=10**9, in_bytes=10**9):
    """A server with limits that nobody was told of."""

    def script(request, number):
        size = sum(len(text.encode()) for text in request.texts)
        if len(request.texts) > texts or size > in_bytes:
            return RequestTooLarge("too large", status=413)
        return None

    return script


@pytest.mark.fault(51)
@pytest.mark.fault(16)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=300),
    st.integers(1, 64),
    st.sampled_from([3000, 20_000, 10**9]),
)
def test_requests_refused_as_too_large_are_sent_smaller(desk, sizes, most, in_bytes):
    rows = [f"{index:03} ".ljust(size, "x") for index, size in enumerate(sizes)]
    script = at_most(most, max(in_bytes, 3000))
    with desk(FakeEmbedder(info=WIDE, script=script)) as one:
        result = one.embed(rows)
        one.right(result, rows)
        assert result.ok.all()
        assert one.embedder.meter.billed_twice == {}
        one.check()


@pytest.mark.fault(51)
def test_the_size_that_works_is_remembered(desk):
    with desk(FakeEmbedder(info=WIDE, script=at_most(32)), threads=1) as one:
        one.embed(texts(2048))
        assert one.embedder.meter.rejected_requests <= 16
        before = one.embedder.meter.rejected_requests
        one.embed([f"{row} more" for row in texts(2048)])
        assert one.embedder.meter.rejected_requests <= before + 1
        assert max(len(call.texts) for call in one.embedder.calls if not call.error) == 32
        one.check()


@pytest.mark.fault(51)
def test_two_long_texts_refused_say_nothing_against_many_short_ones(desk):
    with desk(FakeEmbedder(info=WIDE, script=at_most(in_bytes=30_000)), threads=1) as one:
        rows = ["a" * 20_000, "b" * 20_000]
        one.right(one.embed(rows), rows)
        assert one.embedder.meter.requests == 3
        rows = texts(1000)
        one.right(one.embed(rows), rows)
        assert one.embedder.meter.requests == 4
        one.check()


@pytest.mark.fault(51)
@pytest.mark.parametrize("on_error", ["keep", "raise"])
@pytest.mark.parametrize("known", [False, True])
def test_a_server_that_finds_everything_too_large_is_left_alone(desk, on_error, known):
    rows = texts(4096)

    def script(request, number):
        return None if known and number == 0 else RequestTooLarge("too large", status=413)

    with desk(FakeEmbedder(info=WIDE, script=script), threads=4) as one:
        if known:
            proven(one)
        with pytest.raises(RequestTooLarge):
            one.embed(rows, on_error=on_error)
        assert one.embedder.meter.requests <= (120 if known else 60)
        one.check()


# Too long


def too_long_above(most, *, named=True):
    """A server that counts characters, and names the first text that is too long for it."""

    def script(request, number):
        for place, text in enumerate(request.texts):
            if len(text) > most:
                position = place if named else None
                return InputTooLong("too long", position=position, billed="no")
        return None

    return script


@pytest.mark.fault(49)
@pytest.mark.parametrize("named", [True, False])
def test_a_text_that_the_server_finds_too_long_is_cut_once_more(desk, named):
    rows = [*texts(5), "x" * 100, *texts(9)[5:]]
    with desk(FakeEmbedder(info=WIDE, script=too_long_above(60, named=named))) as one:
        proven(one)
        result = one.embed(rows)
        sent = [*rows[:5], "x" * 48, *rows[6:]]  # half of its 25 tokens
        one.right(result, sent)
        assert result.ok.all()
        assert result.tokens_cut == {5: 25 - 12}
        assert one.embedder.meter.billed_twice == {}
        one.check()


@pytest.mark.fault(49)
def test_each_text_is_cut_further_only_once(desk):
    rows = [*texts(5), "x" * 400, *texts(9)[5:]]
    with desk(FakeEmbedder(info=WIDE, script=too_long_above(60))) as one:
        with pytest.raises(InputTooLong, match="row 5: ") as caught:
            one.embed(rows)
        assert caught.value.position == 5
        result = one.embed(rows, on_error="keep")
        assert set(result.errors) == {5}
        one.right(result, rows)
        assert [len(call.texts) for call in one.embedder.calls if call.error] == [10, 1] * 2
        one.check()


@pytest.mark.fault(49)
def test_with_reject_a_text_the_server_finds_too_long_is_named(desk):
    rows = [*texts(5), "x" * 100, "y" * 90, *texts(9)[5:]]
    script = too_long_above(60)
    with desk(FakeEmbedder(info=WIDE, script=script), overlong="reject") as one:
        with pytest.raises(InputTooLong, match="row 5: "):
            one.embed(rows)
        result = one.embed(rows, on_error="keep")
        assert set(result.errors) == {5, 6}
        assert {result.errors[row].position for row in (5, 6)} == {5, 6}
        one.right(result, rows)
        one.check()


@pytest.mark.fault(49)
@pytest.mark.parametrize("named", [True, False])
def test_a_server_that_finds_every_text_too_long_is_asked_a_bounded_number_of_times(desk, named):
    rows = texts(2048)
    with desk(FakeEmbedder(info=WIDE, script=too_long_above(2, named=named))) as one:
        with pytest.raises(InputTooLong):
            one.embed(rows)
        assert one.embedder.meter.requests <= 30
        try:
            result = one.embed(rows, on_error="keep")
        except EmbeddingError as error:
            result = error.partial
        assert one.embedder.meter.requests <= 400
        assert not result.ok.any()
        one.check()


@pytest.mark.fault(49)
def test_a_text_that_the_provider_itself_refuses_is_named_and_the_others_are_sent(desk):
    def script(request, number):
        if "BAD" in request.texts:
            return InputRejected("cannot be sent", position=request.texts.index("BAD"))
        return None

    rows = [*texts(30), "BAD", *texts(60)[30:]]
    with desk(FakeEmbedder(info=WIDE, script=script)) as one:
        result = one.embed(rows, on_error="keep")
        assert set(result.errors) == {30}
        assert result.errors[30].position == 30
        one.right(result, rows)
        assert result.usage.requests == 2
        one.check()


@settings(deadline=None)
@given(st.sampled_from([-1, 5, 10**6]))
def test_a_position_that_makes_no_sense_is_searched_instead(desk, position):
    def script(request, number):
        if "BAD" in request.texts:
            return InputTooLong("too long", position=position, billed="no")
        return None

    rows = ["a", "b", "BAD", "c"]
    with desk(FakeEmbedder(info=WIDE, script=script)) as one:
        result = one.embed(rows, on_error="keep")
        assert set(result.errors) == {2}
        one.right(result, rows)
        one.check()


# Mixed


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["good", "evil", "long", "name", "fine"]), min_size=1, max_size=24),
    st.sampled_from([3, 8, 64]),
    st.integers(1, 40),
)
def test_whatever_is_wrong_with_whichever_text_the_others_are_bought(desk, kinds, most, largest):
    rows = [f"{kind} text {index}" for index, kind in enumerate(kinds)]

    def script(request, number):
        if len(request.texts) > largest:
            return RequestTooLarge("too large", billed="no")
        for place, text in enumerate(request.texts):
            kind = text[:4]
            if kind == "evil":
                return RequestRejected("no", billed="no")
            if kind == "long" and len(text) > 3:
                return InputTooLong("too long", billed="no")
            if kind == "name" and len(text) > 3:
                return InputTooLong("too long", position=place, billed="no")
        return None

    info = replace(WIDE, max_texts_per_request=most)
    with desk(FakeEmbedder(info=info, script=script), threads=2) as one:
        proven(one)
        result = one.embed(rows, on_error="keep")
        for row, kind in enumerate(kinds):
            if kind in ("good", "fine"):
                assert result.ok[row]
            else:
                # Half of a long text is still too long for this server.
                assert result.errors[row].position == row
        one.right(result, rows)
        one.check()


def test_the_bill_of_a_search_is_the_bill_of_the_good_texts(desk):
    rows = texts(100)
    with desk(FakeEmbedder(info=WIDE, script=refusing({rows[7]}))) as one:
        result = one.embed(rows, on_error="keep")
        good = [row for row in rows if row != rows[7]]
        assert result.usage.tokens == sum(map(tokens_of, good)) == one.spent
        assert result.usage.uncertain_tokens == 0
        one.limited(10**6)
        one.check()
