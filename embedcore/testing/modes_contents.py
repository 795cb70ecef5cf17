"""How does the fake answer in good form, with contents that cannot be right?

All of these bill: the work was done, and the bill is for the true tokens whatever ``usage`` says.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

import numpy as np

from embedcore.testing.embeddings_api import Embeddings, encode
from embedcore.testing.modes import Exchange, mode

if TYPE_CHECKING:
    from embedcore.testing.wire import HttpReply

_LITERAL = "@literal@"

Change = Callable[[Embeddings, Exchange], None]


def _says(*options: str) -> Callable[[Change], Change]:
    """Registers a change to an honest reply's content as a mode."""

    def register(change: Change) -> Change:
        @wraps(change)
        def apply(exchange: Exchange) -> HttpReply:
            embeddings = exchange.embeddings()
            if embeddings is None:
                return exchange.honest()
            change(embeddings, exchange)
            literal = exchange.text("literal", "NaN") if "literal" in options else "NaN"
            body = embeddings.body().replace(f'"{_LITERAL}"'.encode(), literal.encode())
            return exchange.rewritten(body)

        mode(bills=True, options=options)(apply)
        return change

    return register


@_says("count")
def fewer(embeddings: Embeddings, exchange: Exchange) -> None:
    """The last ``count`` (1) embeddings are left out."""
    del embeddings.items[-int(exchange.number("count", 1)) :]


@_says("count")
def more(embeddings: Embeddings, exchange: Exchange) -> None:
    """``count`` (1) embeddings too many, with the next indices."""
    for extra in range(int(exchange.number("count", 1))):
        index = len(embeddings.vectors) + extra
        embeddings.items.append({**embeddings.items[0], "index": index})


@_says()
def shuffled(embeddings: Embeddings, exchange: Exchange) -> None:  # noqa: ARG001
    """Every embedding with its true index, in another order."""
    embeddings.items.reverse()
    half = len(embeddings.items) // 2 if len(embeddings.items) > 3 else 0
    embeddings.items[:] = embeddings.items[half:] + embeddings.items[:half]


@_says()
def duplicate_index(embeddings: Embeddings, exchange: Exchange) -> None:  # noqa: ARG001
    """The last embedding has the index of the first (of a request of two or more)."""
    embeddings.items[-1]["index"] = embeddings.items[0]["index"]


@_says()
def missing_index(embeddings: Embeddings, exchange: Exchange) -> None:  # noqa: ARG001
    """No embedding has an index."""
    for item in embeddings.items:
        del item["index"]


@_says("value")
def index_value(embeddings: Embeddings, exchange: Exchange) -> None:
    """The first index is ``value`` (-1); "n" stands for the number of texts."""
    value = exchange.options.get("value", -1)
    embeddings.items[0]["index"] = len(embeddings.items) if value == "n" else value


@_says("literal", "position")
def component(embeddings: Embeddings, exchange: Exchange) -> None:
    """One number of the vector at ``position`` (0) is the JSON ``literal`` ("NaN"): NaN, Infinity,
    null, 1e999, "0.5". In base64 those that are numbers are packed; the others force a list."""
    place = int(exchange.number("position", 0))
    vector = embeddings.vectors[place].copy()
    number = _as_float(exchange.text("literal", "NaN"))
    if embeddings.encoding == "base64" and number is not None:
        vector[0] = number
        embeddings.items[place]["embedding"] = encode(vector, "base64")
        return
    numbers: list[object] = vector.tolist()
    numbers[0] = _LITERAL
    embeddings.items[place]["embedding"] = numbers


def _as_float(literal: str) -> float | None:
    try:
        number = float(literal)
    except ValueError:
        return None
    return number if math.isnan(number) or abs(number) < 3e38 else math.copysign(math.inf, number)


@_says("kind")
def no_vector(embeddings: Embeddings, exchange: Exchange) -> None:
    """Each text with the marker (the first one without a marker) has no vector: ``kind`` "null",
    "empty", "nulls" (a list of them) or "nan"."""
    kind, width = exchange.text("kind", "null"), embeddings.vectors.shape[1]
    nothing = {"null": None, "empty": [], "nulls": [None] * width, "nan": [math.nan] * width}
    for place, text in enumerate(exchange.answer.texts):
        is_one = place == 0 if exchange.marker is None else exchange.marker in text
        if is_one:
            embeddings.items[place]["embedding"] = nothing[kind]


@_says("position")
def zero_vector(embeddings: Embeddings, exchange: Exchange) -> None:
    """The vector at ``position`` (0) is all zeros."""
    embeddings.vectors[int(exchange.number("position", 0))] = 0


@_says("width")
def wrong_width(embeddings: Embeddings, exchange: Exchange) -> None:
    """Every vector has ``width`` numbers (one fewer than it should)."""
    width = int(exchange.number("width", embeddings.vectors.shape[1] - 1))
    embeddings.vectors = np.resize(embeddings.vectors, (len(embeddings.vectors), width))


@_says()
def mixed_width(embeddings: Embeddings, exchange: Exchange) -> None:  # noqa: ARG001
    """The last vector is one number short."""
    short = encode(embeddings.vectors[-1][:-1], embeddings.encoding)
    embeddings.items[-1]["embedding"] = short


@_says("kind")
def bad_base64(embeddings: Embeddings, exchange: Exchange) -> None:
    """The first vector is base64 with a fault of ``kind`` "alphabet", "length" (of the text) or
    "bytes" (not whole numbers)."""
    coded = base64.b64encode(embeddings.vectors[0].tobytes()).decode()
    broken = {
        "alphabet": "*" + coded[1:],
        "length": coded[:-1],
        "bytes": base64.b64encode(embeddings.vectors[0].tobytes()[:-1]).decode(),
    }
    embeddings.items[0]["embedding"] = broken[exchange.text("kind", "alphabet")]


@_says()
def big_endian(embeddings: Embeddings, exchange: Exchange) -> None:  # noqa: ARG001
    """Every vector is base64 of numbers in the wrong byte order."""
    for item, vector in zip(embeddings.items, embeddings.vectors, strict=True):
        item["embedding"] = base64.b64encode(vector.astype(">f4").tobytes()).decode()


@_says()
def float_list(embeddings: Embeddings, exchange: Exchange) -> None:  # noqa: ARG001
    """Lists of numbers, though base64 was asked for."""
    embeddings.encoding = "float"


@_says("value", "factor")
def usage(embeddings: Embeddings, exchange: Exchange) -> None:
    """Both token counts are ``value``, or the true ones multiplied by ``factor``; with neither,
    ``usage`` is left out. The value "null" makes ``usage`` itself null."""
    value = exchange.options.get("value")
    if "factor" in exchange.options:
        value = int(exchange.answer.tokens * exchange.number("factor", 1))
    elif "value" not in exchange.options:
        del embeddings.rest["usage"]
        return
    counts = {"prompt_tokens": value, "total_tokens": value}
    embeddings.rest["usage"] = None if value == "null" else counts


@_says("model")
def other_model(embeddings: Embeddings, exchange: Exchange) -> None:
    """The reply names another ``model``; "" leaves the name out."""
    name = exchange.text("model", "another-model")
    embeddings.rest["model"] = name
    if not name:
        del embeddings.rest["model"]
