"""Deletes what no batch needs any more, here and at the provider."""

from __future__ import annotations

import logging
import re
import time
from typing import TYPE_CHECKING, Final

from embedcore.policy.batch.context import DAY_SECONDS, contexts_of
from embedcore.policy.batch.part import PartWorker
from embedcore.storage.calendar import MICROSECONDS

if TYPE_CHECKING:
    from embedcore.errors import EmbeddingError
    from embedcore.policy.batch.context import BatchContext
    from embedcore.storage.batches import BatchRecord


logger = logging.getLogger("embedcore")

_FILE: Final = re.compile(r"(\d{8}-[0-9a-f]{8})\.(?:db|db-wal|db-shm|db-journal|json|digests)")


def tidy(context: BatchContext) -> list[EmbeddingError]:
    """Do what is due for parts that no batch waits for any more, of earlier fingerprints too."""
    problems: list[EmbeddingError] = []
    for one in contexts_of(context):
        work, now = PartWorker(one), one.jobs.now()
        for part in one.jobs.live(one.pool):
            if part.state in ("lost", "stray") or not one.jobs.is_wanted(part):
                work.work(part, now)
        problems += work.problems
    return problems


def forget(context: BatchContext, batch: BatchRecord) -> None:
    """Delete the batch's record and texts. Parts of it that run are not stopped."""
    context.batches.drop(batch)
    context.manifest(batch).delete()


def sweep(context: BatchContext) -> int:
    """Forget batches that ended ``keep_days`` ago, and what a crash left of unfinished ones.

    Returns how many batches and files that were. Needs no network.
    """
    keep = round(context.settings.keep_days * DAY_SECONDS * MICROSECONDS)
    over, before = context.batches.over(keep)
    for batch in over:
        forget(context, batch)
    context.jobs.forget(before)
    return len(over) + _sweep_files(context)


def _sweep_files(context: BatchContext) -> int:
    if not context.folder.is_dir():
        return 0
    gone = 0
    for path in context.folder.iterdir():
        name = _FILE.fullmatch(path.name)
        # A new one may be about to get its record from another process.
        if (
            name is not None
            and time.time() - path.stat().st_mtime > DAY_SECONDS
            and not context.batches.is_known(name[1])
        ):
            path.unlink(missing_ok=True)
            gone += 1
    return gone
