"""Reads an existing output and journal: what need not be embedded again."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embedcore.errors import ConfigurationError
from embedcore.files.disk import (
    beside,
    display,
    output_lock,
    require_own_list,
    require_own_lock,
    storage_errors,
    sweep,
)
from embedcore.files.formats import output_format
from embedcore.files.formats.base import OutputFormat, not_ours
from embedcore.files.inputs import Inputs
from embedcore.files.journal import Journal, read_journal
from embedcore.files.scan import Scan
from embedcore.files.types import RESERVED_COLUMNS, SIZE, DigestIndex, Origin

if TYPE_CHECKING:
    from embedcore import EmbeddingClient
    from embedcore.files.types import Digests


def origin_of(client: EmbeddingClient, input_type: str | None) -> Origin:
    """What vectors made with this client now will carry."""
    return Origin(
        model=f"{client.provider}:{client.model}",
        fingerprint=client.fingerprint,
        input_type=input_type,
        dimensions=client.dimensions,
    )


def describe(origin: Origin) -> str:
    """An origin in a message."""
    width = f", {origin.dimensions} dimensions" if origin.dimensions else ""
    kind = f", input type {origin.input_type}" if origin.input_type else ""
    return f"{origin.model} (fingerprint {origin.fingerprint[:12]}{width}{kind})"


def same_space(found: Origin, client: EmbeddingClient) -> bool:
    """Whether the client's vectors may be compared with those found: same model, options and width.

    The same options had another fingerprint while more of them counted for it.
    """
    fingerprint = found.fingerprint
    widths = {found.dimensions, client.dimensions} - {None, 0}
    return (
        found.model == f"{client.provider}:{client.model}"
        and (fingerprint == client.fingerprint or client.made_before(fingerprint))
        and len(widths) <= 1
    )


def require_same_maker(
    name: str, found: Origin, client: EmbeddingClient, input_type: str | None
) -> None:
    """Raise ``ConfigurationError`` unless ``found`` may go on with what the client makes now."""
    if same_space(found, client) and found.input_type == input_type:
        return
    asked = origin_of(client, input_type)
    raise ConfigurationError(
        f"{name} holds vectors of {describe(found)}, and this run would add those of "
        f"{describe(asked)}: the two must not mix. Choose another output, or replace it with "
        "overwrite=True"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """An output and the files beside it. ``path`` is resolved: a link stays a link."""

    path: Path
    format: OutputFormat
    journal: Path
    lock: Path
    failed: Path

    @classmethod
    def at(cls, output: Path) -> Target:
        """Check the name before any work. Raises ``ConfigurationError``."""
        try:
            path = output.resolve()
        except (OSError, RuntimeError) as error:
            raise ConfigurationError(f"{display(output)} leads nowhere: {error}") from None
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise ConfigurationError(f"{display(output)} is {kind}: choose another output")
        if not path.parent.is_dir():
            raise ConfigurationError(f"{display(path.parent)}: there is no such folder; create it")
        target = cls(
            path=path,
            format=output_format(path),
            journal=beside(path, ".journal"),
            lock=beside(path, ".lock"),
            failed=beside(path, ".failed.jsonl"),
        )
        for one in target.format.paths(path):
            _require_replaceable(one)
        _require_short_names(target)
        return target

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the lock of the output for the block; nothing is written yet.

        Raises ``StorageBusy`` while another run holds it, and ``ConfigurationError`` if something
        beside the output is in the way.
        """
        with output_lock(self.lock, self.path):
            self.require_free()
            for path in (self.path, self.failed, self.journal):
                sweep(path)
            yield

    def require_free(self) -> None:
        """Raise ``ConfigurationError`` if there is something beside the output, under a name that a
        run needs, that no run has left there. Changes nothing."""
        with storage_errors(self.path):
            require_own_lock(self.lock)
            require_own_list(self.failed)

    def origin(self) -> Origin | None:
        """What made the output that is there; None if there is none, or nothing in it.

        Raises ``ConfigurationError`` for a file under one of its names that is no output of ours.
        """
        paths = self.format.paths(self.path)
        return self.format.origin(self.path) if any(map(os.path.lexists, paths)) else None

    def require_apart_from(self, inputs: Inputs) -> None:
        """Raise ``ConfigurationError`` if the run would overwrite what it reads."""
        written = [*self.format.paths(self.path), self.journal, self.lock, self.failed]
        for path in inputs.paths:
            if any(other.exists() and path.samefile(other) for other in written):
                raise ConfigurationError(
                    f"{display(path)} is an input and would be overwritten: choose another output"
                )


def _require_replaceable(path: Path) -> None:
    """What cannot be replaced is found out last, when all is paid for."""
    if not os.path.lexists(path):
        return
    found, folder = path.lstat(), path.parent.stat()
    if stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"{display(path)} is a folder, and a run needs that name")
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{display(path)} is no regular file, and a run needs that name")
    owners = {0, found.st_uid, folder.st_uid}
    if folder.st_mode & stat.S_ISVTX and hasattr(os, "geteuid") and os.geteuid() not in owners:
        raise ConfigurationError(
            f"{display(path)} belongs to another user, who alone may replace it in "
            f"{display(path.parent)}: choose another output"
        )


def _require_short_names(target: Target) -> None:
    """The longest name is needed last, when all is paid for."""
    needed = [*target.format.paths(target.path), target.journal, target.lock, target.failed]
    longest = max(needed, key=lambda path: len(os.fsencode(path.name)))
    try:
        most = os.pathconf(target.path.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        return
    if len(os.fsencode(longest.name)) > most:
        raise ConfigurationError(
            f"{display(longest.name)} is longer than the {most} bytes that a name may have there, "
            "and a run may need it beside its output: choose a shorter name"
        )


def require_free_names(keep: tuple[str, ...]) -> None:
    """Raise ``ConfigurationError`` for kept columns that an output could not hold."""
    taken = sorted(RESERVED_COLUMNS.intersection(keep))
    if taken:
        raise ConfigurationError(
            f"the column {taken[0]!r} cannot be kept: outputs use that name themselves; rename it"
        )
    if len(set(keep)) < len(keep):
        raise ConfigurationError("a column is named twice in keep; name it once")


class Existing:
    """The vectors that exist beside ``target`` and are what the client makes.

    ``damaged``: rows of the output that cannot be believed: their vectors do not exist any more.
    Building it changes nothing. Raises ``ConfigurationError`` if the output or the journal is of
    another model, or the output not ours; with ``overwrite`` such are left aside.
    """

    def __init__(
        self,
        target: Target,
        client: EmbeddingClient,
        *,
        input_type: str | None,
        overwrite: bool,
    ) -> None:
        self._target = target
        self._client, self._input_type = client, input_type
        self._overwrite = overwrite
        self.damaged = 0
        self._journal = read_journal(target.journal, origin_of(client, input_type))
        if self._journal is not None:
            made_by, name = self._journal.origin, display(target.journal)
            if not self._tolerate(lambda: self._require_same_maker(name, made_by)):
                self._journal = None
        self._in_output: Digests = np.empty(0, dtype=f"S{SIZE}")
        self._tolerate(self._read_output)

    def missing(self, scan: Scan) -> NDArray[np.intp]:
        """Positions of the first row of each text that is in neither."""
        positions = scan.firsts
        journal = [] if self._journal is None else [self._journal.intact]
        for digests in [self._in_output, *journal]:
            found = DigestIndex(digests).find(scan.digests[positions])
            positions = positions[found < 0]
        return positions

    def collect(self, scan: Scan) -> Journal:
        """The journal with every vector that the scanned rows need and that exists already."""
        if self._journal is None:
            with storage_errors(self._target.journal):
                self._target.journal.unlink(missing_ok=True)
        origin = origin_of(self._client, self._input_type)
        journal = Journal(self._target.journal, origin, self._journal)
        try:
            self._tolerate(lambda: self._carry_over(scan, journal))
        except BaseException:
            journal.close()
            raise
        return journal

    def _tolerate(self, read: Callable[[], None]) -> bool:
        """Whether ``read`` found what it reads usable; not so is an error without ``overwrite``."""
        try:
            read()
        except ConfigurationError:
            if not self._overwrite:
                raise
            return False
        return True

    def _read_output(self) -> None:
        path, reader = self._target.path, self._target.format
        found = self._target.origin()
        if found is not None and path.exists():
            self._require_same_maker(display(path), found)
            parts, damaged = [self._in_output], 0
            for block in reader.blocks(path):
                if block.foreign:
                    raise not_ours(path, block.foreign)
                parts.append(block.digests[block.reusable])
                damaged += block.damaged
            self._in_output, self.damaged = np.concatenate(parts), damaged

    def _require_same_maker(self, name: str, found: Origin) -> None:
        require_same_maker(name, found, self._client, self._input_type)

    def _carry_over(self, scan: Scan, journal: Journal) -> None:
        needed = scan.digests[scan.firsts]
        needed = needed[journal.index().find(needed) < 0]
        index = DigestIndex(needed)
        lacking = index.find(self._in_output) >= 0
        open_places = np.ones(len(needed), dtype=bool)
        blocks = self._target.format.blocks(self._target.path) if lacking.any() else ()
        for block in blocks:
            reusable = np.flatnonzero(block.reusable)
            places, firsts = np.unique(index.find(block.digests[reusable]), return_index=True)
            wanted = (places >= 0) & open_places[places]
            open_places[places[wanted]] = False
            rows = reusable[firsts[wanted]]
            # Not synced: until the new output is complete the old one still has them.
            journal.append(
                block.digests[rows], block.cuts[rows], block.vectors[rows], durable=False
            )
