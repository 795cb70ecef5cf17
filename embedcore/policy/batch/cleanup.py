"""Deletes what no batch needs any more, here and at the provider."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Final

from embedcore.policy.batch.context import DAY_SECONDS, contexts_of
from embedcore.policy.batch.part import PartWorker
from embedcore.storage.calendar import MICROSECONDS

if TYPE_CHECKING:
    from embedcore.errors import EmbeddingError
    from embedcore.policy.batch.context import BatchContext
    from embedcore.storage.batches import BatchRecord
    from embedcore.storage.manifest import Manifest


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


def deliver(context: BatchContext, batch: BatchRecord) -> int:
    """The output of a batch is complete: its vectors that are kept beyond the cap go, save those
    that other batches count on. Returns how many."""
    context.batches.deliver(batch)
    return _let_go(context, batch)


def forget(context: BatchContext, batch: BatchRecord) -> None:
    """Delete the batch's record, its texts, and its vectors beyond the cap. Parts of it that run
    are not stopped."""
    _let_go(context, batch)
    context.batches.drop(batch)
    context.manifest(batch).delete()


def _let_go(context: BatchContext, batch: BatchRecord) -> int:
    if context.store.path.parent != context.folder.parent:
        # Batches of other state folders, of which nothing is known here, may count on them.
        return 0
    with ExitStack() as opened:
        others: dict[str, tuple[Manifest, set[bytes]]] = {}

        def needed(keys: Sequence[bytes]) -> set[bytes]:
            found: set[bytes] = set()
            for name in context.batches.counting(batch):
                if name not in others:
                    if not (path := context.folder / f"{name}.db").exists():
                        continue
                    manifest = opened.enter_context(closing(context.manifest_at(path)))
                    others[name] = manifest, manifest.sent_keys()
                manifest, sent = others[name]
                found |= manifest.among(keys) | sent.intersection(keys)
            return found

        mine = opened.enter_context(closing(context.manifest(batch)))
        if not mine.path.exists():
            return 0
        return context.store.let_go(mine.keys(), needed)


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
