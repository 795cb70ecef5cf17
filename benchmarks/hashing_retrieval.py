"""Does the hashing provider find things? Each docstring's first sentence looks for its own body.

The texts are the public docstrings of the top-level modules of the Python that runs this, so the
number of pairs differs a little between versions. A plain hashed bag of words stands beside it.

    python benchmarks/hashing_retrieval.py
"""

from __future__ import annotations

import argparse
import ast
import re
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from embedcore_hashing.plugin import HashingOptions, create
from numpy.typing import NDArray

from embedcore.provider.types import EmbedRequest

SHORTEST_SENTENCE = 15
SHORTEST_BODY = 40

Vectors = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often the right body came first, came among the first ten, and its mean 1/rank."""

    recall_at_1: float
    recall_at_10: float
    mean_reciprocal_rank: float

    def __str__(self) -> str:
        return f"{self.recall_at_1:.3f}  {self.recall_at_10:.3f}  {self.mean_reciprocal_rank:.3f}"


def public_docstrings() -> list[str]:
    """Each docstring once, in the order of the files."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if not path.name.startswith("_"):
            found.update(dict.fromkeys(_docstrings_in(ast.parse(path.read_bytes()))))
    return list(found)


def _docstrings_in(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if getattr(node, "name", "").startswith("_"):
            return
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        yield from _docstrings_in(child)


def sentence_and_body(docstrings: list[str]) -> list[tuple[str, str]]:
    """First sentence and the rest of every docstring that has both."""
    pattern = re.compile(rf"(.{{{SHORTEST_SENTENCE},}}?[.!?]) (.{{{SHORTEST_BODY},}})")
    matches = (pattern.match(" ".join(text.split())) for text in docstrings)
    return [(match[1], match[2]) for match in matches if match]


def score(sentences: Vectors, bodies: Vectors) -> Score:
    """Ranks by exact cosine among all bodies; a tie does not count against the right one."""
    similarity = sentences @ bodies.T
    own = np.diagonal(similarity)
    ranks = (similarity > own[:, None]).sum(axis=1) + 1
    return Score(
        recall_at_1=float((ranks == 1).mean()),
        recall_at_10=float((ranks <= 10).mean()),
        mean_reciprocal_rank=float((1 / ranks).mean()),
    )


def bag_of_words(width: int) -> Callable[[list[str]], Vectors]:
    """The plain form: every word counts the same, as often as it occurs."""

    def embed(texts: list[str]) -> Vectors:
        sums = np.zeros((len(texts), width), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                value = zlib.crc32(word.encode())
                sums[row, value % width] += 1 if value >> 31 else -1
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        units: Vectors = (sums / np.maximum(lengths, 1e-9)).astype(np.float32)
        return units

    return embed


def hashing(width: int) -> Callable[[list[str]], Vectors]:
    embedder = create(str(width), HashingOptions())
    return lambda texts: embedder.embed(EmbedRequest(texts=texts)).vectors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    widths = parser.parse_args().widths
    pairs = sentence_and_body(public_docstrings())
    sentences, bodies = map(list, zip(*pairs, strict=True))
    print(f"{len(pairs)} pairs\n{'':26}@1     @10    MRR    texts/s")
    for name, method in (("hashed bag of words", bag_of_words), ("hashing", hashing)):
        for width in widths:
            embed = method(width)
            start = time.process_time()
            vectors = embed(sentences), embed(bodies)
            seconds = time.process_time() - start
            print(f"{name:19} {width:5} {score(*vectors)} {2 * len(pairs) / seconds:8,.0f}")


if __name__ == "__main__":
    main()
