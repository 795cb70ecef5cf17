"""Options of a provider over HTTP whose service has batches."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from embedcore.provider.hookspecs import KeepsVectors
from embedcore.provider.http_embedder import HttpOptions
from embedcore.provider.types import ModelInfo, Price


class BatchOptions(HttpOptions):
    """``HttpOptions`` with what batches need. A subclass declares ``api_key`` and ``base_url``.

    ``batch_price``: US dollars per million tokens instead of the table's; with ``price`` alone
    batches cost that. ``transfer_timeout``: seconds for a file that is sent or read.
    ``max_enqueued_tokens``: the account's limit of tokens in all jobs that have not ended.
    ``batch_errors_billed``: "unknown" charges lines of a batch that failed, which are taken to be
    free.
    """

    batch_price: Annotated[Decimal | None, Field(ge=0, allow_inf_nan=False), KeepsVectors()] = None
    transfer_timeout: Annotated[PositiveFloat, Field(allow_inf_nan=False), KeepsVectors()] = 3600.0
    max_enqueued_tokens: Annotated[PositiveInt | None, KeepsVectors()] = None
    batch_errors_billed: Annotated[Literal["no", "unknown"], KeepsVectors()] = "no"

    def over(self, info: ModelInfo) -> ModelInfo:
        """A model's facts, with what these options say in place of them."""
        found = super().over(info)
        if self.batch_price is None or found.price is None:
            return found
        return replace(found, price=_with_batch(found.price, self.batch_price))


def _with_batch(price: Price, batch: Decimal) -> Price:
    return replace(price, batch=batch)
