"""What the options of a provider with batches say, and what they leave alone."""

from __future__ import annotations

from decimal import Decimal

import pytest

from embedcore.provider.batch_http import terms_of
from embedcore.provider.batch_options import BatchOptions
from embedcore.provider.http_embedder import HttpOptions
from embedcore.provider.options import options_fingerprint
from embedcore.provider.types import ModelInfo, Price

INFO = ModelInfo(price=Price(immediate=Decimal("0.10"), batch=Decimal("0.05")))


class Plain(HttpOptions):
    base_url: str = "https://acme.example/v1"


class Options(BatchOptions):
    base_url: str = "https://acme.example/v1"


@pytest.mark.parametrize(
    ("told", "immediate", "batch"),
    [
        ({}, "0.10", "0.05"),
        ({"batch_price": "0.04"}, "0.10", "0.04"),
        ({"price": "0.20"}, "0.20", None),
        ({"price": "0.20", "batch_price": "0.01"}, "0.20", "0.01"),
    ],
)
def test_the_price_of_batches(told: dict[str, str], immediate: str, batch: str | None) -> None:
    price = Options(**told).over(INFO).price
    assert price is not None
    assert price.immediate == Decimal(immediate)
    assert price.batch == (None if batch is None else Decimal(batch))


def test_a_model_without_a_price_has_none_for_batches_alone() -> None:
    assert Options(batch_price=1).over(ModelInfo()).price is None


def test_no_option_for_batches_changes_vectors() -> None:
    options = Options(
        batch_price=1, transfer_timeout=7, max_enqueued_tokens=5, batch_errors_billed="unknown"
    )
    others = {options_fingerprint("p", "m", each, INFO) for each in (options, Options(), Plain())}
    assert len(others) == 1
    terms, enqueued = terms_of(options)
    assert (terms.transfer_timeout, terms.errors_billed, enqueued) == (7, "unknown", 5)


def test_options_that_know_no_batches_will_do() -> None:
    terms, enqueued = terms_of(Plain(timeout=9))
    assert (terms.timeout, terms.errors_billed, enqueued) == (9, "no", None)
