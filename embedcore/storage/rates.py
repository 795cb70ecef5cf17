"""Which rate limits did a provider last name? Kept for whoever looks, and for nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedcore.storage.calendar import MICROSECONDS

if TYPE_CHECKING:
    from embedcore.storage.database import Database


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedRates:
    """Requests and tokens per minute; None: no such limit was named. ``named``: seconds since
    1970 when they were."""

    endpoint: str
    model: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    named: float


def note(database: Database, rates: NamedRates) -> None:
    """Put these in the place of what the same endpoint named before for the same model."""
    with database.transaction() as connection:
        connection.execute(
            "INSERT INTO rate (endpoint, model, requests, tokens, named) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET requests = excluded.requests, tokens = excluded.tokens, "
            "named = excluded.named",
            (
                rates.endpoint,
                rates.model,
                rates.requests_per_minute,
                rates.tokens_per_minute,
                int(rates.named * MICROSECONDS),
            ),
        )


def named_rates(database: Database) -> list[NamedRates]:
    """All that were ever named, by endpoint and model."""
    with database.read() as connection:
        rows = connection.execute(
            "SELECT endpoint, model, requests, tokens, named FROM rate ORDER BY endpoint, model"
        ).fetchall()
    return [
        NamedRates(
            endpoint=endpoint,
            model=model,
            requests_per_minute=requests,
            tokens_per_minute=tokens,
            named=named / MICROSECONDS,
        )
        for endpoint, model, requests, tokens, named in rows
    ]
