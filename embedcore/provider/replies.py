"""Replies of OpenAI-like servers: bytes in, checked vectors out.

For every provider that speaks HTTP, without its SDK::

    return replies.read(response.status, response.headers, response.read(), asked)

Strict: a reply is understood completely or refused. Only a vector that is missing at a known place
leaves the others as they are. Vectors come as base64 of little-endian float32, or as lists of
numbers, and are written straight into one array.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import numpy as np
import orjson
import pybase64

from embedcore.errors import EmbeddingError, InputRejected, InvalidResponse, ReplyMismatch
from embedcore.provider import rate_headers, refusals
from embedcore.provider.error_bodies import usage_of
from embedcore.provider.payloads import (
    apart,
    filled,
    has_more_parts,
    quotation_marks,
    strings_in,
    strings_in_entries,
)
from embedcore.provider.types import EmbedReply

if TYPE_CHECKING:
    from embedcore.provider.refusals import Asked
    from embedcore.provider.types import Vectors

_FLOAT_BYTES: Final = 4
# Rows decoded at a time: enough for few calls, little enough for the caches.
_BLOCK_ROWS: Final = 16
NUMBERS: Final = frozenset({int, float})
# A component may be null, or "NaN" as the JSON of Protocol Buffers has it.
_NUMBERS_AND_NONE: Final = NUMBERS | {type(None), str}

# A component takes at most 25 characters as JSON text, and 5.4 as base64.
_BYTES_PER_COMPONENT: Final = 32
_BYTES_BESIDE: Final = 1_000_000
_WIDEST: Final = 16_384
# What a document may hold for each text beside its vector, and besides: numbers, and an object,
# a list or a string for eight of them.
_PARTS_PER_TEXT: Final = 2_048
_PARTS_BESIDE: Final = 65_536

# No component of a vector is larger. Bytes that are int8, float64 or in another order, taken for
# float32, have any exponent: of every four numbers about one is.
_LARGEST: Final = 1e15
_MOST_OF_THEM_LARGE: Final = 1 / 16

_BOM: Final = b"\xef\xbb\xbf"
_BLANK: Final = b" \t\r\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Where a reply has its vectors.

    ``rows``: the names that lead to the list of them. ``vector``: the name of the vector in an
    entry of it; None: the entry is the vector. ``numbered``: entries have an ``index``; otherwise
    they are in the order of the texts.
    """

    rows: tuple[str, ...] = ("data",)
    vector: str | None = "embedding"
    numbered: bool = True


OPENAI: Final = Form()


class BadReply(Exception):
    """The reply cannot be trusted; the message says why and quotes nothing of it.

    ``mismatch``: it is well-formed, and of other vectors than were asked for.
    """

    def __init__(self, reason: str, *, not_json: bool = False, mismatch: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.not_json = not_json
        self.mismatch = mismatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """``vectors``: C-contiguous float32 (n, d), row i for text i; a row of NaN where the reply has
    none for its text. ``tokens``: None unless positive. ``model``: None unless a non-empty string.
    """

    vectors: Vectors
    tokens: int | None
    model: str | None


def request_body(
    model: str,
    texts: Sequence[str],
    *,
    encoding: str | None = None,
    dimensions: int | None = None,
    more: Mapping[str, object] | None = None,
) -> bytes:
    """The JSON of one request; ``more``: further fields of it.

    Raises ``InputRejected`` for a text with a lone surrogate.
    """
    body: dict[str, object] = {"model": model, "input": list(texts)}
    if encoding is not None:
        body["encoding_format"] = encoding
    if dimensions is not None:
        body["dimensions"] = dimensions
    return json_body({**body, **(more or {})}, texts)


def nothing(dimensions: int | None) -> EmbedReply:
    """The reply to a request without texts, which is never sent. ``dimensions``: as in ``info``."""
    return EmbedReply(vectors=np.empty((0, dimensions or 0), dtype=np.float32), tokens=0)


def json_body(document: Mapping[str, object], texts: Sequence[str]) -> bytes:
    """The JSON of a request, in which ``texts`` stand somewhere.

    Raises ``InputRejected`` for a text with a lone surrogate.
    """
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError:
        for position, text in enumerate(texts):
            if not _is_unicode(text):
                raise InputRejected(
                    "a text is no valid Unicode (a lone surrogate)",
                    position=position,
                    reason="no valid Unicode",
                ) from None
        raise


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def most_bytes(count: int, dimensions: int | None) -> int:
    """The size beyond which no honest reply for so many texts goes."""
    return count * (dimensions or _WIDEST) * _BYTES_PER_COMPONENT + _BYTES_BESIDE


def read(
    status: int,
    headers: Mapping[str, str],
    body: bytes | memoryview,
    asked: Asked,
    *,
    dimensions: int | None = None,
    trust_order: bool = False,
    form: Form = OPENAI,
    into: Vectors | None = None,
) -> EmbedReply:
    """The reply to one request of ``asked.texts``.

    ``dimensions``: the width, where it is known. ``trust_order``: without a complete ``index`` the
    order of the reply counts. ``form``: of another service than OpenAI's. ``into``: an array to
    write to, where it has the right shape.

    Raises what ``refusals.translate`` gives for any other status than a success,
    ``InvalidResponse``, and ``ReplyMismatch`` for another width.
    """
    outcome = _understood(status, headers, body, asked, dimensions, trust_order, form, into)
    if isinstance(outcome, EmbeddingError):
        # The reply may repeat the key: it must not be seen in a frame of the error.
        del body, headers
        raise outcome
    return outcome


def _understood(
    status: int,
    headers: Mapping[str, str],
    body: bytes | memoryview,
    asked: Asked,
    dimensions: int | None,
    trust_order: bool,
    form: Form,
    into: Vectors | None,
) -> EmbedReply | EmbeddingError:
    if not 200 <= status < 300:
        return refusals.translate(status, headers, body, asked)
    try:
        reply = parse_reply(
            body,
            count=len(asked.texts),
            dimensions=dimensions,
            trust_order=trust_order,
            form=form,
            into=into,
        )
    except BadReply as bad:
        failure = bad
    else:
        headers = rate_headers.lowered(headers)
        return EmbedReply(
            vectors=reply.vectors,
            tokens=reply.tokens,
            model=None if reply.model is None else _shown_name(reply.model, asked),
            request_id=refusals.request_id(headers, asked),
            limits=rate_headers.rate_limits(headers),
        )
    # Not inside the handler, where the frames of the parser would become its context.
    return _distrusted(failure, status, headers, body, asked, form)


def _shown_name(model: str, asked: Asked) -> str:
    return model if model in (asked.model, *asked.reply_models) else asked.shown(model)


def _distrusted(
    bad: BadReply,
    status: int,
    headers: Mapping[str, str],
    body: bytes | memoryview,
    asked: Asked,
    form: Form,
) -> EmbeddingError:
    """The error for a success whose body is not one."""
    inner = None if bad.mismatch else refusals.error_within(status, headers, body, asked)
    if inner is not None:
        return inner
    headers = rate_headers.lowered(headers)
    found = refusals.error_body(headers, body)
    reason, said = bad.reason, ""
    if found.known and found.message and not bad.mismatch:
        said = f"; it says: {asked.shown(found.message)}"
    elif bad.not_json:
        start = asked.shown(bytes(body[:2_000]).decode("utf-8", "replace"))
        content = asked.shown(headers.get("content-type", "of unknown type"))[:60]
        reason = reason if start else "it is empty"
        said = f"; {content}: {start[:200]}" if start else ""
        said += "; is base_url right?" + (" Most end in /v1" if form == OPENAI else "")
    kind = ReplyMismatch if bad.mismatch else InvalidResponse
    return kind(
        f"the reply of {asked.endpoint} for {asked.model!r} cannot be trusted: {reason}{said}",
        billed="unknown" if found.known and not bad.mismatch else None,
        status=status,
        code=asked.shown(found.code)[:80] or None,
        request_id=refusals.request_id(headers, asked),
    )


def parse_reply(
    body: bytes | memoryview,
    *,
    count: int,
    dimensions: int | None,
    trust_order: bool = False,
    form: Form = OPENAI,
    into: Vectors | None = None,
) -> Reply:
    """Vectors for ``count`` texts, of width ``dimensions`` where that is known.

    They are written to ``into`` where that has their shape. Raises ``BadReply``.
    """
    body = _without_bom(body)
    most = count * ((dimensions or _WIDEST) + _PARTS_PER_TEXT) + _PARTS_BESIDE
    found = apart(body, most)
    if found is not None:
        skeleton, payloads = found
        try:
            document, rows = _read(skeleton, count, most, trust_order, form)
            if (whole := filled(rows, payloads)) is not None:
                return _reply(document, whole, dimensions, into)
        except BadReply:
            # Read as a whole, it may say better what is wrong.
            pass
    document, rows = _read(bytes(body), count, most, trust_order, form)
    return _reply(document, rows, dimensions, into)


def _without_bom(body: bytes | memoryview) -> bytes | memoryview:
    head = bytes(body[:64])
    rest = head.lstrip(_BLANK)
    return body[len(head) - len(rest) + len(_BOM) :] if rest.startswith(_BOM) else body


def _read(
    body: bytes, count: int, most: int, trust_order: bool, form: Form
) -> tuple[dict[str, Any], list[Any]]:
    if has_more_parts(body, most):
        raise BadReply("it has far more parts than vectors for these texts can have")
    document = _document(body)
    entries = _entries(document, form)
    if len(entries) != count:
        raise BadReply(f"it has {len(entries)} embeddings for {count} texts")
    try:
        # A list of bare vectors is read as one whose entries have nothing beside.
        items = [{"embedding": each} for each in entries] if form.vector is None else entries
        rows = _rows_in_order(items, form, trust_order)
        _refuse_repeated_keys(body, document, entries, form)
    except RecursionError:
        raise BadReply("it is nested too deeply") from None
    return document, rows


def _entries(document: dict[str, Any], form: Form) -> list[Any]:
    found: object = document
    for name in form.rows:
        found = found.get(name) if isinstance(found, dict) else None
    if not isinstance(found, list):
        raise BadReply(f"it has no list of embeddings under '{'.'.join(form.rows)}'")
    return found


def _reply(
    document: dict[str, Any], rows: list[Any], dimensions: int | None, into: Vectors | None
) -> Reply:
    return Reply(
        vectors=_vectors(rows, dimensions, into),
        tokens=usage_of(document),
        model=name_in(document.get("model")),
    )


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        document = _slowly(body)
    if not isinstance(document, dict):
        raise BadReply("it is not a JSON object", not_json=True)
    return document


def _slowly(body: bytes) -> Any:
    """What the fast parser does not take: NaN, which is no JSON and yet what some servers write."""
    try:
        return json.loads(
            body, object_pairs_hook=without_repetition, parse_constant=_only_not_a_number
        )
    except (ValueError, RecursionError):
        raise BadReply("it is not valid JSON", not_json=True) from None


def _only_not_a_number(name: str) -> float:
    return float("nan") if name == "NaN" else refuse_constant(name)


def _refuse_repeated_keys(
    body: bytes, document: dict[str, Any], entries: list[Any], form: Form
) -> None:
    """The fast parser keeps the last of two equal keys: which vector was it then?

    Every string of a document has two quotation marks, so that fewer strings in the result than in
    the bytes mean a repeated key, or an escaped quotation mark, and the slow parser must look.
    """
    strings = strings_in(_without(document, form.rows))
    strings += strings_in_entries(entries, form.vector)
    if quotation_marks(body) != 2 * strings:
        try:
            _slowly(body)
        except BadReply as bad:
            raise BadReply(
                "its JSON is broken" if bad.not_json else bad.reason, not_json=bad.not_json
            ) from None


def _without(document: dict[str, Any], rows: Sequence[str]) -> dict[str, Any]:
    """The document with None in place of the list of embeddings."""
    first, *rest = rows
    return {**document, first: _without(document[first], rest) if rest else None}


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadReply("a key occurs twice in one JSON object")
    return found


def refuse_constant(name: str) -> float:
    raise BadReply(f"it contains {name}, which is not a number in JSON")


def _rows_in_order(items: list[Any], form: Form, trust_order: bool) -> list[Any]:
    """The embeddings by their ``index``, which must be the numbers from 0, each once.

    Where exactly one is missing, and the others are different, it can only be the number that is
    left: some servers leave out what is zero.
    """
    if not form.numbered:
        return [_usable(_entry(item, form), form) for item in items]
    if (plain := _in_order_already(items, form)) is not None:
        return plain
    count = len(items)
    rows: list[Any] = [None] * count
    seen = bytearray(count)
    without: list[Any] = []
    for item in items:
        embedding = _usable(_entry(item, form), form)
        index = item.get("index")
        if index is None:
            without.append(embedding)
        # bool is an int to isinstance, and 0.0 == 0.
        elif type(index) is int and 0 <= index < count and not seen[index]:
            seen[index] = True
            rows[index] = embedding
        elif not trust_order:
            raise BadReply(f"its 'index' values are not 0 to {count - 1}, each once")
        else:
            break
    else:
        if len(without) == 1:
            rows[seen.index(0)] = without[0]
        if len(without) <= 1:
            return rows
    if trust_order:
        return [_usable(_entry(item, form), form) for item in items]
    raise BadReply(
        f"{len(without)} of its {count} embeddings have no 'index' (if the server keeps the "
        "order of the texts, say so: trust_order = true)"
    )


def _in_order_already(items: list[Any], form: Form) -> list[Any] | None:
    """The embeddings of a usual reply: each a text, under the number of its place; else None."""
    if set(map(type, items)) != {dict}:
        return None
    numbers = [item.get("index") for item in items]
    if set(map(type, numbers)) != {int} or numbers != list(range(len(items))):
        return None
    name = form.vector or "embedding"
    found = [item.get(name) for item in items]
    return found if set(map(type, found)) == {str} and all(found) else None


def _entry(item: object, form: Form) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadReply(f"an entry of '{'.'.join(form.rows)}' is not an object")
    return item


def _usable(item: dict[str, Any], form: Form) -> object:
    """The embedding; None for one that is there and is no vector: null, empty, or with nulls."""
    name = form.vector or "embedding"
    if name not in item:
        raise BadReply(f"an entry of '{'.'.join(form.rows)}' has no '{name}'")
    embedding = item[name]
    if embedding is None or embedding == "" or embedding == []:
        return None
    if isinstance(embedding, list):
        kinds = set(map(type, embedding))
        if kinds <= NUMBERS:
            return embedding
        if kinds <= _NUMBERS_AND_NONE and all(map(_is_no_text, embedding)):
            return None
        raise BadReply("an embedding has components that are not numbers")
    if not isinstance(embedding, str | memoryview):
        raise BadReply("an embedding is neither base64 text nor a list of numbers")
    return embedding


def _is_no_text(component: object) -> bool:
    return not isinstance(component, str) or component.lower() == "nan"


def _vectors(rows: list[Any], dimensions: int | None, wanted: Vectors | None) -> Vectors:
    if not rows:
        return np.empty((0, dimensions or 0), dtype=np.float32)
    present = [row for row in rows if row is not None]
    if not present:
        raise BadReply(f"none of its {len(rows)} embeddings is a vector: null, empty or NaN")
    width = row_of(present[0]).shape[0]
    if dimensions is not None and width != dimensions:
        raise _wrong_width(present, width, dimensions)
    shape = (len(rows), width)
    vectors = wanted if _is_fit(wanted, shape) else np.empty(shape, dtype=np.float32)
    are_usual = True
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = rows[start : start + _BLOCK_ROWS]
        into = vectors[start : start + _BLOCK_ROWS]
        if not _decoded_together(block, into):
            _decode_one_by_one(block, into)
        # None is large, infinite or NaN where the sum of their squares is small.
        are_usual = are_usual and bool(np.einsum("ij,ij->", into, into) <= _LARGEST**2)
    # That needs arrays of the reply's size, which the heap of each thread would keep.
    if not are_usual:
        if not all(isinstance(row, list) for row in present):
            _refuse_other_numbers(vectors)
        if not np.isfinite(vectors).all():
            _blank_rows_of_nan(vectors)
    return vectors


def _refuse_other_numbers(vectors: Vectors) -> None:
    """Base64 of other numbers than float32 is as long as that of a vector of another width."""
    with np.errstate(invalid="ignore"):
        large = np.count_nonzero((np.abs(vectors) > _LARGEST) & np.isfinite(vectors))
    if large > vectors.size * _MOST_OF_THEM_LARGE:
        raise BadReply(
            "what it has as base64 are no float32 numbers (int8, float64 or another order of "
            'bytes?); if the server can send lists of numbers, set encoding = "float"'
        )


def _wrong_width(rows: list[Any], width: int, dimensions: int) -> BadReply:
    if any(row_of(row).shape[0] != width for row in rows):
        return BadReply(f"it mixes vectors of {width} and other numbers of dimensions")
    return BadReply(f"its vectors have {width} dimensions instead of {dimensions}", mismatch=True)


def _blank_rows_of_nan(vectors: Vectors) -> None:
    """A row with NaN is no vector at all. Infinite numbers are another fault."""
    if np.isinf(vectors).any():
        raise BadReply("a vector has components that are not finite float32 numbers")
    missing = np.isnan(vectors).any(axis=1)
    if missing.all():
        raise BadReply(f"none of its {len(vectors)} embeddings is a vector: null, empty or NaN")
    vectors[missing] = np.nan


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
    if padded or set(map(type, rows)) != {memoryview} or set(map(len, rows)) != {digits}:
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
        if embedding is None:
            into[position] = np.nan
            continue
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


def name_in(model: object) -> str | None:
    return model if isinstance(model, str) and model else None
