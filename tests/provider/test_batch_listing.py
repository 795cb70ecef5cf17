"""A list that is not complete is never taken for one that is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, strategies as st

from embedcore.errors import InvalidResponse
from embedcore.provider.batch_listing import NewestFirst, Page, all_pages, page_of
from embedcore.provider.batch_objects import file_of
from embedcore.provider.replies import BadReply

NOW = datetime(2026, 11, 24, tzinfo=UTC)


class Listed:
    """Pages of numbers, from a server whose ``has_more`` and cursors may lie."""

    def __init__(
        self, count: int, size: int, *, more: bool | None = None, deaf: bool = False
    ) -> None:
        self.ids = [str(number) for number in range(count)]
        self.size, self.more, self.deaf = size, more, deaf
        self.asked = 0

    def __call__(self, after: str | None) -> Page[str]:
        self.asked += 1
        begin = 0 if after is None or self.deaf else self.ids.index(after) + 1
        ids = self.ids[begin : begin + self.size]
        more = begin + self.size < len(self.ids) if self.more is None else self.more
        return Page(entries=ids, ids=ids, more=more, next=ids[-1] if ids else None)

    def read(self) -> list[str]:
        return [entry for page in all_pages(self) for entry in page.entries]


@pytest.mark.fault(78)
@given(st.integers(0, 40), st.integers(1, 7))
def test_every_entry_of_every_page_comes(count: int, size: int) -> None:
    listed = Listed(count, size)
    assert listed.read() == listed.ids


@pytest.mark.fault(78)
@given(st.integers(0, 40), st.integers(1, 7))
def test_that_there_is_no_more_is_not_taken_on_trust(count: int, size: int) -> None:
    listed = Listed(count, size, more=False)
    assert listed.read() == listed.ids


@pytest.mark.fault(78)
@given(st.integers(0, 40), st.integers(1, 7), st.booleans())
def test_a_promise_of_more_without_more_is_an_error(count: int, size: int, deaf: bool) -> None:
    listed = Listed(count, size, more=True, deaf=deaf)
    with pytest.raises(InvalidResponse, match="repeats itself"):
        listed.read()
    assert listed.asked <= count + 1


@pytest.mark.fault(78)
def test_a_server_without_cursors_and_with_one_page_is_complete() -> None:
    assert Listed(5, 10, more=False, deaf=True).read() == list("01234")


def test_pages_in_a_circle_end() -> None:
    circle = {None: ["a", "b"], "b": ["c", "d"], "d": ["a", "b"]}
    pages = all_pages(lambda after: Page(entries=circle[after], ids=circle[after], more=True))
    with pytest.raises(InvalidResponse):
        list(pages)


@pytest.mark.parametrize(
    "document",
    [{}, {"data": None}, {"data": {}}, {"data": "batch_1"}],
)
def test_what_is_no_list_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(BadReply):
        page_of(document, file_of, "batches")


ODD: list[Any] = [None, 3, "file-1", [], {}, {"id": 3}, {"id": None, "filename": "x"}]


@pytest.mark.fault(78)
@given(st.lists(st.sampled_from([*ODD, "good", "good"]), max_size=30), st.integers(1, 7))
def test_entries_that_cannot_be_used_hide_no_other(kinds: list[Any], size: int) -> None:
    entries = [{"id": f"f-{place}"} if one == "good" else one for place, one in enumerate(kinds)]
    ids = [one.get("id") if isinstance(one, dict) else None for one in entries]

    def fetch(after: str | None) -> Page[Any]:
        begin = 0 if after is None else ids.index(after) + 1
        more = begin + size < len(entries)
        return page_of({"data": entries[begin : begin + size], "has_more": more}, file_of, "files")

    found = []
    try:
        for page in all_pages(fetch):
            found += [one.id for one in page.entries]
    except InvalidResponse:
        # A whole page of them leads to no next one: then it is said that the list goes on.
        nameless = [isinstance(one, str) for one in ids]
        assert any(not any(nameless[at : at + size]) for at in range(len(ids) - size))
    else:
        assert found == [one for one in ids if isinstance(one, str)]


def ages(*hours: float | None) -> list[datetime | None]:
    return [None if age is None else NOW - timedelta(hours=age) for age in hours]


@pytest.mark.parametrize(
    ("pages", "passed"),
    [
        ([ages(1, 2, 3)], False),
        ([ages(1, 6, 7)], True),
        ([ages(1, 4)], False),
        ([ages(6, 7)], True),
        ([ages(1, 2), ages(6, 7)], True),
        ([ages(6, 6, 6)], False),
        ([ages(6, 6), ages(6, 5.5)], False),
        ([ages(6)], False),
        ([ages(6), ages(7)], True),
        ([ages(7, 6)], False),
        ([ages(7, 6), ages(9, 10)], False),
        ([ages(None, 7)], False),
        ([ages(6, None), ages(7, 8)], False),
        ([ages()], False),
    ],
)
def test_the_rest_is_old_only_where_the_order_is_seen(
    pages: list[list[datetime | None]], passed: bool
) -> None:
    order = NewestFirst(NOW - timedelta(hours=5))
    for time in (time for page in pages for time in page):
        order.see(time)
    assert order.has_passed == passed


@pytest.mark.fault(77)
@given(st.lists(st.integers(0, 20), max_size=30), st.integers(0, 20))
def test_stopping_never_loses_a_job_of_a_sorted_list(hours: list[int], limit: int) -> None:
    moment = NOW - timedelta(hours=limit)
    for newest_first in (True, False):
        times = ages(*sorted(hours, reverse=not newest_first))
        order = NewestFirst(moment)
        seen = 0
        for time in times:
            order.see(time)
            seen += 1
            if order.has_passed:
                break
        assert all(time is not None and time < moment for time in times[seen:])
