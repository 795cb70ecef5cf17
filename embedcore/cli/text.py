"""Names, amounts, texts and tables as a person reads them."""

from __future__ import annotations

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit, urlunsplit

_SHORTEST_SECRET: Final = 8

# Whole sequences first, so that what they would have done does not stay behind as letters:
# control strings (titles, hyperlinks, clipboard), then CSI, then the short ones.
_SEQUENCES = re.compile(
    r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"
    r"|\x1b[ -/]*[0-~]?"
)
# What is left of C0 and C1, and the marks that reorder text, so that it reads as something else.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_GAP: Final = "  "
# What is to be pasted into a shell has lines of its own, indented.
_COMMAND = re.compile(r"\s+(?:(?:embedcore|pip|uv|sqlite3|find|export) |[A-Z_]+=)")
# "name  " before what belongs to it, as ``facts`` writes it.
_LABEL = re.compile(r"\s*(?:\S+ )*\S+\s{2,}(?=\S)|\s*(?=\S)")
_UNUSUAL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


# What messages of the library call by its name in Python → what can be typed here instead.
ARGUMENTS: Final = {
    "overwrite=True": "--overwrite",
    "resubmit_lost=True": "--resubmit-lost",
    'on_empty="keep"': "--on-error keep",
    'on_empty = "keep", for embed and embed_iter': "--on-error keep",
    "text_column=…": "--text",
    "id_column=…": "--id",
    "keep=…": "--keep",
    "input_format=…": "--format",
    "knows no input_type": "knows no --input-type",
    ": use embed or embed_iter": "",
    ", or read_again() of the job, then": " then",
    ", or resubmit_cancelled() of the job": "",
}


def as_typed(message: str) -> str:
    """A message of the library, with the options of the command line for what Python calls so."""
    for python, here in ARGUMENTS.items():
        message = message.replace(python, here)
    return message


def printable(text: str) -> str:
    """Without anything that a terminal would obey; line breaks and tabs stay."""
    return _CONTROLS.sub("", _SEQUENCES.sub("", text))


def one_line(text: str, width: int) -> str:
    """Printable, on one line, cut to ``width`` characters."""
    # Cut first as well: a long text needs no look at its whole length.
    line = " ".join(printable(text[: width * 8]).split())
    return line if len(line) <= width and len(text) <= width * 8 else f"{line[: width - 1]}…"


def wrapped(text: str, *, width: int, lines: int, indent: str) -> str:
    """The start of a text as a paragraph of at most so many lines."""
    return textwrap.fill(
        one_line(text, width * lines),
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        max_lines=lines,
        placeholder="…",
        break_on_hyphens=False,
    )


def plural(count: int, singular: str, several: str | None = None) -> str:
    """``1 row``, ``2 rows``, ``1,000 rows``."""
    return f"{count:,} {singular if count == 1 else several or singular + 's'}"


def tokens(count: int, *, exact: bool = True) -> str:
    """``1 token``, ``2,000 tokens``; "at most" before a figure that was not counted."""
    return ("" if exact else "at most ") + plural(count, "token")


def amount_cut(tokens: int, characters: int) -> str:
    """``3 tokens``, ``80 characters``, or both, of different rows."""
    parts = [
        plural(tokens, "token") if tokens else "",
        plural(characters, "character") if characters else "",
    ]
    return " and ".join(filter(None, parts))


def perhaps_cut_text(count: int, what: str = "row") -> str:
    """Texts that the server took whole although they may be longer than its model takes."""
    return (
        f"{plural(count, what)} may be longer than the model takes: whether the server cut "
        f"{'it' if count == 1 else 'them'} is not known without a tokenizer that counts"
    )


def size(in_bytes: int) -> str:
    """``0 B``, ``12.3 kB``, ``6.8 GB``: in thousands, as disks are sold."""
    amount, unit = float(in_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} B" if unit == "B" else f"{amount:,.1f} {unit}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path in a message. ``command`` is for one that is to be pasted."""
    return printable(os.fsencode(path).decode("utf-8", "replace"))


def command(arguments: Sequence[str]) -> str:
    """A command to paste into a shell. It does what was done, whatever the names contain."""
    if sys.platform == "win32":
        import subprocess

        return printable(subprocess.list2cmdline(arguments))
    return " ".join(map(_quoted, arguments))


def _quoted(argument: str) -> str:
    if not _UNUSUAL.search(argument):
        return shlex.quote(argument)
    # $'…' of bash, zsh and POSIX 2024 names every byte, also those that no encoding has.
    return "$'" + "".join(map(_byte, os.fsencode(argument))) + "'"


def _byte(byte: int) -> str:
    letter = chr(byte)
    return letter if " " <= letter <= "~" and letter not in "'\\" else f"\\{byte:03o}"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    width: int | None = None,
    spare: Sequence[str] = (),
) -> str:
    """Aligned columns; those at the places in ``numbers`` to the right. No cell is ever cut.

    Where ``width`` is too small, the columns named in ``spare`` are left out, one after the other.
    Where that is not enough, the first cell of a row that is too wide stands on a line of its own,
    above the others; a row that is too wide even so has a line for each of its cells, and so has
    every row if most of them would be too wide.
    """
    cells = [tuple(printable(cell) for cell in row) for row in rows]
    shapes = list(_shapes(heads, cells, spare, numbers))
    for lines, right in shapes:
        if width is None or _total(_widths(lines)) <= width:
            return "\n".join(_aligned(lines, _widths(lines), right))
    assert width is not None  # noqa: S101 - else the first of them was right
    for lines, right in shapes:
        fitting = _fitting(lines, width)
        if len(fitting) > len(lines) // 2 + 1:
            under = [_block(heads[1:], row[1:], "  ") for row in cells]
            return "\n".join(_with_too_wide(lines, fitting, right, under))
    return "\n\n".join(_block(heads, row, "") for row in cells)


def _shapes(
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
    spare: Sequence[str],
    numbers: Collection[int],
) -> Iterator[tuple[list[list[str]], list[bool]]]:
    """The lines with all columns, then without each of the spare ones as well; and which of the
    columns go to the right."""
    kept = list(range(len(heads)))
    for head in (None, *spare):
        kept = [column for column in kept if heads[column] != head]
        lines = [[row[column] for column in kept] for row in [heads, *cells]]
        yield lines, [column in numbers for column in kept]


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _aligned(
    lines: Sequence[Sequence[str]], widths: Sequence[int], right: Sequence[bool]
) -> list[str]:
    return [
        _GAP.join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]


def _fitting(lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """Which lines make a table that is not too wide, the heads among them; none if the heads alone
    are too wide."""
    fitting: list[int] = []
    widths = [0] * len(lines[0])
    # The heads, then the shortest rows.
    for i in sorted(range(len(lines)), key=lambda i: (i > 0, sum(map(len, lines[i])))):
        wider = [max(room, len(cell)) for room, cell in zip(widths, lines[i], strict=True)]
        if _total(wider) <= width:
            fitting.append(i)
            widths = wider
        elif i == 0:
            break
    return fitting


def _with_too_wide(
    lines: Sequence[Sequence[str]],
    fitting: Sequence[int],
    right: Sequence[bool],
    blocks: Sequence[str],
) -> Iterator[str]:
    """The lines that fit as a table, and in their places the others: the first cell, and below it
    those that follow, in their columns where they fit, else the row's block."""
    widths = _widths([lines[i] for i in fitting])
    for line, block in zip(lines, ["", *blocks], strict=True):
        (first, *others), (room, *rooms) = line, widths
        if len(first) > room or not _fits(others, rooms):
            yield first
            first = ""
        if _fits(others, rooms):
            yield from _aligned([[first, *others]], widths, right)
        else:
            yield block


def _fits(cells: Sequence[str], rooms: Sequence[int]) -> bool:
    return all(len(cell) <= room for cell, room in zip(cells, rooms, strict=True))


def _block(heads: Sequence[str], line: Sequence[str], indent: str) -> str:
    pairs = [(head, cell) for head, cell in zip(heads, line, strict=True) if cell]
    return facts(pairs, indent=indent)


def fitted(text: str, width: int | None) -> str:
    """Lines that are too long, broken between words. A word that is too long stays whole, so that
    it can be copied, and so does a line that is a command. None: as it is."""
    if width is None:
        return text
    return "\n".join(_fitted_line(line, width) for line in text.split("\n"))


def _fitted_line(line: str, width: int) -> str:
    if len(line) <= width or _COMMAND.match(line):
        return line
    label = _LABEL.match(line)
    indent = 0 if label is None else len(label[0])
    longest = max(map(len, line[indent:].split()), default=0)
    if indent > width // 2 or indent + longest > width:
        indent = min(len(line) - len(line.lstrip()) + 2, width // 2)
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )


def facts(pairs: Sequence[tuple[str, str]], *, indent: str = "") -> str:
    """Names and what belongs to them, one a line. More lines of a value stand below its first."""
    width = max((len(name) for name, _ in pairs), default=0)
    below = "\n" + " " * (len(indent) + width + len(_GAP))
    return "\n".join(
        f"{indent}{name.ljust(width)}{_GAP}{value}".rstrip().replace("\n", below)
        for name, value in pairs
    )


def without_credentials(value: str) -> str:
    """A URL without user, password and query; anything else as it is."""
    if "@" not in value and "?" not in value:
        return value
    try:
        parts = urlsplit(value if "://" in value else f"//{value}")
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "(not a valid URL)"
    clean = urlunsplit((parts.scheme, host, parts.path, "", ""))
    return clean if "://" in value else clean.removeprefix("//")


def scrubbed(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Without the value of any environment variable whose name says that it is a secret."""
    for name, value in environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text
