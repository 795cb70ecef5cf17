"""Memory for bodies: lent to one at a time, and used again."""

from __future__ import annotations

import threading

from hypothesis import given, strategies as st

from embedcore.provider.http_bodies import Buffers


@given(st.lists(st.integers(0, 10_000_000), max_size=12))
def test_what_is_lent_is_large_enough_and_nobody_elses(sizes):
    buffers = Buffers()
    lent = [buffers.take(size) for size in sizes]
    assert all(len(buffer) >= size for buffer, size in zip(lent, sizes, strict=True))
    assert len({id(buffer) for buffer in lent}) == len(lent)
    for buffer in lent:
        buffers.give(buffer)


def test_it_is_used_again_and_not_hoarded():
    buffers = Buffers()
    first = buffers.take(1000)
    buffers.give(first)
    assert buffers.take(2000) is first
    many = [buffers.take(1) for _ in range(20)]
    for buffer in many:
        buffers.give(buffer)
    again = [buffers.take(1) for _ in range(20)]
    assert len({id(one) for one in many} & {id(one) for one in again}) == 2
    huge = buffers.take(100 << 20)
    buffers.give(huge)
    assert buffers.take(100 << 20) is not huge


def test_threads_never_share():
    buffers, wrong = Buffers(), []

    def use(number: int) -> None:
        for _ in range(200):
            buffer = buffers.take(8)
            buffer[:1] = bytes([number])
            if buffer[:1] != bytes([number]):
                wrong.append(number)
            buffers.give(buffer)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
