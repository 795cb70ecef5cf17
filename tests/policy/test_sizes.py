"""Is the size of requests learned from what passed, and does it grow again?"""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.policy.planning import RequestSizes, Size, sizes_for
from embedcore.testing import FakeClock


def size(texts, in_bytes=None):
    return Size(texts=texts, in_bytes=in_bytes if in_bytes is not None else 10 * texts)


def halves(whole):
    texts, in_bytes = whole.texts // 2, whole.in_bytes // 2
    return [size(texts, in_bytes), size(whole.texts - texts, whole.in_bytes - in_bytes)]


class Server:
    """Takes requests of so many texts, or bytes; what fails is divided, as the search does."""

    def __init__(self, sizes, texts=10**9, in_bytes=10**9):
        self.sizes, self.most = sizes, size(texts, in_bytes)
        self.failed = 0
        self.sent = 0

    def send(self, whole):
        with self.sizes.turn(whole) as may_leave:
            if may_leave:
                return self._try(whole)
        for part in halves(whole):
            self.send(part)
        return False

    def _try(self, whole):
        self.sent += 1
        if whole.texts <= self.most.texts and whole.in_bytes <= self.most.in_bytes:
            self.sizes.passed(whole)
            return True
        self.failed += 1
        parts = halves(whole)
        if all([self.send(part) for part in parts]):  # noqa: C419 - each of them is sent
            self.sizes.learn(whole, parts)
        return False


@pytest.mark.case("A6")
def test_nothing_is_known_until_something_failed_and_its_parts_passed():
    sizes = RequestSizes()
    assert sizes.known is sizes.wanted is None
    for _ in range(20):
        sizes.passed(size(2048))
    assert sizes.known is sizes.wanted is None
    with sizes.turn(size(10**6)) as may_leave:
        assert may_leave
    sizes.learn(size(64), [size(32), size(32)])
    assert sizes.known == sizes.wanted == size(32)
    with sizes.turn(size(33)) as may_leave:
        assert not may_leave


def test_what_is_within_it_in_texts_or_in_bytes_may_leave():
    sizes = RequestSizes()
    sizes.learn(size(2, 40_000), [size(1, 20_000)] * 2)
    for fits in (size(1000, 20_000), size(1, 10**6)):
        with sizes.turn(fits) as may_leave:
            assert may_leave
    with sizes.turn(size(2, 20_001)) as may_leave:
        assert not may_leave


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(600, 4096))
def test_it_comes_close_to_what_the_server_takes_with_few_that_fail(most, first):
    sizes = RequestSizes()
    server = Server(sizes, texts=most)
    server.send(size(first))
    for _ in range(200):
        server.send(sizes.wanted or size(first))
    if most < first:
        assert most / 1.3 - 1 <= sizes.known.texts <= most
        assert server.failed <= 2 * 13 + 6


@pytest.mark.parametrize("seconds", [500.0, 700.0])
def test_what_failed_long_ago_is_tried_again(seconds):
    clock = FakeClock()
    sizes = RequestSizes(clock.monotonic)
    server = Server(sizes, texts=20)
    server.send(size(64))
    for _ in range(50):
        server.send(sizes.wanted)
    assert sizes.known.texts <= 20
    failed, server.most = server.failed, size(10**6, 10**9)
    clock.advance(seconds)
    for _ in range(50):
        server.send(sizes.wanted)
    assert (sizes.known.texts > 64) == (seconds > 600.0)
    assert server.failed == failed


def test_one_request_at_a_time_tries_a_larger_size():
    sizes = RequestSizes()
    sizes.learn(size(64), [size(32)] * 2)
    for _ in range(8):
        sizes.passed(size(32))
    larger = sizes.wanted
    assert larger == size(48)
    allowed, met, done = [], threading.Barrier(4), threading.Barrier(4)

    def go():
        met.wait(10)
        with sizes.turn(larger) as may_leave:
            allowed.append(may_leave)
            done.wait(10)

    threads = [threading.Thread(target=go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False, False, False, True]
    # It brought no answer to the question, such as a text at fault: asked again later.
    assert sizes.known == sizes.wanted == size(32)


def test_it_shrinks_again_where_it_proves_too_large():
    sizes = RequestSizes()
    sizes.learn(size(64), [size(32)] * 2)
    sizes.learn(size(32), [size(16)] * 2)
    assert sizes.known == size(16)
    # Larger requests that were planned before say nothing new.
    sizes.learn(size(64), [size(16)] * 4)
    assert sizes.known == size(16)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 100)), max_size=60))
def test_a_server_that_minds_bytes_is_not_asked_for_fewer_short_texts(requests):
    sizes = RequestSizes()
    server = Server(sizes, in_bytes=5_000)
    for texts, each in requests:
        before = server.failed
        server.send(size(texts, texts * each))
        assert server.failed == before or texts * each > 5_000


def test_all_clients_of_an_endpoint_and_model_share_it():
    assert sizes_for("http://one", "m") is sizes_for("http://one", "m")
    assert sizes_for("http://one", "m") is not sizes_for("http://one", "n")
    assert sizes_for("http://one", "m") is not sizes_for("http://two", "m")
