"""The rows of a batch with their vectors, from its file and the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from embedcore.errors import (
    BatchEmbeddingFailed,
    EmbeddingError,
    InputRejected,
    ProviderError,
    TransientProviderError,
)
from embedcore.policy.planning import refuses_long
from embedcore.policy.result import EmbeddingResult, Spending, TextCut
from embedcore.policy.stream.rows import Block, called

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.policy.batch.context import BatchContext
    from embedcore.provider.types import Vectors
    from embedcore.storage.batches import BatchRecord
    from embedcore.storage.manifest import Found, ManifestRow


def blocks_of(context: BatchContext, batch: BatchRecord, size: int) -> Iterator[Block]:
    """All rows in their order, ``size`` at a time; those without a vector say why."""
    reader = _Reader(context, batch)
    manifest = context.manifest(batch)
    try:
        for first in range(0, batch.rows, size):
            yield reader.block(manifest.rows(first, size), first)
    finally:
        manifest.close()


def result_of(context: BatchContext, batch: BatchRecord, usage: Spending) -> EmbeddingResult:
    """All rows as one array of shape (n, d)."""
    import numpy as np

    width = context.engine.info.dimensions or context.engine.learned.width
    vectors: Vectors | None = None
    ok, reused = np.zeros(batch.rows, dtype=np.bool_), np.zeros(batch.rows, dtype=np.bool_)
    cuts: dict[int, TextCut] = {}
    errors: dict[int, EmbeddingError] = {}
    for block in blocks_of(context, batch, 4_096):
        here = slice(block.first, block.first + len(block))
        if vectors is None:
            shape = (batch.rows, width or block.vectors.shape[1])
            vectors = np.full(shape, np.nan, dtype=np.float32)
        if block.vectors.shape[1] == vectors.shape[1]:
            vectors[here] = block.vectors
        elif not vectors.shape[1] or not ok.any():
            vectors = np.full((batch.rows, block.vectors.shape[1]), np.nan, dtype=np.float32)
            vectors[here] = block.vectors
        ok[here], reused[here] = block.ok, block.reused
        cuts.update({block.first + place: cut for place, cut in block.cuts.items()})
        errors.update({block.first + place: error for place, error in block.errors.items()})
    return EmbeddingResult(
        vectors=np.empty((0, width or 0), dtype=np.float32) if vectors is None else vectors,
        ok=ok,
        reused=reused,
        usage=usage,
        model=context.engine.label,
        fingerprint=context.engine.fingerprint,
        cuts=cuts,
        errors=errors,
    )


def failure(batch: BatchRecord, jobs: Sequence[str], result: EmbeddingResult) -> Exception:
    """The error for a batch that does not have a vector for every row."""
    failures = {row: error.message for row, error in result.errors.items()}
    row = min(failures)
    where = "" if batch.has_ended else ", which has not ended yet"
    return BatchEmbeddingFailed(
        f"{len(failures)} of {batch.rows} rows of batch {batch.name}{where} have no vector; the "
        f"first is {failures[row]}. Results received so far are in .result, every reason in "
        ".failures; to submit the same texts again pays only for what is missing",
        jobs=jobs,
        failures=failures,
        result=result,
        retryable=not batch.has_ended,
        billed="unknown",
    )


class _Reader:
    """Finds vectors and reasons for rows."""

    def __init__(self, context: BatchContext, batch: BatchRecord) -> None:
        self._context = context
        self._batch = batch
        self._reasons = context.batches.reasons(batch)
        self._open = frozenset(context.batches.open_keys(batch))

    def block(self, rows: Sequence[Found], first: int) -> Block:
        import numpy as np

        places: dict[bytes, list[int]] = {}
        for place, found in enumerate(rows):
            key = found.key if found.shortened is None else found.shortened.key
            if key is not None:
                places.setdefault(key, []).append(place)
        vectors, ok = self._vectors(places, len(rows))
        reused: NDArray[np.bool_] = np.zeros(len(rows), dtype=np.bool_)
        errors: dict[int, EmbeddingError] = {}
        cuts: dict[int, TextCut] = {}
        for place, found in enumerate(rows):
            if ok[place]:
                reused[place] = found.reused
            else:
                errors[place] = self._error(found.row, found.key)
            cut = self._cut(found)
            if cut is not None and (cut.is_known or ok[place]):
                cuts[place] = cut
        keys = [_key(found.row) for found in rows]
        return Block(
            keys=keys,
            rows=keys,
            first=first,
            vectors=vectors,
            ok=ok,
            reused=reused,
            cuts=cuts,
            errors=errors,
        )

    def _cut(self, found: Found) -> TextCut | None:
        """What was cut off the text of a row; None: nothing."""
        before = TextCut(tokens=found.row.tokens_cut or None)
        if found.shortened is not None:
            _, tokens, characters = found.shortened
            return before.and_then(TextCut(tokens=tokens, characters=characters))
        engine = self._context.engine
        unknown = found.perhaps_long and not refuses_long(engine.info, engine.sizes)
        return before if before.is_known or unknown else None

    def _vectors(
        self, places: dict[bytes, list[int]], count: int
    ) -> tuple[Vectors, NDArray[np.bool_]]:
        import numpy as np

        from embedcore.storage.vector_format import all_zero

        context, keys = self._context, list(places)
        width = context.engine.info.dimensions or context.engine.learned.width
        ok: NDArray[np.bool_] = np.zeros(count, dtype=np.bool_)
        kept: list[Vectors] = []

        def take(found: Sequence[int], vectors: Vectors) -> None:
            if not context.engine.learned.agrees(vectors.shape[1]):
                return
            if not kept:
                kept.append(np.full((count, vectors.shape[1]), np.nan, dtype=np.float32))
            zeros = all_zero(vectors).tolist()
            for row, one in enumerate(found):
                if zeros[row] and not self._is_ours(keys[one]):
                    continue
                for place in places[keys[one]]:
                    kept[0][place] = vectors[row]
                    ok[place] = True

        context.store.get(keys, width, take, zeros=True)
        if not kept:
            kept.append(np.full((count, width or 0), np.nan, dtype=np.float32))
        return kept[0], ok

    def _is_ours(self, key: bytes) -> bool:
        """Zeros are what came for this batch, and no find for one that waits for its own, or has
        a reason why it got none."""
        return key not in self._reasons and (self._batch.has_ended or key not in self._open)

    def _error(self, row: ManifestRow, key: bytes | None) -> EmbeddingError:
        number, name = row.number, called(row.number, _key(row))
        if key is None:
            return InputRejected(
                row.problem or f"{name} was rejected",
                position=number,
                reason=row.problem or "rejected",
            )
        if key in self._reasons:
            return _located(
                ProviderError(f"{name}: {self._reasons[key]}", billed="unknown"), number
            )
        if key in self._open and not self._batch.has_ended:
            return _located(
                TransientProviderError(f"{name}: its job has not ended", billed="unknown"),
                number,
            )
        ended = {
            "cancelled": "the batch was cancelled before it had a result",
            "abandoned": "the batch was forgotten before it had a result",
        }
        gone = "its vector is not cached any more; submit it again"
        if self._batch.delivered:
            gone = (
                "its vector was written to an output before and was not cached as well (cache_cap, "
                "cache = false or a free model); submit it again"
            )
        reason = ended.get(self._batch.state, gone)
        return _located(ProviderError(f"{name}: {reason}", billed="unknown"), number)


def _located(error: EmbeddingError, number: int) -> EmbeddingError:
    error.position = number
    return error


def _key(row: ManifestRow) -> Any:
    return row.number if row.key is None else json.loads(row.key)
