"""How much is measured? All of it for a table, little of it with ``--quick`` while tuning."""

from __future__ import annotations

from dataclasses import dataclass

from compare.clients.contract import Purpose, Row


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Texts per run and rounds. A slow client gets fewer texts: its figures are per 10,000 anyway,
    and at milliseconds per text they are steady with a thousand. ``streams``: rounds of what takes
    its time by the wall clock."""

    rounds: int = 5
    imports: int = 5
    streams: int = 3
    cpu: int = 10_000
    short: int = 10_000
    throughput: int = 20_000
    goodput: int = 15_000
    # Calls of 100 texts, of which 600 may be sent per minute.
    strict: int = 32_000
    memory: int = 20_000
    reuse: int = 10_000
    stream: int = 100_000
    short_stream: int = 100_000
    full_cache: int = 10_000
    cache_rows: int = 1_000_000
    query: int = 1_000
    gathers: tuple[int, ...] = (200, 1_000)
    arrivals: int = 2_400
    slow_cpu: int = 1_000
    slow_short: int = 1_000
    slow_throughput: int = 2_000
    slow_memory: int = 4_000
    slow_reuse: int = 1_000
    slow_rounds: int = 3

    def texts(self, row: Row, purpose: Purpose) -> int:
        name = purpose.replace("-", "_")
        number: int = getattr(self, f"slow_{name}" if row.slow else name, 0) or getattr(self, name)
        return number

    @property
    def most_short(self) -> int:
        """Short texts that any measurement sends."""
        return max(self.short, self.strict, self.short_stream, self.query, self.arrivals)


FULL = Sizes()
QUICK = Sizes(
    rounds=2,
    imports=3,
    streams=1,
    throughput=10_000,
    goodput=5_000,
    strict=11_200,
    memory=10_000,
    reuse=2_000,
    stream=30_000,
    short_stream=20_000,
    full_cache=5_000,
    cache_rows=50_000,
    query=300,
    arrivals=800,
    slow_cpu=500,
    slow_short=500,
    slow_throughput=500,
    slow_memory=1_000,
    slow_reuse=200,
    slow_rounds=1,
)
