"""Lists that come in pages, read to their end: from a part of a list nothing follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar

from embedcore.errors import InvalidResponse
from embedcore.provider.replies import BadReply

PAGE_SIZE: Final = 100
# 2,000 batches may be created per hour; no account has more than ten million of them.
_MOST_PAGES: Final = 100_000

Listed = TypeVar("Listed")
# What asks for a page; None for the first one.
Cursor: TypeAlias = str | int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Paging:
    """How a service lists.

    ``by``: a page begins after the last entry of the one before ("last"), has a number from 0
    ("number"), or a name that the page before tells ("token"). ``size``, ``cursor``: the parameters
    for how many entries and for which page. ``entries``: where a page has its list; ``following``:
    where it says that there are more (of "token", the name of the next page).
    """

    by: Literal["last", "number", "token"] = "last"
    size: str = "limit"
    cursor: str = "after"
    entries: str = "data"
    following: str = "has_more"

    def query(self, cursor: Cursor) -> dict[str, str]:
        """The parameters that ask for a page."""
        size = {self.size: str(PAGE_SIZE)}
        return size if cursor is None else {**size, self.cursor: str(cursor)}

    def after(self, document: Mapping[str, Any], ids: Sequence[str], cursor: Cursor) -> Cursor:
        """What asks for the page after this one, which was asked for with ``cursor``."""
        if self.by == "number":
            return int(cursor or 0) + 1
        if self.by == "last":
            return ids[-1] if ids else None
        following = document.get(self.following)
        return following if isinstance(following, str) and following else None


OPENAI: Final = Paging()


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[Listed]):
    """``ids``: of the entries that have one, in order. ``more``: the server says that there are
    more. ``next``: what asks for the page after this one; None: there is no way to ask for it."""

    entries: Sequence[Listed]
    ids: Sequence[str]
    more: bool
    next: Cursor = None


def page_of(
    document: dict[str, Any],
    read: Callable[[object], Listed | None],
    name: str,
    *,
    paging: Paging = OPENAI,
    cursor: Cursor = None,
    as_entry: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Page[Listed]:
    """A page with what ``read`` makes of its entries; those of which it makes None are left out.

    ``cursor``: what it was asked for with. ``as_entry``: puts an entry into OpenAI's form. An entry
    that is null, of another type or without an id takes nothing from the others. Raises
    ``BadReply`` for what is no list at all.
    """
    data = document.get(paging.entries)
    if data is None and paging.by == "token":
        # In the JSON of Protocol Buffers an empty list is left out.
        data = []
    if not isinstance(data, list):
        raise BadReply(f"it is not a list of {name}")
    if as_entry is not None:
        data = [as_entry(entry) if isinstance(entry, dict) else entry for entry in data]
    found = [entry.get("id") for entry in data if isinstance(entry, dict)]
    ids = [each for each in found if isinstance(each, str)]
    following = paging.after(document, ids, cursor)
    promised = following is not None if paging.by == "token" else document.get(paging.following)
    return Page(
        entries=[entry for entry in map(read, data) if entry is not None],
        ids=ids,
        more=promised is True,
        next=following,
    )


def all_pages(
    fetch: Callable[[Any], Page[Listed]], *, named: bool = False
) -> Iterator[Page[Listed]]:
    """Every page of a list. ``fetch`` gets what asks for a page, None for the first.

    That there is no more is believed only when the page after it brings nothing new, or of pages
    that are ``named`` when one names no other. Raises ``InvalidResponse`` when the server says that
    there is more and does not give it.
    """
    seen: set[str] = set()
    asked: set[Cursor] = set()
    cursor: Cursor = None
    for _ in range(_MOST_PAGES):
        page = fetch(cursor)
        fresh = [each for each in page.ids if each not in seen]
        if fresh or not page.ids:
            yield page
        cursor = page.next
        if cursor is None or not (fresh or named):
            if page.more:
                break
            return
        if cursor in asked:
            break
        asked.add(cursor)
        seen.update(fresh)
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

    @property
    def has_passed(self) -> bool:
        """Whether what follows the entries so far is older than the moment."""
        if not self._descends or self._newest is None or self._last is None:
            return False
        return self._newest > self._last and self._last < self._moment

    def see(self, time: datetime | None) -> None:
        """The time of the next entry."""
        if time is None or (self._last is not None and time > self._last):
            self._descends = False
        if time is not None:
            self._newest = self._newest or time
            self._last = time
