"""``embedcore batch resume``, ``cancel``, ``forget`` and ``gc``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from embedcore import money
from embedcore.assembly import create_embedder
from embedcore.choice import choose
from embedcore.cli.batch.records import Clients, drop_note, local_batch, local_batches
from embedcore.cli.batch.status import (
    change_text,
    code_of_all,
    fetch_command,
    report_fields,
    report_text,
    watch_command,
)
from embedcore.cli.process import OK, USAGE, code_of
from embedcore.cli.text import facts, one_line, plural
from embedcore.config import Config
from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.policy.batch.cleanup import forget, left_over
from embedcore.storage.calendar import MICROSECONDS

if TYPE_CHECKING:
    from embedcore.cli.batch.records import LocalBatches
    from embedcore.cli.screen import Screen
    from embedcore.policy.batch.report import BatchReport
    from embedcore.provider.protocol import BatchStrategy
    from embedcore.storage.batches import BatchRecord


def cancel_batch(screen: Screen, name: str, model: str | None) -> int:
    """``embedcore batch cancel``."""
    with local_batch(name) as (local, record), Clients(local=local, model=model) as clients:
        _require_open(local.report(record))
        report = clients.job(record).cancel()
    screen.json(report_fields(report))
    screen.result(report_text(report))
    if report.has_ended:
        screen.info(f"What was done by then: {fetch_command(name)} --partial")
    else:
        screen.info(f"What was done is still collected. Look on with:\n  {watch_command(name)}")
    return OK


def forget_batch(screen: Screen, name: str, model: str | None, *, yes: bool) -> int:
    """``embedcore batch forget``."""
    with local_batch(name) as (local, record), Clients(local=local, model=model) as clients:
        before = local.report(record)
        _require_open(before)
        if not _agreed(screen, _question(before), yes=yes):
            screen.error("Nothing was changed.")
            return USAGE
        report = clients.job(record).forget()
    screen.json(report_fields(report))
    screen.result(report_text(report))
    return OK


def _require_open(report: BatchReport) -> None:
    if report.has_ended:
        raise ConfigurationError(
            f"batch {report.id} has ended already ({report.state}): {fetch_command(report.id)}"
        )


def _question(report: BatchReport) -> str:
    texts = plural(report.texts - report.stored - report.failed, "text")
    then = ""
    if report.reserved_tokens:
        reserved = money.shown(report.reserved_cost)
        then = f" Of the {reserved} reserved for it, what may have been billed counts as spent."
    return f"Batch {report.id} would end with {texts} without a vector.{then}"


def _agreed(screen: Screen, question: str, *, yes: bool) -> bool:
    if yes:
        return True
    if not screen.interactive:
        raise click.UsageError(f"{question} Without a terminal to ask: add --yes")
    return screen.ask(f"{question} Go on?")


_LONGEST = 500


def resume_all(
    screen: Screen, *, model: str | None, resubmit_lost: str | None, resubmit_cancelled: str | None
) -> int:
    """The code of what a person must mend; 0 if there is nothing."""
    if resubmit_lost is not None:
        _pay_again(screen, resubmit_lost, model)
    if resubmit_cancelled is not None:
        _send_again(screen, resubmit_cancelled, model)
    with local_batches(Config.load()) as local:
        if local is None:
            screen.json({"batches": []})
            return OK
        return _resume(screen, local, model)


def _resume(screen: Screen, local: LocalBatches, model: str | None) -> int:
    before = {one.name: change_text(local.report(one)) for one in local.open}
    codes: list[int] = []
    with Clients(local=local, model=model) as clients:
        for record in _pools(local):
            try:
                problems = clients.of(record).resume_batches()
            except EmbeddingError as error:
                problems = [error]
            for problem in problems:
                codes.append(code_of(problem))
                screen.error(f"Error: {record.asked_as}: {one_line(str(problem), _LONGEST)}")
    reports = [local.report(local.named(name)) for name in before]
    for report in reports:
        if change_text(report) != before[report.id]:
            screen.info(change_text(report))
    screen.json({"batches": [report_fields(one) for one in reports]})
    return code_of_all(codes)


def _pools(local: LocalBatches) -> list[BatchRecord]:
    """One batch of each pool in which something may be due, also after its batches have ended."""
    newest = {record.pool: record for record in local.batches.all()}
    busy = {record.pool for record in local.open}
    return [
        record
        for pool, record in newest.items()
        if pool in busy or local.jobs.live(local.batches.pool_of(record))
    ]


def _pay_again(screen: Screen, name: str, model: str | None) -> None:
    with local_batch(name) as (local, record), Clients(local=local, model=model) as clients:
        if record.has_ended:
            note = local.note(record)
            files = "FILE" if note is None else " ".join(note.files)
            raise ConfigurationError(
                f"batch {name} has ended: embedcore batch submit {files} --resubmit-lost sends "
                "what it lost, and nothing else of it"
            )
        texts = clients.job(record).resubmit_lost()
    screen.info(
        f"{name}: what is lost is sent again, and paid for: {plural(texts, 'text')} now, and those "
        "of jobs that are gone as soon as these are looked at"
    )


def _send_again(screen: Screen, name: str, model: str | None) -> None:
    with local_batch(name) as (local, record), Clients(local=local, model=model) as clients:
        if record.has_ended:
            note = local.note(record)
            files = "FILE" if note is None else " ".join(note.files)
            raise ConfigurationError(
                f"batch {name} has ended: embedcore batch submit {files} submits what is missing"
            )
        texts = clients.job(record).resubmit_cancelled()
    screen.info(f"{name}: {plural(texts, 'text')} whose job was cancelled will be sent again")


# A file may be uploaded long before its job is created, and a batch be prepared for a day.
_SAFE: Final = timedelta(days=2)
_DAY_SECONDS: Final = 86_400
_LONGEST_LIST: Final = 500


@dataclass(kw_only=True)
class Garbage:
    """What goes, or would go.

    ``remote``: input files at providers. ``batches``: ids of old batches. ``files``: paths here
    that no batch has. ``parts``: remote jobs that ended, of which only the state file knows.
    """

    remote: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.remote or self.batches or self.files)

    def text(self, *, dry_run: bool) -> str:
        """For a person."""
        if not self:
            return "there is nothing to delete"
        lines = [
            ("input files at the provider", self.remote),
            ("old batches", self.batches),
            ("files of no batch", [str(path) for path in self.files]),
        ]
        verb = "would be deleted" if dry_run else "deleted"
        shown = [(name, f"{len(found):,} {verb}") for name, found in lines if found]
        listed = [f"  {one}" for _, found in lines for one in found] if dry_run else []
        return "\n".join([facts(shown), *listed])


def collect_garbage(
    screen: Screen, *, older_than: float | None, dry_run: bool, model: str | None
) -> int:
    """``embedcore batch gc``. The code of the first thing that could not be looked at.

    ``older_than``: seconds since the end of a batch, instead of ``keep_days``.
    """
    config, found = Config.load(), Garbage()
    with local_batches(config) as local:
        for strategy, needed in _strategies(screen, config, local, model, found):
            try:
                _remote(strategy, needed, found, dry_run=dry_run)
            except EmbeddingError as error:
                _note(screen, error, found)
        if local is not None:
            _clean_up(local, found, older_than=older_than, dry_run=dry_run)
    screen.json(
        {
            "dry_run": dry_run,
            "remote_files": found.remote,
            "batches": found.batches,
            "local_files": [str(path) for path in found.files],
        }
    )
    if found or not found.codes:
        screen.report(found.text(dry_run=dry_run), failed=dry_run or bool(found.codes))
    return next(iter(found.codes), OK)


def _strategies(
    screen: Screen, config: Config, local: LocalBatches | None, model: str | None, found: Garbage
) -> Iterator[tuple[BatchStrategy, frozenset[str]]]:
    """Each account's strategy once, with the inputs that jobs of ours still need."""
    seen: set[tuple[str, str, str]] = set()
    needed: frozenset[str] = frozenset()
    if local is not None:
        newest = {record.pool: record for record in local.batches.all()}
        pools = {number: local.batches.pool_of(record) for number, record in newest.items()}
        live = (part for pool in pools.values() for part in local.jobs.live(pool))
        needed = frozenset(part.input for part in live if part.input is not None)
        with Clients(local=local, model=model) as clients:
            for number, record in newest.items():
                pool = pools[number]
                account = (pool.model.partition(":")[0], pool.endpoint, pool.account)
                if account in seen:
                    continue
                seen.add(account)
                try:
                    strategy = clients.job(record).open_context().strategy
                except EmbeddingError as error:
                    _note(screen, error, found)
                    continue
                yield strategy, needed
    yield from _of_settings(config, model, seen, needed)


def _of_settings(
    config: Config, model: str | None, seen: set[tuple[str, str, str]], needed: frozenset[str]
) -> Iterator[tuple[BatchStrategy, frozenset[str]]]:
    """The account that the settings name, though no batch of it is written down here."""
    choice = choose(model, config=config, scope=None, options={})
    embedder, *_ = create_embedder(choice)
    with closing(embedder):
        info, strategy = embedder.info, embedder.batch
        if strategy is None or not strategy.limits.offered:
            return
        if (info.provider, info.endpoint, info.account) not in seen:
            yield strategy, needed


def _remote(
    strategy: BatchStrategy, needed: frozenset[str], found: Garbage, *, dry_run: bool
) -> None:
    for file in strategy.orphans(before=datetime.now(UTC) - _SAFE):
        if file in needed:
            continue
        if not dry_run:
            strategy.discard(file)
        found.remote.append(file)


def _clean_up(
    local: LocalBatches, found: Garbage, *, older_than: float | None, dry_run: bool
) -> None:
    if older_than is None:
        older_than = local.config.batch.keep_days * _DAY_SECONDS
    over, before = local.batches.over(round(older_than * MICROSECONDS))
    for record in over:
        found.batches.append(record.name)
        if not dry_run:
            forget(local, record)
            drop_note(local.folder, record.name)
    if not dry_run:
        local.jobs.forget(before)
    gone = set(found.batches)
    for path in left_over(local.folder, lambda name: name in gone or local.batches.is_known(name)):
        found.files.append(path)
        if not dry_run:
            path.unlink(missing_ok=True)


def _note(screen: Screen, error: EmbeddingError, found: Garbage) -> None:
    screen.error(f"Error: {one_line(str(error), _LONGEST_LIST)}")
    found.codes.append(code_of(error))
