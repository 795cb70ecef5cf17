"""Batches of the state folder, and what is remembered of their files.

``<id>.json`` says where the rows came from, ``<id>.digests`` has the SHA-256 of each row's text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, cast

from embedcore.assembly import BATCHES_FOLDER, STATE_FILE, open_ledger, vector_store
from embedcore.client import EmbeddingClient
from embedcore.config import Config, state_folder
from embedcore.errors import ConfigurationError, InputRejected, StorageError
from embedcore.files.disk import replacing, storage_errors
from embedcore.files.inputs import STDIN, Inputs
from embedcore.files.scan import Scan, scan
from embedcore.files.types import Columns
from embedcore.policy.batch.report import BatchReport, report_of
from embedcore.settings import DEFAULTS
from embedcore.storage.batches import Batches
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.manifest import Manifest
from embedcore.storage.parts import Parts
from embedcore.storage.standing import standing

if TYPE_CHECKING:
    from embedcore.events import Observer
    from embedcore.files.types import InputFormat, Row
    from embedcore.policy.batch.context import BatchContext
    from embedcore.policy.batch.job import BatchJob
    from embedcore.storage.batches import BatchAccount, BatchRecord
    from embedcore.storage.ledger import Ledger
    from embedcore.storage.vectors import VectorStore


ENDINGS: Final = (".json", ".digests")

_log = logging.getLogger("embedcore")


@dataclass(frozen=True, kw_only=True)
class Note:
    """How a batch was submitted.

    - ``model``: as it was named on the command line. ``folder``: where the command was run.
    - ``files``: absolute paths, "-" for standard input. ``text`` to ``input_format``: how they are
      read. ``input_type``: as it was asked for.
    - ``rows``: how many; ``texts``, ``ids``: SHA-256 of all of them, to see whether they changed.
    """

    model: str | None
    folder: str
    files: tuple[str, ...]
    text: str
    id: str | None
    keep: tuple[str, ...]
    input_format: InputFormat | None
    input_type: str | None
    rows: int
    texts: str
    ids: str

    @property
    def columns(self) -> Columns:
        return Columns(text=self.text, id=self.id, keep=self.keep)


class CountedInputs(Inputs):
    """Inputs that know, once they were read to the end, what their ids were. ``ids``: SHA-256."""

    ids = ""

    def rows(self) -> Iterator[Row]:
        digest = hashlib.sha256()
        for row in super().rows():
            digest.update(json.dumps(row.id).encode())
            yield row
        self.ids = digest.hexdigest()


def digest_of(found: Scan) -> str:
    """One digest for the texts of all rows in their order."""
    return hashlib.sha256(found.raw).hexdigest()


def absolute(files: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Paths that mean the same in another folder."""
    return tuple(STDIN if str(one) == STDIN else str(Path(one).absolute()) for one in files)


def write_note(folder: Path, name: str, note: Note, digests: bytes) -> None:
    """Remember it beside the batch's own file. Raises ``StorageError``."""
    path = folder / f"{name}.json"
    with storage_errors(path), replacing(*_paths(folder, name)) as (text, hashes):
        for file in (text, hashes):
            if os.name == "posix":
                os.fchmod(file.fileno(), 0o600)
        # ASCII escapes carry the bytes of a path that is not Unicode.
        text.write(json.dumps(asdict(note), indent=1).encode())
        hashes.write(digests)


def read_note(folder: Path, name: str) -> Note | None:
    """None if there is none, as for a batch that a program submitted, or if it is damaged."""
    path = folder / f"{name}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        known = {one.name: found[one.name] for one in fields(Note)}
        return Note(**{**known, "files": tuple(known["files"]), "keep": tuple(known["keep"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        _log.warning("%s cannot be used: %s", path, error)
        return None


def read_digests(folder: Path, name: str, rows: int) -> bytes:
    """32 bytes for each row; zeros, which no text has, where they are not known."""
    try:
        found = (folder / f"{name}.digests").read_bytes()
    except OSError:
        found = b""
    return found if len(found) == rows * 32 else bytes(rows * 32)


def drop_note(folder: Path, name: str) -> None:
    """Gone already is fine."""
    for path in _paths(folder, name):
        path.unlink(missing_ok=True)


@contextmanager
def same_files(note: Note, files: Sequence[Path] = ()) -> Iterator[tuple[Inputs, Scan] | str]:
    """The rows as they were submitted, or why they cannot be had any more.

    ``files``: where they are now, if they were moved.
    """
    places = absolute(files) or note.files
    missing = [one for one in places if one == STDIN or not Path(one).is_file()]
    if missing:
        gone = "standard input" if missing[0] == STDIN else missing[0]
        yield f"{gone} is not there any more"
        return
    with CountedInputs(places, columns=note.columns, input_format=note.input_format) as inputs:
        try:
            found = scan(inputs, on_empty="keep")
        except (ConfigurationError, InputRejected) as error:
            yield f"what was submitted has changed since: {error}"
            return
        if (digest_of(found), inputs.ids) != (note.texts, note.ids):
            names = ", ".join(places)
            yield (
                f"{names} changed since it was submitted"
                if len(places) == 1
                else (f"one of {names} changed since they were submitted")
            )
            return
        yield inputs, found


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}{ending}" for ending in ENDINGS]


@dataclass(frozen=True, kw_only=True)
class LocalBatches:
    """Everything that is written down of batches, of every model and scope."""

    config: Config
    ledger: Ledger

    @cached_property
    def batches(self) -> Batches:
        return Batches(self.ledger)

    @cached_property
    def jobs(self) -> Parts:
        return Parts(self.ledger)

    @property
    def folder(self) -> Path:
        """Where the files of batches are."""
        return state_folder(self.config) / BATCHES_FOLDER

    @cached_property
    def store(self) -> VectorStore:
        """The vectors of this state folder. What another ``cache_dir`` has may be others'."""
        return vector_store(self.config, DEFAULTS)

    def manifest(self, batch: BatchRecord) -> Manifest:
        """The file of a batch; the caller closes it."""
        return self.manifest_at(self.folder / f"{batch.name}.db")

    def manifest_at(self, path: Path) -> Manifest:
        return Manifest(path, allow_network_filesystem=self.config.allow_network_filesystem)

    def close(self) -> None:
        if "store" in vars(self):
            self.store.close()

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
        context = _Reading(batches=self.batches, jobs=self.jobs, pool=self.batches.pool_of(record))
        # Of an context it needs what is written down, and no provider.
        return report_of(cast("BatchContext", context), standing(self.batches.ledger, record))

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
    jobs: Parts
    pool: BatchAccount


@contextmanager
def local_batches(config: Config) -> Iterator[LocalBatches | None]:
    """The batches of the state folder; None if there are none yet. Creates nothing."""
    if not os.path.lexists(state_folder(config) / STATE_FILE):
        yield None
        return
    ledger = open_ledger(config, ())
    with closing(ledger.database):
        if ledger.database.path is None:
            raise StorageError("the batches cannot be read: see the warning above")
        with closing(LocalBatches(config=config, ledger=ledger)) as local:
            yield local


@contextmanager
def local_batch(name: str) -> Iterator[tuple[LocalBatches, BatchRecord]]:
    """The batches of the state folder, and the one of that name. Raises ``ConfigurationError``."""
    with local_batches(Config.load()) as local:
        if local is None:
            raise _no_such_batch(name)
        yield local, local.named(name)


@dataclass(kw_only=True)
class Clients:
    """Clients like those that submitted the batches, made of the settings as they are now.

    ``model``: the profile or model to use instead of looking for one. Use as a context manager.
    """

    local: LocalBatches
    model: str | None = None
    observers: Sequence[Observer] = ()
    _clients: dict[int, EmbeddingClient] = field(default_factory=dict)

    def job(self, record: BatchRecord) -> BatchJob:
        """The batch, to be continued. Raises ``ConfigurationError`` if the settings do not give
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

    def __exit__(self, *_: object) -> None:
        for client in self._clients.values():
            client.close()

    def _found(self, record: BatchRecord) -> EmbeddingClient:
        pool, note = self.local.batches.pool_of(record), self.local.note(record)
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
        return list(dict.fromkeys([*named, record.asked_as, None, *self.local.config.profiles]))

    def _made(
        self, name: str | None, pool: BatchAccount, record: BatchRecord, note: Note | None
    ) -> EmbeddingClient:
        client = EmbeddingClient(
            name, config=self.local.config, scope=pool.scope, observers=self.observers
        )
        try:
            _require_same(client, pool, record, note)
        except BaseException:
            client.close()
            raise
        return client


def _require_same(
    client: EmbeddingClient, pool: BatchAccount, record: BatchRecord, note: Note | None
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
