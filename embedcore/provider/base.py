"""Conveniences for a provider's author. None is required: any ``Embedder`` will do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from embedcore.provider.protocol import BatchStrategy, Embedder, Startup, Tokenizer
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors


def startup_of(embedder: Embedder) -> Startup | None:
    """What an embedder can do before its first request. An ``Embedder`` need not have it."""
    found: Startup | None = getattr(embedder, "startup", None)
    return found


class BaseEmbedder:
    """Defaults for a small provider: set ``info``, write ``embed``, and it is one.

    The tokenizer counts UTF-8 bytes, which bounds what any byte-level model can bill; there is no
    batch API, nothing to prepare and nothing to close.
    """

    info: ModelInfo
    tokenizer: Tokenizer = EstimatingTokenizer()
    batch: BatchStrategy | None = None
    startup: Startup | None = None

    def embed(self, request: EmbedRequest) -> EmbedReply:
        raise NotImplementedError(f"{type(self).__name__} must define embed(request)")

    def close(self) -> None:
        """Nothing to release."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WrapperEmbedder:
    """Forwards everything to another embedder: override the one thing that differs.

    What changes the vectors must also change ``info.variant``, or they are taken for those of the
    wrapped model.
    """

    def __init__(self, inner: Embedder) -> None:
        self.inner = inner

    @property
    def info(self) -> ModelInfo:
        return self.inner.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self.inner.tokenizer

    @property
    def batch(self) -> BatchStrategy | None:
        return self.inner.batch

    @property
    def startup(self) -> Startup | None:
        return startup_of(self.inner)

    def embed(self, request: EmbedRequest) -> EmbedReply:
        return self.inner.embed(request)

    def close(self) -> None:
        self.inner.close()


def unit_length(vectors: Vectors) -> None:
    """Give each row length 1, in place. Rows of zeros or NaN stay what they are."""
    import numpy as np

    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))
    lengths[~(lengths > 0)] = 1.0
    np.divide(vectors, lengths[:, None], out=vectors, casting="same_kind")
