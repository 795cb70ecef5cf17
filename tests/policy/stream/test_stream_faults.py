"""When something breaks in a stream, is all before it given, and is nothing billed lost?"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from waiting import until

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    InputRejected,
    OutcomeUnknown,
    QuotaExhausted,
    RequestRejected,
)
from embedcore.storage.amounts import Amount
from embedcore.testing import FakeEmbedder, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO, Outcome

STRICT = "import warnings; warnings.simplefilter('error')\n"
NARROW = replace(FAKE_INFO, dimensions=8, max_texts_per_request=2)


def texts_of(count):
    return [f"row {number}" for number in range(count)]


def drain(stream):
    """Every block, and what ended it."""
    blocks = []
    try:
        while True:
            blocks.append(next(stream))
    except BaseException as error:  # noqa: BLE001 - interrupts as well
        return blocks, error


def rows_right(blocks, *, all_ok=True):
    """Texts that came with their vectors, by position; what has none is NaN."""
    found = {}
    for block in blocks:
        for at, (item, vector, ok) in enumerate(
            zip(block.rows, block.vectors, block.ok.tolist(), strict=True)
        ):
            if ok:
                assert (vector == vectors_of([item], 8)[0]).all()
                assert block.first + at not in found
                found[block.first + at] = item
            else:
                assert not all_ok
                assert np.isnan(vector).all()
    return found


def in_order(blocks):
    firsts = [(block.first, len(block)) for block in blocks]
    assert all(one + size == two for (one, size), (two, _) in itertools.pairwise(firsts))
    assert not firsts or firsts[0][0] == 0


# The source


class Ending:
    """An iterator that ends with whatever it is given, after some rows."""

    def __init__(self, rows, error):
        self.rows, self.error = iter(rows), error

    def __iter__(self):
        return self

    def __next__(self):
        for row in self.rows:
            return row
        raise self.error


@pytest.mark.fault(9)
@pytest.mark.parametrize("error", [RuntimeError("mine"), LookupError(3), MemoryError()])
@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_what_came_before_the_sources_error_is_given_first(desk, error, rows):
    def source():
        yield from texts_of(rows)
        raise error

    with desk(FakeEmbedder(info=NARROW)) as one:
        stream = one.stream(source(), block_size=3)
        blocks, raised = drain(stream)
        assert raised is error
        in_order(blocks)
        assert list(rows_right(blocks).values()) == texts_of(rows)
        assert stream.salvaged == []
        assert list(stream) == []
        assert one.embedder.meter.billed_texts.total() == rows
        one.check()


@pytest.mark.fault(9)
def test_stop_iteration_inside_a_generator_is_an_error_and_of_an_iterator_the_end(desk):
    def source():
        yield from texts_of(3)
        next(iter(()))

    with desk(FakeEmbedder(info=NARROW)) as one:
        blocks, error = drain(one.stream(source()))
        assert isinstance(error, RuntimeError)
        assert len(rows_right(blocks)) == 3
        blocks, error = drain(one.stream(Ending(texts_of(3), StopIteration())))
        assert isinstance(error, StopIteration)
        assert len(rows_right(blocks)) == 3


@pytest.mark.fault(9)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), SystemExit()])
def test_an_interrupt_ends_the_stream_at_once_and_loses_nothing(desk, error):
    with desk(FakeEmbedder(info=NARROW, latency=0.005), threads=2) as one:
        stream = one.stream(Ending(texts_of(40), error), block_size=4)
        blocks, raised = drain(stream)
        assert raised is error
        given_rows = rows_right(blocks)
        kept = rows_right(stream.salvaged, all_ok=False)
        assert not given_rows.keys() & kept.keys()
        assert one.embedder.meter.billed_texts.total() == len(given_rows) + len(kept)
        assert list(stream) == []
        one.check()


@pytest.mark.fault(9)
def test_an_interrupt_while_waiting_for_a_block_loses_nothing(forks):
    program = """
import _thread, sys, threading, time
from dataclasses import replace
from embedcore import EmbeddingClient
from embedcore.testing import FakeEmbedder

def is_waiting():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and "pipeline" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "wait"

class Interrupting(FakeEmbedder):
    # Four blocks are given; the fifth interrupts the program while it is waited for.
    interrupted = threading.Event()

    def embed(self, request):
        first = int(request.texts[0].split()[1])
        if first == 32:
            while not (len(given) == 32 and is_waiting()):
                time.sleep(0.001)
            _thread.interrupt_main()
            self.interrupted.set()
        elif first > 32:
            assert self.interrupted.wait(120)
        return super().embed(request)

embedder, given, kept = Interrupting(), [], []
with EmbeddingClient(embedder=embedder, config={"cache": False}) as client:
    running = client._running
    client._opened._thing = replace(running, engine=replace(running.engine, grace=120.0))
    stream = client.embed_iter((f"row {n}" for n in range(10**6)), block_size=8)
    try:
        for block in stream:
            given += block.rows
    except KeyboardInterrupt:
        kept = [t for b in stream.salvaged for t, ok in zip(b.rows, b.ok) if ok]
    assert sorted([*given, *kept]) == sorted(embedder.meter.billed_texts), len(kept)
    assert kept and not embedder.meter.billed_twice
"""
    assert forks(STRICT + program).wait(timeout=120) == 0


# Rows


BAD = {"none": None, "empty": "", "bytes": b"x", "lone": "\ud800"}


@settings(max_examples=settings.default.max_examples // 2, deadline=None)
@given(
    st.integers(1, 30),
    st.dictionaries(st.integers(0, 29), st.sampled_from(sorted(BAD)), min_size=1, max_size=4),
    st.integers(1, 8),
)
def test_rows_before_a_bad_one_are_given_and_nothing_after_it_is_billed(desk, count, bad, size):
    rows = [BAD[bad[n]] if n in bad else f"row {n}" for n in range(count)]
    first = min((n for n in bad if n < count), default=None)
    with desk(FakeEmbedder(info=NARROW)) as one:
        stream = one.stream(rows, block_size=size)
        blocks, error = drain(stream)
        before = count if first is None else first
        in_order(blocks)
        assert list(rows_right(blocks)) == list(range(before))
        if first is None:
            assert isinstance(error, StopIteration)
        else:
            assert isinstance(error, InputRejected)
            assert error.position == first
            assert f"row {first} " in str(error)
        assert one.embedder.meter.billed_texts.total() == before
        one.check()
        kept, error = drain(one.stream(rows, block_size=size, on_error="keep"))
        assert isinstance(error, StopIteration)
        in_order(kept)
        good = {n for n in range(count) if n not in bad}
        assert rows_right(kept, all_ok=False).keys() == good
        failed = {block.first + at: e for block in kept for at, e in block.errors.items()}
        assert failed.keys() == set(range(count)) - good
        assert all(error.position == row for row, error in failed.items())
        one.check()


def test_a_missing_column_is_an_error_of_its_row(desk):
    rows = [{"id": n, "t": f"row {n}"} for n in range(5)]
    rows[3] = {"id": 3, "body": "x"}
    with desk(FakeEmbedder(info=NARROW)) as one:
        blocks, error = drain(one.stream(rows, text="t", key="id", block_size=2))
        assert [key for block in blocks for key in block.keys] == [0, 1, 2]
        assert str(error) == "row 3 has no 't'; it has: id, body"
        assert error.position == 3
        blocks, error = drain(one.stream(rows, text="t", key="id", block_size=2, on_error="keep"))
        assert [key for block in blocks for key in block.keys] == [0, 1, 2, 3, 4]
        assert blocks[1].ok.tolist() == [True, False]
        assert str(blocks[1].errors[1]) == "row 3 has no 't'; it has: id, body"
        assert [vector is None for _, vector in blocks[1]] == [False, True]


def test_an_element_that_cannot_even_be_indexed_ends_the_stream_like_its_source(desk):
    class Broken(dict):
        def __getitem__(self, name):
            raise OSError("the row is gone")

    rows = [{"t": "row 0"}, {"t": "row 1"}, Broken()]
    with desk(FakeEmbedder(info=NARROW)) as one:
        blocks, error = drain(one.stream(rows, text="t", block_size=8))
        assert [len(block) for block in blocks] == [2]
        assert isinstance(error, OSError)


def test_a_text_that_the_provider_refuses_is_found_and_kept_as_failed(desk):
    def script(request, number):
        if "row 5" in request.texts:
            return Outcome(error=RequestRejected("not this", billed="no", status=400))
        return None

    with desk(FakeEmbedder(info=NARROW, script=script)) as one:
        blocks, _ = drain(one.stream(texts_of(12), block_size=4, on_error="keep"))
        assert rows_right(blocks, all_ok=False).keys() == set(range(12)) - {5}
        assert blocks[1].errors[1].position == 5
        one.check()
        stream = one.stream(texts_of(12), block_size=4)
        blocks, error = drain(stream)
        assert isinstance(error, RequestRejected)
        assert error.position == 5
        assert str(error).startswith("row 5: ")
        assert rows_right(blocks).keys() == set(range(4))
        one.check()


# The provider


@settings(max_examples=settings.default.max_examples * 2 // 5, deadline=None)
@given(
    st.integers(0, 39),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(
        [
            AuthenticationFailed("key", status=401),
            QuotaExhausted("none left", status=429),
            OutcomeUnknown("lost"),
            OSError("raw"),
        ]
    ),
)
def test_the_bill_is_what_was_given_and_what_was_salvaged(desk, at, size, threads, error):
    def script(request, number):
        return Outcome(error=error, bills=False) if f"row {at}" in request.texts else None

    embedder = FakeEmbedder(info=NARROW, script=script, latency=0.001)
    with desk(embedder, threads=threads) as one:
        stream = one.stream(
            ((f"key {n}", text) for n, text in enumerate(texts_of(40))), block_size=size
        )
        blocks, raised = drain(stream)
        assert isinstance(raised, EmbeddingError)
        in_order(blocks)
        given_rows = [key for block in blocks for key in block.keys]
        # All blocks before the one that failed, whole.
        assert given_rows == [f"key {n}" for n in range(at // size * size)]
        kept = set()
        for block in stream.salvaged:
            for key, (_, text), vector, ok in zip(
                block.keys, block.rows, block.vectors, block.ok.tolist(), strict=True
            ):
                assert key == text.replace("row", "key")
                assert ok == (not np.isnan(vector).any())
                if ok:
                    assert (vector == vectors_of([text], 8)[0]).all()
                    assert key not in kept
                    kept.add(key)
        billed = {text.replace("row", "key") for text in embedder.meter.billed_texts}
        assert billed == kept | set(given_rows)
        assert embedder.meter.billed_twice == {}
        assert one.used.held == Amount()


def test_a_failure_ends_no_block_before_it(desk):
    first = threading.Event()

    class Overtaken(FakeEmbedder):
        def embed(self, request):
            if "row 4" in request.texts:
                first.set()
                raise AuthenticationFailed("key", status=401)
            if "row 0" in request.texts:
                assert first.wait(120)
            return super().embed(request)

    with desk(Overtaken(info=NARROW)) as one:
        blocks, error = drain(one.stream(texts_of(8), block_size=4))
        assert isinstance(error, AuthenticationFailed)
        assert [block.first for block in blocks] == [0]
        rows_right(blocks)


def test_a_closed_client_ends_its_streams_with_an_error(desk):
    one = desk(FakeEmbedder(info=NARROW, latency=0.002), threads=2)
    stream = one.stream(texts_of(400), block_size=2)
    next(stream)
    one.engine.pool.close()
    blocks, error = drain(stream)
    assert isinstance(error, ConfigurationError)
    assert "closed while it was in use" in str(error)
    in_order_after = [block.first for block in blocks]
    assert in_order_after == list(range(2, 2 + 2 * len(blocks), 2))
    kept = rows_right(stream.salvaged, all_ok=False)
    assert one.embedder.meter.billed_texts.total() == 2 + 2 * len(blocks) + len(kept)
    until(lambda: one.used.held == Amount())
    one.close()


def test_a_stream_left_open_at_the_end_of_the_program_is_accounted_for(state_home, forks):
    program = """
from embedcore import EmbeddingClient
from embedcore.testing import FakeEmbedder
client = EmbeddingClient(embedder=FakeEmbedder(latency=0.2), config={"cache": False})
stream = client.embed_iter((f"row {n}" for n in range(10**6)), block_size=8)
next(stream)
"""
    assert forks(STRICT + program).wait(timeout=120) == 0
    from embedcore.storage import usage
    from embedcore.storage.database import Database
    from embedcore.storage.ledger import Ledger
    from embedcore.storage.schema import STATE

    ledger = Ledger(Database(state_home / "state.db", STATE))
    assert usage.of_scope(ledger, "default", "total").held == Amount()
    ledger.database.close()


KILLED = """
import json, sys
from embedcore import EmbeddingClient

given = json.loads(sys.argv[1])
with EmbeddingClient(options=given["options"], config=given["config"]) as client:
    for block in client.embed_iter((f"row {n} of many" for n in range(600)), block_size=10):
        assert block.ok.all()
        print(block.first, flush=True)
"""


@pytest.mark.fault(9)
def test_a_killed_stream_that_runs_again_buys_twice_only_what_was_in_flight(
    server, home, hold_replies, forks
):
    given = {
        "options": {
            "base_url": server.base_url,
            "api_key": server.api_key,
            "dimensions": 8,
        },
        "config": {"home": str(home), "concurrency": 4},
    }
    go = hold_replies(after=12)
    process = forks(KILLED, json.dumps(given), stdout=subprocess.PIPE)
    for _ in range(8):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    go.set()
    until(lambda: server.meter.in_flight == 0)
    before = server.meter.billed_texts
    assert 80 <= before.total() < 600
    again = forks(KILLED, json.dumps(given), stdout=subprocess.DEVNULL)
    assert again.wait(timeout=120) == 0
    after = server.meter.billed_texts
    assert len(after) == 600
    # Four requests of ten rows were in flight.
    assert after.total() - 600 <= 4 * 10


@pytest.mark.case("H8")
@pytest.mark.parametrize("size", [1, 2, 50])
def test_rows_are_named_by_their_keys(desk, size):
    rows = [(f"doc-{n}", "" if n == 7 else f"row {n}") for n in range(5, 10)]
    with desk(FakeEmbedder(info=NARROW)) as one:
        blocks, error = drain(one.stream(rows, block_size=size))
        assert [key for block in blocks for key in block.keys] == ["doc-5", "doc-6"]
        assert str(error).startswith("row with key 'doc-7' is an empty text")
        assert error.position == 2
        kept, _ = drain(one.stream(rows, block_size=size, on_error="keep"))
        (why,) = [error for block in kept for error in block.errors.values()]
        assert str(why).startswith("row with key 'doc-7' is an empty text")
