"""Output of a command: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Final, TextIO

from embedcore import money
from embedcore.cli.text import as_typed, command, fitted, printable, scrubbed, table

# A name among the files that stands for standard input.
STDIN: Final = "-"
_INPUTS: Final = {"jsonl": "JSON objects, one a line", "csv": "CSV with a header"}
# What click puts behind a question.
_ANSWER: Final = " [y/N]: y"


class Screen:
    """What a command says, for a person or as JSON.

    ``paying``: money may be under way, so that an interrupt takes its time and says how to go on;
    False: it was not yet; None: this command is not about that. ``interrupt``: raised by a signal.
    """

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self.wants_json = False
        self.quiet = False
        self.verbose = False
        self.paying: bool | None = None
        self.interrupt: KeyboardInterrupt | None = None
        self._arguments = list(arguments)
        self._err: Callable[[str], None] = _write_error
        self._answered = False
        for stream in (sys.stdout, sys.stderr):
            # What the terminal's encoding lacks is written as an escape rather than not at all.
            if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
                reconfigure(errors="backslashreplace")

    @property
    def interactive(self) -> bool:
        """Whether there is a person to be asked."""
        return _is_terminal(sys.stdin) and _is_terminal(sys.stderr)

    @property
    def terminal(self) -> bool:
        """Whether standard error can show something that moves."""
        return _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"

    def result(self, text: str, *, whole: bool = False) -> None:
        """A result for a person. Nothing with ``--json``. ``BrokenPipeError`` if no program reads.

        On a terminal long lines are broken between words, unless it is to stay ``whole``.
        """
        if not self.wants_json:
            _write(f"{printable(text if whole else fitted(text, _columns(sys.stdout)))}\n")

    def report(self, text: str, *, failed: bool = False) -> None:
        """What a command did, for a person. With ``--quiet`` only if a part of it failed."""
        if failed or not self.quiet:
            self.result(text)

    def table(
        self,
        heads: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        numbers: Collection[int] = (),
        spare: Sequence[str] = (),
        title: str = "",
    ) -> None:
        """A result as a table that fits the terminal. ``spare``: columns that may be left out."""
        width = _columns(sys.stdout)
        self.result(title + table(heads, rows, numbers=numbers, width=width, spare=spare))

    def json(self, result: Mapping[str, object]) -> None:
        """The result for a machine, with ``--json``: one object on standard output, with money in
        dollars."""
        if self.wants_json:
            self._answered = True
            _write(json.dumps(result, default=_plain) + "\n")

    def info(self, text: str) -> None:
        """What a person should know meanwhile. Nothing with ``--quiet``."""
        if not self.quiet:
            self._err(fitted(printable(text), _columns(sys.stderr)))

    def error(self, text: str, *, whole: bool = False) -> None:
        """What must be said in any case. ``whole``: its lines stay as they are."""
        text = printable(scrubbed(as_typed(text)))
        self._err(text if whole else fitted(text, _columns(sys.stderr)))

    def awaits_input(self, sources: Sequence[object], kind: str | None) -> bool:
        """Whether a person is to type what is read, which is then said. ``kind``: its format."""
        named = [str(one) for one in sources if isinstance(one, str | os.PathLike)]
        if STDIN not in named or not _is_terminal(sys.stdin):
            return False
        what = _INPUTS.get(kind or "", "texts, one a line")
        end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        self.info(f"Reading {what}, from this terminal: end with {end} on a line of its own.")
        return True

    def ask(self, question: str) -> bool:
        """Whether the person at the terminal says yes. No is the default."""
        import click

        width = _columns(sys.stderr)
        room = None if width is None else max(width - len(_ANSWER), 1)
        agreed = click.confirm(fitted(printable(question), room), err=True)
        if self.interrupt is not None:
            # Python drops an exception that a signal raises while input() flushes its streams.
            raise self.interrupt
        return agreed

    def fail(self, error: BaseException, message: str) -> None:
        """The one message of an error that ends the command."""
        self._trace(error)
        self.error(f"Error: {message}")
        for note in getattr(error, "__notes__", ()):
            self.error(note)
        if self.wants_json and not self._answered:
            self.json({"error": _described(error, scrubbed(as_typed(message)))})

    def stopped(self, error: BaseException) -> None:
        """After an interrupt: what was kept, and how to go on."""
        self._trace(error)
        notes = getattr(error, "__notes__", None)
        if self.paying is False:
            self.error("Stopped; nothing was sent.")
            return
        if self.paying is None and not notes:
            self.error("Stopped.")
            return
        self.error("Stopped." if notes else "Stopped; nothing was kept.")
        for note in notes or ():
            self.error(note)
        self.error(f"Go on with:\n  {self.repeat()}")

    def repeat(self) -> str:
        """The command that was given, to paste into a shell."""
        return command(["embedcore", *self._arguments])

    def over(self, write: Callable[[str], None] | None) -> None:
        """Hand messages to what draws on the terminal now; None: nothing does any more."""
        self._err = write or _write_error

    def flush(self) -> None:
        if sys.stdout is not None:
            sys.stdout.flush()

    def abandon_output(self) -> None:
        """No program reads: what is still buffered goes nowhere, instead of failing at exit."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)

    def _trace(self, error: BaseException) -> None:
        if self.verbose:
            import traceback

            self.error("".join(traceback.format_exception(error)), whole=True)


def _plain(value: object) -> object:
    """What JSON has no type for: money as exact US dollars, all as text."""
    return money.exact(value) if isinstance(value, Decimal) else str(value)


def _described(error: BaseException, message: str) -> dict[str, object]:
    return {
        "type": type(error).__name__,
        "message": message,
        "notes": list(getattr(error, "__notes__", ())),
        "retryable": bool(getattr(error, "retryable", False)),
        "billed": getattr(error, "billed", "no"),
    }


def _columns(stream: TextIO | None) -> int | None:
    """How wide the terminal is; None: it is none, or does not say. Nothing is fitted for a file."""
    if stream is None or not _is_terminal(stream):
        return None
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and int(said):
        return int(said)
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _write(text: str) -> None:
    # A program without a console has no standard output.
    if sys.stdout is not None:
        sys.stdout.write(text)


def _write_error(text: str) -> None:
    # In one file or pipe (2>&1), what was said before stands before. A failure comes at the end.
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    # That no program reads is no reason to lose what is being paid for.
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
