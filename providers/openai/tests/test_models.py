"""What is known of a model, and what the options make of it."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
from embedcore_openai.models import MODELS
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create

from embedcore.errors import ConfigurationError
from embedcore.provider.types import ModelInfo

OWN = "http://localhost:8000/v1"


def info(model: str, **options: Any) -> ModelInfo:
    return create(model, OpenAIOptions(**options)).info


@pytest.mark.parametrize(
    ("model", "dimensions", "price", "batch"),
    [
        ("text-embedding-3-small", 1536, "0.02", "0.01"),
        ("text-embedding-3-large", 3072, "0.13", "0.065"),
        ("text-embedding-ada-002", 1536, "0.10", "0.05"),
    ],
)
def test_the_table(model: str, dimensions: int, price: str, batch: str) -> None:
    found = info(model)
    assert replace(found, best_texts_per_request=None) == MODELS[model]
    assert found.dimensions == dimensions
    assert found.best_texts_per_request is not None
    assert 1_000_000 < found.best_texts_per_request * dimensions * 4 * 4 / 3 < 2_000_000
    assert found.price is not None
    assert (found.price.immediate, found.price.batch) == (Decimal(price), Decimal(batch))
    assert found.price.source
    assert found.price.as_of
    assert (found.max_input_tokens, found.max_texts_per_request) == (8191, 2048)
    assert (found.max_tokens_per_request, found.request_bytes_per_token) == (300_000, 4)
    assert found.endpoint == "https://api.openai.com/v1"


def test_ada_answers_under_another_name() -> None:
    assert info("text-embedding-ada-002").reply_models == ("text-embedding-ada-002-v2",)


@pytest.mark.parametrize(
    ("model", "dimensions"),
    [
        ("text-embedding-3-small", 1537),
        ("text-embedding-3-large", 3073),
        ("text-embedding-ada-002", 256),
        ("text-embedding-ada-002", 1536),
    ],
)
def test_dimensions_that_the_model_cannot_give(model: str, dimensions: int) -> None:
    with pytest.raises(ConfigurationError, match=str(dimensions)):
        info(model, dimensions=dimensions)


@pytest.mark.parametrize("dimensions", [1, 256, 1536])
def test_dimensions_that_it_can(dimensions: int) -> None:
    assert info("text-embedding-3-small", dimensions=dimensions).dimensions == dimensions


def test_a_deployment_has_the_data_of_its_model() -> None:
    found = info(
        "my-deployment",
        base_model="text-embedding-ada-002",
        base_url="https://acme.openai.azure.com/openai/v1",
    )
    table = MODELS["text-embedding-ada-002"]
    assert found.model == "my-deployment"
    assert (found.price, found.dimensions) == (table.price, table.dimensions)
    assert found.reply_models == ("text-embedding-ada-002", "text-embedding-ada-002-v2")
    embedder = create("my-deployment", OpenAIOptions(base_model="text-embedding-3-small"))
    assert embedder.tokenizer.exact


def test_an_unknown_base_model_is_named() -> None:
    with pytest.raises(ConfigurationError, match="text-embedding-3-smal'"):
        info("x", base_model="text-embedding-3-smal")


def test_an_own_server_gets_small_requests_and_no_assumptions() -> None:
    found = info("BAAI/bge-m3", base_url=OWN)
    assert (found.max_texts_per_request, found.max_bytes_per_request) == (32, 1_000_000)
    assert (found.dimensions, found.price, found.max_input_tokens) == (None, None, None)
    assert found.reply_models == ("bge-m3",)
    assert not create("BAAI/bge-m3", OpenAIOptions(base_url=OWN)).tokenizer.exact


def test_an_own_server_is_described_by_options() -> None:
    found = info(
        "bge-m3",
        base_url=OWN,
        price=0,
        dimensions=1024,
        max_input_tokens=8192,
        max_texts_per_request=256,
        max_tokens_per_request=100_000,
        max_concurrency=2,
        reply_models=["*"],
    )
    assert found.price is not None
    assert found.price.free
    assert (found.dimensions, found.max_input_tokens, found.max_texts_per_request) == (
        1024,
        8192,
        256,
    )
    assert (found.max_tokens_per_request, found.max_concurrency) == (100_000, 2)
    assert found.reply_models == ("*",)


def test_a_model_newer_than_the_table_has_openais_limits_and_no_price() -> None:
    found = info("text-embedding-9-huge")
    assert (found.max_texts_per_request, found.max_tokens_per_request) == (2048, 300_000)
    assert (found.price, found.max_bytes_per_request) == (None, None)


def test_prices_can_be_set() -> None:
    both = info("text-embedding-3-small", price="0.015", batch_price="0.007").price
    assert both is not None
    assert (both.immediate, both.batch) == (Decimal("0.015"), Decimal("0.007"))
    one = info("text-embedding-3-small", price="0.015").price
    assert one is not None
    assert one.batch is None
    other = info("text-embedding-3-small", batch_price="0.007").price
    assert other is not None
    assert (other.immediate, other.batch) == (Decimal("0.02"), Decimal("0.007"))
    with pytest.raises(ConfigurationError, match="price"):
        info("bge-m3", base_url=OWN, batch_price="0.007")


@pytest.mark.case("F9")
def test_a_slip_in_a_name_is_refused_unless_a_price_says_that_it_is_meant() -> None:
    with pytest.raises(ConfigurationError, match="did you mean openai:text-embedding-3-small"):
        info("3-small")
    assert info("3-small", price="0.02").price is not None
    assert info("3-small", base_model="text-embedding-3-small").dimensions == 1536
    assert info("3-small", base_url=OWN).price is None
