"""Does the asynchronous stream give the same blocks, and never hold up the event loop?"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import AuthenticationFailed, EmbeddingError, InputRejected
from embedcore.policy.stream import stream as feed
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeClock, FakeEmbedder, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

NARROW = replace(FAKE_INFO, dimensions=8, max_texts_per_request=4)


def texts_of(count):
    return [f"row {number}" for number in range(count)]


def check(blocks, texts):
    at = 0
    for block in blocks:
        assert block.first == at
        assert list(block.rows) == texts[at : at + len(block)]
        assert (block.vectors == vectors_of(list(block.rows), 8)).all()
        at += len(block)
    assert at == len(texts)


async def pausing(texts, pauses=(0.0,)):
    for text, pause in zip(texts, itertools.cycle(pauses), strict=False):
        if pause is not None:
            await asyncio.sleep(pause)
        yield text


async def collect(stream):
    return [block async for block in stream]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 30),
    st.integers(1, 9),
    st.integers(1, 4),
    st.lists(st.sampled_from([None, 0.0, 0.001]), min_size=1, max_size=5),
    st.booleans(),
)
def test_any_source_gives_the_same_blocks(desk, count, size, threads, pauses, plain):
    texts = texts_of(count)

    async def go(one):
        rows = iter(texts) if plain else pausing(texts, pauses)
        stream = one.astream(rows, block_size=size)
        blocks = await collect(stream)
        assert await collect(stream) == []
        return blocks

    # No second passes, after which less than a block would be sent.
    embedder = FakeEmbedder(info=NARROW, latency=0.001)
    with desk(embedder, threads=threads, monotonic=lambda: 0.0) as one:
        blocks = asyncio.run(go(one))
        check(blocks, texts)
        assert all(len(block) == size for block in blocks[:-1])
        one.check()


@pytest.mark.fault(10)
def test_a_source_that_pauses_is_sent_and_given_meanwhile(desk):
    async def go(one):
        goes_on = asyncio.Event()

        async def rows():
            yield "row 0"
            # It goes on only when the consumer has the first block.
            await asyncio.wait_for(goes_on.wait(), 120)
            yield "row 1"

        began = time.monotonic()
        blocks = []
        async for block in one.astream(rows(), block_size=50):
            goes_on.set()
            blocks.append(block)
        assert time.monotonic() - began >= 0.9 * feed.FLUSH_SECONDS
        return blocks

    with desk(FakeEmbedder(info=NARROW)) as one:
        blocks = asyncio.run(go(one))
        assert [len(block) for block in blocks] == [1, 1]
        check(blocks, texts_of(2))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("seconds", [0.0005, 0.004, 0.02])
def test_a_cancelled_anext_loses_no_block(desk, plain, seconds):
    texts = texts_of(60)

    async def go(one):
        stream = one.astream(texts if plain else pausing(texts, [0.001, None]), block_size=3)
        blocks, late = [], 0
        while True:
            try:
                blocks.append(await asyncio.wait_for(anext(stream), seconds))
            except TimeoutError:
                late += 1
            except StopAsyncIteration:
                return blocks, late

    with desk(FakeEmbedder(info=NARROW, latency=0.01), threads=2) as one:
        blocks, late = asyncio.run(go(one))
        check(blocks, texts)
        assert late or seconds > 0.01
        assert one.embedder.meter.billed_twice == {}
        one.check()


def test_an_error_is_not_lost_when_it_is_waited_for_in_short_steps(desk):
    under_way, was_late = threading.Event(), threading.Event()

    class Slow(FakeEmbedder):
        def embed(self, request):
            # What is under way when the stream fails lands after the error was waited for in vain.
            if "row 4" in request.texts:
                assert under_way.wait(120)
                raise AuthenticationFailed("key", status=401)
            if "row 8" in request.texts:
                under_way.set()
                assert was_late.wait(120)
            return super().embed(request)

    async def go(one):
        stream = one.astream(texts_of(12), block_size=4)
        blocks = []
        while True:
            try:
                blocks.append(await asyncio.wait_for(anext(stream), 0.01))
            except TimeoutError:
                if stream._ending is not None:
                    was_late.set()
            except AuthenticationFailed:
                assert was_late.is_set()
                assert await collect(stream) == []
                return blocks, stream.salvaged

    with desk(Slow(info=NARROW)) as one:
        blocks, salvaged = asyncio.run(go(one))
        check(blocks, texts_of(4))
        assert [block.rows for block in salvaged] == [texts_of(12)[8:]]
        assert one.used.held == Amount()


@pytest.mark.parametrize("plain", [True, False])
def test_the_event_loop_goes_on_while_requests_are_under_way(desk, plain):
    asked, heard = threading.Event(), threading.Event()

    class Waiting(FakeEmbedder):
        def embed(self, request):
            # Whoever waited for this in the event loop would wait for ever.
            asked.set()
            assert heard.wait(120)
            return super().embed(request)

    async def listen():
        while not asked.is_set():
            await asyncio.sleep(0)
        heard.set()

    async def go(one):
        listening = asyncio.ensure_future(listen())
        rows = texts_of(40)
        blocks = await collect(one.astream(rows if plain else pausing(rows, [None]), block_size=4))
        await listening
        return blocks

    with desk(Waiting(info=NARROW), threads=2) as one:
        check(asyncio.run(go(one)), texts_of(40))
        one.check()


@pytest.mark.parametrize("plain", [True, False])
def test_a_source_is_read_for_a_hundredth_of_a_second_at_a_time(desk, plain):
    """Each row takes a millisecond of the clock: after ten of them, others have their turn."""
    clock, runs = FakeClock(), [0]

    def read():
        clock.advance(0.001)
        runs[-1] += 1

    def rows():
        for text in texts_of(300):
            read()
            yield text

    async def paused():
        for text in rows():
            yield text

    async def watch():
        while True:
            runs.append(0)
            await asyncio.sleep(0)

    async def go(one):
        watching = asyncio.ensure_future(watch())
        blocks = await collect(one.astream(rows() if plain else paused(), block_size=50))
        watching.cancel()
        return blocks

    with desk(FakeEmbedder(info=NARROW), monotonic=clock.monotonic) as one:
        check(asyncio.run(go(one)), texts_of(300))
    assert sum(runs) == 300
    assert max(runs) <= 11


@pytest.mark.campaign(short=True)
@pytest.mark.parametrize("plain", [True, False])
def test_the_event_loop_is_never_held_up(desk, plain):
    texts = texts_of(6000)
    gaps = []

    async def watch():
        while True:
            began = time.monotonic()
            await asyncio.sleep(0)
            gaps.append(time.monotonic() - began)

    async def go(one):
        watcher = asyncio.ensure_future(watch())
        blocks = await collect(one.astream(texts if plain else pausing(texts, [None])))
        watcher.cancel()
        return blocks

    info = replace(NARROW, max_texts_per_request=512)
    with desk(FakeEmbedder(info=info, latency=0.005)) as one:
        check(asyncio.run(go(one)), texts)
    # The loop shares two processors with the provider in this process: what counts is the rule.
    assert sorted(gaps)[-3] < 0.25
    assert sum(gap > 0.05 for gap in gaps) < 10


@pytest.mark.fault(9)
@pytest.mark.parametrize(
    ("plain", "error"),
    [
        (True, RuntimeError("mine")),
        (False, RuntimeError("mine")),
        # Something that an asynchronous source waited for was cancelled.
        (False, asyncio.CancelledError()),
    ],
)
def test_what_came_before_the_sources_error_is_given_first(desk, plain, error):
    def rows():
        yield from texts_of(7)
        raise error

    async def paused():
        for text in texts_of(7):
            yield text
        raise error

    async def go(one):
        stream, blocks = one.astream(rows() if plain else paused(), block_size=3), []
        with pytest.raises(type(error)):
            async for block in stream:
                blocks.append(block)  # noqa: PERF401 - what came before the error counts
        assert await collect(stream) == []
        return blocks

    with desk(FakeEmbedder(info=NARROW)) as one:
        check(asyncio.run(go(one)), texts_of(7))
        one.check()


def test_rows_and_the_budget_end_it_as_they_end_the_other_form(desk):
    async def bad(one):
        with pytest.raises(InputRejected, match="row 2 ") as caught:
            await collect(one.astream(pausing(["a", "b", None, "c"])))
        assert caught.value.position == 2
        kept = await collect(one.astream(["a", None], on_error="keep"))
        assert kept[0].ok.tolist() == [True, False]

    async def stopped(one):
        rows = [(f"key {n}", f"{n:04}") for n in range(20)]
        stream = one.astream(rows, block_size=4, on_budget="stop")
        assert sum([len(block) async for block in stream]) == 10
        assert stream.stopped_at.key == "key 10"

    with desk(FakeEmbedder(info=NARROW)) as one:
        asyncio.run(bad(one))
    with desk(FakeEmbedder(info=NARROW), daily=10) as one:
        asyncio.run(stopped(one))
        assert one.embedder.meter.billed_tokens == 10
        one.check()


# Ends


@pytest.mark.parametrize("plain", [True, False])
def test_closing_ends_the_source_and_leaves_nothing_held(desk, plain):
    ended = []

    def rows():
        try:
            yield from map(str, itertools.count())
        finally:
            ended.append(True)

    async def paused():
        try:
            for number in itertools.count():
                yield str(number)
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def go(one):
        async with one.astream(rows() if plain else paused(), block_size=4) as stream:
            await anext(stream)
        await stream.aclose()
        assert await collect(stream) == []
        return sum(int(block.ok.sum()) for block in stream.salvaged)

    with desk(FakeEmbedder(info=NARROW, latency=0.005), threads=2) as one:
        kept = asyncio.run(go(one))
        assert ended == [True]
        assert one.embedder.meter.billed_texts.total() == 4 + kept
        one.check()


def test_closing_while_a_source_pauses_ends_the_task_that_waits(desk):
    async def go(one):
        async def rows():
            yield "row 0"
            await asyncio.Event().wait()

        stream = one.astream(rows(), block_size=1)
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        while not stream._busy.locked():
            await asyncio.sleep(0)
        await stream.aclose()
        with pytest.raises(EmbeddingError, match="closed before it ended"):
            await asyncio.wait_for(waiting, 120)

    with desk(FakeEmbedder(info=NARROW)) as one:
        asyncio.run(go(one))
        one.check()


def test_two_tasks_take_from_one_stream_by_turns(desk):
    async def go(one):
        stream = one.astream(pausing(texts_of(60), [0.0, None]), block_size=3)
        taken = await asyncio.gather(*(collect(stream) for _ in range(3)))
        return sorted(itertools.chain(*taken), key=lambda block: block.first)

    with desk(FakeEmbedder(info=NARROW, latency=0.002)) as one:
        check(asyncio.run(go(one)), texts_of(60))


def test_a_stream_that_is_dropped_with_its_loop_sends_nothing_more(desk):
    async def go(one):
        stream = one.astream(map(str, itertools.count()), block_size=4)
        await anext(stream)

    with desk(FakeEmbedder(info=NARROW, latency=0.005), threads=2) as one:
        asyncio.run(go(one))
        ends = time.monotonic() + 120
        while one.used.held != Amount() or any(
            thread.name == "embedcore-stream" for thread in threading.enumerate()
        ):
            assert time.monotonic() < ends
            time.sleep(0.01)
        seen = one.embedder.meter.requests
        time.sleep(0.05)
        assert one.embedder.meter.requests == seen
        one.check()
