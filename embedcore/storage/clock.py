"""What time is it for the books? Never earlier than it was before, and always in one zone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from embedcore.errors import ConfigurationError
from embedcore.storage.calendar import MICROSECONDS, zone_named
from embedcore.storage.windows import Moment

if TYPE_CHECKING:
    import sqlite3

_GRAIN: Final = MICROSECONDS // 10


def moment(connection: sqlite3.Connection, real: int, wanted_zone: str | None) -> Moment:
    """The latest time ever seen, ``real`` included; in the zone that the file was first used with.

    Raises ``ConfigurationError`` if ``wanted_zone`` is another one.
    """
    row = connection.execute("SELECT clock, zone FROM book").fetchone()
    if row is None:
        zone = wanted_zone or "UTC"
        zone_named(zone)
        connection.execute("INSERT INTO book (id, zone, clock) VALUES (1, ?, ?)", (zone, real))
        return Moment(now=real, zone=zone)
    latest, zone = row
    if wanted_zone not in (None, zone):
        raise ConfigurationError(
            f"timezone = {wanted_zone!r}, but the ledger has counted its days in {zone!r} since "
            f"its first use: set timezone = {zone!r}, or use another EMBEDCORE_HOME"
        )
    if real > latest + _GRAIN:
        connection.execute("UPDATE book SET clock = ?", (real,))
    return Moment(now=max(real, latest), zone=zone)


def set_back(connection: sqlite3.Connection, now: int, *, lease: int, attempt_lease: int) -> None:
    """Make ``now`` the latest time seen. Leases from the future end as if taken now.

    Otherwise what a crash left open would stay held, and what a batch has to do put off, until the
    time of the wrong clock.
    """
    connection.execute("UPDATE book SET clock = ?, tight_until = 0", (now,))
    connection.execute('UPDATE "grant" SET lease = min(lease, ?)', (now + lease,))
    connection.execute(
        "UPDATE attempt SET lease = min(lease, ?) WHERE state = 'sent'", (now + attempt_lease,)
    )
    connection.execute(
        "UPDATE part SET next = min(next, ?1), not_before = min(not_before, ?1), "
        "asked = min(asked, ?1), since = min(since, ?1), lease = min(lease, ?1)",
        (now,),
    )
    connection.execute("UPDATE batch SET retry = min(retry, ?)", (now,))
    connection.execute("UPDATE pool SET queue_until = min(queue_until, ?)", (now,))
