"""Exact cosine search over an output, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from embedcore.errors import ConfigurationError, EmbeddingError, InputRejected
from embedcore.files.disk import display
from embedcore.files.formats import output_format
from embedcore.files.resume import describe, origin_of, same_space
from embedcore.files.types import Block, JsonValue, Origin, StoredRow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from embedcore import EmbeddingClient
    from embedcore.files.types import Vectors


class Found(list["list[Hit]"]):
    """For each question its hits. ``damaged``: rows of the output that are not as they were
    written, and are no hits."""

    damaged = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A row found. ``score``: its cosine, from -1 to 1; ``position``: its place in the output.

    ``text`` is None where the output was written without texts.
    """

    score: float
    position: int = 0
    id: str = ""
    text: str | None = None
    kept: Mapping[str, JsonValue] = field(default_factory=dict)


def search(
    client: EmbeddingClient,
    questions: Sequence[str],
    output: str | PathLike[str],
    *,
    limit: int = 10,
    input_type: str | None = None,
) -> Found:
    """For each question the ``limit`` nearest rows of ``output``, best first; ties by position.

    Damaged rows are left out and counted. An output without rows has no hits, and nothing is sent.
    Raises ``ConfigurationError``, before anything is sent, for a file that was made by another
    model, is not an output, or has damaged rows only; ``InputRejected`` for an empty question; and
    what the client raises for the questions.
    """
    path = Path(output)
    if limit < 1:
        raise ConfigurationError(f"limit = {limit}: it must be at least 1")
    if isinstance(questions, str):
        raise ConfigurationError("questions must be a list of texts, not one text: use [question]")
    if not path.is_file():
        raise ConfigurationError(f"{display(path)}: there is no such file")
    found = output_format(path).origin(path)
    if found is not None and not same_space(found, client):
        raise _other_space(path, found, origin_of(client, input_type))
    if not questions or not _has_rows(path):
        return Found([] for _ in questions)
    return nearest(_embedded(client, questions, input_type), path, limit=limit)


def _embedded(client: EmbeddingClient, questions: Sequence[str], input_type: str | None) -> Vectors:
    if "" in questions:
        at = questions.index("")
        # Whatever the settings say of empty texts: a question without a vector finds nothing.
        raise InputRejected(
            f"{_name(questions, at)} is empty: no row is near to it. Nothing was sent",
            position=at,
            reason="empty question",
        )
    try:
        return client.embed(questions, input_type=input_type).vectors
    except EmbeddingError as error:
        if error.position is not None:
            said = error.message.removeprefix(f"row {error.position}: ")
            error.message = f"{_name(questions, error.position)}: {said}"
        raise


def _name(questions: Sequence[str], at: int) -> str:
    return "the question" if len(questions) == 1 else f"question {at + 1}"


def nearest(questions: Vectors, output: Path, *, limit: int) -> Found:
    """The same for vectors of shape (q, d) that were made before, by the model of ``output``."""
    best = Found([] for _ in questions)
    directions = _unit(np.asarray(questions, dtype=np.float32))
    start = 0
    for block in output_format(output).blocks(output):
        scores = _scores(block, directions, output)
        unreadable: set[int] = set()
        for at, row_scores in enumerate(scores):
            found = _hits(block, row_scores, best[at], limit, start, unreadable)
            best[at] = sorted(best[at] + found, key=lambda hit: (-hit.score, hit.position))[:limit]
        best.damaged += block.damaged + len(unreadable)
        start += len(block.digests)
    return best


def _has_rows(path: Path) -> bool:
    """Whether there is a row to be found. Raises ``ConfigurationError`` if all are damaged."""
    damaged = 0
    for block in output_format(path).blocks(path):
        if block.sound.any():
            return True
        damaged += block.damaged
    if damaged:
        raise ConfigurationError(
            f"{display(path)}: all of its {damaged:,} rows are damaged; embed the input once more"
        )
    return False


def _other_space(path: Path, found: Origin, asked: Origin) -> ConfigurationError:
    return ConfigurationError(
        f"{display(path)} holds vectors of {describe(found)}, and the question would be one of "
        f"{describe(asked)}: their distances mean nothing. Ask with the model of the file"
    )


def _scores(block: Block, directions: Vectors, output: Path) -> Vectors:
    """Cosines of shape (q, n); below all of them for rows that are not sound."""
    if block.vectors.shape[1] != directions.shape[1]:
        raise ConfigurationError(
            f"{display(output)} holds vectors of {block.vectors.shape[1]} dimensions, and the "
            f"question has {directions.shape[1]}"
        )
    vectors = np.where(block.sound[:, None], block.vectors, np.float32(0))
    scores: Vectors = np.clip(directions @ _unit(vectors).T, -1, 1)
    scores[:, ~block.sound] = -np.inf
    return scores


def _hits(
    block: Block, scores: Vectors, best: Sequence[Hit], limit: int, start: int, unreadable: set[int]
) -> list[Hit]:
    """The rows of the block that can be among the best so far. ``unreadable``: rows whose vector is
    sound and whose text or columns are damaged; those that were met are added."""
    scores[list(unreadable)] = -np.inf
    while True:
        chosen = {i: block.row(i) for i in _top(scores, best, limit)}
        broken = [i for i, row in chosen.items() if row is None]
        if not broken:
            return [
                _hit(float(scores[i]), start + i, row)
                for i, row in chosen.items()
                if row is not None
            ]
        unreadable.update(broken)
        scores[broken] = -np.inf


def _unit(vectors: Vectors) -> Vectors:
    """Scaled to length 1; a zero vector stays, and is at cosine 0 from everything."""
    # Scaled by the largest component first: squares of large or tiny numbers leave float32.
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
    scaled = np.divide(vectors, largest, out=np.zeros_like(vectors), where=largest > 0)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    unit: Vectors = np.divide(scaled, lengths, out=scaled, where=lengths > 0)
    return unit


def _top(scores: Vectors, best: Sequence[Hit], limit: int) -> list[int]:
    """The at most ``limit`` places in the block that can be among the best so far."""
    floor = best[-1].score if len(best) == limit else -np.inf
    if len(scores) > limit:
        floor = max(floor, np.partition(scores, -limit)[-limit])
    places = np.flatnonzero((scores >= floor) & (scores > -np.inf))
    return [int(i) for i in places[np.argsort(-scores[places], kind="stable")][:limit]]


def _hit(score: float, position: int, row: StoredRow) -> Hit:
    return Hit(score=score, position=position, id=row.id, text=row.text, kept=row.kept)
