"""Are the books where they should be, sound, private, and on time?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from embedcore.assembly import STATE_FILE, open_ledger
from embedcore.cli.budget import CLOCK_TOLERANCE_SECONDS
from embedcore.cli.checks import Finding, Level
from embedcore.cli.text import dollars, duration, one_line
from embedcore.config import Config
from embedcore.configfile import state_folder
from embedcore.storage.batches import Batches
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.engine import SPENDING, driver, engine_version, wal_is_safe
from embedcore.storage.inspection import faults
from embedcore.storage.jobs import Jobs
from embedcore.storage.rates import named_rates

if TYPE_CHECKING:
    from embedcore.storage.database import Database
    from embedcore.storage.ledger import Ledger

_LONGEST: Final = 300
_MOST_FAULTS: Final = 20


def state(config: Config) -> Iterator[Finding]:
    """SQLite and the state file."""
    engine, name = engine_version(), driver().__name__
    yield _finding("SQLite", f"{engine} ({name})")
    if not wal_is_safe(engine):
        yield _finding(
            "journal",
            "TRUNCATE instead of WAL, correct but slower: this SQLite can corrupt a WAL file that "
            "several processes write (mended in 3.51.3); pip install pysqlite3 brings a newer one",
            "note",
        )
    folder = state_folder(config)
    path = folder / STATE_FILE
    yield _finding("folder", str(folder))
    if not path.exists():
        yield _finding("state file", "none yet: nothing was spent from here")
        return
    yield from _who_may_read(path)
    limits = config.limits(config.profile(None), config.scope)
    ledger = open_ledger(config, limits, compare=False)
    with closing(ledger.database):
        yield _finding("state file", f"{path}, journal {ledger.database.journal_mode}")
        yield from _books(ledger.database)
        moment = ledger.moment()
        yield from _clock(moment.now / MICROSECONDS, moment.zone)
        yield from _batches(ledger)
        yield from _rates(ledger)


def _books(database: Database) -> Iterator[Finding]:
    """Whether everything in the file agrees with everything else."""
    found = faults(database)
    for fault in [*map(str, found.counters), *found.others][:_MOST_FAULTS]:
        yield _finding("books", one_line(fault, _LONGEST), "problem")
    more = len(found.counters) + len(found.others) - _MOST_FAULTS
    if more > 0:
        yield _finding("books", f"and {more:,} more", "problem")
    if found.counters:
        yield _finding(
            "remedy",
            "embedcore budget recount --repair sets the counters to what the entries add up to, "
            "on the record; or restore a copy",
            "note",
        )
    if found.others:
        yield _finding(
            "remedy",
            f"an entry was altered or lost: restore a copy of {database.path}, or delete it while "
            f"no program uses it, to start with {SPENDING.without}",
            "note",
        )
    if not found.counters and not found.others:
        yield _finding("books", "counters and entries agree")


def _rates(ledger: Ledger) -> Iterator[Finding]:
    for one in named_rates(ledger.database):
        parts = [
            f"{number:,} {what}"
            for number, what in (
                (one.requests_per_minute, "requests"),
                (one.tokens_per_minute, "tokens"),
            )
            if number is not None
        ]
        day = datetime.fromtimestamp(one.named, UTC).date()
        yield Finding(
            section="rate limits",
            name=one.model,
            value=f"{' and '.join(parts) or 'none'} per minute, as {one.endpoint} said on {day}",
            level="ok",
        )


def _batches(ledger: Ledger) -> Iterator[Finding]:
    """Those that are open: what is held for them, and what they wait for."""
    jobs = Jobs(ledger)
    found = [record for record in Batches(ledger).all() if not record.has_ended]
    if not found:
        return
    held = sum(jobs.spent(record).held.cost for record in found)
    yield _finding(
        "batches",
        f"{len(found):,} open, {dollars(held)} held for them: embedcore batch status --watch, or "
        "embedcore batch resume in a cron job, goes on with them",
    )
    for record in found:
        troubles = [part.trouble for part in jobs.of_batch(record) if part.trouble]
        for why in dict.fromkeys([*filter(None, [record.blocked]), *troubles]):
            yield _finding(record.name, one_line(why, _LONGEST), "note")


def _who_may_read(path: Path) -> Iterator[Finding]:
    if os.name == "posix" and path.stat().st_mode & 0o077:
        yield _finding("state file", f"{path} can be read by others: chmod 600 {path}", "problem")


def _clock(books: float, zone: str) -> Iterator[Finding]:
    ahead = books - time.time()
    if ahead > CLOCK_TOLERANCE_SECONDS:
        yield _finding(
            "clock",
            f"the books are {duration(ahead)} ahead of this computer: everything is counted there. "
            "If this computer is right: embedcore budget clock --repair",
            "problem",
        )
    else:
        yield _finding("clock", f"right; days begin at midnight in {zone}")


def _finding(name: str, value: str, level: Level = "ok") -> Finding:
    return Finding(section="state", name=name, value=value, level=level)
