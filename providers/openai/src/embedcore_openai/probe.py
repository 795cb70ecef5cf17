"""A probe: finds by a few cheap requests which options fit a server with OpenAI's API.

Nothing is sent before ``Probe.run``. Every text is a letter or a number, but two long ones.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit, urlunsplit

import orjson
from pydantic import SecretStr

from embedcore.errors import ConfigurationError, EmbeddingError, InvalidResponse
from embedcore.provider import http
from embedcore.provider.batch_errors import Context
from embedcore.provider.error_bodies import read_body
from embedcore_openai import models
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.presets import PRESETS
from embedcore_openai.session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.provider.types import Price

    Vector = NDArray[np.float32]

# The same beginning, longer than what nearly all models read, and two ends.
_LONG: Final = "a " * 9_000
_ENDS: Final = ("b " * 300, "c " * 300)
# Ends of 300 in 9,300 words move a vector further than this; what computes it twice does not.
_EQUAL: Final = 1 - 1e-5
_PAIR: Final = ("one", "two")
_SIZES: Final = (16, 32, 64, 128, 256, 512, 1024, 2048)
_SMALL_SIZES: Final = (8, 4, 2)
_REFUSED: Final = frozenset({400, 413, 422, 500})
_FREE: Final = frozenset({400, 401, 403, 404, 405, 413, 422, 429})
_MOST_BYTES: Final = 1 << 28
# Which servers say it in "owned_by" of their models.
_OWNERS: Final = ("vllm", "sglang", "llamacpp", "infinity")
# And which in a header of each reply: header → preset.
_HEADERS: Final = {"x-litellm-version": "litellm-proxy"}


@dataclass(kw_only=True, slots=True)
class Seen:
    """One reply. ``status`` 0: there was none. ``rows``: index as sent, and the vector."""

    status: int
    rows: list[tuple[object, Vector]] = field(default_factory=list)
    said: str = ""
    usage: int | None = None
    in_base64: bool = False
    model: object = None

    @property
    def taken(self) -> bool:
        return self.status == 200 and bool(self.rows)

    @property
    def width(self) -> int:
        return len(self.rows[0][1]) if self.rows else 0


class Probe:
    """The probe of one server. ``key``: sent with each request; None: no key is.

    Raises ``ConfigurationError`` for an address that no request may go to.
    """

    most_requests: Final = 21
    # No text has more tokens than bytes: of all requests together.
    most_tokens: Final = 2 * len(_LONG) + sum(map(len, _ENDS)) + 5 * sum(_SIZES) + 200

    def __init__(
        self, url: str, *, model: str | None = None, key: str | None = None, timeout: float = 60.0
    ) -> None:
        self._options = OpenAIOptions(
            base_url=url, api_key=None if key is None else SecretStr(key), timeout=timeout
        )
        self._model = model
        self._sessions: dict[str, Session] = {}
        self._context = Context(
            model=model or "", endpoint=self._options.base_url, secrets=[key] if key else []
        )
        self._owner = ""
        self._by_header: str | None = None
        self.requests = 0
        self.tokens = 0
        self.reported = True

    @property
    def address(self) -> str:
        return self._options.base_url

    @property
    def reach(self) -> str:
        """ "loopback", "private" or "public"."""
        return self._options.endpoint.reach

    def price_of(self, model: str) -> Price | None:
        """What the model costs by the provider's table; None: nothing is known."""
        return models.describe(model, self._options).price

    def choose_model(self) -> tuple[str, list[str]]:
        """The model to ask, and those that the server lists. One or two requests, which are free.

        Raises ``ConfigurationError`` where none is named and the server lists none.
        """
        listed: list[str] = []
        for url in self._addresses():
            answer = self._get(url, "/models")
            found = answer.get("data") if isinstance(answer, dict) else answer
            if isinstance(found, list):
                entries = [one for one in found if isinstance(one, dict) and "id" in one]
                listed = [self._without_key(str(one["id"])) for one in entries]
                self._owner = str(entries[0].get("owned_by", "")) if entries else ""
                self._options = self._options.model_copy(update={"base_url": url})
                break
        likely = [name for name in listed if "embed" in name.lower()]
        chosen = self._model or next(iter(likely or listed), None)
        if chosen is None:
            raise ConfigurationError(
                f"{self.address} lists no models: name one by "
                f"embedcore provider probe {self.address} --model NAME"
            )
        self._model = chosen
        return chosen, listed

    def run(self) -> dict[str, Any]:
        """Ask, and return what was found: ``options`` to set, and ``findings`` as text.

        Raises the error of the first request where the server gives no vectors.
        """
        try:
            return self._run()
        finally:
            for session in self._sessions.values():
                session.close()

    def _run(self) -> dict[str, Any]:
        plain = self._first()
        options: dict[str, Any] = {"base_url": self.address}
        findings: dict[str, str] = {"width": str(plain.width), "norm": self._norms(plain)}
        self._index(plain, options, findings)
        accepted = self._encodings(plain, options, findings)
        self._dimensions(plain, options, findings)
        info, props = self._said_of_itself(options, findings)
        self._truncation(options, findings)
        self._sizes(info, options, findings)
        empty = self._ask(["", "one"])
        findings["empty text"] = "taken" if empty.taken else f"refused ({empty.status})"
        findings["usage"] = self._usage(plain)
        if plain.model not in (None, self._model):
            options["reply_models"] = [self._without_key(str(plain.model))]
        return {
            "address": self.address,
            "model": self._model,
            "options": options,
            "findings": findings,
            "preset": self._preset(options, accepted, info=info, props=props),
            "presets_that_fit": fitting(options, accepted),
            "requests": self.requests,
            "tokens": self.tokens,
            "tokens_reported": self.reported,
        }

    def _first(self) -> Seen:
        """Two texts as every server takes them. Raises where there are no vectors."""
        for url in self._addresses():
            self._options = self._options.model_copy(update={"base_url": url})
            seen = self._ask(_PAIR, must_answer=True)
            if seen.status != 404:
                break
        if not seen.taken or len(seen.rows) != len(_PAIR):
            raise InvalidResponse(
                f"{self.address} gives no vectors for {self._model!r}: HTTP {seen.status}"
                + (f", {self._context.shown(seen.said)}" if seen.said else ""),
                billed="no" if seen.status in _FREE else "unknown",
            )
        return seen

    def _addresses(self) -> list[str]:
        """The one that was given, and where it has no path the usual one."""
        url = self.address
        return [url] if urlsplit(url).path else [f"{url}/v1", url]

    def _norms(self, plain: Seen) -> str:
        import numpy as np

        return ", ".join(sorted({f"{np.linalg.norm(row):.4g}" for _, row in plain.rows}))

    def _index(self, plain: Seen, options: dict[str, Any], findings: dict[str, str]) -> None:
        numbers = [number for number, _ in plain.rows]
        alone = self._ask(_PAIR[1:])
        in_order = alone.taken and _same(alone.rows[0][1], plain.rows[1][1])
        if numbers == [0, 1]:
            findings["index"] = "on every vector"
        elif numbers == [None, 1]:
            findings["index"] = "left out where it is 0"
        else:
            findings["index"] = "left out"
            if in_order:
                options["trust_order"] = True
        findings["order"] = (
            "that of the texts" if in_order else "not that of the texts, or unsteady"
        )

    def _encodings(
        self, plain: Seen, options: dict[str, Any], findings: dict[str, str]
    ) -> frozenset[str]:
        """What it takes as ``encoding_format``, "omit" among them."""
        accepted = {"omit"}
        coded = self._ask(_PAIR, {"encoding_format": "base64"})
        same = coded.taken and _same(coded.rows[0][1], plain.rows[0][1])
        if same:
            accepted.add("base64")
        floats = self._ask(_PAIR, {"encoding_format": "float"})
        if floats.taken and not floats.in_base64:
            accepted.add("float")
        # A server that is asked for base64 and answers with numbers gives them without, too.
        best = "base64" if same and coded.in_base64 else "float" if "float" in accepted else "omit"
        options["encoding"] = best
        findings["base64"] = (
            ("given" if coded.in_base64 else "ignored") if same else f"refused ({coded.status})"
        )
        return frozenset(accepted)

    def _dimensions(self, plain: Seen, options: dict[str, Any], findings: dict[str, str]) -> None:
        half = max(plain.width // 2, 1)
        for name in ("dimensions", "output_dimension"):
            seen = self._ask(_PAIR, {name: half})
            if seen.taken and seen.width == half and half != plain.width:
                options["dimensions_field"] = name
                findings["shorter vectors"] = f"by the field {name}"
                return
        options["dimensions_field"] = "none"
        findings["shorter vectors"] = "no: dimensions and output_dimension are ignored or refused"

    def _said_of_itself(
        self, options: dict[str, Any], findings: dict[str, str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = urlsplit(self.address)
        root = urlunsplit((parts.scheme, parts.netloc, "", "", ""))
        info, props = (self._get(root, path) for path in ("/info", "/props"))
        info = info if isinstance(info, dict) and "max_client_batch_size" in info else {}
        props = props if isinstance(props, dict) else {}
        if isinstance(info.get("max_input_length"), int):
            options["max_input_tokens"] = info["max_input_length"]
            findings["longest text"] = f"{info['max_input_length']} tokens, by /info"
        return info, props

    def _truncation(self, options: dict[str, Any], findings: dict[str, str]) -> None:
        seen = self._ask([_LONG + end for end in _ENDS])
        if seen.taken and len(seen.rows) == len(_ENDS):
            cut = _same(seen.rows[0][1], seen.rows[1][1])
            options["truncation"] = "silent" if cut else "unknown"
            findings["long texts"] = (
                "cut, and nothing says so" if cut else "one of 9,300 words was read whole"
            )
        else:
            options["truncation"] = "error" if seen.status in _REFUSED else "unknown"
            findings["long texts"] = f"refused ({seen.status})" if seen.status else "no answer"

    def _sizes(
        self, info: Mapping[str, Any], options: dict[str, Any], findings: dict[str, str]
    ) -> None:
        said = info.get("max_client_batch_size")
        if isinstance(said, int) and said > 0:
            options["max_texts_per_request"] = said
            findings["texts in a request"] = f"{said}, by /info"
            return
        # The smallest replies that the server has.
        form = {} if options["encoding"] == "omit" else {"encoding_format": options["encoding"]}
        largest, ended = 0, ""
        for size in _SIZES:
            seen = self._ask([str(number) for number in range(size)], form)
            if not (seen.taken and len(seen.rows) == size):
                ended = f"{size} were refused ({seen.status})" if seen.status else "no answer"
                break
            largest = size
        for size in _SMALL_SIZES:
            if largest:
                break
            if self._ask([str(number) for number in range(size)], form).taken:
                largest = size
        options["max_texts_per_request"] = largest or 1
        findings["texts in a request"] = f"{largest or 1}; {ended or 'more were not tried'}"

    def _usage(self, plain: Seen) -> str:
        if plain.usage is None:
            return "not reported"
        return f"reported ({plain.usage} tokens for the texts {' and '.join(_PAIR)})"

    def _preset(
        self,
        options: Mapping[str, Any],
        accepted: frozenset[str],
        *,
        info: Mapping[str, Any],
        props: Mapping[str, Any],
    ) -> str | None:
        """The preset of what the server says that it is, if it fits what was found."""
        fit = fitting(options, accepted)
        named = [name for name in fit if PRESETS[name].options.get("base_url") == self.address]
        if self._by_header is not None:
            # It stands before another server, and passes on what that says.
            named = [self._by_header]
        elif info:
            named = ["tei"]
        elif props:
            named = ["llamacpp"]
        else:
            owner = self._owner.lower().replace(".", "")
            named = [name for name in _OWNERS if name in owner] or named
        named = [name for name in named if name in fit]
        return named[0] if len(named) == 1 else None

    def _without_key(self, name: str) -> str:
        """A name that the server gave, which may repeat the key."""
        for secret in self._context.secrets:
            name = name.replace(secret, "…")
        return name

    def _get(self, url: str, path: str) -> Any:
        """The JSON at an address; None where there is none."""
        call = http.Call(method="GET", path=path, timeout=10.0, max_bytes=1 << 24)
        try:
            answer = self._send(url, call)
        except ConfigurationError:
            raise
        except EmbeddingError:
            return None
        with answer:
            return _json_of(bytes(answer.body)) if answer.status == 200 else None

    def _ask(
        self,
        texts: Sequence[str],
        fields: Mapping[str, object] | None = None,
        *,
        must_answer: bool = False,
    ) -> Seen:
        body = {"model": self._model, "input": list(texts), **(fields or {})}
        size = sum(len(text.encode()) for text in texts)
        call = http.Call(
            path="/embeddings",
            headers={"Content-Type": "application/json"},
            body=orjson.dumps(body),
            timeout=self._options.timeout,
            max_bytes=_MOST_BYTES,
        )
        # Counted before it leaves: an interrupt may come at any time.
        self.tokens += size
        try:
            answer = self._send(self.address, call)
        except EmbeddingError as error:
            if error.billed == "no":
                self.tokens -= size
            else:
                self.reported = False
            if must_answer or isinstance(error, ConfigurationError):
                raise
            return Seen(status=0, said=str(error))
        with answer:
            seen = _read(answer)
        if seen.status in _FREE:
            self.tokens -= size
        elif seen.usage is None:
            self.reported = False
        else:
            self.tokens += seen.usage - size
        return seen

    def _send(self, url: str, call: http.Call) -> http.Answer:
        if url not in self._sessions:
            self._sessions[url] = Session(self._options.model_copy(update={"base_url": url}))
        session = self._sessions[url]
        key = session.key()
        self.requests += 1
        answer = session.send(call, key, self._context)
        found = (name for header, name in _HEADERS.items() if header in answer.headers)
        self._by_header = next(found, self._by_header)
        return answer


def fitting(options: Mapping[str, Any], accepted: frozenset[str]) -> list[str]:
    """The presets that nothing of what was found speaks against."""
    return [
        name
        for name, preset in PRESETS.items()
        # Those with further fields are for services that are known by their address.
        if name != "other"
        and "body" not in preset.options
        # Sizes were doubled: the limit itself is below twice the largest that passed.
        and preset.options["max_texts_per_request"] < 2 * options["max_texts_per_request"]
        and preset.options["encoding"] in accepted
        and _agree(preset.options["dimensions_field"], options["dimensions_field"], "none")
        and _agree(preset.options["truncation"], options["truncation"], "unknown")
    ]


def _agree(one: str, other: str, open_word: str) -> bool:
    return one == other or open_word in (one, other)


def _same(one: Vector, other: Vector) -> bool:
    import numpy as np

    if len(one) != len(other):
        return False
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return lengths > 0 and float(one @ other) / lengths > _EQUAL


def _json_of(raw: bytes) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None


def _read(answer: http.Answer) -> Seen:
    body = bytes(answer.body)
    if answer.status != 200:
        said = read_body(body, answer.headers.get("content-type", "")).message
        return Seen(status=answer.status, said=str(said)[:300])
    document = _json_of(body)
    data = document.get("data") if isinstance(document, dict) else None
    seen = Seen(status=200)
    if not isinstance(data, list):
        return seen
    usage = document.get("usage")
    for name in ("total_tokens", "prompt_tokens"):
        value = usage.get(name) if isinstance(usage, dict) else None
        if isinstance(value, int) and value > 0 and seen.usage is None:
            seen.usage = value
    seen.model = document.get("model")
    for item in data:
        row = _vector(item.get("embedding") if isinstance(item, dict) else None)
        if row is None:
            return Seen(status=200, usage=seen.usage)
        seen.in_base64 = isinstance(item["embedding"], str)
        seen.rows.append((item.get("index"), row))
    return seen


def _vector(value: object) -> Vector | None:
    import numpy as np

    try:
        if isinstance(value, str):
            row = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
        else:
            row = np.array(value, dtype=np.float32)
    except (ValueError, TypeError, binascii.Error):
        return None
    return row if row.ndim == 1 and len(row) and bool(np.isfinite(row).all()) else None
