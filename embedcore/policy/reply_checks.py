"""Checks of a reply before anything of it counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

from embedcore.errors import InvalidResponse, ReplyMismatch
from embedcore.provider.types import EmbedReply, ModelInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedcore.provider.types import Vectors


# No request is larger; and the price of that many still is an amount that the ledger can hold.
_MOST_TOKENS = 2**32
_LONGEST_NAME = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """The vectors of a reply that can be believed: float32 of shape (texts, d).

    ``missing``: rows that came as null, empty or NaN, never all of them. ``zeros``: rows of zeros.
    """

    vectors: Vectors
    missing: Sequence[int] = ()
    zeros: Sequence[int] = ()


def checked_vectors(reply: object, texts: int, info: ModelInfo, *, width: int | None) -> Checked:
    """What may be kept of a reply. ``width``: what earlier replies had, if the model does not say.

    Raises ``ReplyMismatch`` for another model or width, and ``InvalidResponse`` for a wrong count
    or type, an infinite number, and a reply without one usable vector.
    """
    if not isinstance(reply, EmbedReply):
        raise _invalid(info, f"returned {type(reply).__name__} instead of an EmbedReply", reply)
    vectors = _as_matrix(reply, info)
    if vectors.shape[0] != texts:
        raise _invalid(info, f"returned {vectors.shape[0]} vectors for {texts} texts", reply)
    if vectors.shape[1] == 0 and texts:
        raise _invalid(info, "returned vectors without a number", reply)
    expected = info.dimensions or width
    if expected is not None and vectors.shape[1] != expected:
        found = vectors.shape[1]
        what = f"returned vectors of width {found}, not {expected}: correct the model or dimensions"
        raise _invalid(info, what, reply, ReplyMismatch)
    if (wrong := wrong_model(info, reply.model)) is not None:
        raise _invalid(info, wrong, reply, ReplyMismatch)
    return _looked_through(vectors, info, reply)


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
        array = _as_numbers(raw)
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


def _as_numbers(raw: Any) -> NDArray[Any]:
    """As an array; a row of a list that is null or empty, or has a null in it, becomes NaN."""
    import numpy as np

    try:
        array = np.asarray(raw)
    except ValueError:
        # Rows of several lengths.
        if not isinstance(raw, (list, tuple)):
            raise
    else:
        if array.dtype != object or not isinstance(raw, (list, tuple)):
            return array
    whole = [row for row in raw if not _is_hole(row)]
    nothing = [math.nan] * (len(whole[0]) if whole else 0)
    return np.asarray([nothing if _is_hole(row) else row for row in raw])


def _is_hole(row: Any) -> bool:
    if row is None or len(row) == 0:
        return True
    return isinstance(row, (list, tuple)) and any(number is None for number in row)


def _looked_through(vectors: Vectors, info: ModelInfo, reply: EmbedReply) -> Checked:
    import numpy as np

    # One pass tells all: a squared norm is not finite if a component is not, or overflows.
    norms = np.einsum("ij,ij->i", vectors, vectors)
    zeros = [int(row) for row in np.flatnonzero(norms == 0) if not vectors[row].any()]
    suspects = np.flatnonzero(~np.isfinite(norms))
    infinite = [int(row) for row in suspects if np.isinf(vectors[row]).any()]
    if infinite:
        raise _invalid(info, f"returned a number that is not finite in vector {infinite[0]}", reply)
    missing = [int(row) for row in suspects if np.isnan(vectors[row]).any()]
    if missing and len(missing) == len(vectors):
        raise _invalid(info, "returned null, nothing or NaN instead of every vector", reply)
    return Checked(vectors=vectors, missing=missing, zeros=zeros)


def wrong_model(info: ModelInfo, name: object) -> str | None:
    """What is wrong with the name that was answered with; None if nothing is."""
    accepted = (info.model, *info.reply_models)
    if name is None or name in accepted or "*" in accepted:
        return None
    return (
        f"answered as model {str(name)[:80]!r}, not {info.model!r}; if that is the same model, add "
        "the name to reply_models"
    )


def _invalid(
    info: ModelInfo, what: str, reply: object, kind: type[InvalidResponse] = InvalidResponse
) -> InvalidResponse:
    return kind(
        f"{info.provider}:{info.model} {what}. Nothing of the reply was kept; it counts as billed",
        request_id=identity(reply),
    )
