"""The provider ``litellm``: its options, and one request. The package is imported by the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from embedcore.errors import EmbeddingError, InvalidResponse
from embedcore.provider import access, http
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.hookspecs import KeepsVectors, Provider, hookimpl
from embedcore.provider.http_embedder import Key
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price

if TYPE_CHECKING:
    from embedcore.provider.refusals import Asked
    from embedcore.provider.types import Vectors

PROVIDER: Final = "litellm"
# Input types that a service wants, by the beginning of the model's name.
WORDS: Final[Mapping[str, Mapping[str, str]]] = {
    "cohere": {
        "query": "search_query",
        "document": "search_document",
        "classification": "classification",
        "clustering": "clustering",
    },
    "voyage": {"query": "query", "document": "document"},
}
# What keeps services from cutting long texts in silence.
WHOLE: Final[Mapping[str, Mapping[str, object]]] = {
    "cohere": {"truncate": "NONE", "embedding_types": ["float"]},
    "voyage": {"truncation": False},
}
_NO_WORDS: Final[Mapping[str, str]] = MappingProxyType({})


# Nothing of its own: the core tries again, counts, caches and tells. Some services take a zero for
# "not said": for them ``library.load`` sets the default.
_QUIET: Final[Mapping[str, object]] = {
    "max_retries": 0,
    "num_retries": 0,
    "fallbacks": None,
    "caching": False,
    "cache": {"no-cache": True, "no-store": True},
    "drop_params": False,
    "no-log": True,
}


class LiteLLMOptions(BaseModel):
    """Options of ``litellm:<service>/<model>``.

    ``api_key``: without it litellm reads the service's own variable. ``base_url``: in place of the
    service's address. ``litellm_prices``: take the price from litellm's own table, which imports
    its package when an embedder is made; ``price`` goes over it. ``refusals_billed`` and
    ``server_errors_billed``: "unknown" charges refused requests to the budget, which are taken to
    be free.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    api_key: Key = None
    base_url: str | None = None
    allow_plaintext: Annotated[bool, KeepsVectors()] = False
    dimensions: PositiveInt | None = None
    timeout: Annotated[PositiveFloat, Field(allow_inf_nan=False), KeepsVectors()] = 60.0
    price: Annotated[Decimal | None, Field(ge=0, allow_inf_nan=False), KeepsVectors()] = None
    litellm_prices: Annotated[bool, KeepsVectors()] = False
    max_input_tokens: PositiveInt | None = None
    max_texts_per_request: Annotated[PositiveInt, KeepsVectors()] = 96
    max_tokens_per_request: Annotated[PositiveInt | None, KeepsVectors()] = None
    max_concurrency: Annotated[PositiveInt, KeepsVectors()] = 8
    refusals_billed: Annotated[Literal["no", "unknown"], KeepsVectors()] = "no"
    server_errors_billed: Annotated[Literal["no", "unknown"], KeepsVectors()] = "no"

    def key(self) -> str | None:
        """The key for one request; None: litellm looks for it. Raises as ``access.given_key``."""
        return access.given_key(self.api_key, where="the option api_key")

    def __getstate__(self) -> dict[Any, Any]:
        # Pickles end up in caches, queues and files: no secret goes into one.
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}


class LiteLLMEmbedder(BaseEmbedder):
    """Implements ``Embedder``. Shared freely between threads."""

    def __init__(self, model: str, options: LiteLLMOptions) -> None:
        self.options = options
        service = model.partition("/")[0]
        self._words, self._whole = WORDS.get(service, _NO_WORDS), WHOLE.get(service, {})
        if options.base_url is not None:
            endpoint = access.parse(options.base_url, such_as="https://host/v1")
            access.refuse_plaintext(endpoint, allowed=options.allow_plaintext)
        self.info = ModelInfo(
            provider=PROVIDER,
            model=model,
            dimensions=options.dimensions,
            max_input_tokens=options.max_input_tokens,
            max_texts_per_request=options.max_texts_per_request,
            max_tokens_per_request=options.max_tokens_per_request,
            max_concurrency=options.max_concurrency,
            price=self._price(model),
            input_types=tuple(self._words),
            default_input_type="document" if self._words else None,
            truncation="error" if self._whole else "unknown",
            endpoint=options.base_url or f"{PROVIDER}:{service}",
        )
        self.startup = _Startup()

    def _price(self, model: str) -> Price | None:
        if self.options.price is not None:
            return Price(immediate=self.options.price, source="options")
        if not self.options.litellm_prices:
            return None
        from embedcore_litellm.library import price_of

        return price_of(model)

    @http.without_frames
    def embed(self, request: EmbedRequest) -> EmbedReply:
        """Send one request over litellm. Whatever it raises becomes one of embedcore's errors."""
        from embedcore.provider.replies import nothing
        from embedcore_litellm import library

        if not request.texts:
            return nothing(self.info.dimensions)
        key = self.options.key()
        asked = self._asked(request.texts, key)
        try:
            answer = library.load().embedding(**self._call(request, key))
        except EmbeddingError:
            raise
        except Exception as error:  # noqa: BLE001 - each service has its own
            failure = library.translated(error, asked)
        else:
            return self._reply(answer)
        raise failure

    def _call(self, request: EmbedRequest, key: str | None) -> dict[str, object]:
        kind = request.input_type or self.info.default_input_type
        given = {
            "api_key": key,
            "api_base": self.options.base_url,
            "dimensions": self.options.dimensions,
            "input_type": None if kind is None else self._words[kind],
        }
        return {
            "model": self.info.model,
            "input": list(request.texts),
            "timeout": http.seconds_for(self.options.timeout, request.timeout),
            **{name: value for name, value in given.items() if value is not None},
            **self._whole,
            **_QUIET,
        }

    def _reply(self, answer: Any) -> EmbedReply:
        from embedcore.provider.rate_headers import lowered, rate_limits

        hidden = getattr(answer, "_hidden_params", None) or {}
        told = hidden.get("additional_headers") or {}
        headers = {str(name).removeprefix("llm_provider-"): str(told[name]) for name in told}
        used = getattr(answer, "usage", None)
        tokens = getattr(used, "prompt_tokens", 0) or getattr(used, "total_tokens", 0)
        return EmbedReply(
            vectors=_rows(answer.data),
            tokens=tokens or None,
            limits=rate_limits(lowered(headers)),
        )

    def _asked(self, texts: Sequence[str], key: str | None) -> Asked:
        from embedcore.provider.refusals import Asked

        return Asked(
            model=self.info.model,
            endpoint=self.info.endpoint,
            texts=texts,
            secrets=[] if key is None else [key],
            key_hint="check the option api_key, or the variable that litellm reads for the service",
            refusals_billed=self.options.refusals_billed,
            server_errors_billed=self.options.server_errors_billed,
        )


def _rows(data: Sequence[Any]) -> Vectors:
    """Row i for text i, by the numbers of the rows where they have any."""
    import numpy as np

    numbers = [one.get("index") for one in data]
    if None not in numbers and sorted(numbers) != list(range(len(data))):
        raise InvalidResponse("the rows of the reply have the wrong numbers", billed="yes")
    order = range(len(data)) if None in numbers else np.argsort(numbers)
    try:
        found = np.array([data[place]["embedding"] for place in order])
        return found.astype(np.float32, casting="same_kind")
    except (ValueError, TypeError, LookupError):
        raise InvalidResponse("the reply holds no vectors", billed="yes") from None


class _Startup:
    """Implements ``embedcore.provider.protocol.Startup``: an import of seconds."""

    def load(self) -> None:
        from embedcore_litellm import library

        library.load()

    def connect(self) -> None:
        """There is nothing that is free to ask."""


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(name=PROVIDER, options=LiteLLMOptions, create=LiteLLMEmbedder)
