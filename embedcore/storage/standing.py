"""How a batch stands: its record, its parts, its texts and its money, read in one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from embedcore.storage.amounts import Amount
from embedcore.storage.batches import BatchRecord, Counts, counts_in, record_again
from embedcore.storage.parts import Part, live_parts, parts_of

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.ledger import Ledger


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """Money of a batch. ``actual`` includes ``unconfirmed``: charged without proof."""

    actual: Amount
    unconfirmed: Amount
    held: Amount
    reported: bool


class ToDo(NamedTuple):
    """What a look at a batch begins with: its record and parts, all parts of its account that have
    not ended (``live``), and the time of the ledger, in microseconds since 1970."""

    batch: BatchRecord
    parts: list[Part]
    live: list[Part]
    now: int


class Standing(NamedTuple):
    """What has become of a batch, at a time ``now`` of the ledger, in microseconds since 1970."""

    batch: BatchRecord
    parts: list[Part]
    counts: Counts
    spent: Spent
    now: int


def to_do(ledger: Ledger, batch: BatchRecord) -> ToDo:
    with ledger.database.read() as connection:
        now, batch = ledger.now_in(connection), record_again(connection, batch)
        return ToDo(batch, parts_of(connection, batch), live_parts(connection, batch.pool), now)


def standing(ledger: Ledger, batch: BatchRecord) -> Standing:
    with ledger.database.read() as connection:
        now, batch = ledger.now_in(connection), record_again(connection, batch)
        counts, parts = counts_in(connection, batch), parts_of(connection, batch)
        return Standing(batch, parts, counts, _spent(connection, batch), now)


def _spent(connection: sqlite3.Connection, batch: BatchRecord) -> Spent:
    """What the parts that a batch planned cost so far, and what is reserved for it."""
    mine = "SELECT attempt FROM part WHERE batch = ?1"
    row = connection.execute(
        "SELECT coalesce(sum(actual_tokens), 0) AS tokens, "
        "coalesce(sum(actual_cost), 0) AS cost, "
        "coalesce(sum(iif(state = 'charged', actual_tokens, 0)), 0) AS charged_tokens, "
        "coalesce(sum(iif(state = 'charged', actual_cost, 0)), 0) AS charged_cost, "
        "coalesce(sum(iif(state = 'sent', tokens, 0)), 0) AS sent_tokens, "
        "coalesce(sum(iif(state = 'sent', cost, 0)), 0) AS sent_cost, "
        "coalesce(min(iif(state IN ('settled', 'charged'), reported, 1)), 1) AS reported "
        f"FROM attempt WHERE id IN ({mine})",
        (batch.id,),
    ).fetchone()
    drained = connection.execute(
        "SELECT drained_tokens, drained_cost FROM batch WHERE id = ?", (batch.id,)
    ).fetchone()
    left = connection.execute(
        "SELECT coalesce(sum(tokens), 0) AS tokens, coalesce(sum(cost), 0) AS cost "
        'FROM "grant" WHERE id IN '
        '(SELECT "grant" FROM part WHERE batch = ?1 '
        'UNION SELECT "grant" FROM batch WHERE id = ?1)',
        (batch.id,),
    ).fetchone()
    return Spent(
        actual=Amount(
            tokens=row["tokens"] + drained["drained_tokens"],
            cost=row["cost"] + drained["drained_cost"],
        ),
        unconfirmed=Amount(tokens=row["charged_tokens"], cost=row["charged_cost"]),
        held=Amount(
            tokens=row["sent_tokens"] + left["tokens"], cost=row["sent_cost"] + left["cost"]
        ),
        reported=bool(row["reported"]),
    )
