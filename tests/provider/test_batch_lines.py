"""Lines of results are whole, however they arrive."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import orjson
import pytest
from hypothesis import given, strategies as st

from embedcore.provider.batch_lines import HalfLine, whole_lines
from embedcore.provider.http import UnreadableBody


def cut(content: bytes, places: list[int]) -> Iterator[bytes]:
    at = [0, *sorted(min(place, len(content)) for place in places), len(content)]
    return (content[begin:end] for begin, end in pairwise(at))


DOCUMENTS = st.lists(
    st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers(-9, 99), max_size=3),
    max_size=8,
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \r\n"])
PLACES = st.lists(st.integers(0, 400), max_size=12)


@pytest.mark.fault(69)
@given(DOCUMENTS, ENDS, st.booleans(), st.booleans(), PLACES)
def test_pieces_line_ends_and_a_byte_order_mark_change_nothing(
    documents: list[object], end: bytes, final: bool, marked: bool, places: list[int]
) -> None:
    content = end.join(map(orjson.dumps, documents)) + (end if final else b"")
    content = b"\xef\xbb\xbf" * marked + content
    assert [orjson.loads(line) for line in whole_lines(cut(content, places))] == documents


@pytest.mark.fault(69)
@pytest.mark.fault(79)
@given(DOCUMENTS, PLACES, st.integers(0, 400))
def test_a_cut_gives_a_prefix_and_half_a_line_is_never_given(
    documents: list[object], places: list[int], kept: int
) -> None:
    whole = b"".join(orjson.dumps(document) + b"\n" for document in documents)
    content = whole[:kept]
    given_lines = []
    half = bool(content) and not content.endswith(b"\n")
    half &= kept < len(whole) and whole[kept : kept + 1] != b"\n"
    try:
        for line in whole_lines(cut(content, places)):
            given_lines += [orjson.loads(line)]
        assert not half
    except HalfLine:
        assert half
    assert given_lines == documents[: len(given_lines)]
    assert len(given_lines) == content.count(b"\n") + (
        bool(content) and not content.endswith(b"\n") and not half
    )


def test_a_line_without_end_is_not_kept() -> None:
    endless = (b"x" * 10_000 for _ in range(1_000_000))
    with pytest.raises(UnreadableBody, match="longer than"):
        list(whole_lines(endless))


def test_no_bytes_are_no_lines() -> None:
    assert list(whole_lines([])) == []
    assert list(whole_lines([b"", b"\n", b" "])) == []
