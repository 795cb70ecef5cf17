"""Deletes what no batch needs any more, here and at the provider."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from embedcore.policy.batch.context import DAY_SECONDS, contexts_of
from embedcore.policy.batch.part import PartWorker
from embedcore.storage.calendar import MICROSECONDS

if TYPE_CHECKING:
    from embedcore.errors import EmbeddingError
    from embedcore.policy.batch.context import BatchContext
    from embedcore.storage.batches import Batches, BatchRecord
    from embedcore.storage.manifest import Manifest
    from embedcore.storage.vectors import VectorStore


logger = logging.getLogger("embedcore")

_FILE: Final = re.compile(r"(\d{8}-[0-9a-f]{8})\.(?:db|db-wal|db-shm|db-journal|json|digests)")


class Place(Protocol):
    """Where what is kept of batches lies: a ``BatchContext``, or what needs no provider."""

    @property
    def batches(self) -> Batches: ...

    @property
    def store(self) -> VectorStore: ...

    @property
    def folder(self) -> Path: ...

    def manifest(self, batch: BatchRecord) -> Manifest: ...

    def manifest_at(self, path: Path) -> Manifest: ...


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


def deliver(place: Place, batch: BatchRecord) -> int:
    """The output of a batch is complete: its vectors that are kept beyond the cap go, save those
    that other batches count on. Returns how many."""
    place.batches.deliver(batch)
    return _let_go(place, batch)


def forget(place: Place, batch: BatchRecord) -> None:
    """Delete the batch's record, its texts, and its vectors beyond the cap. Parts of it that run
    are not stopped."""
    _let_go(place, batch)
    place.batches.drop(batch)
    place.manifest(batch).delete()


def _let_go(place: Place, batch: BatchRecord) -> int:
    if place.store.path.parent != place.folder.parent:
        # Batches of other state folders, of which nothing is known here, may count on them.
        return 0
    with ExitStack() as opened:
        others: dict[str, tuple[Manifest, set[bytes]]] = {}

        def needed(keys: Sequence[bytes]) -> set[bytes]:
            found: set[bytes] = set()
            for name in place.batches.counting(batch):
                if name not in others:
                    if not (path := place.folder / f"{name}.db").exists():
                        continue
                    manifest = opened.enter_context(closing(place.manifest_at(path)))
                    others[name] = manifest, manifest.sent_keys()
                manifest, sent = others[name]
                found |= manifest.among(keys) | sent.intersection(keys)
            return found

        mine = opened.enter_context(closing(place.manifest(batch)))
        if not mine.path.exists():
            return 0
        return place.store.let_go(mine.keys(), needed)


def sweep(context: BatchContext) -> int:
    """Forget batches that ended ``keep_days`` ago, and what a crash left of unfinished ones.

    Returns how many batches and files that were. Needs no network.
    """
    keep = round(context.settings.keep_days * DAY_SECONDS * MICROSECONDS)
    over, before = context.batches.over(keep)
    for batch in over:
        forget(context, batch)
    context.jobs.forget(before)
    found = list(left_over(context.folder, context.batches.is_known))
    for path in found:
        path.unlink(missing_ok=True)
    return len(over) + len(found)


def left_over(folder: Path, is_known: Callable[[str], bool]) -> Iterator[Path]:
    """Files of batches that there are not, all of them a day old."""
    if not folder.is_dir():
        return
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if found := _FILE.fullmatch(path.name):
            groups.setdefault(found[1], []).append(path)
    for name, paths in groups.items():
        try:
            newest = max(path.stat().st_mtime for path in paths)
        except FileNotFoundError:
            # In use at this moment: the last process to close it deletes what SQLite keeps.
            continue
        # A new one may be about to get its record from another process.
        if time.time() - newest > DAY_SECONDS and not is_known(name):
            yield from paths
