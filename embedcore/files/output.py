"""Writes the finished output and puts it in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from embedcore.files.cuts import Tally, tally
from embedcore.files.disk import replacing, storage_errors
from embedcore.files.formats.base import Layout, RowWriter
from embedcore.files.formats.jsonl import json_line
from embedcore.files.inputs import Inputs
from embedcore.files.journal import Journal
from embedcore.files.resume import Target
from embedcore.files.scan import Scan, all_rows, blocks
from embedcore.files.types import Row, content_digest

_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """Rows in the output, of which ``truncated`` were cut, by ``tokens_cut`` and, of others,
    ``characters_cut`` in all, and ``perhaps_cut`` may have been; rows left out: ``failed``, and
    ``not_done`` since the budget ended."""

    rows: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    characters_cut: int = 0
    perhaps_cut: int = 0
    failed: int = 0
    not_done: int = 0


class _NoWriter:
    """Where an output stays as it is."""

    def write(self, *_: object) -> None:
        raise AssertionError("there was to be no row")

    def finish(self) -> None:
        """There is nothing to finish."""

    def abandon(self) -> None:
        """Nor to let go."""


def stays(target: Target, rows: int) -> bool:
    """Whether the output stays as it is: rows are not replaced by none at all."""
    return not rows and target.path.exists()


@contextmanager
def writing(
    target: Target, layout: Layout, *, listing: bool
) -> Iterator[tuple[RowWriter, BinaryIO | None]]:
    """A writer of the output, and with ``listing`` the file for the rows that are left out.

    Both take their places when the block ends without an error, and are complete and on the disk.
    Without ``listing`` an older list goes. Raises ``StorageError``.
    """
    unchanged = stays(target, layout.rows)
    paths = () if unchanged else target.format.paths(target.path)
    listed = (target.failed,) if listing else ()
    with storage_errors(target.path), replacing(*paths, *listed) as files:
        own = files[: len(paths)]
        writer = _NoWriter() if unchanged else target.format.writer(own, layout)
        try:
            yield writer, files[-1] if listing else None
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
    with storage_errors(target.failed):
        if not listing:
            target.failed.unlink(missing_ok=True)


def write_output(
    target: Target,
    inputs: Inputs,
    scan: Scan,
    journal: Journal,
    reasons: Mapping[bytes, str],
    *,
    stopped: str | None = None,
    keep_text: bool,
    on_rows: Callable[[int], None],
) -> Written:
    """Write every row that has a vector, in the order of the input; list the others, and why.

    ``stopped``: why rows without a reason of their own were not done. An existing output stays as
    it is until the new one is complete and on the disk, and for ever if that had no row. Raises
    ``StorageError``, and ``InputRejected`` if the input is not the one that was scanned.
    """
    numbers = _records_of(scan, journal)
    missing = int((numbers < 0).sum())
    layout = Layout(
        origin=journal.origin,
        rows=scan.rows - missing,
        kinds=scan.kinds,
        keep_text=keep_text,
    )
    cut, not_done = Tally(), 0
    with writing(target, layout, listing=missing > 0) as (writer, listed):
        for rows in blocks(all_rows(inputs, scan), max_rows=_ROWS_AT_ONCE):
            start, end = rows[0].position, rows[0].position + len(rows)
            cut += _write_block(writer, rows, scan, journal, numbers[start:end])
            if listed is not None:
                not_done += _write_missing(listed, rows, numbers[start:end], reasons, stopped)
            on_rows(end)
    return Written(
        rows=layout.rows,
        truncated=cut.rows,
        tokens_cut=cut.tokens,
        characters_cut=cut.characters,
        perhaps_cut=cut.unknown,
        failed=missing - not_done,
        not_done=not_done,
    )


def write_list(
    target: Target,
    inputs: Inputs,
    scan: Scan,
    journal: Journal,
    reasons: Mapping[bytes, str],
    *,
    stopped: str,
) -> Written:
    """List the rows without a vector, and why, where the output stays as it is. Raises as above."""
    numbers = _records_of(scan, journal)
    not_done = 0
    with storage_errors(target.failed), replacing(target.failed) as (listed,):
        for rows in blocks(all_rows(inputs, scan), max_rows=_ROWS_AT_ONCE):
            start, end = rows[0].position, rows[0].position + len(rows)
            not_done += _write_missing(listed, rows, numbers[start:end], reasons, stopped)
    return Written(failed=int((numbers < 0).sum()) - not_done, not_done=not_done)


def _records_of(scan: Scan, journal: Journal) -> NDArray[np.intp]:
    """For each row the number of its record, -1 where it has none."""
    numbers = journal.index().find(scan.digests)
    numbers[scan.empty] = -1
    return numbers


def _write_block(
    writer: RowWriter, rows: list[Row], scan: Scan, journal: Journal, numbers: NDArray[np.intp]
) -> Tally:
    """Write those with a vector. Returns what was cut off them."""
    there = np.flatnonzero(numbers >= 0)
    if not len(there):
        return Tally()
    cuts, vectors = journal.read(numbers[there])
    writer.write(
        [rows[i] for i in there],
        scan.digests[rows[0].position + there],
        cuts,
        vectors,
    )
    return tally(cuts)


def _write_missing(
    file: BinaryIO,
    rows: list[Row],
    numbers: NDArray[np.intp],
    reasons: Mapping[bytes, str],
    stopped: str | None,
) -> int:
    """List the rows without a vector. Returns how many of them were not done."""
    not_done = 0
    for i in np.flatnonzero(numbers < 0):
        row = rows[i]
        digest = content_digest(row.text)
        reason = reasons.get(digest) if row.text else "empty text"
        if reason is None and stopped is not None:
            reason = f"not done: {stopped}"
            not_done += 1
        reason = reason or "no vector came back"
        file.write(
            json_line(
                {
                    "id": row.id,
                    "position": row.position,
                    "where": row.where,
                    "text_sha256": digest.hex(),
                    "reason": reason.encode("utf-8", "replace").decode(),
                }
            )
        )
    return not_done
