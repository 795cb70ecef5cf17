"""Does a stream give every row once, in order, with its vector, and read no further than said?"""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from waiting import until

from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.events import Progress
from embedcore.policy.stream import stream as feed
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeEmbedder, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO
from embedcore.testing.strategies import text_lists

NARROW = replace(FAKE_INFO, dimensions=8, max_texts_per_request=4)


def own_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("embedcore")]


def jittery(seed, longest=0.004):
    """A provider whose requests overtake one another."""
    chance = random.Random(seed)
    return FakeEmbedder(
        info=NARROW, latency=1.0, sleep=lambda _: time.sleep(chance.random() * longest)
    )


def texts_of(count, word="row"):
    return [f"{word} {number}" for number in range(count)]


def check(blocks, texts, *, keys=None, items=None, width=8):
    """Every row once, in order, each with the vector of its own text."""
    keys = list(range(len(texts))) if keys is None else keys
    items = texts if items is None else items
    first = 0
    for block in blocks:
        assert block.first == first
        rows = slice(first, first + len(block))
        assert list(block.keys) == keys[rows]
        assert list(block.rows) == items[rows]
        assert block.vectors.dtype == np.float32
        assert block.ok.all()
        assert not block.errors
        assert (block.vectors == vectors_of(texts[rows], width)).all()
        first += len(block)
    assert first == len(texts)


# Order


@settings(max_examples=40, deadline=None)
@given(
    st.data(),
    text_lists(max_size=30),
    st.none() | st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 2**16),
)
def test_every_row_comes_once_in_order_with_its_own_vector(desk, data, texts, size, threads, seed):
    keys = data.draw(st.lists(st.integers(), min_size=len(texts), max_size=len(texts)))
    form = data.draw(st.sampled_from(["texts", "pairs", "mappings"]))
    items = {
        "texts": texts,
        "pairs": list(zip(keys, texts, strict=True)),
        "mappings": [{"t": text, "k": key} for key, text in zip(keys, texts, strict=True)],
    }[form]
    how = {"text": "t", "key": "k"} if form == "mappings" else {}
    rows = items if data.draw(st.booleans()) else iter(items)
    with desk(jittery(seed), threads=threads, monotonic=lambda: 0.0) as one:
        stream = one.stream(rows, block_size=size, **how)
        blocks = list(stream)
        check(blocks, texts, keys=None if form == "texts" else keys, items=items)
        full = size or one_block(one)
        assert [len(block) for block in blocks[:-1]] == [full] * (len(blocks) - 1)
        assert stream.usage.tokens == sum(block.usage.tokens for block in blocks) == one.spent
        assert stream.salvaged == []
        assert stream.stopped_at is None
        with pytest.raises(StopIteration):
            next(stream)
        one.check()


def one_block(desk):
    return 4 * desk.engine.info.max_texts_per_request


def read_ahead(desk, size):
    """Rows that may have been read and not given: the blocks under way, and nothing else."""
    requests = max(-(-size // desk.engine.info.max_texts_per_request), 1)
    return size * (-(-desk.engine.pool.size // requests) + 1)


@pytest.mark.parametrize("rows", [[], iter(()), ["one"], ["a", "b", "c"]])
def test_short_streams(desk, rows):
    texts = rows if isinstance(rows, list) else []
    with desk(FakeEmbedder(info=NARROW)) as one:
        blocks = list(one.stream(rows, block_size=1))
        check(blocks, texts)
        assert len(blocks) == len(texts)
        one.check()


def test_equal_texts_of_one_block_are_billed_once_and_all_given(desk):
    texts = ["a", "b", "a", "a"] * 8
    with desk(FakeEmbedder(info=NARROW)) as one:
        blocks = list(one.stream(texts, block_size=8))
        check(blocks, texts)
        # Without the store each block buys its own.
        assert one.embedder.meter.billed_texts == {"a": 4, "b": 4}
        assert blocks[0].reused.tolist() == [False, False, *[True] * 6]


@pytest.mark.parametrize(
    "how",
    [{"on_error": "ignore"}, {"on_budget": "pause"}, {"block_size": 0}, {"block_size": -1}],
)
def test_what_is_asked_for_wrongly_is_refused_before_anything_is_read(desk, how):
    def rows():
        raise AssertionError("read")
        yield

    with desk() as one:
        for stream in (one.stream, one.astream):
            with pytest.raises(ConfigurationError):
                stream(rows(), **how)


def test_progress_counts_every_row_and_ends_at_the_last(desk):
    texts = ["a", "a", *texts_of(30)]
    told = []
    with desk(FakeEmbedder(info=NARROW)) as one:
        stream = one.stream(texts, block_size=8, progress=told.append)
        spent = sum(block.usage.tokens for block in stream)
        assert all(isinstance(event, Progress) and event.total == 32 for event in told)
        assert max(event.done for event in told) == told[-1].done == 32
        assert told[-1].tokens == spent
        told.clear()
        list(one.stream(iter(texts), block_size=8, progress=told.append))
        assert {event.total for event in told} == {None}


def test_what_is_traced_belongs_to_the_callers_context(desk):
    import contextvars

    name = contextvars.ContextVar("name", default="nobody")
    seen = set()

    class Tracing(FakeEmbedder):
        def embed(self, request):
            seen.add(name.get())
            return super().embed(request)

    with desk(Tracing(info=NARROW)) as one:
        token = name.set("caller")
        list(one.stream(texts_of(40), block_size=4))
        name.reset(token)
    assert seen == {"caller"}


# Read-ahead


@pytest.mark.fault(10)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.0, 0.002]), st.integers(0, 99))
def test_the_source_is_read_no_further_ahead_than_the_blocks_under_way(
    desk, size, threads, pause, seed
):
    with desk(jittery(seed, 0.002), threads=threads) as one:
        most, given_rows, worst = read_ahead(one, size), 0, 0

        def rows():
            nonlocal worst
            for number in range(10 * size):
                worst = max(worst, number + 1 - given_rows)
                yield f"row {number}"

        blocks = []
        for block in one.stream(rows(), block_size=size):
            blocks.append(block)
            given_rows += len(block)
            time.sleep(pause)
        check(blocks, texts_of(10 * size))
        assert worst <= most


@pytest.mark.fault(10)
def test_a_source_without_end_is_read_as_far_as_asked(desk):
    with desk(FakeEmbedder(info=NARROW), threads=3) as one:
        counter = itertools.count()
        stream = one.stream((f"row {next(counter)}" for _ in itertools.repeat(0)), block_size=4)
        blocks = list(itertools.islice(stream, 20))
        stream.close()
        check(blocks, texts_of(80))
        assert next(counter) <= 80 + read_ahead(one, 4)
        salvaged = sum(int(block.ok.sum()) for block in stream.salvaged)
        assert one.embedder.meter.billed_texts.total() == 80 + salvaged
        with pytest.raises(StopIteration):
            next(stream)
        one.check()


@pytest.mark.fault(10)
def test_a_consumer_that_sleeps_holds_up_the_source(desk):
    with desk(FakeEmbedder(info=NARROW), threads=2) as one:
        read = itertools.count(1)
        stream = one.stream((f"row {next(read) - 1}" for _ in range(1000)), block_size=2)
        next(stream)
        time.sleep(0.2)
        assert next(read) - 1 <= 2 + read_ahead(one, 2)
        stream.close()


@pytest.mark.fault(10)
def test_what_a_slow_source_gave_is_sent_while_it_is_waited_for(desk):
    sent = threading.Event()

    class Telling(FakeEmbedder):
        def embed(self, request):
            sent.set()
            return super().embed(request)

    def rows():
        yield "row 0"
        # The source goes on only once the server has seen its first row.
        assert sent.wait(120)
        yield "row 1"

    with desk(Telling(info=NARROW)) as one:
        began = time.monotonic()
        blocks = list(one.stream(rows(), block_size=100))
        assert time.monotonic() - began >= 0.9 * feed.FLUSH_SECONDS
        check(blocks, texts_of(2))
        assert len(blocks) == 2


@pytest.mark.fault(10)
def test_a_quick_source_is_not_sent_in_crumbs(desk):
    with desk(FakeEmbedder(info=NARROW), monotonic=lambda: 0.0) as one:
        assert [len(block) for block in one.stream(texts_of(100), block_size=50)] == [50, 50]


# Ends


def quiet(one):
    """Nothing is held, and no thread of a stream is left; those of the engine are its own."""
    until(lambda: one.used.held == Amount())
    until(lambda: len(own_threads()) <= one.engine.pool.size)
    one.check(certain=False)


def test_a_stream_that_is_dropped_sends_nothing_more(desk):
    with desk(FakeEmbedder(info=NARROW, latency=0.005), threads=2) as one:
        before = len(own_threads())
        stream = one.stream((f"row {number}" for number in itertools.count()), block_size=4)
        next(stream)
        gone = weakref.ref(stream)
        del stream
        gc.collect()
        assert gone() is None
        until(lambda: len(own_threads()) <= before + one.engine.pool.size)
        quiet(one)
        seen = one.embedder.meter.requests
        time.sleep(0.05)
        assert one.embedder.meter.requests == seen
        one.check()


@pytest.mark.parametrize("closing", [True, False])
def test_a_consumer_that_raises_leaves_nothing_behind(desk, closing):
    def go(one):
        stream = one.stream((f"row {number}" for number in itertools.count()), block_size=4)
        if closing:
            with stream:
                for _ in stream:
                    raise ZeroDivisionError
        for _ in stream:
            raise ZeroDivisionError

    with desk(FakeEmbedder(info=NARROW, latency=0.005), threads=2) as one:
        with pytest.raises(ZeroDivisionError):
            go(one)
        gc.collect()
        quiet(one)
        one.check()


def test_a_generator_is_closed_with_the_stream_and_a_file_is_not(desk, tmp_path):
    ended = []

    def rows():
        try:
            yield from texts_of(100)
        finally:
            ended.append(True)

    (tmp_path / "texts").write_text("a\nb\n" * 50)
    with desk(FakeEmbedder(info=NARROW)) as one:
        source = rows()
        with one.stream(source, block_size=1) as stream:
            next(stream)
        assert ended == [True]
        # Nobody else holds it: it ends as in a for loop.
        next(one.stream(rows(), block_size=1))
        gc.collect()
        until(lambda: len(ended) == 2)
        with (tmp_path / "texts").open() as file:
            with one.stream(file, block_size=1) as stream:
                next(stream)
            assert not file.closed


def test_closing_twice_is_harmless_and_an_unread_stream_needs_no_closing(desk):
    with desk() as one:
        stream = one.stream(["a"])
        stream.close()
        stream.close()
        assert list(stream) == []
        assert one.embedder.meter.requests == 0


def test_closing_from_another_thread_ends_the_reader(desk):
    hold = threading.Event()

    def rows():
        yield "row 0"
        hold.wait(120)
        yield "row 1"

    with desk(FakeEmbedder(info=NARROW)) as one:
        stream = one.stream(rows(), block_size=1)
        raised = []

        def read():
            try:
                list(stream)
            except EmbeddingError as error:
                raised.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        until(lambda: one.embedder.meter.requests == 1)
        closer = threading.Thread(target=stream.close)
        closer.start()
        until(lambda: stream._pipeline.is_ended)
        hold.set()
        closer.join(120)
        reader.join(120)
        # It must not look like the end of the source.
        assert [str(error) for error in raised] == ["the stream was closed before it ended"]
        assert [block.keys for block in stream.salvaged] == [[0]]
        quiet(one)


def test_a_source_that_reads_its_own_stream_is_told(desk):
    def rows():
        yield "a"
        next(streams[0])

    with desk() as one:
        streams = [one.stream(rows())]
        check([next(streams[0])], ["a"], width=32)
        with pytest.raises(ConfigurationError, match="already being read"):
            next(streams[0])
        assert list(streams[0]) == []


def test_a_source_that_closes_its_own_stream_does_not_hang(desk):
    def rows():
        yield "a"
        streams[0].close()

    with desk() as one:
        streams = [one.stream(rows(), block_size=1)]
        with pytest.raises(EmbeddingError):
            list(streams[0])
        quiet(one)


# Several


def test_two_threads_take_from_one_stream_by_turns(desk):
    with desk(jittery(1)) as one:
        stream = one.stream(texts_of(200), block_size=3)
        taken = [[], [], []]
        threads = [threading.Thread(target=lambda into=into: into.extend(stream)) for into in taken]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        blocks = sorted(itertools.chain(*taken), key=lambda block: block.first)
        check(blocks, texts_of(200))
        one.check()


def test_several_streams_of_one_client_at_once(desk):
    with desk(jittery(2)) as one:
        streams = [one.stream(texts_of(60, word), block_size=5) for word in "abc"]
        given = [list(blocks) for blocks in zip(*zip(*streams, strict=True), strict=True)]
        for word, blocks in zip("abc", given, strict=True):
            check(blocks, texts_of(60, word))
        one.check()


def test_a_stream_of_a_stream(desk):
    with desk(jittery(3), threads=2) as one:
        inner = one.stream(texts_of(50), block_size=3)
        again = (text for block in inner for text in block.rows)
        check(list(one.stream(again, block_size=4)), texts_of(50))
        one.check()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_cannot_go_on_with_the_stream_of_its_parent(desk):
    with desk(FakeEmbedder(info=NARROW, latency=0.01)) as one:
        stream = one.stream(texts_of(40), block_size=4)
        blocks = [next(stream)]
        child = os.fork()
        if child == 0:
            code = 1
            try:
                next(stream)
            except ConfigurationError as error:
                stream.close()
                code = 0 if "forked" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        check(blocks + list(stream), texts_of(40))
        one.check()
