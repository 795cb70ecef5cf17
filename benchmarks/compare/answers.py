"""What does the fake server answer to a request for vectors, and what does it charge for it?

The answers to the corpus' texts are prepared, so that assembling a reply is putting pieces in a
row. Any other text, as when a client alters one, is answered too, a little more slowly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import orjson
import pybase64

from compare import truth
from compare.limits import Limit, RateLimiter
from compare.tokens import Counter

MAX_TEXTS: Final = 2_048
MAX_TOKENS: Final = 300_000
MAX_TEXT_TOKENS: Final = 8_192

_FIRST: Final = b'{"object":"list","data":['
_NEXT: Final = tuple(
    (b"" if position == 0 else b"},") + b'{"object":"embedding","index":%d,"embedding":' % position
    for position in range(MAX_TEXTS)
)
_LAST: Final = (
    b'}],"model":"text-embedding-3-small","usage":{"prompt_tokens":%d,"total_tokens":%d}}'
)


@dataclass(kw_only=True)
class Meter:
    """What happened since the last reset. ``billed`` counts the tokens of answered requests."""

    requests: int = 0
    answered: int = 0
    throttled: int = 0
    refused: int = 0
    texts: int = 0
    billed: int = 0
    unknown_texts: int = 0
    most_in_flight: int = 0
    formats: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    parts: Sequence[bytes]
    headers: bytes = b""


class Refusal(Exception):
    """A request that breaks a rule of the API: 400, with OpenAI's own words."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class Answers:
    def __init__(self, texts: Sequence[str], counter: Counter) -> None:
        self._counter = counter
        self._prepared: dict[str, tuple[bytes, int]] = {}
        for start in range(0, len(texts), 500):
            self._prepare(texts[start : start + 500])
        self.meter = Meter()
        self._limiter: RateLimiter | None = None

    @property
    def counted(self) -> str:
        """How tokens are counted: by tiktoken, or by an estimate."""
        return self._counter.how

    def reset(self, limit: Limit | None) -> None:
        """Start the meter again, with full buckets or without limits."""
        self.meter = Meter()
        self._limiter = None if limit is None else RateLimiter(limit)

    def answer(self, body: bytes) -> Answer:
        """Never raises: a broken request is answered as the API would."""
        self.meter.requests += 1
        try:
            request = orjson.loads(body)
            texts = self._texts(request.get("input"))
            fragments = [self._prepared.get(text) or self._fresh(text) for text in texts]
            tokens = sum(count for _, count in fragments)
            self._check(tokens, [count for _, count in fragments])
        except (orjson.JSONDecodeError, AttributeError):
            return self._refuse(Refusal("We could not parse the JSON body of your request."))
        except Refusal as refusal:
            return self._refuse(refusal)
        if self._limiter is not None:
            wait, kind = self._limiter.take(tokens)
            if wait > 0:
                return self._throttle(wait, kind, self._limiter)
        return self._grant(request, texts, fragments, tokens)

    def _grant(
        self,
        request: dict[str, Any],
        texts: Sequence[str],
        fragments: Sequence[tuple[bytes, int]],
        tokens: int,
    ) -> Answer:
        encoding = request.get("encoding_format") or "float"
        meter = self.meter
        meter.answered += 1
        meter.texts += len(texts)
        meter.billed += tokens
        meter.formats[encoding] = meter.formats.get(encoding, 0) + 1
        parts = [_FIRST]
        if encoding == "base64":
            for prefix, (fragment, _) in zip(_NEXT, fragments, strict=False):
                parts.append(prefix)
                parts.append(fragment)
        else:
            for prefix, row in zip(_NEXT, truth.vectors(texts), strict=False):
                parts.append(prefix)
                parts.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY))
        parts.append(_LAST % (tokens, tokens))
        return Answer(status=200, parts=parts, headers=self._headers())

    def _texts(self, given: object) -> list[str]:
        """The input as texts; a list of tokens, or of such lists, is turned back into them."""
        if isinstance(given, str) or (
            isinstance(given, list) and given and isinstance(given[0], int)
        ):
            given = [given]
        if not isinstance(given, list) or not given:
            raise Refusal("'$.input' is invalid.")
        if len(given) > MAX_TEXTS:
            raise Refusal(
                f"Invalid 'input': array too long. Expected an array with maximum length "
                f"{MAX_TEXTS}, but got an array with length {len(given)} instead.",
                "array_above_max_length",
            )
        texts = [one if isinstance(one, str) else self._counter.text(one) for one in given]
        if "" in texts:
            raise Refusal("Invalid 'input': input cannot be an empty string.")
        return texts

    @staticmethod
    def _check(tokens: int, counts: Sequence[int]) -> None:
        for position, count in enumerate(counts):
            if count > MAX_TEXT_TOKENS:
                raise Refusal(f"Invalid 'input[{position}]': maximum input length is 8192 tokens.")
        if tokens > MAX_TOKENS:
            raise Refusal(
                f"Requested {tokens} tokens, max {MAX_TOKENS} tokens per request",
                "max_tokens_per_request",
            )

    def _prepare(self, texts: Sequence[str]) -> None:
        for text, row in zip(texts, truth.vectors(texts), strict=True):
            self._prepared[text] = (_quoted(row), self._counter.count(text))

    def _fresh(self, text: str) -> tuple[bytes, int]:
        self.meter.unknown_texts += 1
        return _quoted(truth.vectors([text])[0]), self._counter.count(text)

    def _headers(self) -> bytes:
        return b"" if self._limiter is None else self._limiter.headers()

    def _refuse(self, refusal: Refusal) -> Answer:
        self.meter.refused += 1
        return Answer(
            status=400,
            parts=[_error(str(refusal), "invalid_request_error", refusal.code)],
            headers=self._headers(),
        )

    def _throttle(self, wait: float, kind: str, limiter: RateLimiter) -> Answer:
        self.meter.throttled += 1
        milliseconds = math.ceil(wait * 1000)
        message = (
            f"Rate limit reached for text-embedding-3-small on {kind} per min. "
            f"Please try again in {milliseconds}ms."
        )
        named = f"retry-after-ms: {milliseconds}\r\nretry-after: {math.ceil(wait)}\r\n"
        return Answer(
            status=429,
            parts=[_error(message, kind, "rate_limit_exceeded")],
            headers=named.encode() + limiter.headers(),
        )


def _quoted(row: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    return b'"' + pybase64.b64encode(row.astype("<f4").tobytes()) + b'"'


def _error(message: str, kind: str, code: str | None) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})
