"""How do the results read as tables in Markdown?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

Cell: TypeAlias = Mapping[str, Any]
Show: TypeAlias = Callable[[Cell], str]
Column: TypeAlias = tuple[str, str, Show]

_EMPTY: Final = "–"
_REUSE: Final = "from the cache, new process: CPU s per 10k"


def _number(value: float, digits: int = 2) -> str:
    return f"{value:,.{digits}f}"


def _failed(cell: Cell) -> str:
    return f"{cell['failed_texts']:,} of {cell['texts']:,}" if cell["failed_texts"] else "0"


def _refused(cell: Cell) -> str:
    return f"{cell['throttled']:,} / {cell['requests']:,}"


def _figure(name: str, digits: int = 2, factor: float = 1.0) -> Show:
    return lambda cell: _number(cell[name] * factor, digits)


def _gathered(count: str) -> Show:
    def show(cell: Cell) -> str:
        if count in cell.get("failed", {}):
            return "failed"
        return f"{_number(cell['seconds'][count])} ({_number(cell['times_limit'][count], 1)} ×)"

    return show


_SPEED: Final[Sequence[Column]] = (
    ("CPU s per 10k texts", "cpu", _figure("seconds_per_10k")),
    ("× the limit", "cpu", _figure("times_limit", 1)),
    ("short texts: CPU, × the limit", "short", _figure("times_limit", 1)),
    ("texts/s at 100 ms", "throughput", _figure("texts_per_second", 0)),
    ("share of the limit's", "throughput", _figure("share_of_limit")),
    ("stream of short texts: time, × the limit", "short-stream", _figure("times_limit", 1)),
    ("share of the rate limit", "goodput", _figure("share")),
    ("429s / requests", "goodput", _refused),
    ("failed texts", "goodput", _failed),
)
_ASKING: Final[Sequence[Column]] = (
    ("one question: CPU ms", "query", _figure("milliseconds")),
    ("× the limit", "query", _figure("times_limit", 1)),
    ("200 questions at once: s (× the limit)", "gather", _gathered("200")),
    ("1,000 at once: s (× the limit)", "gather", _gathered("1000")),
    ("800 questions/s: median ms", "arrivals", _figure("median_seconds", 0, 1000)),
    ("99 % within ms", "arrivals", _figure("late_seconds", 0, 1000)),
    ("600 requests/min, refused ones count: share", "strict", _figure("share")),
    ("429s / requests", "strict", _refused),
    ("failed texts", "strict", _failed),
)
_COST: Final[Sequence[Column]] = (
    ("MB per 10k texts", "memory", _figure("mb_per_10k", 0)),
    ("MB for a stream", "stream", _figure("mb", 0)),
    ("billed / different tokens", "cpu", _figure("billed_over_unique")),
    (_REUSE, "reuse", _figure("seconds_per_10k")),
    ("same process", "reuse", _figure("running_seconds_per_10k")),
    ("tokens billed again", "reuse", _figure("billed_again", 0)),
    ("bytes per cached vector", "reuse", _figure("bytes_per_vector", 0)),
    ("into a full cache: CPU s per 10k", "full-cache", _figure("put_seconds_per_10k")),
    ("out of it", "full-cache", _figure("get_seconds_per_10k")),
    ("import, CPU s", "import", _figure("import_seconds")),
    ("first client, CPU s", "import", _figure("ready_seconds")),
    ("first vector, CPU s", "import", _figure("first_seconds")),
    (
        "wrong vectors",
        "checked",
        lambda cell: f"{cell['wrong']:,} of {cell['vectors']:,}" if cell["vectors"] else _EMPTY,
    ),
)
_TABLES: Final = (_SPEED, _ASKING, _COST)
# Under a rate limit a failure is the figure; everywhere else there is none.
_SHARES: Final = ("goodput", "strict")


class _Notes:
    """Why cells are empty: each reason once, numbered in the order of its first use."""

    def __init__(self) -> None:
        self._reasons: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        return f"[{self._reasons.setdefault(reason, len(self._reasons) + 1)}]"

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for reason, number in self._reasons.items()]


def markdown(results: Mapping[str, Any]) -> str:
    """The tables, with where and on what they were measured, and a note for each empty cell.

    Rows and columns of which nothing was measured are left out.
    """
    notes = _Notes()
    tables = [_table(results, columns, notes) for columns in _TABLES]
    parts = [_heading(results), *("\n".join(lines) for lines in tables if lines)]
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
    rows = list(results["rows"].values())
    columns = [column for column in columns if _is_worth_a_column(rows, column)]
    if not {measure for _, measure, _ in columns} - {"checked"}:
        return []
    lines = [
        "| client | " + " | ".join(title for title, _, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for row in rows:
        error = results["clients"][row["client"]].get("error")
        if error is not None or _has_any(row, columns):
            cells = [_cell(row, column, error, notes) for column in columns]
            lines.append(f"| {row['title']} | " + " | ".join(cells) + " |")
    return lines


def _has_any(row: Mapping[str, Any], columns: Sequence[Column]) -> bool:
    measures = {measure for _, measure, _ in columns} - {"checked"}
    return bool(measures & row.keys())


def _is_worth_a_column(rows: Sequence[Mapping[str, Any]], column: Column) -> bool:
    """It has a figure, or nothing but reasons why there is none."""
    _, measure, show = column
    cells = [row[measure] for row in rows if measure in row]
    figures = [cell for cell in cells if "missing" not in cell and not _failed_whole(cell, measure)]
    return any(_shown(cell, show) is not None for cell in figures) or bool(cells and not figures)


def _failed_whole(cell: Cell, measure: str) -> bool:
    return bool(cell.get("error")) and measure not in _SHARES


def _shown(cell: Cell, show: Show) -> str | None:
    """None where an older run has no such figure, or a smaller one not so many."""
    try:
        return show(cell)
    except KeyError:
        return None


def _cell(row: Mapping[str, Any], column: Column, error: str | None, notes: _Notes) -> str:
    title, measure, show = column
    if error is not None:
        return f"{_EMPTY} {notes.mark(error)}"
    cell = row.get(measure)
    if cell is None:
        return _EMPTY
    if "missing" in cell:
        return f"{_EMPTY} {notes.mark(cell['missing'])}"
    if _failed_whole(cell, measure):
        return f"failed {notes.mark(cell['error'])}"
    shown = _shown(cell, show)
    if shown is None:
        return f"failed {notes.mark(cell['error'])}" if cell.get("error") else _EMPTY
    if cell.get("error") and title == "failed texts":
        shown += f" {notes.mark(cell['error'])}"
    if cell.get("how") and title == _REUSE:
        shown += f" {notes.mark(cell['how'])}"
    return shown
