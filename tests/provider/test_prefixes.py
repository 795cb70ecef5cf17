"""Prefixes go by the model's name, wherever it runs, and are known to fingerprint and bill."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedcore.provider.prefixes import prefixed, prefixes_of
from embedcore.provider.types import ModelInfo

INFO = ModelInfo(provider="acme", model="m", max_input_tokens=100, overhead_tokens_per_text=2)


@pytest.mark.parametrize(
    ("model", "query", "document"),
    [
        ("nomic-embed-text", "search_query: ", "search_document: "),
        ("nomic-ai/nomic-embed-text-v1.5", "search_query: ", "search_document: "),
        ("Nomic_Embed_Text:latest", "search_query: ", "search_document: "),
        ("intfloat/e5-large-v2", "query: ", "passage: "),
        ("intfloat/multilingual-e5-base", "query: ", "passage: "),
        ("BAAI/bge-large-en-v1.5", "Represent this sentence", ""),
        ("mxbai-embed-large:335m", "Represent this sentence", ""),
        ("gemini-embedding-2-preview", "task: search result", "title: none"),
        ("embeddinggemma:300m", "task: search result", "title: none"),
    ],
)
def test_a_model_is_known_by_its_name(model: str, query: str, document: str) -> None:
    found = prefixes_of(model)
    assert found["query"].startswith(query)
    assert found["document"].startswith(document)


@pytest.mark.parametrize(
    "model", ["bge-m3", "all-minilm", "intfloat/multilingual-e5-large-instruct", "e5", "", "x/y"]
)
def test_others_get_nothing(model: str) -> None:
    assert prefixes_of(model) == {}
    assert prefixed(INFO, prefixes_of(model)) == INFO


def test_what_stands_before_a_text_is_in_the_facts_of_the_model() -> None:
    info = prefixed(INFO, prefixes_of("nomic-embed-text"))
    longest = len("search_document: ")
    assert info.default_input_type == "document"
    assert info.input_types == ("query", "document", "classification", "clustering")
    assert (info.max_input_tokens, info.overhead_tokens_per_text) == (100 - longest, 2 + longest)
    assert (
        prefixed(replace(INFO, max_input_tokens=None), {"document": "x"}).max_input_tokens is None
    )


def test_other_prefixes_are_another_set_of_vectors() -> None:
    variants = {
        prefixed(INFO, prefixes).variant
        for prefixes in ({}, {"document": "a"}, {"document": "b"}, {"document": "a", "query": "a"})
    }
    assert len(variants) == 4
