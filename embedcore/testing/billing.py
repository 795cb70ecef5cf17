"""Tokens as OpenAI bills them, for the fakes of its API.

The exact encoding, cl100k_base, is that of the installed provider ``openai``, asked for by name as
any program does. Without it a token is four UTF-8 bytes, and a warning says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

from embedcore.errors import ConfigurationError
from embedcore.provider import registry
from embedcore.testing.vectors import tokens_of

CL100K_BASE: Final = "cl100k_base"
BYTES: Final = "bytes/4"

_PROVIDER: Final = "openai"
_MODEL: Final = "text-embedding-3-small"

logger = logging.getLogger("embedcore.testing")


def openai_tokens(texts: Sequence[str]) -> list[int]:
    """The tokens that OpenAI's embedding models bill for each text."""
    count, _ = _counter()
    return count(texts)


def openai_encoding() -> str:
    """By what ``openai_tokens`` counts: "cl100k_base", or "bytes/4" without the provider."""
    return _counter()[1]


def counted_by_bytes(texts: Sequence[str]) -> list[int]:
    """``tokens_of`` each text."""
    return [tokens_of(text) for text in texts]


@cache
def _counter() -> tuple[Callable[[Sequence[str]], list[int]], str]:
    try:
        tokenizer = registry.create(_PROVIDER, _MODEL, {}).tokenizer
        tokenizer.count([""])
    except ConfigurationError as error:
        return _by_bytes(str(error))
    if not tokenizer.exact:
        return _by_bytes("its vocabulary cannot be loaded")
    return tokenizer.count, CL100K_BASE


def _by_bytes(why: str) -> tuple[Callable[[Sequence[str]], list[int]], str]:
    logger.warning(
        "the fake server counts a token for four bytes, not as OpenAI does: %s. With "
        "embedcore-openai installed its bill is exact",
        why,
    )
    return counted_by_bytes, BYTES
