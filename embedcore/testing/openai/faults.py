"""Faults of the fake: which request fails, and how.

All of these bill: the work was done, and the bill is for the true tokens whatever ``usage`` says.

::

    server.faults.push("rate_limited", retry_after=2)       # the next request
    server.faults.push("reset", "ok", "hang", seconds=5)    # the next three, hanging 5 s at last
    server.faults.when(marker="BAD", mode="bad_text")       # each request with such a text
    server.faults.when(probability=0.1, mode="status", status=503)
    server.faults.always("quota_exhausted")                 # whatever is left
    server.faults.clear()

``embedcore.testing.openai.modes.table()`` lists the modes, what each bills and its options;
``bills=True`` or ``bills=False`` overrides that for one fault. Faults meet requests to
``/v1/embeddings`` unless ``path`` names another one: ``/v1/batches/{id}``, say, or
``POST /v1/batches`` for one method only.

On the Files and Batch API a fault also says whether the work is done::

    server.faults.push("reset", path="POST /v1/batches", effect="before")   # nothing was done
    server.faults.push("reset", path="POST /v1/batches", effect="after")    # done, answer lost
    server.faults.push("reset", path="POST /v1/batches", effect="late", after_requests=2)

By default a mode that bills means "after", any other one "before". A "late" effect happens before
the request that follows ``after_requests`` further ones, ``after_seconds`` later, or, with neither,
when ``server.batches.land()`` is called.
"""

from __future__ import annotations

import base64
import math
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from embedcore.testing.openai.embeddings import Embeddings, encode, path_pattern
from embedcore.testing.openai.http import HttpRequest
from embedcore.testing.openai.modes import MODES, Exchange, Mode, mode

if TYPE_CHECKING:
    from embedcore.testing.openai.http import HttpReply, RequestHead


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


Predicate: TypeAlias = Callable[[HttpRequest], bool]

UNREAD = "reset_unread"
EFFECTS = ("before", "after", "late")
_OWN = {"effect", "after_requests", "after_seconds"}  # fields of a fault, not options of its mode


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A mode with its options. ``bills``: None for what the mode bills by itself.

    ``effect``, ``after_requests`` and ``after_seconds``: see the module's docstring.
    """

    mode: str = "ok"
    bills: bool | None = None
    path: str = "/v1/embeddings"
    options: Mapping[str, object] = field(default_factory=dict)
    marker: str | None = None
    effect: str | None = None
    after_requests: int | None = None
    after_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.effect not in (None, *EFFECTS):
            raise ValueError(f"no effect {self.effect!r}; there are {', '.join(EFFECTS)}")
        known = MODES.get(self.mode)
        if known is None:
            raise ValueError(f"no fault mode {self.mode!r}; there are: {', '.join(MODES)}")
        wrong = sorted(set(self.options) - known.options)
        if wrong:
            takes = ", ".join(sorted(known.options)) or "none"
            raise ValueError(f"{self.mode} has no option {wrong[0]!r}; its options: {takes}")

    @property
    def details(self) -> Mode:
        return MODES[self.mode]

    @property
    def is_billed(self) -> bool:
        return self.details.bills if self.bills is None else self.bills

    @property
    def works(self) -> str:
        """When the work of a request is done: before, after or late, as in ``EFFECTS``."""
        return self.effect or ("after" if self.is_billed else "before")

    def is_for(self, request: HttpRequest | RequestHead) -> bool:
        method, _, path = self.path.rpartition(" ")
        return method in ("", request.method) and _pattern(path).fullmatch(request.path) is not None


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return path_pattern(path)


@dataclass(kw_only=True, slots=True)
class _Rule:
    fault: Fault
    predicate: Predicate | None
    probability: float
    left: int | None

    def meets(self, request: HttpRequest, texts: Sequence[str], chance: float) -> bool:
        marker = self.fault.marker
        return (
            self.left != 0
            and self.fault.is_for(request)
            and (marker is None or any(marker in text for text in texts))
            and (self.predicate is None or self.predicate(request))
            and chance < self.probability
        )


class Faults:
    """The script of a fake server: first what was pushed, then the rules, then ``always``.

    Callable from several threads. ``seed`` makes probabilities repeatable.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._queue: list[Fault] = []
        self._rules: list[_Rule] = []
        self._always: Fault | None = None

    def push(
        self,
        *modes: str | Fault,
        times: int = 1,
        bills: bool | None = None,
        path: str = "/v1/embeddings",
        **options: object,
    ) -> None:
        """One fault for each of the next requests, in this order, ``times`` over.

        With several modes an option goes to those that take it.
        """
        faults = [
            each if isinstance(each, Fault) else made(each, bills, path, options, len(modes) > 1)
            for each in modes
        ]
        _check_used(faults, options)
        with self._lock:
            self._queue.extend(faults * times)

    def always(
        self,
        mode: str | Fault | None,
        *,
        bills: bool | None = None,
        path: str = "/v1/embeddings",
        **options: object,
    ) -> None:
        """For every request that nothing else is for; None: no fault."""
        fault = made(mode, bills, path, options) if isinstance(mode, str) else mode
        with self._lock:
            self._always = fault

    def when(
        self,
        predicate: Predicate | None = None,
        *,
        mode: str | Fault,
        marker: str | None = None,
        probability: float = 1.0,
        times: int | None = None,
        bills: bool | None = None,
        path: str = "/v1/embeddings",
        **options: object,
    ) -> None:
        """For requests that ``predicate`` picks, or with ``marker`` in a text, or by chance.

        All that are given must hold. ``times``: only for that many. Rules are tried in order.
        """
        fault = made(mode, bills, path, options) if isinstance(mode, str) else mode
        rule = _Rule(
            fault=replace(fault, marker=marker),
            predicate=predicate,
            probability=probability,
            left=times,
        )
        with self._lock:
            self._rules.append(rule)

    def clear(self) -> None:
        with self._lock:
            self._queue.clear()
            self._rules.clear()
            self._always = None

    @property
    def pending(self) -> int:
        """Pushed faults that no request has met yet."""
        with self._lock:
            return len(self._queue)

    def take(self, request: HttpRequest, texts: Sequence[str]) -> Fault | None:
        """The fault that this request meets."""
        with self._lock:
            for place, fault in enumerate(self._queue):
                if fault.is_for(request):
                    return self._queue.pop(place)
            for rule in self._rules:
                chance = self._random.random() if rule.probability < 1 else 0.0
                if rule.meets(request, texts, chance):
                    rule.left = None if rule.left is None else rule.left - 1
                    return rule.fault
            always = self._always
            return always if always is not None and always.is_for(request) else None

    def take_unread(self, head: RequestHead) -> Fault | None:
        """The fault that strikes before the body is read, if it is such a one's turn."""
        with self._lock:
            for place, fault in enumerate(self._queue):
                if fault.is_for(head):
                    return self._queue.pop(place) if fault.mode == UNREAD else None
            always = self._always
            if always is not None and always.is_for(head) and always.mode == UNREAD:
                return always
            return None


def made(
    mode: str,
    bills: bool | None,
    path: str,
    options: Mapping[str, object],
    only_known: bool = False,
) -> Fault:
    """A fault by its mode and everything else that may be said of it."""
    own = {name: value for name, value in options.items() if name in _OWN}
    known = MODES[mode].options if only_known and mode in MODES else set(options)
    taken = {name: value for name, value in options.items() if name in known - _OWN}
    fault = Fault(mode=mode, bills=bills, path=path, options=taken)
    return replace(fault, **cast(dict[str, Any], own))


def _check_used(faults: Sequence[Fault], options: Mapping[str, object]) -> None:
    for name in options:
        if name not in _OWN and not any(name in fault.options for fault in faults):
            raise ValueError(f"none of these faults has an option {name!r}")
