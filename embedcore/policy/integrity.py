"""May this reply be believed? Checked before anything of it counts."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

from embedcore.errors import InvalidResponse
from embedcore.provider.types import EmbedReply, ModelInfo

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors

# No request is larger; and the price of that many still is an amount that the books can hold.
_MOST_TOKENS = 2**32
_LONGEST_NAME = 200


def checked_vectors(
    reply: object, texts: int, info: ModelInfo, *, width: int | None
) -> tuple[Vectors, list[int]]:
    """The reply's vectors as float32 of shape (texts, d), and the rows that are all zero.

    Raises ``InvalidResponse`` for a wrong count, width, type, model name or a number that is not
    finite. ``width``: what earlier replies had, where the model does not say.
    """
    if not isinstance(reply, EmbedReply):
        raise _invalid(info, f"returned {type(reply).__name__} instead of an EmbedReply", reply)
    vectors = _as_matrix(reply, info)
    if vectors.shape[0] != texts:
        raise _invalid(info, f"returned {vectors.shape[0]} vectors for {texts} texts", reply)
    expected = info.dimensions or width
    if vectors.shape[1] == 0 or (expected is not None and vectors.shape[1] != expected):
        raise _invalid(
            info, f"returned vectors of width {vectors.shape[1]}, not {expected or '≥ 1'}", reply
        )
    if (wrong := wrong_model(info, reply.model)) is not None:
        raise _invalid(info, wrong, reply)
    return vectors, _zero_rows(vectors, info, reply)


def billed_tokens(reply: EmbedReply) -> int | None:
    """What the provider says it billed, or None if that is missing or cannot be right."""
    tokens: object = reply.tokens
    # Numpy's integers are integers as well, and its booleans are none.
    if isinstance(tokens, bool) or not isinstance(tokens, Integral):
        return None
    return int(tokens) if 0 < int(tokens) <= _MOST_TOKENS else None


def identity(reply: object) -> str | None:
    """The provider's name for the request, if it is one that can be kept and shown."""
    name = reply.request_id if isinstance(reply, EmbedReply) else None
    return name[:_LONGEST_NAME] if isinstance(name, str) else None


def _as_matrix(reply: EmbedReply, info: ModelInfo) -> Vectors:
    import numpy as np

    raw: Any = reply.vectors
    try:
        if not hasattr(raw, "__array__") and not isinstance(raw, (list, tuple, memoryview)):
            raw = list(raw)
        array = np.asarray(raw)
        if array.dtype.kind not in "fiu":
            raise _invalid(info, f"returned vectors of type {array.dtype}, not numbers", reply)
        if array.ndim != 2:
            raise _invalid(info, f"returned an array of {array.ndim} dimensions, not 2", reply)
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise _invalid(
            info, f"returned vectors that are no array of numbers: {error}", reply
        ) from error


def _zero_rows(vectors: Vectors, info: ModelInfo, reply: EmbedReply) -> list[int]:
    import numpy as np

    # One pass tells both: a squared norm is not finite if a component is not, or overflows.
    norms = np.einsum("ij,ij->i", vectors, vectors)
    if not np.isfinite(norms).all() and not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise _invalid(info, f"returned a number that is not finite in vector {row}", reply)
    suspects = np.flatnonzero(norms == 0)
    return [int(row) for row in suspects if not vectors[row].any()]


def wrong_model(info: ModelInfo, name: object) -> str | None:
    """What is wrong with the name that was answered with; None if nothing is."""
    accepted = (info.model, *info.reply_models)
    if name is None or name in accepted or "*" in accepted:
        return None
    return (
        f"answered as model {str(name)[:80]!r}, not {info.model!r}; if that is the same model, add "
        "the name to reply_models"
    )


def _invalid(info: ModelInfo, what: str, reply: object) -> InvalidResponse:
    return InvalidResponse(
        f"{info.provider}:{info.model} {what}. Nothing of the reply was kept; it counts as billed",
        request_id=identity(reply),
    )
