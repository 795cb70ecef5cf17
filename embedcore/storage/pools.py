"""What batches share: a scope, a model, a way to make vectors, an account."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from embedcore.errors import StorageCorrupt
from embedcore.storage.batchrecords import Pool

if TYPE_CHECKING:
    from embedcore.storage.batchrecords import BatchRecord
    from embedcore.storage.database import Database


class Pools:
    """What ``Batches`` adds to itself for the table ``pool``."""

    database: Database

    def pool(
        self, *, scope: str, model: str, fingerprint: str, endpoint: str, account: str
    ) -> Pool:
        """The pool of that description, made if need be."""
        name = (scope, model, fingerprint, endpoint, account)
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO pool (scope, model, fingerprint, endpoint, account) "
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                name,
            )
            row = connection.execute(
                "SELECT id, scope, model, fingerprint, endpoint, account FROM pool WHERE "
                "scope = ? AND model = ? AND fingerprint = ? AND endpoint = ? AND account = ?",
                name,
            ).fetchone()
        return _pool(row)

    def pool_of(self, batch: BatchRecord) -> Pool:
        with self.database.read() as connection:
            row = connection.execute(
                "SELECT id, scope, model, fingerprint, endpoint, account FROM pool WHERE id = ?",
                (batch.pool,),
            ).fetchone()
        if row is None:
            raise StorageCorrupt(f"the pool of batch {batch.name} is not in the state file")
        return _pool(row)


def _pool(row: Sequence[object]) -> Pool:
    names = ("id", "scope", "model", "fingerprint", "endpoint", "account")
    return Pool(**dict(zip(names, row, strict=True)))  # type: ignore[arg-type]
