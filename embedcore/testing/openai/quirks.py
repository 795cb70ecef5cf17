"""Other servers with OpenAI's API: how each of them differs, for the fake to behave so.

``FakeOpenAI(quirks=SERVERS["vllm"])`` stands for one. The differences were read in the sources,
specifications and reports of November 2026, and are no one's configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from embedcore.testing.openai.embeddings import (
    Answer,
    ApiError,
    Embeddings,
    EmbeddingsApi,
    Limits,
    Router,
    fields_of,
    json_reply,
)
from embedcore.testing.vectors import BYTES_PER_TOKEN, vectors_of

if TYPE_CHECKING:
    from embedcore.testing.openai.http import HttpRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Quirks:
    """How a server differs from OpenAI's.

    ``encodings``: what it takes as ``encoding_format``; others are refused, or with
    ``ignores_encoding`` answered with numbers. ``max_texts``, ``max_text_tokens``: its limits
    (a token is four bytes), ``long_texts``: what it does with a longer one. ``width_field``:
    under which name it takes a width; None: under none. ``fields``: further ones that it knows,
    ``must_have``: a field and value without which it cuts silently. ``unknown_fields``: what it
    does with others. ``usage``: what it reports. ``index``: which vectors it numbers. ``norm``:
    the length of its vectors. ``empty``: whether it takes an empty text. ``owner``: whose its
    models are, as it lists them. ``info``, ``props``: what it says of itself at those paths;
    ``headers``: and with each reply.
    """

    encodings: frozenset[str] = frozenset({"float", "base64"})
    ignores_encoding: bool = False
    max_texts: int = 2048
    max_text_tokens: int = 512
    long_texts: Literal["error", "silent"] = "error"
    too_long_status: int = 400
    width_field: str | None = "dimensions"
    fields: frozenset[str] = frozenset()
    must_have: Mapping[str, object] = field(default_factory=dict)
    unknown_fields: Literal["ignored", "refused"] = "ignored"
    usage: Literal["tokens", "total", "none", "characters"] = "tokens"
    index: Literal["all", "no_zero", "none"] = "all"
    norm: float = 1.0
    empty: bool = False
    lists_models: bool = True
    owner: str = "fake"
    info: Mapping[str, object] | None = None
    props: Mapping[str, object] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


_NO_BASE64: Final = frozenset({"float"})
_NO_FIELD: Final[frozenset[str]] = frozenset()

SERVERS: Final[Mapping[str, Quirks]] = {
    "azure-v1": Quirks(max_text_tokens=8192, unknown_fields="refused"),
    "azure-classic": Quirks(max_text_tokens=8192, unknown_fields="refused"),
    "gemini-openai": Quirks(encodings=_NO_BASE64, max_texts=100, usage="none", index="no_zero"),
    "mistral": Quirks(
        max_texts=256, width_field="output_dimension", unknown_fields="refused", lists_models=False
    ),
    "voyage": Quirks(
        encodings=frozenset({"base64"}),
        max_texts=1000,
        width_field="output_dimension",
        fields=frozenset({"truncation", "input_type"}),
        must_have={"truncation": False},
        unknown_fields="refused",
        usage="total",
        lists_models=False,
    ),
    "jina": Quirks(
        encodings=_NO_FIELD,
        max_texts=512,
        fields=frozenset({"truncate", "normalized", "task"}),
        unknown_fields="refused",
    ),
    "openrouter": Quirks(max_texts=64, fields=frozenset({"provider", "input_type"})),
    "together": Quirks(
        encodings=_NO_FIELD,
        max_texts=32,
        width_field=None,
        unknown_fields="refused",
        usage="none",
    ),
    "fireworks": Quirks(encodings=_NO_FIELD, max_texts=256, unknown_fields="refused", norm=3.0),
    "deepinfra": Quirks(max_texts=1024, long_texts="silent"),
    "siliconflow": Quirks(max_texts=32, too_long_status=413),
    "dashscope": Quirks(encodings=_NO_BASE64, max_texts=10, unknown_fields="refused"),
    "zhipu": Quirks(encodings=_NO_FIELD, max_texts=64, unknown_fields="refused"),
    "nvidia-nim": Quirks(
        max_texts=50, fields=frozenset({"truncate", "input_type"}), unknown_fields="refused"
    ),
    "cloudflare": Quirks(encodings=_NO_FIELD, max_texts=100, width_field=None, usage="none"),
    "databricks": Quirks(
        encodings=_NO_FIELD, max_texts=150, width_field=None, unknown_fields="refused", norm=2.0
    ),
    "ollama": Quirks(long_texts="silent", empty=True),
    "lmstudio": Quirks(ignores_encoding=True, width_field=None, usage="none"),
    "llamacpp": Quirks(
        too_long_status=500, width_field=None, empty=True, props={"total_slots": 1, "n_ctx": 512}
    ),
    "vllm": Quirks(owner="vllm"),
    "sglang": Quirks(encodings=_NO_BASE64, owner="sglang"),
    "tei": Quirks(
        max_texts=32,
        long_texts="silent",
        info={
            "model_id": "acme/tiny",
            "max_client_batch_size": 32,
            "max_input_length": 512,
            "auto_truncate": True,
        },
    ),
    "infinity": Quirks(long_texts="silent", usage="characters", empty=True, owner="infinity"),
    "xinference": Quirks(ignores_encoding=True, too_long_status=500),
    "localai": Quirks(width_field=None, usage="none"),
    "gpustack": Quirks(max_texts=64, encodings=_NO_BASE64),
    "litellm-proxy": Quirks(
        encodings=_NO_FIELD,
        max_texts=64,
        unknown_fields="refused",
        headers={"x-litellm-version": "1.108.7"},
    ),
}
"""Server → how it differs, under the names that presets of providers have as well."""

_OPENAI_FIELDS: Final = frozenset({"input", "model", "user"})


class QuirkyEmbeddings(EmbeddingsApi):
    """``POST /v1/embeddings`` of a server with such quirks."""

    def __init__(self, quirks: Quirks, **given: Any) -> None:
        limits = Limits(
            max_texts=quirks.max_texts,
            max_text_tokens=quirks.max_text_tokens,
            max_request_tokens=1 << 40,
        )
        super().__init__(limits=limits, **given)
        self._quirks = quirks

    def create(self, request: HttpRequest, parameters: Mapping[str, str]) -> Answer:  # noqa: ARG002
        quirks, given = self._quirks, fields_of(request)
        fields = self._understood(given)
        used = self._used(self._with_blanks(fields), given)
        try:
            asked = self.asked({**fields, "input": used})
        except ApiError as error:
            if "maximum input length" in str(error):
                error.status = quirks.too_long_status
            raise
        texts = asked.texts
        rest: dict[str, object] = {"model": asked.model}
        if quirks.usage == "characters":
            rest["usage"] = {"prompt_tokens": (n := sum(map(len, texts))), "total_tokens": n}
        elif quirks.usage == "total":
            rest["usage"] = {"total_tokens": asked.tokens}
        elif quirks.usage == "tokens":
            rest["usage"] = {"prompt_tokens": asked.tokens, "total_tokens": asked.tokens}

        def embeddings() -> Embeddings:
            vectors = vectors_of(texts, asked.width, salt=self.salt) * np.float32(quirks.norm)
            items = [self._item(place) for place in range(len(texts))]
            return Embeddings(vectors=vectors, encoding=asked.encoding, items=items, rest=rest)

        return Answer(embeddings=embeddings, texts=asked.texts, tokens=asked.tokens)

    def _understood(self, given: Mapping[str, object]) -> dict[str, object]:
        """A request as OpenAI's own would have it; raises ``ApiError`` for what is refused."""
        quirks = self._quirks
        known = _OPENAI_FIELDS | quirks.fields | {quirks.width_field}
        fields = {name: given[name] for name in _OPENAI_FIELDS if name in given}
        for name in given:
            if name == "encoding_format" or name in known:
                continue
            if quirks.unknown_fields == "refused":
                raise ApiError(400, f"Unrecognized request argument supplied: {name}")
        if quirks.width_field in given and quirks.width_field is not None:
            fields["dimensions"] = given[quirks.width_field]
        encoding = given.get("encoding_format")
        if encoding is not None and not quirks.ignores_encoding:
            if encoding in quirks.encodings:
                fields["encoding_format"] = encoding
            elif quirks.encodings or quirks.unknown_fields == "refused":
                raise ApiError(400, f"Invalid encoding_format: {encoding}", param="encoding_format")
        return fields

    def _with_blanks(self, fields: Mapping[str, object]) -> object:
        """The texts, with what stands for an empty one where such are taken."""
        texts = fields.get("input")
        if not self._quirks.empty:
            return texts
        if isinstance(texts, list):
            return [text or " " for text in texts]
        return texts or " "

    def _used(self, texts: object, given: Mapping[str, object]) -> object:
        """What of each text becomes a vector: what is cut silently is never too long."""
        asked = all(given.get(name) == value for name, value in self._quirks.must_have.items())
        if (self._quirks.long_texts == "error" and asked) or not isinstance(texts, list):
            return texts
        most = self._quirks.max_text_tokens * BYTES_PER_TOKEN
        return [
            text.encode()[:most].decode(errors="ignore") if isinstance(text, str) else text
            for text in texts
        ]

    def _item(self, place: int) -> dict[str, object]:
        item: dict[str, object] = {"object": "embedding", "embedding": place}
        numbered = {"all": True, "none": False, "no_zero": place > 0}[self._quirks.index]
        return {**item, "index": place} if numbered else item


class Sidelines:
    """What a server says of itself at ``/info`` (TEI) and ``/props`` (llama.cpp)."""

    def __init__(self, quirks: Quirks) -> None:
        self._said = {"/info": quirks.info, "/props": quirks.props}

    def register(self, router: Router) -> None:
        for path, said in self._said.items():
            if said is not None:
                router.add("GET", path, self._answer)

    def _answer(self, request: HttpRequest, parameters: Mapping[str, str]) -> Answer:  # noqa: ARG002
        return Answer(reply=json_reply(self._said[request.path]))
