"""Do the stand-ins do as they are told, and bill what they say?"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import OutcomeUnknown, RateLimited, RequestRejected
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo
from embedcore.testing import FakeClock, FakeEmbedder, FakeTokenizer, tokens_of, vectors_of
from embedcore.testing.fakes.embedder import Outcome
from embedcore.testing.strategies import scripts, text_lists


def request(*texts):
    return EmbedRequest(texts=texts)


@given(text_lists(min_size=1))
def test_reply_is_the_truth(texts):
    fake = FakeEmbedder()
    reply = fake.embed(request(*texts))
    assert np.array_equal(reply.vectors, vectors_of(texts, 32))
    assert reply.tokens == sum(map(tokens_of, texts)) == fake.billed_tokens
    assert reply.model == fake.info.model


def test_overhead_is_billed_and_width_may_be_unknown():
    fake = FakeEmbedder(info=ModelInfo(overhead_tokens_per_text=3), salt="other")
    reply = fake.embed(request("12345", "6"))
    assert fake.billed_tokens == reply.tokens == 2 + 1 + 2 * 3
    assert np.array_equal(reply.vectors, vectors_of(["12345", "6"], 32, salt="other"))


@given(scripts(), st.integers(1, 15))
def test_bill_is_that_of_the_script(script, calls):
    fake = FakeEmbedder(script=script)
    billed = 0
    for number in range(calls):
        outcome = script[number] if number < len(script) else Outcome()
        billed += outcome.is_billed
        if outcome.error is None:
            fake.embed(request("12345"))
            continue
        with pytest.raises(type(outcome.error)) as caught:
            fake.embed(request("12345"))
        assert caught.value is outcome.error
    assert fake.billed_tokens == 2 * billed
    assert fake.meter.billed_requests == billed
    assert fake.meter.rejected_requests == calls - billed
    assert sum(call.billed_tokens for call in fake.calls) == fake.billed_tokens
    assert [call.texts for call in fake.calls] == [("12345",)] * calls


def test_what_an_error_bills():
    cases = {
        RateLimited("slow down"): 0,
        RequestRejected("no", billed="yes"): 1,
        OutcomeUnknown("no answer"): 1,
        ValueError("not typed"): 1,
    }
    for error, billed in cases.items():
        fake = FakeEmbedder(script=[error])
        with pytest.raises(type(error)):
            fake.embed(request("a"))
        assert fake.billed_tokens == billed
    fake = FakeEmbedder(script=[Outcome(error=OutcomeUnknown("no answer"), bills=False)])
    with pytest.raises(OutcomeUnknown):
        fake.embed(request("a"))
    assert fake.billed_tokens == 0


def test_scripted_replies():
    given_reply = EmbedReply(vectors=np.zeros((1, 3), np.float32))

    def shorter(asked, honest):
        return EmbedReply(vectors=honest.vectors[:-1], tokens=len(asked.texts))

    fake = FakeEmbedder(script=[given_reply, Outcome(reply=shorter), None])
    assert fake.embed(request("a", "b")) is given_reply
    changed = fake.embed(request("a", "b"))
    assert (len(changed.vectors), changed.tokens) == (1, 2)
    assert len(fake.embed(request("a", "b")).vectors) == 2


def test_script_may_be_a_function():
    fake = FakeEmbedder(
        script=lambda asked, number: (
            RateLimited("wait") if number == 1 or "x" in asked.texts else None
        )
    )
    fake.embed(request("a"))
    for text in ("a", "x"):
        with pytest.raises(RateLimited):
            fake.embed(request(text))
    fake.embed(request("a"))


def test_latency_is_slept_by_the_clock_given():
    clock = FakeClock()
    fake = FakeEmbedder(latency=2.5, sleep=clock.sleep)
    fake.embed(request("a"))
    assert clock.sleeps == [2.5]


def test_threads_lose_no_call():
    fake = FakeEmbedder(latency=0.01)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fake.embed, [request("12345")] * 200))
    assert fake.billed_tokens == 400
    assert len(fake.calls) == 200
    assert 1 < fake.meter.max_in_flight <= 8
    assert fake.meter.in_flight == 0


def test_close_is_counted():
    with FakeEmbedder() as fake:
        assert fake.times_closed == 0
    assert fake.times_closed == 1


def test_tokenizer_says_what_it_was_asked():
    tokenizer = FakeTokenizer()
    tokenizer.count(["a", "b"])
    assert tokenizer.texts_counted == 2


def test_clock_passes_only_when_told():
    clock = FakeClock(datetime(2026, 3, 1, tzinfo=UTC))
    wall, steady = clock.now(), clock.monotonic()
    assert (clock.now(), clock.monotonic()) == (wall, steady)
    clock.sleep(90)
    assert clock.now() - wall == timedelta(seconds=90)
    assert clock.monotonic() - steady == 90
    clock.jump(-3600)
    assert clock.now() - wall == timedelta(seconds=90 - 3600)
    assert clock.monotonic() - steady == 90
    assert clock.time() == clock.now().timestamp()
    assert clock.sleeps == [90]


def test_clock_is_shared_by_threads():
    clock = FakeClock()
    begun = clock.monotonic()
    threads = [threading.Thread(target=clock.sleep, args=(1,)) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.monotonic() - begun == 50
