"""What does the ledger cost on top of the statements that it sends to SQLite?

Each way of paying for a request is run by the ledger, and its own statements, recorded once, are
replayed on bare connections: same driver, file, journal and ``synchronous=FULL``. Rounds of both
alternate, since a disk's speed drifts; the median round counts.

    python benchmarks/ledger.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.database import Database, driver, engine_version
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE, STATE_VERSION

LARGEST_RATIO = 2.0
FEWEST_CYCLES = 1500.0
AMOUNT = Amount(tokens=100, cost=2_000_000)
LIMITS = (
    Limit(scope="project", period="day", unit="tokens", amount=10**12),
    Limit(scope="project", period="month", unit="cost", amount=10**18),
    Limit(scope="*", period="day", unit="tokens", amount=10**12),
)
Statement = tuple[str, tuple[Any, ...]]
Cycle = Callable[[], object]


def in_one_commit(ledger: Ledger) -> None:
    attempt = ledger.hold_and_send("project", AMOUNT, LIMITS, model="fake:m", inputs=10)
    ledger.settle(attempt, AMOUNT, request_id="req-1", close=True)


def step_by_step(ledger: Ledger) -> None:
    grant = ledger.hold("project", AMOUNT, LIMITS)
    attempt = ledger.send(grant, AMOUNT, model="fake:m", inputs=10)
    ledger.settle(attempt, AMOUNT, request_id="req-1")
    ledger.close(grant)


WAYS = {"hold_and_send + settle": in_one_commit, "hold + send + settle + close": step_by_step}


class Recorder:
    """Stands in for a connection and writes down what passes through it."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.statements: list[Statement] = []

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.in_transaction)

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> Any:
        self.statements.append((sql, parameters))
        return self._connection.execute(sql, parameters)

    def close(self) -> None:
        self._connection.close()


class Placeholder:
    """A grant's or an attempt's id, which is another in every cycle."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return _placeholder, (self.name,)


GRANT, ATTEMPT = Placeholder("grant"), Placeholder("attempt")


def _placeholder(name: str) -> Placeholder:
    return GRANT if name == "grant" else ATTEMPT


def new_ledger(path: Path) -> Ledger:
    return Ledger(Database(path, STATE, version=STATE_VERSION))


def recorded(path: Path, way: Callable[[Ledger], None]) -> list[Statement]:
    """One cycle's statements, from a ledger whose windows are there already."""
    ledger = new_ledger(path)
    way(ledger)
    recorder = Recorder(ledger.database._connection)
    ledger.database._connection = recorder  # type: ignore[assignment]
    way(ledger)
    ledger.database.close()
    with driver().connect(path) as connection:
        row = connection.execute('SELECT id, "grant" FROM attempt ORDER BY id DESC').fetchone()
    connection.close()
    names = {row[0]: ATTEMPT, row[1]: GRANT}
    return [
        (sql, tuple(names.get(value, value) if value else value for value in parameters))
        for sql, parameters in recorder.statements
    ]


def bare(path: Path, statements: list[Statement], first_grant: int) -> Iterator[Cycle]:
    connection = driver().connect(path, timeout=60, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    grants = count(first_grant)

    def cycle() -> None:
        ids = {GRANT: next(grants), ATTEMPT: 0}
        for sql, parameters in statements:
            if parameters:
                values = [
                    ids[value] if isinstance(value, Placeholder) else value for value in parameters
                ]
                cursor = connection.execute(sql, values)
            else:
                cursor = connection.execute(sql)
            if sql.startswith("INSERT INTO attempt"):
                ids[ATTEMPT] = cursor.lastrowid
            elif not sql.startswith(("INSERT", "UPDATE")):
                cursor.fetchall()

    yield cycle
    connection.close()


def by_ledger(path: Path, way: str) -> Iterator[Cycle]:
    ledger = new_ledger(path)
    yield lambda: WAYS[way](ledger)
    ledger.database.close()


def worker(source: Any, arguments: tuple[Any, ...], seconds: float, start: Any, done: Any) -> None:
    cycles = 0
    for cycle in source(*arguments):
        cycle()
        start.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            cycle()
            cycles += 1
    done.put(cycles)


def rate(source: Any, arguments: list[tuple[Any, ...]], seconds: float) -> float:
    """Cycles per second of as many processes as there are arguments."""
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(len(arguments)), context.Queue()
    processes = [
        context.Process(target=worker, args=(source, one, seconds, start, done))
        for one in arguments
    ]
    for process in processes:
        process.start()
    cycles: int = sum(done.get() for _ in processes)
    for process in processes:
        process.join()
    return cycles / seconds


def compare(folder: Path, way: str, processes: int, rounds: int, seconds: float) -> bool:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path = Path(name) / "state.db"
        statements = recorded(path, WAYS[way])
        grants = count(1)
        ledger_rates, bare_rates = [], []
        for _ in range(rounds):
            ledger_rates.append(rate(by_ledger, [(path, way)] * processes, seconds))
            each = [(path, statements, next(grants) * 10**9) for _ in range(processes)]
            bare_rates.append(rate(bare, each, seconds))
    ours, theirs = statistics.median(ledger_rates), statistics.median(bare_rates)
    ratio = theirs / ours
    print(f"{way:30} {processes:9} {ours:10,.0f} {theirs:10,.0f} {ratio:7.2f}", flush=True)
    return ratio <= LARGEST_RATIO and (way != next(iter(WAYS)) or ours >= FEWEST_CYCLES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="on which disk; default: the temporary folder")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        journal = new_ledger(Path(name) / "state.db").database.journal_mode
    print(f"SQLite {engine_version()} ({driver().__name__}), journal {journal}, synchronous FULL")
    print(f"{'cycles per second':30} {'processes':>9} {'ledger':>10} {'bare':>10} {'ratio':>7}")
    met = [
        compare(options.folder, way, processes, options.rounds, options.seconds)
        for way in WAYS
        for processes in options.processes
    ]
    targets = f"ratio ≤ {LARGEST_RATIO:g}, and ≥ {FEWEST_CYCLES:,.0f} cycles/s in two commits"
    print(f"{targets}: {'met' if all(met) else 'missed'}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
