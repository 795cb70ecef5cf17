"""A client of the shape that ``embedcore.files`` calls, whose vectors are a function of the text.

Processes that a test starts load this file by its path, so that they use the same client.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from embedcore import Arrival, EmbeddingResult, Plan, Spending, TextCut
from embedcore.errors import EmbeddingError, InputRejected
from embedcore.events import Progress
from embedcore.money import in_dollars

WIDTH = 6


def vector_of(text: str, model: str = "fake", width: int = WIDTH) -> np.ndarray:
    """The vector that this model has for this text: float32 of shape (width,)."""
    stream = hashlib.shake_256(f"{model}\0".encode() + text.encode()).digest(4 * width)
    numbers = np.frombuffer(stream, dtype="<u4").astype(np.float64) / 2**31 - 1
    return numbers.astype(np.float32)


@dataclass
class FakeClient:
    """``before(texts)`` may raise or return how many texts are billed before ``error`` is raised.

    ``bad``: texts whose rows fail. ``meter``: a file that gets one line for each text billed.
    Texts of more than ``longest`` characters are "truncated" by the rest, which ``cut`` tells.
    """

    model: str = "fake"
    provider: str = "fake"
    fingerprint: str = "f" * 32
    dimensions: int | None = None
    width: int = WIDTH
    bad: frozenset[str] = frozenset()
    meter: Path | None = None
    pause: float = 0.0
    longest: int = 10**9
    cut: Callable[[int], TextCut] = lambda rest: TextCut(tokens=rest)
    stop_after: Callable[[int], tuple[int, BaseException] | None] = lambda call: None
    calls: list[list[str]] = field(default_factory=list)
    billed: list[str] = field(default_factory=list)
    input_types: set[str | None] = field(default_factory=set)
    former: tuple[str, ...] = ()

    def embed(
        self,
        texts: Sequence[str],
        *,
        input_type: str | None = None,
        on_error: str = "raise",
        on_budget: str = "raise",
        progress: bool | Callable[[Progress], None] = False,
        on_arrival: Callable[[Arrival], None] | None = None,
    ) -> EmbeddingResult:
        self.calls.append(list(texts))
        self.input_types.add(input_type)
        assert texts
        assert len(set(texts)) == len(texts), "a text was sent twice in one call"
        stop = self.stop_after(len(self.calls))
        reached = len(texts) if stop is None else min(stop[0], len(texts))
        result = self._result(texts, reached)
        if callable(progress):
            usage = result.usage
            tokens, cost = usage.tokens, usage.cost
            progress(Progress(done=reached, total=len(texts), tokens=tokens, cost=cost))
        if on_arrival is not None:
            self._deliver(result, on_arrival)
        if stop is not None:
            stop[1].partial = result  # type: ignore[attr-defined]
            raise stop[1]
        if on_error == "raise" and not result.ok.all():
            raise InputRejected("bad text", position=min(result.errors), partial=result)
        return result

    def _deliver(self, result: EmbeddingResult, on_arrival: Callable[[Arrival], None]) -> None:
        """Some rows come early, in parts and out of order; the others only with the result."""
        early = np.flatnonzero(result.ok)[::-2]
        for rows in np.array_split(early, 3):
            cuts = {row: result.cuts[row] for row in rows.tolist() if row in result.cuts}
            if not len(rows):
                continue
            try:
                on_arrival(Arrival(rows=rows, vectors=result.vectors[rows], cuts=cuts))
            except BaseException as error:
                error.partial = result  # type: ignore[attr-defined]
                raise

    def _result(self, texts: Sequence[str], reached: int) -> EmbeddingResult:
        vectors = np.full((len(texts), self.width), np.nan, dtype=np.float32)
        errors: dict[int, EmbeddingError] = {}
        for i, text in enumerate(texts):
            if i >= reached or text in self.bad:
                errors[i] = InputRejected(f"text {i} is bad", position=i, reason="it is bad")
                continue
            vectors[i] = vector_of(text, self.model, self.width)
            self._pay(text)
        ok = np.array([i not in errors for i in range(len(texts))])
        tokens = sum(len(text) for i, text in enumerate(texts) if ok[i])
        cuts = {
            i: self.cut(len(text) - self.longest)
            for i, text in enumerate(texts)
            if ok[i] and len(text) > self.longest
        }
        return EmbeddingResult(
            vectors=vectors,
            ok=ok,
            reused=np.zeros(len(texts), dtype=bool),
            usage=Spending(tokens=tokens, cost=in_dollars(tokens * 20_000), requests=1),
            cuts=cuts,
            errors=errors,
        )

    def _pay(self, text: str) -> None:
        self.billed.append(text)
        if self.meter is not None:
            with self.meter.open("ab") as file:
                # What is written outlives a process that is killed.
                file.write(hashlib.sha256(text.encode()).hexdigest()[:16].encode() + b"\n")
        time.sleep(self.pause)

    def made_before(self, fingerprint: str) -> bool:
        return fingerprint in self.former

    def plan(
        self, texts: Sequence[str], *, input_type: str | None = None, batch: bool = False
    ) -> Plan:
        tokens = sum(map(len, texts))
        return Plan(
            rows=len(texts),
            unique=len(set(texts)),
            rejected=0,
            truncated=sum(len(text) > self.longest for text in texts),
            requests=1,
            tokens=tokens,
            exact=False,
            cost=in_dollars(tokens * 20_000),
            to_embed=len(set(texts)),
        )


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture(scope="session")
def new_client() -> type[FakeClient]:
    return FakeClient


@pytest.fixture(scope="session")
def vector() -> Callable[..., np.ndarray]:
    return vector_of


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def jsonl() -> Callable[[Path, Sequence[dict[str, object]]], Path]:
    return write_jsonl


def load_output(path: Path) -> list[dict[str, object]]:
    """Any output as plain rows, read with the format's own tools and none of ours."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    if path.suffix == ".npy":
        matrix = np.load(path)
        lines = path.with_name(path.name + ".rows.jsonl").read_bytes().split(b"\n")
        header, *rows = [json.loads(line) for line in lines if line]
        assert matrix.shape == (header["rows"], header["dimensions"])
        assert matrix.dtype == np.float32
        assert len(rows) == header["rows"]
        return [row | {"vector": matrix[i].tolist()} for i, row in enumerate(rows)]
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


@pytest.fixture(scope="session")
def load() -> Callable[[Path], list[dict[str, object]]]:
    return load_output


@pytest.fixture(scope="session")
def check_rows() -> Callable[..., None]:
    """Every row's vector and hash are those of its own text, by recomputing them."""

    def check(path: Path, texts: Sequence[str], model: str = "fake") -> None:
        rows = load_output(path)
        assert [row["text"] for row in rows] == list(texts)
        for row, text in zip(rows, texts, strict=True):
            assert row["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
            assert np.array_equal(np.array(row["vector"], np.float32), vector_of(text, model))

    return check


@pytest.fixture(params=["parquet", "jsonl", "npy"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A name for an output, in each of the formats."""
    return tmp_path / f"vectors.{request.param}"
