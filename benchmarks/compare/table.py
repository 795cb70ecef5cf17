"""How do the results read as two tables in Markdown?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

Cell: TypeAlias = Mapping[str, Any]
Show: TypeAlias = Callable[[Cell], str]
Column: TypeAlias = tuple[str, str, Show]

_EMPTY: Final = "–"
_REUSE: Final = "2nd run: CPU s per 10k"


def _number(value: float, digits: int = 2) -> str:
    return f"{value:,.{digits}f}"


def _failed(cell: Cell) -> str:
    return f"{cell['failed_texts']:,} of {cell['texts']:,}" if cell["failed_texts"] else "0"


_SPEED: Final[Sequence[Column]] = (
    ("CPU s per 10k texts", "cpu", lambda cell: _number(cell["seconds_per_10k"])),
    ("× the limit", "cpu", lambda cell: _number(cell["times_limit"], 1)),
    (
        "texts/s at 100 ms",
        "throughput",
        lambda cell: _number(cell["texts_per_second"], 0),
    ),
    ("share of the rate limit", "goodput", lambda cell: _number(cell["share"])),
    (
        "429s / requests",
        "goodput",
        lambda cell: f"{cell['throttled']:,} / {cell['requests']:,}",
    ),
    ("failed texts", "goodput", _failed),
)
_COST: Final[Sequence[Column]] = (
    ("MB per 10k texts", "memory", lambda cell: _number(cell["mb_per_10k"], 0)),
    ("MB for a stream", "stream", lambda cell: _number(cell["mb"], 0)),
    ("billed / different tokens", "cpu", lambda cell: _number(cell["billed_over_unique"])),
    (_REUSE, "reuse", lambda cell: _number(cell["seconds_per_10k"])),
    ("2nd run: tokens bought", "reuse", lambda cell: _number(cell["billed_again"], 0)),
    ("bytes per vector kept", "reuse", lambda cell: _number(cell["bytes_per_vector"], 0)),
    ("import, CPU s", "import", lambda cell: _number(cell["import_seconds"])),
    ("first client, CPU s", "import", lambda cell: _number(cell["ready_seconds"])),
    (
        "wrong vectors",
        "checked",
        lambda cell: f"{cell['wrong']:,} of {cell['vectors']:,}" if cell["vectors"] else _EMPTY,
    ),
)


class _Notes:
    """Why cells are empty: each reason once, numbered in the order of its first use."""

    def __init__(self) -> None:
        self._reasons: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        return f"[{self._reasons.setdefault(reason, len(self._reasons) + 1)}]"

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for reason, number in self._reasons.items()]


def markdown(results: Mapping[str, Any]) -> str:
    """Both tables, with where and on what they were measured, and a note for each empty cell."""
    notes = _Notes()
    speed, cost = _table(results, _SPEED, notes), _table(results, _COST, notes)
    parts = [_heading(results), "\n".join(speed), "\n".join(cost)]
    if lines := notes.lines():
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _heading(results: Mapping[str, Any]) -> str:
    machine, limit, corpus = results["machine"], results["limit"], results["corpus"]
    load = machine.get("load_at_start")
    other = "" if load is None else f" (load average when it began: {load:.1f})"
    versions = []
    for client in results["clients"].values():
        shown = client.get("versions", {})
        versions.append(" with ".join(f"{name} {number}" for name, number in shown.items()))
    return (
        f"Measured {results['when'][:10]} on {machine['processor']} ({machine['cores']} cores), "
        f"Python {machine['python']}{other}; the fake server has one core, the client the rest. "
        f"Texts of {corpus['mean_tokens']:.0f} tokens on average, 5 % of them exact duplicates, "
        f"vectors of 1,536 dimensions. Rate limit: {limit['tokens_per_minute'] / 1e6:g}M tokens "
        f"and {limit['requests_per_minute']:,} requests per minute. "
        f"Versions: {'; '.join(filter(None, versions))}."
    )


def _table(results: Mapping[str, Any], columns: Sequence[Column], notes: _Notes) -> list[str]:
    rows = {name: row for name, row in results["rows"].items() if _has_any(row, columns)}
    # A measure that nobody was asked for needs no column of dashes.
    columns = [column for column in columns if any(column[1] in row for row in rows.values())]
    lines = [
        "| client | " + " | ".join(title for title, _, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in rows.values():
        error = results["clients"][row["client"]].get("error")
        cells = [_cell(row, column, error, notes) for column in columns]
        lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    return lines


def _has_any(row: Mapping[str, Any], columns: Sequence[Column]) -> bool:
    measures = {measure for _, measure, _ in columns} - {"checked"}
    return bool(measures & row.keys()) or not {"cpu", "goodput", "import"} & row.keys()


def _cell(row: Mapping[str, Any], column: Column, error: str | None, notes: _Notes) -> str:
    _, measure, show = column
    if error is not None:
        return f"{_EMPTY} {notes.mark(error)}"
    cell = row.get(measure)
    if cell is None:
        return _EMPTY
    if "missing" in cell:
        return f"{_EMPTY} {notes.mark(cell['missing'])}"
    # Under a rate limit a failure is the figure; everywhere else there is none.
    if cell.get("error") and measure != "goodput":
        return f"failed {notes.mark(cell['error'])}"
    shown = show(cell)
    if cell.get("error") and column[0] == "failed texts":
        shown += f" {notes.mark(cell['error'])}"
    if cell.get("how") and column[0] == _REUSE:
        shown += f" {notes.mark(cell['how'])}"
    return shown
