"""What embedding models were trained to find before a text, by their names.

It belongs to the model, on whatever server it runs: a text without it has a vector that is further
from its like. A service that puts it there itself must not get it twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from embedcore.provider.tokens import utf8_length
from embedcore.provider.types import ModelInfo

_BGE: Final = {
    "query": "Represent this sentence for searching relevant passages: ",
    "document": "",
}
# By the names of files and of the Hugging Face hub; the first that fits. bge-m3 has none.
_PREFIXES: Final[tuple[tuple[re.Pattern[str], Mapping[str, str]], ...]] = tuple(
    (re.compile(name), MappingProxyType(prefixes))
    for name, prefixes in (
        (
            r"nomic-embed-text",
            {
                "query": "search_query: ",
                "document": "search_document: ",
                "classification": "classification: ",
                "clustering": "clustering: ",
            },
        ),
        (
            r"embeddinggemma|embedding-gemma|gemini-embedding-2",
            {
                "query": "task: search result | query: ",
                "document": "title: none | text: ",
                "classification": "task: classification | query: ",
                "clustering": "task: clustering | query: ",
                "similarity": "task: sentence similarity | query: ",
            },
        ),
        (r"mxbai-embed-large", _BGE),
        (r"bge-(?:small|base|large)-en", _BGE),
        (r"e5-(?:small|base|large)(?!-instruct)", {"query": "query: ", "document": "passage: "}),
    )
)
_NONE: Final[Mapping[str, str]] = MappingProxyType({})


def prefixes_of(model: str) -> Mapping[str, str]:
    """Input type → what stands before a text of it; empty for a model that wants nothing, or that
    is not known. Names are compared without case, folder, tag and the kind of a hyphen."""
    name = model.lower().rpartition("/")[2].replace("_", "-")
    return next((found for form, found in _PREFIXES if form.search(name)), _NONE)


def prefixed(info: ModelInfo, prefixes: Mapping[str, str]) -> ModelInfo:
    """The model's facts where a provider puts these before each text.

    They take part in the fingerprint, in the bill, and in what a text may have at most.
    """
    if not prefixes:
        return info
    longest = max(map(utf8_length, prefixes.values()))
    limit = info.max_input_tokens
    return replace(
        info,
        input_types=tuple(prefixes),
        default_input_type="document",
        overhead_tokens_per_text=info.overhead_tokens_per_text + longest,
        max_input_tokens=None if limit is None else max(limit - longest, 1),
        variant="|".join([info.variant, *(f"{kind}={text}" for kind, text in prefixes.items())]),
    )
