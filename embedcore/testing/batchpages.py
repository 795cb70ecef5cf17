"""Which entries does a page of the fake's lists show?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from embedcore.testing.api import ApiError
from embedcore.testing.batchfiles import StoredFile
from embedcore.testing.batchjobs import Job
from embedcore.testing.batchsettings import Listing

Entry = TypeVar("Entry", Job, StoredFile)


def visible(jobs: Iterable[Job], listing: Listing, after: str | None, now: float) -> list[Job]:
    """The jobs a list knows of by now, newest first. A first page counts as one listing."""
    shown = []
    for job in jobs:
        there = job.listings >= listing.lag_listings
        if there and now - job.created_at >= listing.lag_seconds and not job.gone:
            shown.append(job)
        job.listings += after is None
    return shown[::-1]


def page(
    entries: Sequence[Entry],
    describe: Callable[[Entry], dict[str, object]],
    *,
    after: str | None,
    limit: int,
    has_more: bool | None = None,
) -> dict[str, object]:
    """``limit`` entries behind the one called ``after``; ``has_more`` overrides the truth."""
    start = 0
    if after is not None:
        places = [place for place, entry in enumerate(entries) if entry.id == after]
        if not places:
            raise ApiError(400, f"No entry found with id '{after}'.", param="after")
        start = places[0] + 1
    data = [describe(entry) for entry in entries[start : start + limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": start + limit < len(entries) if has_more is None else has_more,
    }
