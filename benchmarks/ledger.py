"""What does the ledger cost on top of SQLite, whatever else the machine does meanwhile?

Three take short turns in the same processes: the ledger, with each way of paying for a request; its
own statements, recorded once and replayed on bare connections; and the raw limit, as many commits
of one number. Same driver, disk, journal and ``synchronous=FULL``. A ratio is the median over
rounds in which all three came one after the other, each first in turn, since a disk and a busy
machine drift. Where the disk is slow all of them wait for it: then the CPU of a cycle tells more.

    python benchmarks/ledger.py
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.database import Database, driver, engine_version
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE

# Times the time and the CPU of the bare statements, and of the raw limit.
MOST = {"rate_bare": 2.0, "rate_limit": 4.0, "cpu_bare": 2.5, "cpu_limit": 5.0}
AMOUNT = Amount(tokens=100, cost=2_000_000)
LIMITS = (
    Limit(scope="project", period="day", unit="tokens", amount=10**12),
    Limit(scope="project", period="month", unit="cost", amount=10**18),
    Limit(scope="*", period="day", unit="tokens", amount=10**12),
)
Statement = tuple[str, tuple[Any, ...]]
Cycle = Callable[[], object]
Source = Callable[..., Iterator[Cycle]]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Cycles per second, and seconds of CPU for one of them."""

    rate: float
    cpu: float


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
    return Ledger(Database(path, STATE))


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


def raw_limit(path: Path, commits: int) -> Iterator[Cycle]:
    connection = driver().connect(path, timeout=60, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")

    def cycle() -> None:
        for _ in range(commits):
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE counter SET value = value + 1")
            connection.execute("COMMIT")

    yield cycle
    connection.close()


def new_raw_limit(path: Path) -> None:
    with driver().connect(path, isolation_level=None) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE counter (value INTEGER)")
        connection.execute("INSERT INTO counter VALUES (0)")
    connection.close()


def worker(
    sources: Sequence[tuple[Source, tuple[Any, ...]]],
    rounds: int,
    seconds: float,
    start: Any,
    done: Any,
) -> None:
    """Puts the rounds of this process: a turn of each source, in the order of the sources."""
    with contextlib.ExitStack() as opened:
        cycles = [
            opened.enter_context(contextlib.contextmanager(source)(*arguments))
            for source, arguments in sources
        ]
        for cycle in cycles:
            cycle()
        found = []
        for number in range(rounds):
            turns: dict[int, Turn] = {}
            for step in range(len(cycles)):
                place = (number + step) % len(cycles)
                start.wait()
                turns[place] = turn(cycles[place], seconds)
            found.append([turns[place] for place in range(len(cycles))])
    done.put(found)


def turn(cycle: Cycle, seconds: float) -> Turn:
    """As many cycles as fit into that time, and one at least."""
    count, began, cpu = 0, time.perf_counter(), time.process_time()
    while not count or time.perf_counter() < began + seconds:
        cycle()
        count += 1
    used = time.process_time() - cpu
    return Turn(rate=count / (time.perf_counter() - began), cpu=used / count)


def rounds_of(
    sources: Sequence[Sequence[tuple[Source, tuple[Any, ...]]]], rounds: int, seconds: float
) -> list[list[Turn]]:
    """What all processes did together in each round, with each of their sources."""
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(len(sources)), context.Queue()
    processes = [
        context.Process(target=worker, args=(own, rounds, seconds, start, done)) for own in sources
    ]
    for process in processes:
        process.start()
    found = [done.get() for _ in processes]
    for process in processes:
        process.join()
    return [
        [together(turns) for turns in zip(*same_round, strict=True)]
        for same_round in zip(*found, strict=True)
    ]


def together(turns: Sequence[Turn]) -> Turn:
    rate = sum(each.rate for each in turns)
    return Turn(rate=rate, cpu=sum(each.cpu * each.rate for each in turns) / rate)


def compare(folder: Path, way: str, processes: int, rounds: int, seconds: float) -> bool:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        path, raw = Path(name) / "state.db", Path(name) / "raw.db"
        statements = recorded(path, WAYS[way])
        new_raw_limit(raw)
        commits = sum(sql == "COMMIT" for sql, _ in statements)
        each = [
            [
                (by_ledger, (path, way)),
                (bare, (path, statements, number * 10**9)),
                (raw_limit, (raw, commits)),
            ]
            for number in range(1, processes + 1)
        ]
        found = rounds_of(each, rounds, seconds)
    middle = statistics.median
    rate = middle(ledger.rate for ledger, _, _ in found)
    cpu = middle(ledger.cpu for ledger, _, _ in found)
    figures = {
        "rate_bare": middle(bare.rate / ledger.rate for ledger, bare, _ in found),
        "rate_limit": middle(limit.rate / ledger.rate for ledger, _, limit in found),
        "cpu_bare": middle(ledger.cpu / bare.cpu for ledger, bare, _ in found),
        "cpu_limit": middle(ledger.cpu / limit.cpu for ledger, _, limit in found),
    }
    shown = "".join(f"{figure:9.2f}" for figure in figures.values())
    print(f"{way:30} {processes:9} {rate:9,.0f} {cpu * 1000:9.2f}{shown}", flush=True)
    return all(figure <= MOST[name] for name, figure in figures.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="on which disk; default: the temporary folder")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each turn in a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        journal = new_ledger(Path(name) / "state.db").database.journal_mode
    print(f"SQLite {engine_version()} ({driver().__name__}), journal {journal}, synchronous FULL")
    titles = ("cycles/s", "CPU ms", "× bare", "× limit", "CPU×bare", "CPU×lim")
    print(f"{'':30} processes  " + "  ".join(f"{title:>8}" for title in titles))
    met = [
        compare(options.folder, way, processes, options.rounds, options.seconds)
        for way in WAYS
        for processes in options.processes
    ]
    print(f"{', '.join(f'{name} ≤ {most:g}' for name, most in MOST.items())}: ", end="")
    print("met" if all(met) else "missed")
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
