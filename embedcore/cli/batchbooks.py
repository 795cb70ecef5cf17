"""Which batches are written down in the state folder, and which client goes on with each?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self, cast

from embedcore.assembly import BATCHES_FOLDER, STATE_FILE, open_ledger
from embedcore.cli.batchnotes import Note, read_note
from embedcore.client import EmbeddingClient
from embedcore.config import Config
from embedcore.configfile import state_folder
from embedcore.errors import ConfigurationError, StorageError
from embedcore.policy.batchreport import BatchReport, report_of
from embedcore.storage.batches import Batches
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.jobs import Jobs

if TYPE_CHECKING:
    from types import TracebackType

    from embedcore.events import Observer
    from embedcore.policy.batchjob import BatchJob
    from embedcore.policy.batchoffice import BatchOffice
    from embedcore.storage.batchrecords import BatchRecord, Pool
    from embedcore.storage.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class BatchBooks:
    """Everything that is written down of batches, of every model and scope."""

    config: Config
    ledger: Ledger

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.ledger)

    @cached_property
    def jobs(self) -> Jobs:
        return Jobs(self.ledger)

    @property
    def folder(self) -> Path:
        """Where the files of batches are."""
        return state_folder(self.config) / BATCHES_FOLDER

    @property
    def open(self) -> list[BatchRecord]:
        """Those that have not ended, oldest first."""
        return [record for record in self.batches.all() if not record.has_ended]

    def named(self, name: str) -> BatchRecord:
        """Raises ``ConfigurationError`` if there is none."""
        record = self.batches.named(name)
        if record is None:
            raise _no_such_batch(name)
        return record

    def report(self, record: BatchRecord) -> BatchReport:
        """How a batch stands, without network and whatever the settings are now."""
        books = _Reading(batches=self.batches, jobs=self.jobs, pool=self.batches.pool_of(record))
        # Of an office it needs what is written down, and no provider.
        return report_of(cast("BatchOffice", books), self.batches.again(record))

    def reasons(self, record: BatchRecord) -> Counter[str]:
        """Why texts of it failed, and how many for each reason."""
        return Counter(self.batches.reasons(record).values())

    def next_try(self, record: BatchRecord) -> datetime | None:
        """Before when nothing is asked again after an error; None if nothing waits for that."""
        now = self.jobs.now()
        parts = self.jobs.of_batch(record)
        waits = [
            one.next for one in parts if one.trouble and one.state != "done" and one.next > now
        ]
        return datetime.fromtimestamp(min(waits) / MICROSECONDS, UTC) if waits else None

    def note(self, record: BatchRecord) -> Note | None:
        return read_note(self.folder, record.name)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    batches: Batches
    jobs: Jobs
    pool: Pool


@contextmanager
def batch_books(config: Config) -> Iterator[BatchBooks | None]:
    """The books of the state folder; None if there are none yet. Creates nothing."""
    if not (state_folder(config) / STATE_FILE).exists():
        yield None
        return
    ledger = open_ledger(config, ())
    with closing(ledger.database):
        if ledger.database.path is None:
            raise StorageError("the batches cannot be read: see the warning above")
        yield BatchBooks(config=config, ledger=ledger)


@contextmanager
def books_of(name: str) -> Iterator[tuple[BatchBooks, BatchRecord]]:
    """The books, and the batch of that name in them. Raises ``ConfigurationError``."""
    with batch_books(Config.load()) as books:
        if books is None:
            raise _no_such_batch(name)
        yield books, books.named(name)


@dataclass(kw_only=True)
class Clients:
    """Clients like those that submitted the batches, made of the settings as they are now.

    ``model``: the profile or model to use instead of looking for one. Use as a context manager.
    """

    books: BatchBooks
    model: str | None = None
    observers: Sequence[Observer] = ()
    _clients: dict[int, EmbeddingClient] = field(default_factory=dict)

    def job(self, record: BatchRecord) -> BatchJob:
        """The batch, to be gone on with. Raises ``ConfigurationError`` if the settings do not give
        a client of the same model, options, endpoint and account."""
        return self.of(record).batch_job(record.name)

    def of(self, record: BatchRecord) -> EmbeddingClient:
        """The client for a batch, and for all others of its pool."""
        client = self._clients.get(record.pool)
        if client is None:
            client = self._clients[record.pool] = self._found(record)
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for client in self._clients.values():
            client.close()

    def _found(self, record: BatchRecord) -> EmbeddingClient:
        pool, note = self.books.batches.pool_of(record), self.books.note(record)
        first: ConfigurationError | None = None
        for name in self._names(record, note):
            try:
                return self._made(name, pool, record, note)
            except ConfigurationError as error:
                first = first or error
        assert first is not None  # noqa: S101 - there is always a name
        raise first

    def _names(self, record: BatchRecord, note: Note | None) -> list[str | None]:
        """What may stand for the model: how it was named, itself, and every profile."""
        if self.model is not None:
            return [self.model]
        named = [] if note is None else [note.model]
        return list(dict.fromkeys([*named, record.asked_as, None, *self.books.config.profiles]))

    def _made(
        self, name: str | None, pool: Pool, record: BatchRecord, note: Note | None
    ) -> EmbeddingClient:
        client = EmbeddingClient(
            name, config=self.books.config, scope=pool.scope, observers=self.observers
        )
        try:
            _require_same(client, pool, record, note)
        except BaseException:
            client.close()
            raise
        return client


def _require_same(
    client: EmbeddingClient, pool: Pool, record: BatchRecord, note: Note | None
) -> None:
    info, mine = client.info, client.fingerprint
    if client.made_before(pool.fingerprint):
        mine = pool.fingerprint
    for what, theirs, ours in (
        ("model", pool.model, f"{info.provider}:{info.model}"),
        ("endpoint", pool.endpoint, info.endpoint),
        ("account", pool.account, info.account),
        ("options (fingerprint)", pool.fingerprint, mine),
    ):
        if theirs != ours:
            where = f", in {note.folder}" if note is not None else ""
            raise ConfigurationError(
                f"batch {record.name} was submitted with {what} {theirs!r}{where}, and the "
                f"settings here give {ours!r}: use those it was submitted with, or name their "
                "profile with -m"
            )


def _no_such_batch(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"there is no batch {name!r} in this state folder: embedcore batch list --all shows them"
    )
