"""Is a list that comes in pages complete? Or is it an error: never a part of it, unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Generic, TypeVar

from embedcore.errors import InvalidResponse
from embedcore.provider.replies import BadReply

PAGE_SIZE: Final = 100
# 2,000 batches may be created per hour; nobody has more than ten million of them.
_MOST_PAGES: Final = 100_000

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[T]):
    """``ids``: of the entries, in order. ``more``: the server says that there are more."""

    entries: Sequence[T]
    ids: Sequence[str]
    more: bool


def page_of(document: dict[str, Any], read: Callable[[dict[str, Any]], T], name: str) -> Page[T]:
    """Raises ``BadReply`` if an entry has no id: then the next page cannot be asked for."""
    data = document.get("data")
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise BadReply(f"it is not a list of {name}")
    ids = [entry.get("id") for entry in data]
    if not all(isinstance(each, str) for each in ids):
        raise BadReply(f"an entry of the list of {name} has no 'id'")
    return Page(
        entries=[read(entry) for entry in data], ids=ids, more=document.get("has_more") is True
    )


def all_pages(fetch: Callable[[str | None], Page[T]]) -> Iterator[Page[T]]:
    """Every page of a list. ``fetch`` gets the id after which the page begins.

    That there is no more is believed only when the page after it brings nothing new. Raises
    ``InvalidResponse`` when the server says that there is more and does not give it.
    """
    seen: set[str] = set()
    after: str | None = None
    for _ in range(_MOST_PAGES):
        page = fetch(after)
        fresh = [each for each in page.ids if each not in seen]
        if not fresh:
            if page.more:
                break
            return
        seen.update(fresh)
        yield page
        after = page.ids[-1]
    raise InvalidResponse(
        "the list cannot be read to its end: the server says that there is more and repeats "
        "itself. Nothing follows from a part of a list",
        billed="no",
    )


class NewestFirst:
    """Notices when everything that is still to come was created before a moment.

    That holds only in a list which is seen to run from new to old, and in which every entry has
    its time.
    """

    def __init__(self, moment: datetime) -> None:
        self._moment = moment
        self._newest: datetime | None = None
        self._last: datetime | None = None
        self._descends = True

    def passed(self, times: Sequence[datetime | None]) -> bool:
        """True when, after a page of these times, no page can bring a later one."""
        for time in times:
            if time is None or (self._last is not None and time > self._last):
                self._descends = False
                return False
            self._newest = self._newest or time
            self._last = time
        known = [time for time in times if time is not None]
        if not self._descends or not known or self._newest is None or self._last is None:
            return False
        return self._newest > self._last and max(known) < self._moment
