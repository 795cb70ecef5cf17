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
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, TypeAlias

from compare import corpus
from compare.child import Used
from compare.clients.contract import Client, Row
from compare.limits import Limit
from compare.runner import Outcome, Runner, environment
from compare.sizes import Sizes
from compare.tokens import Counter

LATENCY: Final = 0.1
LIMIT: Final = Limit()
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
        self.checked: dict[str, Cell] = {}

    def cpu(self, client: Client, row: Row) -> Cell:
        """Pairs of a run of the limit and one of the client; the ratio is the median pair's.

        ``altered_texts`` reached the server other than they were given.
        """
        texts = self._sizes.texts(row, "cpu")
        rounds = self._sizes.slow_rounds if row.slow else self._sizes.rounds
        pairs, last = [], None
        for number in range(rounds):
            # Who goes first changes: load that comes or goes must not favour one of them.
            base = self._base() if number % 2 == 0 else None
            last = self._note(row, self._runner.run(client, row, "cpu", texts=texts))
            if (bad := _unusable(last)) is not None:
                return bad
            base = base or self._base()
            pairs.append((_per(base.used.cpu, base.used.texts), _per(last.used.cpu, texts)))
        assert last is not None
        ratio = statistics.median(own / base for base, own in pairs)
        return {
            "seconds_per_10k": statistics.median(own for _, own in pairs),
            # Against itself it shows how steady the machine was; the pairs tell.
            "times_limit": 1.0 if client is self._limit else ratio,
            "pairs": pairs,
            "texts": texts,
            "requests": last.meter["requests"],
            "server_cpu_per_10k": _per(last.meter["cpu"], texts),
            "billed": last.meter["billed"],
            "billed_over_unique": last.meter["billed"] / self._bill.unique[texts],
            "altered_texts": last.meter["unknown_texts"],
        }

    def _base(self) -> Outcome:
        return self._runner.run(self._limit, self._limit.rows[0], "cpu", texts=self._sizes.cpu)

    def throughput(self, client: Client, row: Row) -> Cell:
        """Texts per second while every request takes 100 ms."""
        texts = self._sizes.texts(row, "throughput")
        rates, most = [], 0
        for _ in range(1 if row.slow else 3):
            outcome = self._note(
                row, self._runner.run(client, row, "throughput", texts=texts, latency=LATENCY)
            )
            if (bad := _unusable(outcome)) is not None:
                return bad
            rates.append(texts / outcome.used.wall)
            most = max(most, outcome.meter["most_in_flight"])
        return {
            "texts_per_second": statistics.median(rates),
            "runs": rates,
            "texts": texts,
            "most_in_flight": most,
        }

    def goodput(self, client: Client, row: Row) -> Cell:
        """The ideal time for what came back with a vector, as a share of the time it took.

        No duplicates here: whoever leaves them out would have less to do.
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
        """The same texts a second time, in a new process that finds what the first one kept."""
        texts = self._sizes.texts(row, "reuse")
        with tempfile.TemporaryDirectory(prefix="compare-") as name:
            folder = Path(name)
            first = self._note(
                row, self._runner.run(client, row, "reuse", texts=texts, folder=folder)
            )
            if (bad := _unusable(first)) is not None:
                return bad
            kept = disk_bytes(folder / "kept")
            second = self._note(
                row, self._runner.run(client, row, "reuse", texts=texts, folder=folder)
            )
        if (bad := _unusable(second)) is not None:
            return bad
        different = len(set(corpus.texts(texts)))
        return {
            "how": row.reuse_how,
            "seconds_per_10k": _per(second.used.cpu, texts),
            "first_seconds_per_10k": _per(first.used.cpu, texts),
            "bytes_per_vector": kept / different,
            "billed_again": second.meter["billed"],
            "billed_first": first.meter["billed"],
            "texts": texts,
        }

    def start(self, client: Client, python: Path) -> Cell:
        """CPU over a bare interpreter: to import it, and to hold a client that could be used."""
        cases = {"bare": "pass", "import": client.statement, "ready": client.ready}
        with tempfile.TemporaryDirectory(prefix="compare-") as name:
            run = _interpreter(python, Path(name))
            # The first time of all also writes the bytecode.
            if run(cases["import"]) is None or run(cases["ready"]) is None:
                return {"error": "the import failed"}
            found: dict[str, list[float]] = {case: [] for case in cases}
            for _ in range(self._sizes.imports):
                for case, code in cases.items():
                    found[case].append(run(code) or 0.0)
        bare = statistics.median(found["bare"])
        return {
            "import_seconds": max(0.0, statistics.median(found["import"]) - bare),
            "ready_seconds": max(0.0, statistics.median(found["ready"]) - bare),
        }

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


def _interpreter(python: Path, home: Path) -> Callable[[str], float | None]:
    variables = environment("http://127.0.0.1:9/v1", home / "home")

    def run(code: str) -> float | None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [python, "-c", code],
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
