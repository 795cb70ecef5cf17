"""Do calls of few texts leave at once, or together, and does each caller pay and hear its own?"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import math
import threading
import time
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from waiting import until

from embedcore import EmbeddingClient
from embedcore.errors import (
    AuthenticationFailed,
    BudgetExceeded,
    ConfigurationError,
    EmbeddingError,
    OutcomeUnknown,
    ProviderUnavailable,
    RequestRejected,
    TransientProviderError,
)
from embedcore.events import Progress, RequestFinished, RequestSent, Reserved, Settled
from embedcore.policy.immediate.front import PLACES, Front
from embedcore.policy.immediate.together import divided
from embedcore.provider.types import Price
from embedcore.settings import RetrySettings
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeClock, FakeEmbedder, tokens_of, vector_of, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO, FakeTokenizer, Outcome

WIDTH = 8
INFO = replace(FAKE_INFO, dimensions=WIDTH)
SECONDS = 120.0
CALLER = contextvars.ContextVar("CALLER", default=-1)


async def until_soon(true):
    ends = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < ends, "waited in vain"
        await asyncio.sleep(0.002)


def text_of(number):
    return f"question {number} " + "of many words " * (number % 5)


class Gated(FakeEmbedder):
    """Holds every request until it is let go."""

    def __init__(self, **options):
        super().__init__(info=options.pop("info", INFO), **options)
        self.go = threading.Event()
        self.arrived = 0
        self._counting = threading.Lock()

    def embed(self, request):
        with self._counting:
            self.arrived += 1
        assert self.go.wait(SECONDS)
        return super().embed(request)


# Places


@pytest.mark.parametrize("threads", [4, 16])
def test_while_a_place_is_free_each_leaves_alone_and_then_they_leave_together(desk, threads):
    fake = Gated()
    places = min(PLACES, threads)
    with desk(fake, threads=threads) as one:
        front = Front(one.engine)

        async def main():
            first = [asyncio.ensure_future(_ask(front, one, n)) for n in range(places)]
            await until_soon(lambda: fake.arrived == places)
            rest = [asyncio.ensure_future(_ask(front, one, n)) for n in range(places, 40)]
            await asyncio.sleep(0.05)
            assert fake.arrived == places, "no more than the places are in flight"
            fake.go.set()
            return await asyncio.gather(*first, *rest)

        for number, result in enumerate(asyncio.run(main())):
            one.right(result, [text_of(number)])
        alone = [call for call in fake.calls if len(call.texts) == 1]
        assert len(alone) >= places
        assert len(fake.calls) <= 2 * places + 1
        assert sum(len(call.texts) for call in fake.calls) == 40
        one.check()
        front.close()


async def _ask(front, one, number, **how):
    return await front.aembed(one.engine, [text_of(number)], **how)


def test_threads_that_ask_at_once_share_requests(desk):
    fake = Gated()
    with desk(fake, threads=2) as one:
        front, found = Front(one.engine), {}

        def ask(number):
            found[number] = front.embed(one.engine, [text_of(number)])

        threads = [threading.Thread(target=ask, args=[number]) for number in range(30)]
        for thread in threads:
            thread.start()
        until(lambda: fake.arrived == 2 and sum(map(len, front._queues.values())) == 28)
        fake.go.set()
        for thread in threads:
            thread.join(SECONDS)
        for number in range(30):
            one.right(found[number], [text_of(number)])
        assert len(fake.calls) <= 5
        one.check()
        front.close()


def test_a_thousand_callers_need_no_thousand_threads(desk):
    fake = Gated(info=replace(INFO, max_texts_per_request=2000))
    with desk(fake, threads=16) as one:
        front = Front(one.engine)
        before = threading.active_count()

        async def main():
            calls = [asyncio.ensure_future(_ask(front, one, n)) for n in range(1000)]
            await until_soon(lambda: fake.arrived == PLACES)
            threads = threading.active_count() - before
            fake.go.set()
            await asyncio.gather(*calls)
            return threads

        # For each place one that watches, and one that sends.
        assert asyncio.run(main()) <= 2 * PLACES
        assert len(fake.calls) == PLACES, "all of them leave at once, spread over the places"
        one.check()
        front.close()


@pytest.mark.parametrize("count", [3, 200])
def test_a_request_is_no_larger_than_the_model_takes(desk, count):
    fake = FakeEmbedder(info=replace(INFO, max_texts_per_request=7, max_tokens_per_request=400))
    with desk(fake, threads=1) as one:
        front = Front(one.engine)

        async def main():
            return await asyncio.gather(*(_ask(front, one, n) for n in range(count)))

        for number, result in enumerate(asyncio.run(main())):
            one.right(result, [text_of(number)])
        assert max(len(call.texts) for call in fake.calls) <= 7
        one.check()
        front.close()


# Money


@given(whole=st.integers(0, 10**6), weights=st.lists(st.integers(0, 10**4), min_size=1))
def test_shares_add_up_and_are_in_proportion(whole, weights):
    shares = divided(whole, weights)
    assert sum(shares) == whole
    total = sum(weights)
    for share, weight in zip(shares, weights, strict=True):
        if total:
            assert abs(share * total - whole * weight) < total


@pytest.mark.parametrize("threads", [1, 4])
def test_who_is_refused_by_the_budget_hears_so_and_the_others_are_served(desk, threads):
    long = "a long text " * 300
    with desk(FakeEmbedder(info=INFO), daily=500, threads=threads) as one:
        front = Front(one.engine)

        async def main():
            texts = [long if number % 3 == 1 else text_of(number) for number in range(9)]
            asked = [front.aembed(one.engine, [text]) for text in texts]
            return texts, await asyncio.gather(*asked, return_exceptions=True)

        texts, found = asyncio.run(main())
        for text, result in zip(texts, found, strict=True):
            if text is long:
                assert isinstance(result, BudgetExceeded)
                assert result.partial is not None
            else:
                one.right(result, [text])
                assert result.usage.tokens == tokens_of(text)
        one.check()
        front.close()


def test_one_who_has_gone_before_it_left_pays_nothing_and_one_in_flight_pays_its_share(desk):
    fake = Gated()
    with desk(fake, threads=1) as one:
        front = Front(one.engine)

        async def main():
            first = asyncio.ensure_future(_ask(front, one, 0))
            await until_soon(lambda: fake.arrived == 1)
            queued = [asyncio.ensure_future(_ask(front, one, n)) for n in range(1, 5)]
            await until_soon(lambda: sum(map(len, front._queues.values())) == 4)
            queued[1].cancel()
            await asyncio.sleep(0)
            fake.go.set()
            fake.go = threading.Event()
            await first
            await until_soon(lambda: fake.arrived == 2)
            queued[3].cancel()
            await asyncio.sleep(0)
            fake.go.set()
            found = await asyncio.gather(*queued, return_exceptions=True)
            assert [isinstance(one, asyncio.CancelledError) for one in found] == [
                False,
                True,
                False,
                True,
            ]
            one.right(found[0], [text_of(1)])
            one.right(found[2], [text_of(3)])

        asyncio.run(main())
        assert [call.texts for call in fake.calls] == [
            (text_of(0),),
            (text_of(1), text_of(3), text_of(4)),
        ]
        one.check()
        front.close()


# Faults

UNKNOWN = OutcomeUnknown("lost", billed="unknown")
FREE = ProviderUnavailable("down", billed="no")
FAULTS = {
    "free": FREE,
    "unknown": UNKNOWN,
    "rejected": RequestRejected("no", billed="no"),
    "charged": RequestRejected("no", billed="yes"),
    "key": AuthenticationFailed("no key", billed="no"),
    "bug": ValueError("a bug of the provider"),
    "null": Outcome(reply=lambda request, reply: _with_null(reply)),
    "short": Outcome(reply=lambda request, reply: replace(reply, vectors=reply.vectors[:-1])),
    "untold": Outcome(reply=lambda request, reply: replace(reply, tokens=None)),
    "dear": Outcome(reply=lambda request, reply: replace(reply, tokens=3 * reply.tokens + 1)),
    "fine": None,
}


def _with_null(reply):
    vectors = reply.vectors.copy()
    vectors[0] = float("nan")
    return replace(reply, vectors=vectors)


def _script(faults):
    """The first requests fail so; a text at fault is refused in any."""

    def script(request, number):
        if any("BAD" in text for text in request.texts):
            return RequestRejected("bad text", billed="no")
        fault = FAULTS[faults[number]] if number < len(faults) else None
        # The client may write into an error.
        return copy.copy(fault) if isinstance(fault, EmbeddingError) else fault

    return script


def _story(one, fake, asked, found, **settings):
    """All that happened, for where the money does not add up: threads may have had a part in it."""
    with one.ledger.database.read() as connection:
        attempts = connection.execute(
            "SELECT state, tokens, actual_tokens, inputs, note FROM attempt"
        ).fetchall()
    callers = [f"{how} -> {result!r}" for how, result in zip(asked, found, strict=True)]
    requests = [f"{call.texts} billed {call.billed_tokens}, {call.error!r}" for call in fake.calls]
    rows = [str(tuple(row)) for row in attempts]
    lines = [str(settings), *callers, "requests:", *requests, "attempts:", *rows, "events:"]
    return "\n".join(["what happened:", *lines, *map(str, one.events)])


callers = st.lists(
    st.fixed_dictionaries(
        {
            "texts": st.lists(
                st.sampled_from([*(text_of(n) for n in range(12)), "BAD", "BAD too"]),
                min_size=1,
                max_size=3,
            ),
            "input_type": st.sampled_from([None, "query"]),
            "check_budget": st.booleans(),
            "on_error": st.sampled_from(["raise", "keep"]),
            "cancelled": st.sampled_from([None, None, None, "before", "in flight"]),
        }
    ),
    min_size=1,
    max_size=9,
)


@example(
    asked=[
        {
            "texts": [text_of(n)],
            "input_type": None,
            "check_budget": True,
            "on_error": "raise",
            "cancelled": None,
        }
        for n in range(5)
    ],
    faults=["unknown", "null"],
    daily=None,
    threads=1,
    exact=True,
)
@given(
    asked=callers,
    faults=st.lists(st.sampled_from(sorted(FAULTS)), max_size=4),
    daily=st.sampled_from([None, None, 60, 400]),
    threads=st.sampled_from([1, 3]),
    exact=st.booleans(),
)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
def test_each_caller_gets_its_own_vectors_and_pays_its_own_share(
    desk, asked, faults, daily, threads, exact
):
    fake = Gated(script=_script(faults), tokenizer=FakeTokenizer(exact=exact))
    with desk(fake, daily=daily, threads=threads) as one:
        front = Front(one.engine)

        async def call(number, how):
            CALLER.set(number)
            how = dict(how)
            how.pop("cancelled")
            return await front.aembed(one.engine, how.pop("texts"), **how)

        async def main():
            calls = [asyncio.ensure_future(call(*each)) for each in enumerate(asked)]
            await asyncio.sleep(0)
            for caller, task in zip(asked, calls, strict=True):
                if caller["cancelled"] == "before":
                    task.cancel()
            await asyncio.sleep(0.001)
            for caller, task in zip(asked, calls, strict=True):
                if caller["cancelled"] == "in flight":
                    task.cancel()
            fake.go.set()
            return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), SECONDS)

        found = asyncio.run(main())
        spent = 0
        for caller, result in zip(asked, found, strict=True):
            if isinstance(result, asyncio.CancelledError):
                assert caller["cancelled"] is not None
                spent = None
                continue
            if isinstance(result, EmbeddingError):
                result = result.partial
                if result is None:
                    continue
            assert not isinstance(result, BaseException), result
            one.right(result, caller["texts"])
            assert not any(
                ok and "BAD" in text for ok, text in zip(result.ok, caller["texts"], strict=True)
            )
            if spent is not None:
                spent += result.usage.tokens
        used = one.used
        story = _story(one, fake, asked, found, faults=faults, daily=daily, threads=threads)
        assert used.held == Amount(), story
        if not {"untold", "short"} & set(faults):
            assert fake.meter.billed_tokens <= used.spent.tokens or "dear" in faults, story
        if spent is not None:
            assert spent == used.spent.tokens, story
        told = one.told(Settled)
        assert sum(event.tokens for event in told) == used.spent.tokens or spent is None, story
        if not faults:
            assert fake.meter.billed_tokens == used.spent.tokens, story
        front.close()


def test_one_text_at_fault_harms_only_its_caller_and_later_requests_are_smaller(desk):
    fake = FakeEmbedder(info=INFO, script=_script([]))
    with desk(fake, threads=1) as one:
        front = Front(one.engine)

        async def main():
            texts = [text_of(number) for number in range(20)]
            texts[7] = "BAD"
            asked = [front.aembed(one.engine, [text]) for text in texts]
            return texts, await asyncio.gather(*asked, return_exceptions=True)

        texts, found = asyncio.run(main())
        for text, result in zip(texts, found, strict=True):
            if text == "BAD":
                assert isinstance(result, RequestRejected)
                assert result.position == 0
            else:
                one.right(result, [text])
        # Together, each alone, and nothing in between.
        assert sorted({len(call.texts) for call in fake.calls}) == [1, 20]
        assert front._most == 10
        one.check()
        front.close()


def test_of_an_outage_each_has_the_attempts_that_are_left(desk):
    fake = FakeEmbedder(info=INFO, script=lambda request, number: copy.copy(FREE))
    retry = RetrySettings(attempts=3, first_wait=0.001, longest_wait=0.002)
    with desk(fake, threads=1, retry=retry) as one:
        front = Front(one.engine)

        async def main():
            asked = [_ask(front, one, number) for number in range(4)]
            return await asyncio.gather(*asked, return_exceptions=True)

        found = asyncio.run(main())
        assert {type(error) for error in found} == {ProviderUnavailable}
        assert len(set(map(id, found))) == 4, "each has an error of its own"
        alone = defaultdict(int)
        for call in fake.calls:
            if len(call.texts) == 1:
                alone[call.texts] += 1
        # One together, and two more.
        assert set(alone.values()) == {2}
        assert one.spent == 0
        one.check()
        front.close()


def test_a_key_that_is_refused_is_asked_with_once(desk):
    fake = FakeEmbedder(info=INFO, script=lambda request, number: copy.copy(FAULTS["key"]))
    with desk(fake, threads=1) as one:
        front = Front(one.engine)

        async def main():
            asked = [_ask(front, one, number) for number in range(9)]
            return await asyncio.gather(*asked, return_exceptions=True)

        assert {type(error) for error in asyncio.run(main())} == {AuthenticationFailed}
        assert len(fake.calls) == 1
        one.check()
        front.close()


# Time


def test_a_provider_that_hangs_ends_each_call_at_its_deadline_and_is_charged(desk):
    clock, fake = FakeClock(), Gated()
    retry = RetrySettings(first_wait=0.001, longest_wait=0.002, deadline=30)
    with desk(fake, threads=1, clock=clock, grace=5.0, retry=retry) as one:
        front = Front(one.engine)

        async def main():
            calls = [asyncio.ensure_future(_ask(front, one, n)) for n in range(3)]
            await until_soon(lambda: fake.arrived == 1)
            clock.advance(36)
            return await asyncio.gather(*calls, return_exceptions=True)

        found = asyncio.run(main())
        assert {type(error) for error in found} == {OutcomeUnknown}
        assert one.used.held == Amount()
        assert one.spent == sum(tokens_of(text_of(number)) for number in range(3))
        assert all(error.partial.usage.unconfirmed_tokens > 0 for error in found)
        fake.go.set()
        until(lambda: fake.meter.in_flight == 0 and len(fake.calls) == 1)
        one.check()
        front.close()


def test_an_answer_that_comes_while_one_caller_is_given_up_serves_the_others(desk):
    """Two threads have to do with that caller, and both tell its observers."""
    clock, fake = FakeClock(), Gated()
    served = threading.Event()
    given_up = []

    def observe(event):
        if isinstance(event, Settled) and event.unconfirmed:
            given_up.append(CALLER.get())
            fake.go.set()
            assert served.wait(SECONDS)

    with desk(fake, threads=1, clock=clock, grace=5.0) as one:
        one.engine = replace(one.engine, observe=observe)
        front = Front(one.engine)

        async def ask(number):
            CALLER.set(number)
            return await _ask(front, one, number)

        async def main():
            gone, other = [asyncio.ensure_future(ask(number)) for number in range(2)]
            await until_soon(lambda: fake.arrived == 1)
            gone.cancel()
            while not given_up:
                clock.advance(6)
                await asyncio.sleep(0.01)
            try:
                return await asyncio.wait_for(other, SECONDS)
            finally:
                served.set()

        # Without waiting for the end of what may never end.
        loop = asyncio.new_event_loop()
        one.right(loop.run_until_complete(main()), [text_of(1)])
        loop.close()
        assert given_up == [0]
        one.check()
        front.close()


def test_who_waits_longer_than_its_deadline_is_not_sent(desk):
    clock, fake = FakeClock(), Gated()
    slow = RetrySettings(first_wait=0.001, longest_wait=0.002, deadline=30)
    with desk(fake, threads=1, clock=clock, grace=1000.0, retry=slow) as one:
        front = Front(one.engine)

        async def main():
            first = asyncio.ensure_future(_ask(front, one, 0))
            await until_soon(lambda: fake.arrived == 1)
            late = [asyncio.ensure_future(_ask(front, one, n)) for n in (1, 2)]
            await until_soon(lambda: sum(map(len, front._queues.values())) == 2)
            clock.advance(31)
            fake.go.set()
            return await asyncio.gather(first, *late, return_exceptions=True)

        first, *late = asyncio.run(main())
        one.right(first, [text_of(0)])
        for error in late:
            assert isinstance(error, TransientProviderError)
            assert error.billed == "no"
            assert "before this one could leave" in str(error)
        assert len(fake.calls) == 1
        one.check()
        front.close()


# Each hears its own


def test_events_are_those_of_a_call_alone_in_the_context_of_its_caller(desk):
    def told_of(together):
        heard, fake = defaultdict(list), FakeEmbedder(info=INFO)
        with desk(fake, threads=1 if together else 16) as one:
            one.engine = replace(
                one.engine, observe=lambda event: heard[CALLER.get()].append(event)
            )
            front = Front(one.engine)

            async def ask(number):
                CALLER.set(number)
                return await _ask(front, one, number)

            async def main():
                if together:
                    return await asyncio.gather(*map(ask, range(5)))
                return [await asyncio.create_task(ask(number)) for number in range(5)]

            results = asyncio.run(main())
            assert len(fake.calls) == (1 if together else 5)
            front.close()
        return heard, results

    (heard, found), (expected, alone) = told_of(True), told_of(False)
    kinds = (Reserved, RequestSent, Settled, RequestFinished, Progress)
    for number in range(5):
        assert tuple(map(type, heard[number])) == kinds
        for event, other in zip(heard[number], expected[number], strict=True):
            assert event == other or replace(event, seconds=0.0) == replace(other, seconds=0.0)
        assert found[number].usage == alone[number].usage
    assert set(heard) == set(range(5))


def test_a_client_that_is_closed_tells_who_waits(desk):
    fake = Gated()
    with desk(fake, threads=1) as one:
        front = Front(one.engine)

        async def main():
            first = asyncio.ensure_future(_ask(front, one, 0))
            await until_soon(lambda: fake.arrived == 1)
            second = asyncio.ensure_future(_ask(front, one, 1))
            await until_soon(lambda: front._queues)
            front.close()
            with pytest.raises(ConfigurationError, match="closed while it was in use"):
                await second
            fake.go.set()
            await first

        asyncio.run(main())
        one.check()


# Through the cache, and over a real socket


def test_equal_questions_are_paid_for_once(home):
    price = replace(INFO, provider="paid", price=Price(immediate=1), max_concurrency=2)
    fake = Gated(info=price)
    with EmbeddingClient(embedder=fake, config={"home": home, "cache": True}) as client:
        client.open()

        async def main():
            calls = [asyncio.ensure_future(client.aembed_query(text_of(n % 3))) for n in range(30)]
            await until_soon(lambda: fake.arrived)
            fake.go.set()
            return await asyncio.wait_for(asyncio.gather(*calls), SECONDS)

        for number, vector in enumerate(asyncio.run(main())):
            assert vector == vector_of(text_of(number % 3), WIDTH).tolist()
        assert sorted(fake.meter.billed_texts) == sorted(map(text_of, range(3)))


def test_a_cancelled_caller_leaves_its_vector_in_the_cache(home):
    fake = Gated(info=replace(INFO, provider="paid2", max_concurrency=1))
    with EmbeddingClient(embedder=fake, config={"home": home, "cache": True}) as client:
        client.open()

        async def main():
            calls = [asyncio.ensure_future(client.aembed_query(text_of(n))) for n in range(3)]
            await until_soon(lambda: fake.arrived == 1)
            calls[1].cancel()
            await asyncio.sleep(0)
            fake.go.set()
            await asyncio.gather(*calls, return_exceptions=True)

        asyncio.run(main())
        assert [call.texts for call in fake.calls] == [tuple(map(text_of, range(3)))]
        assert client.embed_query(text_of(1)) == vector_of(text_of(1), WIDTH).tolist()
        assert len(fake.calls) == 1


MODES = [None, "rate_limited", "reset_billed", "cut_json", "html", "bad_text"]


@pytest.mark.parametrize(
    ("mode", "cache"),
    # With a store: all is well, an answer is lost, a text fails.
    [*((mode, False) for mode in MODES), (None, True), ("cut_json", True), ("bad_text", True)],
)
def test_many_questions_at_once_over_a_real_socket(server, connect, ledger, mode, cache):
    client = connect(cache=cache)
    client.open()
    texts = [text_of(number) for number in range(60)]
    if mode == "bad_text":
        texts[50] += " MARK"
        server.faults.when(mode="bad_text", marker="MARK")
    elif mode is not None:
        server.faults.push(mode, times=3)

    async def main():
        asked = [client.aembed_query(text) for text in texts]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(main())
    for text, vector in zip(texts, found, strict=True):
        if "MARK" in text:
            assert isinstance(vector, EmbeddingError)
        elif isinstance(vector, EmbeddingError):
            # One that had no other in its request may meet more than one of the three.
            assert mode in ("cut_json", "html")
        else:
            assert vector == vectors_of([text], 8)[0].tolist()
    used = ledger()
    assert used.held == Amount()
    billed = server.meter.billed_tokens
    assert (
        billed == used.spent.tokens if mode in (None, "bad_text") else billed <= used.spent.tokens
    )
    if mode is None:
        assert PLACES <= server.meter.requests <= most_requests(len(texts))


def most_requests(texts):
    """Where each request has ended before the next one leaves, so that all places are free."""
    requests = 0
    while texts:
        texts -= math.ceil(texts / PLACES)
        requests += 1
    return requests


def test_who_goes_on_alone_keeps_no_money_from_those_who_have_the_places(desk):
    """The long text does not fit beside the bounds of the short ones, which have failed together:
    it has the only place, and they stand behind it."""
    fake = FakeEmbedder(
        info=INFO,
        tokenizer=FakeTokenizer(exact=False),
        script=lambda request, number: copy.copy(FREE) if len(request.texts) > 1 else None,
    )
    short, long = ["short text 1", "short text 2"], "a long text " * 50
    with desk(fake, daily=len(long) + len(short[0]), threads=1, wait=SECONDS) as one:
        front = Front(one.engine)

        async def main():
            asked = [front.aembed(one.engine, [text]) for text in [*short, long]]
            return await asyncio.gather(*asked)

        began = time.monotonic()
        for result, text in zip(asyncio.run(main()), [*short, long], strict=True):
            one.right(result, [text])
        assert time.monotonic() - began < SECONDS / 2, "none waited for the money of another"
        one.check()
        front.close()
