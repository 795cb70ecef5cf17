"""What do the bytes of a reply say? Strict: a reply is understood completely or refused.

Texts go out as JSON; vectors come back as base64 of little-endian float32 (or as lists of numbers
from servers that ignore the wish) and are written straight into one array.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import numpy as np
import orjson
import pybase64

from embedcore_openai.payloads import apart, payload_of, quotation_marks

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors

_FLOAT_BYTES: Final = 4
# Rows decoded at a time: enough for few calls, little enough for the caches.
_BLOCK_ROWS: Final = 32
# Larger numbers of tokens are no numbers of tokens, and do not fit a database column.
_MOST_TOKENS: Final = 2**63 - 1
NUMBERS: Final = frozenset({int, float})


class BadReply(Exception):
    """The reply cannot be trusted; the message says why and quotes nothing of it."""

    def __init__(self, reason: str, *, not_json: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.not_json = not_json


class NotUnicode(Exception):
    """The text at ``position`` cannot be written as UTF-8."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """``vectors``: C-contiguous float32 (n, d), row i for text i. ``tokens``: None unless a
    positive integer. ``model``: None unless a non-empty string."""

    vectors: Vectors
    tokens: int | None
    model: str | None


def request_body(
    model: str, texts: Sequence[str], *, encoding: str, dimensions: int | None
) -> bytes:
    """The JSON of one request. Raises ``NotUnicode`` for a text with a lone surrogate."""
    body: dict[str, object] = {"model": model, "input": list(texts), "encoding_format": encoding}
    if dimensions is not None:
        body["dimensions"] = dimensions
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError:
        for position, text in enumerate(texts):
            if not _is_unicode(text):
                raise NotUnicode(position) from None
        raise


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_reply(
    body: bytes | memoryview, *, count: int, dimensions: int | None, into: Vectors | None = None
) -> Reply:
    """Vectors for ``count`` texts, of width ``dimensions`` where that is known.

    They are written to ``into`` where that has their shape. Raises ``BadReply``.
    """
    found = apart(body)
    if found is not None:
        skeleton, payloads = found
        try:
            document, rows = _read(skeleton, count)
            if (filled := _filled(rows, payloads)) is not None:
                return _reply(document, filled, dimensions, into)
        except BadReply:
            # Read as a whole, it may say better what is wrong.
            pass
    document, rows = _read(bytes(body), count)
    return _reply(document, rows, dimensions, into)


def _read(body: bytes, count: int) -> tuple[dict[str, Any], list[Any]]:
    document = _document(body)
    items = document.get("data")
    if not isinstance(items, list):
        raise BadReply("it has no list of embeddings under 'data'")
    if len(items) != count:
        raise BadReply(f"it has {len(items)} embeddings for {count} texts")
    try:
        _refuse_repeated_keys(body, document, items)
    except RecursionError:
        raise BadReply("it is nested too deeply") from None
    return document, _rows_in_order(items)


def _filled(rows: list[Any], payloads: list[memoryview]) -> list[Any] | None:
    """The rows with their payloads; None if a payload is anywhere but in one row."""
    found = [payload_of(row, payloads) for row in rows]
    used = [one for one in found if one is not None]
    if len(used) != len(payloads):
        return None
    return [row if one is None else one for row, one in zip(rows, found, strict=True)]


def _reply(
    document: dict[str, Any], rows: list[Any], dimensions: int | None, into: Vectors | None
) -> Reply:
    return Reply(
        vectors=_vectors(rows, dimensions, into),
        tokens=tokens_in(document.get("usage")),
        model=name_in(document.get("model")),
    )


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadReply("it is not valid JSON", not_json=True) from None
    if not isinstance(document, dict):
        raise BadReply("it is not a JSON object", not_json=True)
    return document


def _refuse_repeated_keys(body: bytes, document: dict[str, Any], items: list[Any]) -> None:
    """The fast parser keeps the last of two equal keys: which vector was it then?

    Every string of a document has two quotation marks, so that fewer strings in the result than in
    the bytes mean a repeated key, or an escaped quotation mark, and the slow parser must look.
    """
    strings = strings_in({**document, "data": None})
    for item in items:
        if not isinstance(item, dict):
            raise BadReply("an entry of 'data' is not an object")
        strings += len(item)
        for name, value in item.items():
            if type(value) is str:
                strings += 1
            elif name != "embedding":
                strings += strings_in(value)
            elif type(value) is list and not NUMBERS.issuperset(map(type, value)):
                raise BadReply("an embedding has components that are not numbers")
    if quotation_marks(body) == 2 * strings:
        return
    try:
        json.loads(body, object_pairs_hook=without_repetition, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        raise BadReply("its JSON is broken", not_json=True) from None


def strings_in(value: object) -> int:
    if isinstance(value, str):
        return 1
    if isinstance(value, dict):
        return len(value) + sum(map(strings_in, value.values()))
    return sum(map(strings_in, value)) if isinstance(value, list) else 0


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadReply("a key occurs twice in one JSON object")
    return found


def refuse_constant(name: str) -> float:
    raise BadReply(f"it contains {name}, which is not a number in JSON")


def _rows_in_order(items: list[dict[str, Any]]) -> list[Any]:
    """The embeddings by their ``index``, which must be the numbers from 0, each once."""
    count = len(items)
    rows: list[Any] = [None] * count
    seen = bytearray(count)
    for item in items:
        index = item.get("index")
        # bool is an int to isinstance, and 0.0 == 0.
        if type(index) is not int or not 0 <= index < count or seen[index]:
            raise BadReply(f"its 'index' values are not 0 to {count - 1}, each once")
        seen[index] = True
        rows[index] = item.get("embedding")
    return rows


def _vectors(rows: list[Any], dimensions: int | None, wanted: Vectors | None) -> Vectors:
    if not rows:
        return np.empty((0, dimensions or 0), dtype=np.float32)
    first = row_of(rows[0])
    width = first.shape[0]
    if dimensions is not None and width != dimensions:
        raise BadReply(f"its vectors have {width} dimensions instead of {dimensions}")
    shape = (len(rows), width)
    vectors = wanted if _is_fit(wanted, shape) else np.empty(shape, dtype=np.float32)
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        into = vectors[start : start + _BLOCK_ROWS]
        if not _decoded_together(block, into):
            _decode_one_by_one(block, into)
    if not np.isfinite(vectors).all():
        raise BadReply("a vector has components that are not finite float32 numbers")
    return vectors


def _is_fit(array: Vectors | None, shape: tuple[int, int]) -> TypeGuard[Vectors]:
    return (
        array is not None
        and array.shape == shape
        and array.dtype == np.dtype("<f4")
        and array.flags.c_contiguous
        and array.flags.writeable
    )


def _decoded_together(rows: list[Any], into: Vectors) -> bool:
    """Decode base64 texts in one call; False where that is not the same as one by one.

    It is when each text is as long as its row needs and none needs padding: then no group of four
    digits belongs to two texts, and padding anywhere is an error or makes the result too short.
    """
    digits, padded = divmod(into.shape[1] * _FLOAT_BYTES * 4, 3)
    if padded or not all(type(row) is memoryview and len(row) == digits for row in rows):
        return False
    try:
        raw = pybase64.b64decode(b"".join(rows), validate=True)
    except ValueError:
        return False
    if len(raw) != into.nbytes:
        return False
    into[:] = np.frombuffer(raw, dtype="<f4").reshape(into.shape)
    return True


def _decode_one_by_one(rows: list[Any], into: Vectors) -> None:
    for position, embedding in enumerate(rows):
        row = row_of(embedding)
        if row.shape != into.shape[1:]:
            raise BadReply(f"it mixes vectors of {into.shape[1]} and {row.shape[0]} dimensions")
        into[position] = row


def row_of(embedding: object) -> Vectors:
    if isinstance(embedding, (str, memoryview)):
        return _from_base64(embedding)
    if not isinstance(embedding, list):
        raise BadReply("an embedding is neither base64 text nor a list of numbers")
    if not embedding:
        raise BadReply("an embedding is empty")
    try:
        # A number beyond float32 becomes infinite and is refused with the others of that kind.
        with np.errstate(over="ignore"):
            return np.array(embedding, dtype=np.float32)
    except OverflowError:
        raise BadReply("a component is too large for a float32 number") from None


def _from_base64(text: str | memoryview) -> Vectors:
    try:
        raw = pybase64.b64decode(text, validate=True)
    except ValueError:
        raise BadReply("an embedding is not valid base64") from None
    if not raw or len(raw) % _FLOAT_BYTES:
        raise BadReply(f"an embedding of {len(raw)} bytes is not a list of float32 numbers")
    return np.frombuffer(raw, dtype="<f4")


def tokens_in(usage: object) -> int | None:
    """What was billed. Some servers say nothing, zero or nonsense: that is None."""
    if not isinstance(usage, dict):
        return None
    named = (usage.get("prompt_tokens"), usage.get("total_tokens"))
    sound = [value for value in named if type(value) is int and 0 < value <= _MOST_TOKENS]
    return max(sound, default=None)


def name_in(model: object) -> str | None:
    return model if isinstance(model, str) and model else None
