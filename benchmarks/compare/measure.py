"""What is measured of a client, and how is a figure made of several runs?

Every run is a child process of its own. CPU is user + system time of the client's process only.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Any, Final, TypeAlias

from compare import corpus
from compare.asking import CALL_TEXTS, RATE
from compare.clients.contract import Client, Purpose, Row
from compare.limits import Limit
from compare.runner import Outcome, Runner, environment
from compare.sizes import Sizes
from compare.tokens import Counter
from compare.used import Used

LATENCY: Final = 0.1
QUERY_LATENCY: Final = 0.15
LIMIT: Final = Limit()
STRICT: Final = Limit(requests_per_minute=600, burst_requests=10, refused_count=True)
# Texts per request that the limit is tried with: the best is the limit.
REQUEST_TEXTS: Final = (125, 171, 250, 500, 1_250)
_PER: Final = 10_000

Cell: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Tokens of the first n texts of the corpus: all of them, and each different text once."""

    all: Sequence[int]
    unique: Sequence[int]

    @classmethod
    def of(cls, texts: Sequence[str], counter: Counter) -> Bill:
        counts: dict[str, int] = {}
        new: list[int] = []
        every: list[int] = []
        for text in texts:
            known = text in counts
            tokens = counts[text] if known else counts.setdefault(text, counter.count(text))
            every.append(tokens)
            new.append(0 if known else tokens)
        return cls(all=[0, *accumulate(every)], unique=[0, *accumulate(new)])


class Measure:
    """All measurements of one run. ``limit`` is who the CPU rounds alternate with."""

    def __init__(
        self, runner: Runner, sizes: Sizes, bill: Bill, unique_bill: Bill, limit: Client
    ) -> None:
        self._runner = runner
        self._sizes = sizes
        self._bill = bill
        self._unique_bill = unique_bill
        self._limit = limit
        self._best: dict[Purpose, Cell] = {}
        self._starts: dict[str, Cell] = {}
        self.checked: dict[str, Cell] = {}

    def cpu(self, client: Client, row: Row) -> Cell:
        """CPU until there is one array, beside the limit's; over TLS, beside its own over TLS.

        ``altered_texts`` reached the server other than they were given.
        """
        cell, outcome = self._beside_limit(client, row, "cpu")
        if outcome is not None:
            texts, meter = cell["texts"], outcome.meter
            cell |= {
                "requests": meter["requests"],
                "server_cpu_per_10k": _per(meter["cpu"], texts),
                "billed": meter["billed"],
                "billed_over_unique": meter["billed"] / self._bill.unique[texts],
                "altered_texts": meter["unknown_texts"],
            }
        return cell

    def short(self, client: Client, row: Row) -> Cell:
        """The same for short texts."""
        return self._beside_limit(client, row, "short")[0]

    def _beside_limit(
        self, client: Client, row: Row, purpose: Purpose
    ) -> tuple[Cell, Outcome | None]:
        """Pairs of a run of the limit and one of the client; the ratio is the median pair's."""
        texts = self._sizes.texts(row, purpose)
        rounds = self._sizes.slow_rounds if row.slow else self._sizes.rounds

        def own() -> Outcome:
            return self._note(row, self._runner.run(client, row, purpose, texts=texts))

        pairs = self._pairs(rounds, own, lambda: self._base(purpose, row))
        last = pairs[-1][1]
        if (bad := _unusable(last)) is not None:
            return bad, None
        seconds = [
            (_per(base.used.cpu, base.used.texts), _per(one.used.cpu, texts)) for base, one in pairs
        ]
        cell = {
            "seconds_per_10k": statistics.median(one for _, one in seconds),
            "times_limit": self._times(client, seconds),
            "pairs": seconds,
            "texts": texts,
        }
        return cell, last

    def _pairs(
        self, rounds: int, own: Callable[[], Outcome], base: Callable[[], Outcome]
    ) -> list[tuple[Outcome, Outcome]]:
        """Both in turns. Ends with the first of its own that has no figure."""
        pairs = []
        for number in range(rounds):
            # Who goes first changes: load that comes or goes must not favour one of them.
            first = base() if number % 2 == 0 else None
            one = own()
            pairs.append((first or one, one))
            if _unusable(one) is not None:
                break
            pairs[-1] = (first or base(), one)
        return pairs

    def _times(self, client: Client, pairs: Sequence[tuple[float, float]]) -> float:
        # Against itself it shows how steady the machine was; the pairs tell.
        return 1.0 if client is self._limit else _ratio(pairs)

    def _base(self, purpose: Purpose = "cpu", row: Row | None = None, **more: Any) -> Outcome:
        """The limit, as ``row`` is measured."""
        tls = row is not None and row.tls
        base = next(one for one in self._limit.rows if one.tls == tls)
        texts = more.pop("texts", None) or self._sizes.texts(base, purpose)
        return self._runner.run(self._limit, base, purpose, texts=texts, **more)

    def throughput(self, client: Client, row: Row) -> Cell:
        """Texts per second while every request takes 100 ms, and beside the limit at its best."""
        texts = self._sizes.texts(row, "throughput")
        best = self._best_of_limit("throughput", latency=LATENCY)
        if client is self._limit:
            return {**best, "share_of_limit": 1.0, "texts": texts}

        def own() -> Outcome:
            return self._note(
                row, self._runner.run(client, row, "throughput", texts=texts, latency=LATENCY)
            )

        def base() -> Outcome:
            return self._base("throughput", latency=LATENCY, request_texts=best["request_texts"])

        pairs = self._pairs(1 if row.slow else self._sizes.streams, own, base)
        last = pairs[-1][1]
        if (bad := _unusable(last)) is not None:
            return bad
        rates = [(_rate(base), _rate(one)) for base, one in pairs]
        return {
            "texts_per_second": statistics.median(one for _, one in rates),
            "share_of_limit": _ratio(rates),
            "pairs": rates,
            "texts": texts,
            "most_in_flight": max(one.meter["most_in_flight"] for _, one in pairs),
        }

    def short_stream(self, client: Client, row: Row) -> Cell:
        """How long a stream of short texts takes, beside the limit at its best."""
        texts = self._sizes.texts(row, "short-stream")
        best = self._best_of_limit("short-stream")
        if client is self._limit:
            return {**best, "seconds": texts / best["texts_per_second"], "times_limit": 1.0}

        def own() -> Outcome:
            return self._note(row, self._runner.run(client, row, "short-stream", texts=texts))

        def base() -> Outcome:
            return self._base("short-stream", request_texts=best["request_texts"])

        pairs = self._pairs(self._sizes.streams, own, base)
        if (bad := _unusable(pairs[-1][1])) is not None:
            return bad
        seconds = [(base.used.wall, one.used.wall) for base, one in pairs]
        return {
            "seconds": statistics.median(one for _, one in seconds),
            "times_limit": _ratio(seconds),
            "pairs": seconds,
            "texts": texts,
        }

    def _best_of_limit(self, purpose: Purpose, **more: Any) -> Cell:
        """The limit with each number of texts per request, and which was the fastest. More than
        once: the first time around, the machine may do something else."""
        if purpose not in self._best:
            rates: dict[int, list[float]] = {size: [] for size in REQUEST_TEXTS}
            for size in REQUEST_TEXTS * min(2, self._sizes.streams):
                outcome = self._base(purpose, request_texts=size, **more)
                self._note(self._limit.rows[0], outcome)
                rates[size].append(_rate(outcome) if _unusable(outcome) is None else 0.0)
            best = max(rates, key=lambda size: max(rates[size]))
            self._best[purpose] = {
                "request_texts": best,
                "texts_per_second": max(rates[best]),
                "rates": rates,
            }
        return self._best[purpose]

    def goodput(self, client: Client, row: Row) -> Cell:
        """The ideal time for what came back with a vector, as a share of the time it took.

        No duplicates here: a client that leaves them out would have less to do.
        """
        texts = self._sizes.texts(row, "goodput")
        outcome = self._note(
            row,
            self._runner.run(
                client, row, "goodput", texts=texts, duplicates=0.0, latency=LATENCY, limit=LIMIT
            ),
        )
        if outcome.used.missing is not None or not outcome.meter:
            return _unusable(outcome) or {}
        used, meter = outcome.used, outcome.meter
        tokens = self._unique_bill.all[texts]
        return {
            "share": share(tokens, meter["billed"], used),
            "ideal_seconds": LIMIT.ideal_seconds(tokens),
            "seconds": used.wall,
            "texts": texts,
            "failed_texts": texts - used.delivered,
            "throttled": meter["throttled"],
            "requests": meter["requests"],
            "billed": meter["billed"],
            "error": used.error,
        }

    def strict(self, client: Client, row: Row) -> Cell:
        """The same for 600 requests per minute, where those that are refused count as well."""
        texts = self._sizes.texts(row, "strict")
        outcome = self._note(
            row,
            self._runner.run(client, row, "strict", texts=texts, latency=LATENCY, limit=STRICT),
        )
        if outcome.used.missing is not None or not outcome.meter:
            return _unusable(outcome) or {}
        used, meter = outcome.used, outcome.meter
        ideal = STRICT.ideal_seconds_of_requests(used.delivered / CALL_TEXTS)
        return {
            "share": ideal / used.wall,
            "ideal_seconds": ideal,
            "seconds": used.wall,
            "failed_texts": texts - used.delivered,
            "texts": texts,
            "throttled": meter["throttled"],
            "requests": meter["requests"],
            "error": used.error,
        }

    def memory(self, client: Client, row: Row) -> Cell:
        """Growth of the resident memory, at its highest, over what was there before the call."""
        texts = self._sizes.texts(row, "memory")
        outcome = self._note(row, self._runner.run(client, row, "memory", texts=texts))
        if (bad := _unusable(outcome)) is not None:
            return bad
        return {"mb_per_10k": _per(outcome.used.growth / 1e6, texts), "texts": texts}

    def stream(self, client: Client, row: Row) -> Cell:
        texts = self._sizes.stream
        outcome = self._note(
            row, self._runner.run(client, row, "stream", texts=texts, duplicates=0.0)
        )
        if (bad := _unusable(outcome)) is not None:
            return bad
        return {"mb": outcome.used.growth / 1e6, "texts": texts}

    def reuse(self, client: Client, row: Row) -> Cell:
        """The same texts a second time, in a new process that finds what the first one kept, and
        in a process that has had all of them from there before."""
        texts = self._sizes.texts(row, "reuse")
        with tempfile.TemporaryDirectory(prefix="compare-") as name:
            folder = Path(name)

            def run(*, running: bool = False) -> Outcome:
                outcome = self._runner.run(
                    client, row, "reuse", texts=texts, folder=folder, running=running
                )
                return self._note(row, outcome)

            first = run()
            if (bad := _unusable(first)) is not None:
                return bad
            kept = disk_bytes(folder / "kept")
            rounds = self._sizes.slow_rounds if row.slow else self._sizes.rounds
            pairs = self._pairs(rounds, run, self._base)
            again = [run(running=True) for _ in pairs]
        found = [*(one for _, one in pairs), *again]
        for outcome in found:
            if (bad := _unusable(outcome)) is not None:
                return bad
        seconds = [(_cpu_per_10k(base), _cpu_per_10k(one)) for base, one in pairs]
        running = statistics.median(map(_cpu_per_10k, again))
        return {
            "how": row.reuse_how,
            "seconds_per_10k": statistics.median(one for _, one in seconds),
            "times_limit": _ratio(seconds),
            "running_seconds_per_10k": running,
            "running_times_limit": running / statistics.median(base for base, _ in seconds),
            "first_seconds_per_10k": _cpu_per_10k(first),
            "bytes_per_vector": kept / len(set(corpus.texts(texts))),
            "billed_again": sum(one.meter["billed"] for one in found),
            "billed_first": first.meter["billed"],
            "texts": texts,
        }

    def full_cache(self, client: Client, row: Row) -> Cell:
        """The cache by itself, with a million vectors in it: CPU to put more, and to read some."""
        texts, rows = self._sizes.texts(row, "full-cache"), self._sizes.cache_rows
        with tempfile.TemporaryDirectory(prefix="compare-") as name:
            folder = Path(name)

            def run(*, running: bool) -> Outcome:
                outcome = self._runner.run(
                    client,
                    row,
                    "full-cache",
                    texts=texts,
                    folder=folder,
                    running=running,
                    rows=rows,
                    rounds=self._sizes.rounds,
                    # A million in a few minutes, and more than that in as much more.
                    timeout=600.0 + rows / 500,
                )
                return self._note(row, outcome)

            first = run(running=True)
            if (bad := _unusable(first)) is not None:
                return bad
            kept = disk_bytes(folder / "kept")
            bases = [_cpu_per_10k(self._base())]
            again = run(running=False)
            bases.append(_cpu_per_10k(self._base()))
        if (bad := _unusable(again)) is not None:
            return bad
        *puts, get = (_per(lap, texts) for lap in first.used.laps)
        put = statistics.median(puts)
        return {
            "rows": rows,
            "put_seconds_per_10k": put,
            "put_times_limit": put / statistics.mean(bases),
            "puts": puts,
            "get_seconds_per_10k": get,
            "get_times_limit": get / statistics.mean(bases),
            "new_process_seconds_per_10k": _per(again.used.laps[0], texts),
            "bytes_per_vector": kept / (rows + len(puts) * texts),
            "texts": texts,
        }

    def query(self, client: Client, row: Row) -> Cell:
        """CPU of one question after the other, beside the limit's."""
        cell, outcome = self._beside_limit(client, row, "query")
        if outcome is not None:
            cell["milliseconds"] = cell["seconds_per_10k"] / _PER * 1000
        return cell

    def gather(self, client: Client, row: Row) -> Cell:
        """Questions in one ``asyncio.gather`` while every request takes 150 ms. Many may be too
        many where few were not: ``failed`` says why."""
        cell: Cell = {"seconds": {}, "times_limit": {}, "requests": {}, "failed": {}}
        for many in self._sizes.gathers:

            def own(many: int = many) -> Outcome:
                return self._note(
                    row,
                    self._runner.run(client, row, "gather", texts=many, latency=QUERY_LATENCY),
                )

            def base(many: int = many) -> Outcome:
                return self._base("gather", texts=many, latency=QUERY_LATENCY)

            pairs = self._pairs(self._sizes.streams, own, base)
            if (bad := _unusable(pairs[-1][1])) is not None:
                cell["failed"][str(many)] = bad
                continue
            seconds = [(base.used.wall, one.used.wall) for base, one in pairs]
            cell["seconds"][str(many)] = statistics.median(one for _, one in seconds)
            cell["times_limit"][str(many)] = self._times(client, seconds)
            cell["requests"][str(many)] = pairs[-1][1].meter["requests"]
        return cell if cell["seconds"] else next(iter(cell["failed"].values()))

    def arrivals(self, client: Client, row: Row) -> Cell:
        """Questions that arrive evenly while every request takes 150 ms: how long each waits."""
        texts = self._sizes.texts(row, "arrivals")

        def own() -> Outcome:
            return self._note(
                row,
                self._runner.run(client, row, "arrivals", texts=texts, latency=QUERY_LATENCY),
            )

        def base() -> Outcome:
            return self._base("arrivals", latency=QUERY_LATENCY)

        pairs = self._pairs(self._sizes.streams, own, base)
        last = pairs[-1][1]
        if (bad := _unusable(last)) is not None:
            return bad
        medians = [
            (statistics.median(base.used.laps), statistics.median(one.used.laps))
            for base, one in pairs
        ]
        return {
            "per_second": RATE,
            "median_seconds": statistics.median(one for _, one in medians),
            "times_limit": self._times(client, medians),
            "late_seconds": statistics.median(
                statistics.quantiles(one.used.laps, n=100)[98] for _, one in pairs
            ),
            "requests": last.meter["requests"],
            "texts": texts,
        }

    def start(self, client: Client, python: Path, limit: Path) -> Cell:
        """CPU over a bare interpreter: to import it, to hold a client that could be used, and to
        have a first vector, beside the limit's. Once for all rows of a client."""
        if client.name not in self._starts:
            self._starts[client.name] = self._start(client, python, limit)
        return self._starts[client.name]

    def _start(self, client: Client, python: Path, limit: Path) -> Cell:
        cases = {
            "bare": (python, "pass"),
            "import": (python, client.statement),
            "ready": (python, client.ready),
            "limit": (limit, self._limit.first),
        }
        if client.first:
            cases["first"] = (python, client.first)
        with tempfile.TemporaryDirectory(prefix="compare-") as name:
            run = _interpreter(Path(name), self._runner.base_url)
            # The first time of all also writes the bytecode, and the files that it leaves.
            for case, statement in cases.items():
                if run(*statement) is None:
                    return {"error": f"{case} failed"}
            found: dict[str, list[float]] = {case: [] for case in cases}
            for _ in range(self._sizes.imports):
                for case, statement in cases.items():
                    found[case].append(run(*statement) or 0.0)
        middle = {case: statistics.median(seconds) for case, seconds in found.items()}
        over = {case: max(0.0, seconds - middle["bare"]) for case, seconds in middle.items()}
        cell = {"import_seconds": over["import"], "ready_seconds": over["ready"]}
        if "first" in over:
            cell["first_seconds"] = over["first"]
            cell["first_times_limit"] = over["first"] / over["limit"] if over["limit"] else 0.0
        return cell

    def _note(self, row: Row, outcome: Outcome) -> Outcome:
        """Every vector of every run was checked; the sum goes into one column."""
        cell = self.checked.setdefault(row.name, {"vectors": 0, "wrong": 0})
        cell["vectors"] += outcome.used.delivered
        cell["wrong"] += outcome.used.wrong
        return outcome


def share(tokens: int, billed: int, used: Used) -> float:
    """The least time for what was delivered, as a share of the time that it took.

    Of the ``tokens`` of all texts, those delivered count by their number; where many failed they
    may be the short ones, so never more than what was billed.
    """
    delivered = min(tokens * used.delivered // used.texts, billed)
    return LIMIT.ideal_seconds(delivered) / used.wall


def _unusable(outcome: Outcome) -> Cell | None:
    """Why there is no figure: the client cannot do it, or failed."""
    if outcome.used.missing is not None:
        return {"missing": outcome.used.missing}
    if outcome.used.error is not None:
        return {"error": outcome.used.error}
    if outcome.used.delivered < outcome.used.texts:
        return {"error": f"{outcome.used.texts - outcome.used.delivered} texts without a vector"}
    return None


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The median pair's: the client's figure beside the limit's."""
    return statistics.median(own / base for base, own in pairs)


def _rate(outcome: Outcome) -> float:
    return outcome.used.texts / outcome.used.wall


def _cpu_per_10k(outcome: Outcome) -> float:
    return _per(outcome.used.cpu, outcome.used.texts)


def _per(amount: float, texts: int) -> float:
    return amount / texts * _PER


def disk_bytes(folder: Path) -> int:
    """What the files of a folder take from the disk, whole blocks where the system tells."""
    total = 0
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            total += getattr(status, "st_blocks", 0) * 512 or status.st_size
    return total


def _interpreter(home: Path, base_url: str) -> Callable[[Path, str], float | None]:
    variables = environment(base_url, home / "home")
    # Another one each time: no cache has its vector.
    texts = count()

    def run(python: Path, code: str) -> float | None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [python, "-c", f"text = 'first request {next(texts)}'; {code}"],
            env=variables,
            cwd=home,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            return None
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    return run


def machine() -> Cell:
    """Where this ran: absolute times hold there, ratios travel further."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        # What others did meanwhile blurs the figures.
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"
