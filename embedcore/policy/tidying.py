"""What nobody needs any more of batches, here and at the provider."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Final

from embedcore.policy.batchoffice import DAY_SECONDS
from embedcore.policy.parts import PartWork
from embedcore.storage.calendar import MICROSECONDS

if TYPE_CHECKING:
    from embedcore.errors import EmbeddingError
    from embedcore.policy.batchoffice import BatchOffice
    from embedcore.storage.batchrecords import BatchRecord

logger = logging.getLogger("embedcore")

_FILE: Final = re.compile(r"(\d{8}-[0-9a-f]{8})\.(?:db|db-wal|db-shm|db-journal|json|digests)")


def tidy(office: BatchOffice) -> list[EmbeddingError]:
    """Do what is due for parts of the pool that no batch waits for any more."""
    work = PartWork(office)
    for part in office.jobs.live(office.pool):
        if part.state in ("lost", "stray") or not office.jobs.is_wanted(part):
            work.work(part)
    return work.problems


def forget(office: BatchOffice, batch: BatchRecord) -> None:
    """Leave nothing of a batch behind: no record, no texts. Jobs of it that run are not stopped."""
    office.batches.drop(batch)
    office.manifest(batch).delete()


def sweep(office: BatchOffice) -> int:
    """Forget batches that ended ``keep_days`` ago, and what a crash left of unfinished ones.

    Returns how many batches and files that were. Needs no network.
    """
    before = office.jobs.now() - round(office.settings.keep_days * DAY_SECONDS * MICROSECONDS)
    gone = 0
    for batch in (*office.batches.unfinished(), *office.batches.ended_before(before)):
        forget(office, batch)
        gone += 1
    office.jobs.forget(before)
    return gone + _sweep_files(office)


def _sweep_files(office: BatchOffice) -> int:
    if not office.folder.is_dir():
        return 0
    gone = 0
    for path in office.folder.iterdir():
        name = _FILE.fullmatch(path.name)
        # A new one may be about to get its record from another process.
        if (
            name is not None
            and time.time() - path.stat().st_mtime > DAY_SECONDS
            and not office.batches.is_known(name[1])
        ):
            path.unlink(missing_ok=True)
            gone += 1
    return gone
