"""Is the model behind a name still the one that made the vectors which are kept?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from embedcore.storage.keys import Keys, Origin

if TYPE_CHECKING:
    from embedcore.provider.types import ModelInfo, Vectors
    from embedcore.storage.vectors import VectorStore

PROBE_TEXT: Final = "A lighthouse keeper counts ships, stars and the hours until the fog lifts."
# Services that compute on many machines answer the same text with vectors that differ in the last
# digits; another model, or another version of one, is far below.
SAME_ABOVE: Final = 0.999


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """``cosine``: of the vector now and the one that is kept; None: this is the first."""

    cosine: float | None

    @property
    def changed(self) -> bool:
        """Another model answers: its vectors do not belong to those that are kept."""
        return self.cosine is not None and self.cosine < SAME_ABOVE


def probe(store: VectorStore, info: ModelInfo, fingerprint: str, vectors: Vectors) -> Probe:
    """Compare the vector of ``PROBE_TEXT``, of shape (1, d), with the first one ever kept.

    The first is kept under a key of its own, and goes when the model's vectors are pruned. Raises
    ``StorageError``.
    """
    import numpy as np

    own = f"{fingerprint} probe"
    keys = Keys(provider=info.provider, model=info.model, fingerprint=own, input_type=None)
    (key,) = keys.of([PROBE_TEXT])
    kept: list[Vectors] = []

    def take(_: Sequence[int], found: Vectors) -> None:
        kept.append(found)

    store.get([key], None, take)
    if not kept:
        origin = Origin(model=f"{info.provider}:{info.model}", fingerprint=own)
        store.put([key], vectors, origin)
        return Probe(cosine=None)
    if kept[0].shape != vectors.shape:
        return Probe(cosine=0.0)
    before, now = kept[0][0].astype(np.float64), vectors[0].astype(np.float64)
    lengths = float(np.linalg.norm(before) * np.linalg.norm(now))
    return Probe(cosine=float(before @ now) / lengths if lengths else 0.0)
