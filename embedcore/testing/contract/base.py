"""What a provider's author fills in for the contract tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from embedcore.provider.types import EmbedRequest

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import Vectors


Value = TypeVar("Value")

PROBES = (
    "The cat sat on the mat.",
    "Invoices are due within thirty days.",
    "def factorial(n): return 1 if n < 2 else n * factorial(n - 1)",
    "Der Zug nach Hamburg fährt um sieben Uhr ab.",
    "今日は東京で雨が降っています。",
    "42",
    "Photosynthesis turns light into sugar; chlorophyll makes leaves green. " * 4,
    "please reset my password",
)
"""Texts so different that no model may give two of them nearly the same vector."""


class ContractBase:
    """The places that a provider's author fills in; see ``EmbedderContract``."""

    secret: ClassVar[str | None] = None
    tolerance: ClassVar[float] = 1e-3
    examples: ClassVar[int] = 30

    def make_embedder(self) -> Embedder:
        """A working embedder. Not needed by a class that defines the fixture ``embedder``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define make_embedder() or a fixture named embedder"
        )

    def make_broken_embedder(self) -> Embedder | None:
        """An embedder whose every request fails: no server listens, the key is wrong, …"""
        return None

    def server_bill(self) -> int | None:
        """Tokens billed so far by the server behind the embedder; None if it cannot be asked."""
        return None

    def server_requests(self) -> int | None:
        """Requests that reached the server so far, those of the broken embedder among them."""
        return None

    @pytest.fixture
    def embedder(self) -> Iterator[Embedder]:
        embedder = self.make_embedder()
        yield embedder
        embedder.close()

    @pytest.fixture
    def broken_embedder(self) -> Iterator[Embedder]:
        broken = self.make_broken_embedder()
        if broken is None:
            pytest.skip("define make_broken_embedder() to have errors tested")
        yield broken
        broken.close()

    def holds(
        self,
        claim: Callable[[Value], None],
        values: SearchStrategy[Value],
        *,
        examples: int | None = None,
    ) -> None:
        """Try a claim with many values; the same ones in every run.

        The values are drawn inside the test, so a claim may use what fixtures gave to the test.
        """

        @settings(
            max_examples=examples or self.examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(values)
        def claim_holds(value: Value) -> None:
            claim(value)

        claim_holds()

    def assert_same(self, one: Vectors, other: Vectors, why: str) -> None:
        """Two vectors of one text are the same within ``tolerance``."""
        apart = distance(one, other)
        assert apart <= self.tolerance, f"{why} (1 - cosine is {apart:.2g})"


def embed(embedder: Embedder, texts: Sequence[str], input_type: str | None = None) -> Vectors:
    """The vectors of one request, sure to be one row per text."""
    vectors = embedder.embed(EmbedRequest(texts=list(texts), input_type=input_type)).vectors
    assert isinstance(vectors, np.ndarray), (
        f"EmbedReply.vectors must be a numpy array, not {type(vectors).__name__}"
    )
    assert vectors.ndim == 2, (
        f"EmbedReply.vectors must have two dimensions (texts, width), not shape {vectors.shape}"
    )
    assert len(vectors) == len(texts), (
        f"{len(texts)} texts were sent and {len(vectors)} rows came back: there must be exactly "
        f"one for each; raise InvalidResponse if the server leaves one out"
    )
    return vectors


def several(embedder: Embedder, texts: Sequence[str] = PROBES) -> list[str]:
    """As many of these texts as fit one request; skips a model that takes one at a time."""
    most = embedder.info.max_texts_per_request
    if most < 2:
        pytest.skip("this model takes one text per request")
    return list(texts[:most])


def distance(one: Vectors, other: Vectors) -> float:
    """1 − cosine; infinite where there is no angle: widths that differ, NaN, a zero vector."""
    if one.shape != other.shape:
        return float("inf")
    left, right = one.astype(np.float64), other.astype(np.float64)
    length = float(np.sqrt((left @ left) * (right @ right)))
    apart = 1.0 - float(left @ right) / length if length > 0 else float("inf")
    return apart if np.isfinite(apart) else float("inf")
