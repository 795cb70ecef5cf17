"""Facts of a model: what settings and the table of prices say, laid over what its provider says.

A fact that the provider has an option for has become that option before (``Choice.resolve``). The
others are laid over its ``ModelInfo`` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    PermissionDenied,
    ProviderError,
)
from embedcore.prices import kept as kept_prices, newer as newer_price
from embedcore.provider.base import WrapperEmbedder
from embedcore.provider.options import ADDRESS
from embedcore.provider.types import Price

if TYPE_CHECKING:
    from pydantic import BaseModel

    from embedcore.choice import Choice
    from embedcore.provider.hookspecs import Provider
    from embedcore.provider.options import ResolvedOptions
    from embedcore.provider.protocol import Embedder, Tokenizer
    from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo
    from embedcore.settings import ModelFacts

_PRICES: Final = ("price", "batch_price")
# Where a text is cut decides its vector.
_OF_VECTORS: Final = ("max_input_tokens", "tokenizer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Laid:
    """What is laid over an embedder, and what of it decides its vectors, by name."""

    info: ModelInfo
    tokenizer: Tokenizer
    of_vectors: Mapping[str, Any]


def laid_over(
    embedder: Embedder,
    choice: Choice,
    provider: Provider,
    resolved: ResolvedOptions,
    options: BaseModel,
) -> Laid:
    """The facts of a model once everything is read that says some.

    Raises ``ConfigurationError`` for a batch price where no other is known, and for a tokenizer
    that cannot be read.
    """
    known = provider.options.model_fields
    facts = {name: fact for name, fact in choice.facts.stated().items() if name not in known}
    info, tokenizer = embedder.info, embedder.tokenizer
    if "tokenizer" in facts:
        from embedcore.provider.tokenizer_files import tokenizer_of

        tokenizer = found = tokenizer_of(facts["tokenizer"])
        info = replace(
            info,
            overhead_tokens_per_text=max(info.overhead_tokens_per_text, found.marks),
            tokens_per_byte=max(info.tokens_per_byte, found.tokens_per_byte),
        )
    if "max_input_tokens" in facts:
        # As in an option of that name: the server's limit, the marks around a text included.
        marks = getattr(tokenizer, "marks", 0)
        info = replace(info, max_input_tokens=max(facts["max_input_tokens"] - marks, 1))
    if "dimensions" in facts:
        info = replace(info, dimensions=facts["dimensions"])
    return Laid(
        info=replace(info, price=_price(info, choice, facts, resolved, options)),
        tokenizer=tokenizer,
        of_vectors={name: facts[name] for name in _OF_VECTORS if name in facts},
    )


def _price(
    info: ModelInfo,
    choice: Choice,
    facts: Mapping[str, Any],
    resolved: ResolvedOptions,
    options: BaseModel,
) -> Price | None:
    """The price of the settings, else the newer one of the provider's and the user's table."""
    name, source = f"{choice.provider}:{choice.model}", choice.config.file or "the configuration"
    if "price" in facts:
        return Price(
            immediate=facts["price"],
            batch=facts.get("batch_price", resolved.values.get("batch_price")),
            source=source,
        )
    if "batch_price" in facts:
        own = info.price or kept_prices().get(name)
        if own is None:
            raise ConfigurationError(
                f'[models."{name}"] sets batch_price and not price, and no other price is known: '
                "set both"
            )
        return replace(own, batch=facts["batch_price"], source=source)
    said = any(resolved.values.get(one) is not None for one in _PRICES)
    if said or info.local or not _is_own_address(options):
        return info.price
    return newer_price(info.price, kept_prices().get(name))


def _is_own_address(options: BaseModel) -> bool:
    """Whether the provider's own service is asked: a server with its API has prices of its own."""
    described = type(options).model_fields.get(ADDRESS)
    return described is None or getattr(options, ADDRESS) == described.get_default()


def as_listed(info: ModelInfo, facts: ModelFacts, listed: Price | None, source: str) -> ModelInfo:
    """A model's facts for a list, in which nothing is built. ``source``: the settings' name."""
    price = newer_price(info.price, listed)
    if facts.price is not None:
        price = Price(immediate=facts.price, batch=facts.batch_price, source=source)
    elif facts.batch_price is not None and price is not None:
        price = replace(price, batch=facts.batch_price, source=source)
    return replace(
        info,
        price=price,
        dimensions=facts.dimensions or info.dimensions,
        max_input_tokens=facts.max_input_tokens or info.max_input_tokens,
    )


class Described(WrapperEmbedder):
    """An embedder with facts laid over it.

    ``asks_for_keys``: its key is a function, so that one that is refused is asked for once more.
    """

    def __init__(self, inner: Embedder, laid: Laid, *, asks_for_keys: bool) -> None:
        super().__init__(inner)
        self._laid = laid
        self._asks_for_keys = asks_for_keys

    @property
    def info(self) -> ModelInfo:
        return self._laid.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._laid.tokenizer

    def embed(self, request: EmbedRequest) -> EmbedReply:
        try:
            return self.inner.embed(request)
        except ProviderError as error:
            about_key = isinstance(error, AuthenticationFailed | PermissionDenied)
            # A key that has ended may be refused with either, and the next one differs.
            if self._asks_for_keys and about_key and error.status is not None:
                error.again = error.again or "key"
            raise
