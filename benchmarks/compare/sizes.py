"""How much is measured? All of it for a table, little of it with ``--quick`` while tuning."""

from __future__ import annotations

from dataclasses import dataclass

from compare.clients.contract import Purpose, Row


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Texts per run and rounds. A slow client gets fewer texts: its figures are per 10,000 anyway,
    and at milliseconds per text they are steady with a thousand."""

    rounds: int = 5
    imports: int = 5
    cpu: int = 10_000
    throughput: int = 20_000
    goodput: int = 15_000
    memory: int = 20_000
    reuse: int = 10_000
    stream: int = 100_000
    slow_cpu: int = 1_000
    slow_throughput: int = 2_000
    slow_memory: int = 4_000
    slow_reuse: int = 1_000
    slow_rounds: int = 3

    def texts(self, row: Row, purpose: Purpose) -> int:
        name = f"slow_{purpose}" if row.slow and purpose not in ("goodput", "stream") else purpose
        number: int = getattr(self, name)
        return number


FULL = Sizes()
QUICK = Sizes(
    rounds=3,
    imports=3,
    throughput=10_000,
    goodput=5_000,
    memory=10_000,
    reuse=2_000,
    stream=30_000,
    slow_cpu=500,
    slow_throughput=500,
    slow_memory=1_000,
    slow_reuse=200,
    slow_rounds=1,
)
