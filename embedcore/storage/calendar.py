"""Days and months of the budget, in UTC, and when they end."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Final, Literal, TypeAlias
from zoneinfo import ZoneInfo

from embedcore.errors import ConfigurationError, StorageCorrupt

Period: TypeAlias = Literal["day", "month", "total"]
PERIODS: Final[tuple[Period, ...]] = ("day", "month", "total")
MICROSECONDS: Final = 1_000_000


def as_datetime(microseconds: int) -> datetime:
    """A time of the ledger, in UTC."""
    return datetime.fromtimestamp(microseconds / MICROSECONDS, UTC)


@lru_cache(maxsize=64)
def zone_named(name: str) -> ZoneInfo:
    """The IANA zone of that name. Raises ``ConfigurationError`` if there is none."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise ConfigurationError(
            f"timezone = {name!r} is not an IANA time zone: use a name such as UTC or Europe/Berlin"
        ) from error


@lru_cache(maxsize=256)
def _local_date(second: int, zone: str) -> date:
    try:
        return datetime.fromtimestamp(second, tz=zone_named(zone)).date()
    except (ValueError, OverflowError, OSError) as error:
        raise StorageCorrupt(
            f"the ledger's clock stands at {second} seconds since 1970, which is no date: "
            "set it right with: embedcore budget clock --repair"
        ) from error


def window_start(period: Period, moment: int, zone: str) -> str:
    """The name of the window that holds ``moment`` (microseconds since 1970, UTC)."""
    if period == "total":
        return ""
    today = _local_date(moment // MICROSECONDS, zone)
    return today.isoformat() if period == "day" else today.isoformat()[:7]


def window_end(period: Period, moment: int, zone: str) -> datetime | None:
    """When the window that holds ``moment`` ends, in UTC; None for a limit in total.

    A midnight that a change of clocks skips counts as the moment of the change.
    """
    if period == "total":
        return None
    return _end(period, _local_date(moment // MICROSECONDS, zone), zone)


def day_ends(moment: int, zone: str) -> int:
    """The end of the day that holds ``moment``, in microseconds since 1970 as well."""
    ends = _end("day", _local_date(moment // MICROSECONDS, zone), zone)
    return round(ends.timestamp()) * MICROSECONDS


@lru_cache(maxsize=64)
def _end(period: Period, today: date, zone: str) -> datetime:
    if period == "day":
        following = today + timedelta(days=1)
    else:
        following = (today.replace(day=1) + timedelta(days=32)).replace(day=1)
    start = datetime(following.year, following.month, following.day, tzinfo=zone_named(zone))
    return start.astimezone(UTC)
