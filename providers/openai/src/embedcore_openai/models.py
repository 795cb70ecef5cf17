"""Known models: width, limits, price, and the names they answer with."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from decimal import Decimal
from typing import Final

from embedcore.errors import ConfigurationError
from embedcore.provider.known import near_models
from embedcore.provider.types import ModelInfo, Price
from embedcore_openai.options import DEFAULT_BASE_URL, OpenAIOptions

PROVIDER: Final = "openai"
DEFAULT_MODEL: Final = "text-embedding-3-small"

# The server's own limit is 8,192 (API reference, "input"); price tables and older error texts say
# 8,191, so that is what texts are cut to.
_MAX_INPUT_TOKENS: Final = 8_191
_MAX_TEXTS: Final = 2_048
_MAX_TOKENS: Final = 300_000
# A reply of 1 to 2 MB, in base64 8 kB for 1,536 dimensions, is the cheapest to read: larger ones
# need fresh pages of memory every time (measured by benchmarks/compare). What is under way at once
# takes memory as well.
_BEST_REPLY_BYTES: Final = 1_400_000
_BYTES_PER_COMPONENT: Final = 16 / 3
# The limit of 300,000 is measured as a quarter of the UTF-8 bytes (timescale/pgai, issue 728).
_BYTES_PER_TOKEN: Final = 4

_PRICES_AS_OF: Final = date(2026, 11, 12)
_MODEL_PAGE: Final = "https://developers.openai.com/api/docs/models/"


def _openai(
    model: str, *, dimensions: int, price: str, batch: str, reply_models: tuple[str, ...] = ()
) -> ModelInfo:
    return ModelInfo(
        provider=PROVIDER,
        model=model,
        dimensions=dimensions,
        max_input_tokens=_MAX_INPUT_TOKENS,
        max_texts_per_request=_MAX_TEXTS,
        max_tokens_per_request=_MAX_TOKENS,
        request_bytes_per_token=_BYTES_PER_TOKEN,
        max_concurrency=16,
        price=Price(
            immediate=Decimal(price),
            batch=Decimal(batch),
            as_of=_PRICES_AS_OF,
            source=_MODEL_PAGE + model,
        ),
        truncation="error",
        reply_models=reply_models,
        endpoint=DEFAULT_BASE_URL,
    )


MODELS: Final = {
    info.model: info
    for info in (
        _openai("text-embedding-3-small", dimensions=1536, price="0.02", batch="0.01"),
        _openai("text-embedding-3-large", dimensions=3072, price="0.13", batch="0.065"),
        _openai(
            "text-embedding-ada-002",
            dimensions=1536,
            price="0.10",
            batch="0.05",
            reply_models=("text-embedding-ada-002-v2",),
        ),
    )
}
_FIXED_WIDTH: Final = frozenset({"text-embedding-ada-002"})


def describe(
    model: str, options: OpenAIOptions, *, marks: int = 0, tokens_per_byte: int = 1
) -> ModelInfo:
    """The facts of ``model`` under these options. Touches no network.

    ``marks``: tokens that the server puts around each text, ``tokens_per_byte``: the most that a
    text can have, where the tokenizer says so. Raises ``ConfigurationError`` for an unknown
    ``base_model`` and for ``dimensions`` that the model cannot give.
    """
    if options.base_model is not None and options.tokenizer is not None:
        raise ConfigurationError(
            "base_model and tokenizer are both set: base_model counts as OpenAI's models do; "
            "leave one of them out"
        )
    known = _known(model, options)
    info = _with_dimensions(known, model, options) if known else _unknown(model, options)
    return replace(
        info,
        model=model,
        best_texts_per_request=_best_texts(info),
        max_input_tokens=_longest(options.max_input_tokens or info.max_input_tokens, marks),
        overhead_tokens_per_text=marks,
        tokens_per_byte=tokens_per_byte,
        max_texts_per_request=options.max_texts_per_request or info.max_texts_per_request,
        max_tokens_per_request=options.max_tokens_per_request or info.max_tokens_per_request,
        max_concurrency=options.max_concurrency or info.max_concurrency,
        price=_price(info.price, options),
        truncation=options.truncation or info.truncation,
        reply_models=_reply_models(info, model, options),
        endpoint=options.base_url,
        account=_account(options),
    )


def _longest(limit: int | None, marks: int) -> int | None:
    """The longest text by its own count: the marks around it are within the server's limit."""
    return None if limit is None else max(limit - marks, 1)


def _account(options: OpenAIOptions) -> str:
    """The organisation and project that the options name; a key alone does not tell."""
    named = (options.organization or "", options.project or "")
    return "/".join(named) if any(named) else ""


def _best_texts(info: ModelInfo) -> int | None:
    if info.dimensions is None:
        return None
    best = round(_BEST_REPLY_BYTES / (info.dimensions * _BYTES_PER_COMPONENT))
    return min(max(best, 1), info.max_texts_per_request)


def counts_like_openai(model: str, options: OpenAIOptions) -> bool:
    """True when the tokenizer of the model is known to be cl100k_base (all three models)."""
    return options.tokenizer is None and _known(model, options) is not None


def _known(model: str, options: OpenAIOptions) -> ModelInfo | None:
    if options.base_model is None:
        return MODELS.get(model)
    if options.base_model not in MODELS:
        raise ConfigurationError(
            f"base_model = {options.base_model!r} is not an OpenAI embedding model; "
            f"known: {', '.join(MODELS)}"
        )
    return MODELS[options.base_model]


def _with_dimensions(info: ModelInfo, model: str, options: OpenAIOptions) -> ModelInfo:
    asked, full = options.dimensions, info.dimensions or 0
    if asked is None:
        return info
    if info.model in _FIXED_WIDTH:
        raise ConfigurationError(
            f"dimensions = {asked}: {model!r} has {full} dimensions and cannot give fewer; "
            "leave the option out or use text-embedding-3-small"
        )
    if asked > full:
        raise ConfigurationError(f"dimensions = {asked}: {model!r} gives 1 to {full} dimensions")
    return replace(info, dimensions=asked)


def _unknown(model: str, options: OpenAIOptions) -> ModelInfo:
    """A model that no table has.

    On OpenAI's own host the limits of a request are those of the API. Another server gets small
    requests: 32 texts is what Text Embeddings Inference takes by default, along with 2 MB.
    Nothing is assumed of price and longest text. Raises ``ConfigurationError`` for a name that is
    nearly one of OpenAI's own, on its own host.
    """
    info = ModelInfo(provider=PROVIDER, dimensions=options.dimensions)
    if options.is_openai:
        _refuse_near(model, options)
        return replace(
            info,
            max_texts_per_request=_MAX_TEXTS,
            max_tokens_per_request=_MAX_TOKENS,
            request_bytes_per_token=_BYTES_PER_TOKEN,
            max_concurrency=16,
        )
    tail = model.rpartition("/")[2]
    return replace(
        info,
        max_texts_per_request=32,
        max_bytes_per_request=1_000_000,
        reply_models=(tail,) if tail != model else (),
    )


def _refuse_near(model: str, options: OpenAIOptions) -> None:
    """A slip in a model's name, before it is asked for: its price would not be known."""
    near = near_models(model, MODELS)
    if near and options.price is None:
        names = " or ".join(f"{PROVIDER}:{name}" for name in near)
        raise ConfigurationError(
            f"{PROVIDER}:{model} is no embedding model of OpenAI's that is known: did you mean "
            f"{names}? If OpenAI has one of that name, say what it costs: price = … in its options"
        )


def _price(price: Price | None, options: OpenAIOptions) -> Price | None:
    if options.price is None and options.batch_price is None:
        return price
    if options.price is not None:
        # Without a batch price of its own, a batch is reckoned at the immediate one.
        return Price(immediate=options.price, batch=options.batch_price, source="options")
    if price is None:
        raise ConfigurationError("batch_price is set and price is not: set both")
    return replace(price, batch=options.batch_price, source="options")


def _reply_models(info: ModelInfo, model: str, options: OpenAIOptions) -> tuple[str, ...]:
    names = dict.fromkeys((info.model or model, *info.reply_models, *options.reply_models))
    return tuple(name for name in names if name != model)
