"""The command line: who takes part, what is measured, where the results go."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, get_args

from compare import corpus, environments, picture, roster, table
from compare.clients.contract import Client, Purpose, Row
from compare.measure import LATENCY, LIMIT, Bill, Cell, Measure, machine
from compare.runner import SHORT, Runner
from compare.serving import Serving
from compare.sizes import FULL, QUICK, Sizes
from compare.tokens import Counter, offer_vocabulary

_HERE: Final = Path(__file__).parent
MEASURES: Final = (*get_args(Purpose), "import")
# What a row must have to be measured so; who has not is left out without a word.
_NEEDED: Final = {
    "strict": "strict",
    "short-stream": "stream",
    "full-cache": "cache",
    "query": "query",
    "gather": "aquery",
    "arrivals": "aquery",
}


def run(arguments: Sequence[str]) -> int:
    given = _parser().parse_args(arguments)
    sizes = QUICK if given.quick else FULL
    complete = not (given.quick or given.only or given.measures)
    folder = Path(given.out) if given.out else _HERE if complete else environments.FOLDER / "last"
    folder.mkdir(parents=True, exist_ok=True)
    if given.cache_rows:
        sizes = replace(sizes, cache_rows=given.cache_rows)
    if given.draw:
        return _draw(json.loads((folder / "results.json").read_text()), folder)
    offer_vocabulary(environments.FOLDER / "vocabulary")
    if given.profile:
        return _profile(given.profile, sizes)
    measures = tuple(given.measures.split(",")) if given.measures else MEASURES
    if unknown := set(measures) - set(MEASURES):
        raise SystemExit(f"no measure {', '.join(unknown)}; there are: {', '.join(MEASURES)}")
    results = _measure(roster.chosen(given.only), measures, sizes)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return _draw(results, folder)


def _profile(name: str, sizes: Sizes) -> int:
    client, row = roster.row(name)
    pythons, _ = _install([client])
    with Serving(sizes.cpu) as serving:
        runner = Runner(serving, pythons)
        texts = sizes.texts(row, "cpu")
        outcome = runner.run(client, row, "cpu", texts=texts, profile=True)
    print(f"{row.title}: {texts:,} texts")
    print(outcome.used.profile or outcome.used.error or outcome.used.missing)
    return 0


def _draw(results: dict[str, Any], folder: Path) -> int:
    text = table.markdown(results)
    (folder / "results.md").write_text(text)
    picture.draw(results, folder / "results.png")
    print(text)
    print(f"written to {folder}: results.md, results.json, results.png", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/compare", description="Measure embedcore beside its peers."
    )
    parser.add_argument("--quick", action="store_true", help="fewer texts and rounds")
    parser.add_argument("--only", metavar="NAMES", help="clients or rows, separated by commas")
    parser.add_argument(
        "--measures", metavar="NAMES", help=f"some of {','.join(MEASURES)} (default: all)"
    )
    parser.add_argument(
        "--cache-rows", metavar="N", type=int, help="vectors in the cache of full-cache"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where the results go")
    parser.add_argument(
        "--profile", metavar="ROW", help="only show where the CPU time of one row goes"
    )
    parser.add_argument(
        "--draw", action="store_true", help="measure nothing: table and picture of the last run"
    )
    return parser


def _measure(
    chosen: list[tuple[Client, list[Row]]], measures: Sequence[str], sizes: Sizes
) -> dict[str, Any]:
    pythons, clients = _install([client for client, _ in chosen])
    counter = Counter()
    most = max(sizes.cpu, sizes.memory, sizes.throughput, sizes.reuse)
    bills = (
        Bill.of(corpus.texts(most), counter),
        Bill.of(corpus.texts(sizes.goodput, duplicates=0.0), counter),
    )
    results: dict[str, Any] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "corpus": {
            "seed": corpus.SEED,
            "mean_tokens": bills[0].all[-1] / most,
            "counted": counter.how,
        },
        "latency": LATENCY,
        "limit": vars(LIMIT),
        "clients": clients,
        "rows": {},
    }
    short = sizes.most_short if {*SHORT} & {*measures} else 0
    with Serving(most, short) as serving:
        measure = Measure(Runner(serving, pythons), sizes, *bills, limit=chosen[0][0])
        for client, rows in chosen:
            for row in rows:
                cells = _row(measure, client, row, measures, pythons)
                cells["checked"] = measure.checked.get(row.name, {"vectors": 0, "wrong": 0})
                results["rows"][row.name] = cells
                # After a run that was stopped, what there was can still be looked at.
                (environments.FOLDER / "unfinished.json").write_text(json.dumps(results))
    return results


def _install(chosen: Sequence[Client]) -> tuple[dict[str, Path], dict[str, Any]]:
    """The interpreters of those that can be installed, and what is known of everybody."""
    pythons: dict[str, Path] = {}
    clients: dict[str, Any] = {}
    for client in chosen:
        _tell(f"environment of {client.name}")
        try:
            python = environments.python(client.name, client.packages)
        except environments.NotInstalled as reason:
            clients[client.name] = {"error": f"not installed: {reason}"}
            continue
        pythons[client.name] = python
        clients[client.name] = {"versions": environments.versions(python, client.shown)}
    return pythons, clients


def _row(
    measure: Measure,
    client: Client,
    row: Row,
    measures: Sequence[str],
    pythons: dict[str, Path],
) -> dict[str, Any]:
    cells: dict[str, Any] = {
        "title": row.title,
        "label": row.label,
        "client": client.name,
    }
    if client.name not in pythons:
        return cells
    for name in measures:
        if row.only and name not in row.only:
            continue
        if name in _NEEDED and not getattr(row, _NEEDED[name]):
            continue
        if name in row.missing:
            cells[name] = {"missing": row.missing[name]}
            continue
        started = time.monotonic()
        cells[name] = _cell(measure, client, row, name, pythons)
        shown = {key: value for key, value in cells[name].items() if key not in ("pairs", "puts")}
        _tell(f"{row.name}: {name} in {time.monotonic() - started:.0f} s: {_brief(shown)}")
    return cells


def _cell(measure: Measure, client: Client, row: Row, name: str, pythons: dict[str, Path]) -> Cell:
    if name == "import":
        return measure.start(client, pythons[client.name], pythons["limit"])
    if name == "reuse" and row.reuse is None:
        return {"missing": "has no cache of its own"}
    if name == "stream" and row.stream is None:
        return {"missing": "no stream of vectors"}
    ways: dict[str, Callable[[Client, Row], Cell]] = {
        "cpu": measure.cpu,
        "short": measure.short,
        "throughput": measure.throughput,
        "goodput": measure.goodput,
        "strict": measure.strict,
        "memory": measure.memory,
        "stream": measure.stream,
        "short-stream": measure.short_stream,
        "reuse": measure.reuse,
        "full-cache": measure.full_cache,
        "query": measure.query,
        "gather": measure.gather,
        "arrivals": measure.arrivals,
    }
    return ways[name](client, row)


def _brief(cell: Cell) -> str:
    return ", ".join(
        f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in cell.items()
        if value is not None
    )


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
