"""How do the results look? Four panels of bars, the same clients in the same order in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _FAINT, _RED = "#24292f", "#8b949e", "#c93c37"
_OURS, _LIMIT, _PEER, _BAD = "#2563eb", "#57606a", "#c4cbd3", "#eab8b5"


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    hint: str
    measure: str
    value: Callable[[Mapping[str, Any]], float]
    text: Callable[[Mapping[str, Any]], str]
    logarithmic: bool = False


def _goodput_text(cell: Mapping[str, Any]) -> str:
    share = f"{cell['share']:.0%}"
    failed = cell["failed_texts"] / cell["texts"]
    return f"{share}, {failed:.0%} failed" if failed else share


_PANELS: Final = (
    Panel(
        title="CPU time, × the raw limit",
        hint="shorter is better; logarithmic",
        measure="cpu",
        value=lambda cell: cell["times_limit"],
        text=lambda cell: f"{cell['times_limit']:.{1 if cell['times_limit'] < 10 else 0}f}×",
        logarithmic=True,
    ),
    Panel(
        title="Texts per second at 100 ms",
        hint="longer is better",
        measure="throughput",
        value=lambda cell: cell["texts_per_second"],
        text=lambda cell: f"{cell['texts_per_second']:,.0f}",
    ),
    Panel(
        title="Share of the rate limit used",
        hint="longer is better",
        measure="goodput",
        value=lambda cell: cell["share"],
        text=_goodput_text,
    ),
    Panel(
        title="Memory, MB per 10,000 texts",
        hint="shorter is better",
        measure="memory",
        value=lambda cell: cell["mb_per_10k"],
        text=lambda cell: f"{cell['mb_per_10k']:,.0f}",
    ),
)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture. Rows without a label, and rows and panels of which nothing was measured,
    are left out; without any there is no picture."""
    rows, panels = drawn(results)
    if not panels:
        path.unlink(missing_ok=True)
        return
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams["font.family"] = ["DejaVu Sans"]
    down = (len(panels) + 1) // 2
    across = min(2, len(panels))
    height = down * (0.29 * len(rows) + 0.7) + 0.6
    figure, axes = plt.subplots(down, across, figsize=(12, height), squeeze=False)
    places = axes.flatten()
    for place, panel in zip(places, panels, strict=False):
        _panel(place, panel, rows)
    for place in places[len(panels) :]:
        place.set_visible(False)
    _words(figure, results, height)
    figure.savefig(path, dpi=160, facecolor="white")
    plt.close(figure)


def drawn(results: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], list[Panel]]:
    """The rows and panels that the picture has. A client that cannot be installed keeps its row."""
    labelled = [row for row in results["rows"].values() if row["label"]]
    panels = [panel for panel in _PANELS if any(panel.measure in row for row in labelled)]
    rows = [
        row
        for row in labelled
        if "error" in results["clients"][row["client"]]
        or any(panel.measure in row for panel in panels)
    ]
    return rows, panels


def _words(figure: Any, results: Mapping[str, Any], height: float) -> None:
    machine = results["machine"]
    figure.suptitle(
        "The same texts, the same fake OpenAI server, one run",
        x=0.012,
        ha="left",
        y=1 - 0.18 / height,
        fontsize=13,
        fontweight="bold",
        color=_INK,
    )
    figure.text(
        0.012,
        0.10 / height,
        f"{results['when'][:10]}, {machine['processor']}, Python {machine['python']}. Rate limit: "
        "6M tokens and 3,000 requests per minute. A missing bar says why.",
        fontsize=8,
        color=_FAINT,
    )
    figure.tight_layout(rect=(0.004, 0.28 / height, 0.996, 1 - 0.08 / height), h_pad=1.4, w_pad=2.0)


def _panel(axes: Axes, panel: Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    cells = [row.get(panel.measure, {}) for row in rows]
    usable = ["missing" not in cell and _has(panel, cell) for cell in cells]
    values = [panel.value(cell) if ok else 0.0 for cell, ok in zip(cells, usable, strict=True)]
    largest = max([*values, 1e-9])
    start = 0.5 if panel.logarithmic else 0.0
    axes.barh(
        range(len(rows)),
        [max(value - start, 0.0) for value in values],
        left=start,
        color=[
            _BAD if cell.get("failed_texts") else _colour(row)
            for row, cell in zip(rows, cells, strict=True)
        ],
        height=0.68,
    )
    if panel.logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(start, largest * 4)
    else:
        axes.set_xlim(0, largest * 1.32)
    for place, (cell, ok, value) in enumerate(zip(cells, usable, values, strict=True)):
        _annotate(axes, place, panel.text(cell) if ok else _why(cell), max(value, start), ok, cell)
    _dress(axes, panel, rows)


def _annotate(
    axes: Axes, place: int, text: str, value: float, ok: bool, cell: Mapping[str, Any]
) -> None:
    bad = bool(cell.get("failed_texts")) or not ok
    axes.annotate(
        text,
        (value, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=_RED if bad else _INK,
    )


def _dress(axes: Axes, panel: Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    axes.set_title(panel.hint, loc="right", fontsize=8.5, color=_FAINT)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9, color=_INK)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row["client"] == "embedcore":
            label.set_fontweight("bold")
            label.set_color(_OURS)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_FAINT)


def _has(panel: Panel, cell: Mapping[str, Any]) -> bool:
    try:
        panel.value(cell)
    except KeyError:
        return False
    return True


def _why(cell: Mapping[str, Any]) -> str:
    reason = str(cell.get("missing") or cell.get("error") or "not measured")
    return reason if len(reason) <= 48 else reason[:45] + "…"


def _colour(row: Mapping[str, Any]) -> str:
    if row["client"] == "embedcore":
        return _OURS
    return _LIMIT if row["client"] == "limit" else _PEER
