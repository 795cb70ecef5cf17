"""How are the vectors of a batch written as ``embed`` writes its output, in bounded memory?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from embedcore.errors import InputRejected, StorageError, TransientProviderError
from embedcore.files.cuts import codes_of, tally
from embedcore.files.digests import SIZE, as_digests
from embedcore.files.formats import Layout, RowWriter
from embedcore.files.jsonl import json_line
from embedcore.files.output import stays, writing
from embedcore.files.scan import Scan, all_rows
from embedcore.files.types import FileProgress, Origin, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedcore.errors import EmbeddingError
    from embedcore.files.inputs import Inputs
    from embedcore.files.resume import Target
    from embedcore.policy.batchjob import BatchJob
    from embedcore.policy.blocks import Block

_BLOCK_ROWS: Final = 2_048
_MOST_REASONS: Final = 1_000


@dataclass(kw_only=True)
class Fetched:
    """What became of the rows: written, failed, or still pending.

    ``truncated``: of those written, how many were cut; ``perhaps_cut``: how many may have been.
    ``zeros``: how many have a vector of zeros.
    ``reasons``: why, of those that are not written. ``with_columns``: the columns of the input are
    in the output. ``unchanged``: there was no vector, and the output is as it was.
    """

    written: int = 0
    failed: int = 0
    pending: int = 0
    truncated: int = 0
    perhaps_cut: int = 0
    zeros: int = 0
    dimensions: int = 0
    with_columns: bool = False
    failed_path: Path | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    unchanged: bool = False


@dataclass(frozen=True, kw_only=True)
class BatchOutput:
    """Writes the rows of one batch. ``source``: what was submitted, if it is still there.

    ``digests``: 32 bytes for each row.
    """

    job: BatchJob
    target: Target
    origin: Origin
    digests: bytes
    source: tuple[Inputs, Scan] | None
    keep_text: bool
    on_progress: Callable[[FileProgress], None]

    def write(self) -> Fetched:
        """Replace the output as soon as all of it is on the disk. Raises ``StorageError``."""
        there, width = self._looked()
        layout = Layout(
            origin=replace(self.origin, dimensions=width or self.origin.dimensions or 0),
            rows=int(there.sum()),
            kinds={} if self.source is None else self.source[1].kinds,
            keep_text=self.keep_text and self.source is not None,
        )
        fetched = Fetched(
            dimensions=layout.origin.dimensions or 0, with_columns=self.source is not None
        )
        missing = not there.all()
        fetched.unchanged = stays(self.target, layout.rows)
        with writing(self.target, layout, listing=bool(missing)) as (writer, listed):
            self._write_all(writer, listed, there, fetched)
        fetched.failed_path = self.target.failed if missing else None
        return fetched

    def _looked(self) -> tuple[NDArray[np.bool_], int]:
        """Which rows have a vector, and its width: an output must know both before its first row,
        and more may arrive while it is written."""
        found: list[NDArray[np.bool_]] = []
        width = 0
        for block in self.job.blocks(_BLOCK_ROWS):
            found.append(block.ok)
            if block.ok.any():
                width = block.vectors.shape[1]
            self.on_progress(FileProgress(stage="reading", done=block.first + len(block)))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.bool_), width

    def _write_all(
        self,
        writer: RowWriter,
        listed: BinaryIO | None,
        there: NDArray[np.bool_],
        fetched: Fetched,
    ) -> None:
        rows = None if self.source is None else all_rows(*self.source)
        for block in self.job.blocks(_BLOCK_ROWS):
            end = block.first + len(block)
            these = _plain_rows(block) if rows is None else list(islice(rows, len(block)))
            digests = self.digests[block.first * SIZE : end * SIZE]
            _write_block(writer, block, these, digests, there[block.first : end], fetched)
            if listed is not None:
                self._list(listed, block, these, there[block.first : end], fetched)
            self.on_progress(FileProgress(stage="writing", done=end, total=len(there)))

    def _list(
        self,
        listed: BinaryIO,
        block: Block,
        rows: list[Row],
        there: NDArray[np.bool_],
        fetched: Fetched,
    ) -> None:
        for place in np.flatnonzero(~there).tolist():
            error = block.errors.get(place)
            pending = error is None or isinstance(error, TransientProviderError)
            fetched.pending += pending
            fetched.failed += not pending
            reason = _reason(error, block.first + place)
            if reason in fetched.reasons or len(fetched.reasons) < _MOST_REASONS:
                fetched.reasons[reason] += 1
            number = block.first + place
            digest = self.digests[number * SIZE : (number + 1) * SIZE]
            row = rows[place]
            listed.write(
                json_line(
                    {
                        "id": row.id,
                        "position": number,
                        "where": row.where or None,
                        "text_sha256": digest.hex() if any(digest) else None,
                        "reason": reason,
                    }
                )
            )


def _write_block(
    writer: RowWriter,
    block: Block,
    rows: list[Row],
    digests: bytes,
    there: NDArray[np.bool_],
    fetched: Fetched,
) -> None:
    places = np.flatnonzero(there)
    if not len(places):
        return
    if not block.ok[places].all():
        raise StorageError(
            "a vector that was there a moment ago is gone: the store was pruned, or it was damaged "
            "and deleted. Run the same again, and submit what is listed as failed"
        )
    cuts = codes_of(block.cuts, places.tolist())
    writer.write(
        [rows[place] for place in places.tolist()],
        as_digests(digests)[places],
        cuts,
        block.vectors[places],
    )
    fetched.written += len(places)
    cut = tally(cuts)
    fetched.truncated += cut.rows
    fetched.perhaps_cut += cut.unknown
    fetched.zeros += int(np.count_nonzero(block.zeros[places]))


def _plain_rows(block: Block) -> list[Row]:
    return [Row(id=_id(key), position=block.first + place) for place, key in enumerate(block.keys)]


def _id(key: Any) -> str:
    return key if isinstance(key, str) else json.dumps(key)


def _reason(error: EmbeddingError | None, number: int) -> str:
    if error is None:
        return "it arrived while this was written: fetch again"
    said = error.reason if isinstance(error, InputRejected) and error.reason else error.message
    return said.removeprefix(f"row {number}: ").encode("utf-8", "replace").decode()
