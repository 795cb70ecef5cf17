"""Cuts the texts of a batch into parts and reserves their money.

The money of a batch is reserved as a whole before anything is sent, by a grant that no lease ends;
each part takes its own from there. What must be sent again is reserved anew, on the day that it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from embedcore import money
from embedcore.storage import counters, grants
from embedcore.storage.amounts import Amount, Grant, HeldLoosely, Limit
from embedcore.storage.parts import COLUMNS, Part, new_key, read_part
from embedcore.storage.spool import flush_all

if TYPE_CHECKING:
    import sqlite3

    from embedcore.storage.batches import BatchAccount, BatchRecord
    from embedcore.storage.ledger import Ledger


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How large a part may be. ``price``: dollars per million tokens; None: not known.

    ``scale``: how many times the counted tokens the provider was seen to bill.
    """

    items: int
    in_bytes: int | None = None
    tokens: int | None = None
    overhead: int = 0
    price: Decimal | None = None
    scale: float = 1.0

    def of(self, texts: Sequence[tuple[int, int, int]]) -> Amount:
        """What texts cost at most, each given as id, tokens and bytes."""
        return self.amount(sum(one[1] for one in texts) + len(texts) * self.overhead)

    def amount(self, tokens: int) -> Amount:
        held = tokens if self.scale == 1.0 else math.ceil(tokens * self.scale)
        return priced(held, None if self.price is None else str(self.price))


def priced(tokens: int, price: str | None) -> Amount:
    """Tokens at the price that was written down when they were reserved, rounded up."""
    return Amount(tokens=tokens, cost=money.cost_of(tokens, Decimal(price or 0)))


class Cutter:
    """Cuts parts for one pool. ``limits``: of the caller whose budget it is.

    ``on_held`` gets the amount of a part that was not reserved with its whole batch. ``exact``:
    tokens are counted, and no bounds.
    """

    def __init__(
        self,
        ledger: Ledger,
        pool: BatchAccount,
        limits: Sequence[Limit] = (),
        *,
        on_held: Callable[[Amount], None] = lambda _: None,
        exact: bool = True,
    ) -> None:
        self._is_bound = not exact
        self.pool = pool
        self.limits = tuple(limits)
        self._on_held = on_held
        self.database = ledger.database
        self._ledger = ledger

    def hold(self, batch: BatchRecord, cut: Cut) -> Amount:
        """Reserve the money of everything that a batch would submit, or raise ``BudgetExceeded``.

        ``HeldLoosely`` is raised instead of a refusal that is due to the loose bounds of others.
        """
        flush_all()
        with self.database.transaction() as connection:
            amount = self._whole(connection, batch, cut)
            grant, refusal = self._hold(connection, amount)
            if grant is not None:
                connection.execute(
                    'UPDATE batch SET "grant" = ? WHERE id = ?', (grant.id, batch.id)
                )
        if refusal is not None:
            raise refusal
        return amount

    def whole(self, batch: BatchRecord, cut: Cut) -> Amount:
        """What ``hold`` would reserve."""
        with self.database.read() as connection:
            return self._whole(connection, batch, cut)

    def affords(self, amount: Amount, *, waits: bool = False) -> bool:
        """Whether the limits allow so much more now. Nothing is reserved.

        ``waits``: also if they will as soon as the loose bounds of others are settled.
        """
        flush_all()
        with self.database.transaction() as connection:
            refusal = self._refusal(connection, amount, waits=waits)
            return refusal is None or isinstance(refusal, HeldLoosely)

    def _whole(self, connection: sqlite3.Connection, batch: BatchRecord, cut: Cut) -> Amount:
        tokens, items = connection.execute(
            "SELECT coalesce(sum(i.tokens), 0), count(*) FROM wish w JOIN item i "
            "ON i.id = w.item WHERE w.batch = ? AND i.state = 'open' AND i.part IS NULL "
            "AND NOT i.stopped",
            (batch.id,),
        ).fetchone()
        amount = cut.amount(tokens + items * cut.overhead)
        # Every part is rounded up by itself.
        return Amount(tokens=amount.tokens, cost=amount.cost + (items if amount.cost else 0))

    def plan(self, batch: BatchRecord, cut: Cut, *, after: int = 0) -> tuple[Part | None, int]:
        """Cut the next part of what a batch still has to submit; None if that is nothing.

        The second is the ``after`` of the next call: texts are taken by ascending id. Where the
        limits do not allow a whole part, it has as many texts as they do; raises as ``hold`` when
        that is none.
        """
        flush_all()
        with self.database.transaction() as connection:
            chosen = self._choose(connection, batch, cut, after)
            if not chosen:
                self._close_spare(connection, batch)
                return None, after
            amount = cut.of(chosen)
            grant, refusal, anew = self._take(connection, batch, amount)
            if grant is None:
                # What fits is submitted, and the rest when there is budget again.
                chosen = chosen[: self._fitting(connection, chosen, cut)] or chosen[:1]
                amount = cut.of(chosen)
                grant, _, anew = self._take(connection, batch, amount)
            if grant is not None:
                part = self._insert(connection, batch, grant, amount, cut, len(chosen))
                connection.executemany(
                    "UPDATE item SET part = ?, ordinal = ? WHERE id = ?",
                    ((part.id, place, one[0]) for place, one in enumerate(chosen)),
                )
        if grant is None and refusal is not None:
            raise refusal
        if anew:
            self._on_held(amount)
        return part, chosen[-1][0]

    def _fitting(
        self, connection: sqlite3.Connection, chosen: Sequence[tuple[int, int, int]], cut: Cut
    ) -> int:
        """How many of these texts the limits allow now."""
        least, most = 0, len(chosen)
        while least < most:
            middle = (least + most + 1) // 2
            if self._refusal(connection, cut.of(chosen[:middle])) is None:
                least = middle
            else:
                most = middle - 1
        return least

    def _refusal(
        self, connection: sqlite3.Connection, amount: Amount, *, waits: bool = False
    ) -> Exception | None:
        scope = self.pool.scope
        grant = grants.new_grant(scope, "all", self.limits, False)
        moment, windows = self._ledger.begin_in(connection, scope, "all")
        return grants.check(
            connection,
            grant,
            windows,
            amount,
            moment,
            final=True,
            waits=waits,
            is_bound=self._is_bound,
        )

    def _choose(
        self, connection: sqlite3.Connection, batch: BatchRecord, cut: Cut, after: int
    ) -> list[tuple[int, int, int]]:
        rows = connection.execute(
            "SELECT i.id, i.tokens, i.bytes FROM wish w JOIN item i ON i.id = w.item "
            "WHERE w.batch = ? AND w.item > ? AND i.state = 'open' AND i.part IS NULL "
            "AND NOT i.stopped ORDER BY w.item LIMIT ?",
            (batch.id, after, cut.items),
        )
        chosen: list[tuple[int, int, int]] = []
        tokens = in_bytes = 0
        for row in rows:
            tokens += row["tokens"] + cut.overhead
            in_bytes += row["bytes"]
            too_much = (cut.tokens is not None and tokens > cut.tokens) or (
                cut.in_bytes is not None and in_bytes > cut.in_bytes
            )
            if too_much and chosen:
                rows.close()
                break
            chosen.append(tuple(row))
        return chosen

    def _take(
        self, connection: sqlite3.Connection, batch: BatchRecord, amount: Amount
    ) -> tuple[Grant | None, Exception | None, bool]:
        """The money of a part, or why there is none; and whether it was not reserved before."""
        (spare,) = connection.execute(
            'SELECT "grant" FROM batch WHERE id = ?', (batch.id,)
        ).fetchone()
        if spare is not None:
            whole = Grant(id=spare, scope=self.pool.scope, lane="all", limits=(), loose=False)
            windows = grants.take(connection, whole, amount, None)
            if windows is not None:
                mine = grants.new_grant(self.pool.scope, "all", self.limits, False)
                moment = self._ledger.moment_in(connection)
                grants.open_grant(connection, mine, windows, amount, moment, lease=None)
                return mine, None, False
        grant, refusal = self._hold(connection, amount)
        return grant, refusal, grant is not None

    def _hold(
        self, connection: sqlite3.Connection, amount: Amount
    ) -> tuple[Grant | None, Exception | None]:
        scope = self.pool.scope
        grant = grants.new_grant(scope, "all", self.limits, False)
        moment, windows = self._ledger.begin_in(connection, scope, "all")
        refusal = grants.check(
            connection, grant, windows, amount, moment, final=True, is_bound=self._is_bound
        )
        if refusal is not None:
            return None, refusal
        counters.hold(connection, windows, amount)
        grants.open_grant(connection, grant, windows, amount, moment, lease=None)
        return grant, None

    def _insert(
        self,
        connection: sqlite3.Connection,
        batch: BatchRecord,
        grant: Grant,
        amount: Amount,
        cut: Cut,
        items: int,
    ) -> Part:
        price = None if cut.price is None else str(cut.price)
        columns = (amount.tokens, amount.cost, price, grant.id)
        created = self._ledger.moment_in(connection).now
        return read_part(
            connection.execute(
                "INSERT INTO part (key, pool, batch, state, input_type, items, tokens, cost, "
                'price, "grant", created, ids) '
                "VALUES (?, ?, ?, 'planned', ?, ?, ?, ?, ?, ?, ?, 'key') "
                f"RETURNING {COLUMNS}",
                (new_key(), self.pool.id, batch.id, batch.input_type, items, *columns, created),
            ).fetchone()
        )

    def _close_spare(self, connection: sqlite3.Connection, batch: BatchRecord) -> None:
        row = connection.execute('SELECT "grant" FROM batch WHERE id = ?', (batch.id,)).fetchone()
        if row is not None and row["grant"] is not None:
            grants.close_grant(connection, row["grant"])
            connection.execute('UPDATE batch SET "grant" = NULL WHERE id = ?', (batch.id,))
