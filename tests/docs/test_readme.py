"""Is the README true? Every block of it is executed; a block nobody knows how to execute fails."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from embedcore import EmbeddingClient
from embedcore.cli import process as exits
from embedcore.config import Config
from embedcore.errors import ConfigurationError
from embedcore.testing import FakeOpenAI, vector_of
from embedcore.testing.openai.batch_settings import BatchSettings, Progress
from embedcore.testing.openai.http import HttpReply, HttpRequest

Forks: TypeAlias = Callable[..., Any]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
CLI = "import sys; from embedcore.cli.app import main; sys.exit(main())"
STRICT = "import warnings; warnings.simplefilter('error')\n"
SECONDS = 120.0
ROWS, TEXTS, WIDTH = 12_000, 11_400, 256
# Where the session was recorded, and what depends on the moment in which Ctrl-C came.
RECORDED_IN = "/home/you"
TIMED = re.compile(r"^Embedding |^Spent |^[\d,]+ vectors are kept|^ +(bought|reused) ")
TIMED_AGAIN = re.compile(r"^(rows|to embed|cost) ")


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line``: where it begins, for messages."""

    language: str
    text: str
    line: int


def _blocks(page: str) -> list[Block]:
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(one[1], one[2], page[: one.start()].count("\n") + 1) for one in found]


BLOCKS = _blocks(PAGE)
SETTINGS = next(block.text for block in BLOCKS if block.language == "toml")


class Halting(FakeOpenAI):
    """An OpenAI that can be told to hold its replies back, after so many of them."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.answers = 0
        jobs = BatchSettings(progress=Progress(polls=2))
        super().__init__(record=False, batch=jobs)

    def hold(self, *, after: int) -> None:
        self.answers = after
        self.go.clear()

    def answer(self, request: HttpRequest) -> HttpReply:
        reply = super().answer(request)
        self.answers -= 1
        assert self.answers >= 0 or self.go.wait(SECONDS)
        return reply


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Halting]:
    """For this process and those that it starts."""
    with Halting() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        # With all requests under way at once there would be nothing left to stop.
        monkeypatch.setenv("EMBEDCORE_CONCURRENCY", "2")
        yield fake


@pytest.fixture
def workspace() -> Path:
    """The working directory, with the settings and the corpus of the README: one row in 20 repeats.

    The fake counts a token for each four bytes; these texts have as many by the real tokenizer.
    """
    # Only OpenAI's own servers are taken to have a batch API.
    own = SETTINGS.replace("[options.openai]\n", "[options.openai]\nbatch = true\n")
    assert own != SETTINGS
    Path("embedcore.toml").write_text(own)
    rows = ({"id": f"row-{n}", "text": f"Section number {n % TEXTS:05}"} for n in range(ROWS))
    Path("corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return Path.cwd()


def screen_of(written: str) -> list[str]:
    """The lines that a terminal shows after this was written to it."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif (up := re.fullmatch(r"\x1b\[(\d*)A", part)) is not None:
            row -= int(up[1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def typed(command: str, *, interrupt: bool, forks: Forks, server: Halting) -> tuple[list[str], int]:
    """What a terminal shows, and the exit code. Ctrl-C comes when the first rows are bought."""
    program, *arguments = shlex.split(command)
    assert program == "embedcore", f"who runs {program}?"
    if interrupt:
        server.hold(after=2)
    terminal, other_end = os.openpty()
    run = forks(
        CLI,
        *arguments,
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"},
        terminal=True,
    )
    os.close(other_end)
    written, end = b"", time.monotonic() + SECONDS
    while select.select([terminal], [], [], max(end - time.monotonic(), 0))[0]:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # Linux says so when the other end is closed
            data = b""
        if not data:
            break
        written += data
        if interrupt and re.search(rb"Embedding .*? [1-9][\d,]*/", written):
            os.write(terminal, b"\x03")
            interrupt = False
        if b"Ctrl-C again" in written:
            server.go.set()
    else:
        run.kill()
    os.close(terminal)
    return screen_of(written.decode()), run.wait(timeout=SECONDS)


def play(transcript: str, forks: Forks, server: Halting) -> tuple[str, list[int]]:
    """The commands of a transcript again: the new transcript, and the exit codes."""
    lines: list[str] = []
    codes = []
    for step in re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]:
        command, _, shown = step.partition("\n")
        screen, code = typed(command, interrupt="^C" in shown, forks=forks, server=server)
        lines += [f"$ {command}", *screen]
        codes.append(code)
    return "\n".join(lines).replace(str(Path.cwd()), RECORDED_IN), codes


def normal(transcript: str) -> list[str]:
    """Without what differs from run to run; blank lines do not count."""
    lines: list[str] = []
    commands = 0
    for line in filter(str.strip, transcript.splitlines()):
        commands += line.startswith("$ ")
        # The bar may be drawn once more over what the terminal made of Ctrl-C.
        line = re.sub(r"━[━╸╺]*|[╸╺]━*", "━", line.removesuffix("^C"))
        line = re.sub(r"\d+:\d\d(:\d\d)?|--:--", "TIME", line)
        if TIMED.search(line) or (commands > 1 and TIMED_AGAIN.search(line)):
            line = re.sub(r"\d[\d,]*(\.\d+)?", "#", line)
        lines.append(re.sub(r"(took +).*", r"\1#", line))
    return lines


def number(pattern: str, transcript: str) -> int:
    (found,) = re.findall(pattern, transcript, re.MULTILINE)
    return int(found.replace(",", ""))


def check_sums(transcript: str) -> None:
    """What was kept is what was reused, and nothing was bought twice, in texts and in tokens."""
    kept = number(r"^([\d,]+) vectors are kept", transcript)
    assert kept == number(r"reused +([\d,]+) texts", transcript) > 0
    assert kept + number(r"bought +([\d,]+) texts", transcript) == TEXTS
    spent = number(r"Spent by this run: ([\d,]+) tokens", transcript)
    then = number(r"bought .*, ([\d,]+) tokens", transcript)
    assert spent + then == number(rf"{TEXTS:,} texts, ([\d,]+) tokens", transcript)


def run_console(block: Block, server: Halting, forks: Forks) -> None:
    if os.name != "posix":
        pytest.skip("needs a terminal of POSIX")
    check_sums(block.text)
    transcript, codes = play(block.text, forks, server)
    assert normal(transcript) == normal(block.text)
    check_sums(transcript)
    assert codes == [exits.INTERRUPTED, exits.OK]
    assert server.meter.billed_twice == {}
    assert len(server.meter.billed_texts) == TEXTS
    tokens = number(rf"{TEXTS:,} texts, ([\d,]+) tokens", transcript)
    assert server.meter.billed_tokens == tokens
    rows = [json.loads(line) for line in Path("vectors.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(ROWS)]
    for row in rows[::1000]:
        wanted = vector_of(row["text"], WIDTH)
        assert np.array_equal(np.asarray(row["vector"], np.float32), wanted)


def run_python(block: Block, server: Halting, forks: Forks) -> None:
    """What ``print(…)  # this`` prints is this."""
    out = ran(forks, STRICT + block.text)
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", block.text, re.MULTILINE)
    assert promised
    assert out.splitlines() == promised


def ran(forks: Forks, code: str, *arguments: str) -> str:
    """What it prints."""
    run = forks(code, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = run.communicate(timeout=SECONDS)
    assert run.returncode == 0, err
    return str(out)


def run_toml(block: Block, server: Halting, forks: Forks) -> None:
    Path("embedcore.toml").write_text(block.text)
    config = Config.load()
    assert set(tomllib.loads(block.text)) <= config.model_fields_set
    with EmbeddingClient() as client:
        assert config.model == f"{client.provider}:{client.model}"
        assert client.embed(["a text"]).ok.all()


def run_shell(block: Block, server: Halting, forks: Forks) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] in PROGRAMS, f"line {block.line}: who executes {line!r}?"
        PROGRAMS[words[0]](words[1:], forks)


def _make(arguments: list[str], forks: Forks) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in arguments:
        found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert found, f"no target {target!r}"
        assert {"demo": "embedcore demo", "test": "$(PYTEST)"}.get(target, "$(") in found[1]
    if "demo" in arguments:
        # In this environment, rather than in one that make would set up.
        assert ran(forks, CLI, "demo").count("?\n") == 3


def _pip(arguments: list[str], forks: Forks) -> None:
    """What is installed is here: every argument is the folder of a distribution."""
    install, *wanted = arguments
    assert install == "install"
    assert wanted
    for name in wanted:
        assert (ROOT / name / "pyproject.toml").is_file(), f"no distribution {name!r}"


def _python(arguments: list[str], forks: Forks) -> None:
    """The benchmarks take their time: it is enough that they are there and know their options."""
    done = subprocess.run(
        [sys.executable, ROOT / arguments[0], *arguments[1:], "--help"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


PROGRAMS: dict[str, Callable[[list[str], Forks], None]] = {
    "make": _make,
    "pip": _pip,
    "python": _python,
}
EXECUTORS: dict[str, Callable[[Block, Halting, Forks], None]] = {
    "console": run_console,
    "python": run_python,
    "sh": run_shell,
    "toml": run_toml,
}


def execute(block: Block, server: Halting, forks: Forks) -> None:
    assert block.language in EXECUTORS, f"line {block.line}: who executes {block.language!r}?"
    EXECUTORS[block.language](block, server, forks)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.language}-line-{block.line}")
def test_every_block_is_executed(block: Block, server: Halting, forks: Forks) -> None:
    execute(block, server, forks)


def test_no_block_hides() -> None:
    fences = re.findall(r"^\s*(?:```|~~~)", PAGE, re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS)
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^(?: {4}|\t)|<pre|<code", prose, re.MULTILINE)


def test_a_screen_is_what_a_person_sees() -> None:
    assert screen_of("a\r\n\x1b[1mbar 1\x1b[0m\r\x1b[2Kbar 22\rbaz\n\x1b[1A\r\x1b[2Kb") == [
        "a",
        "b",
        "",
    ]


def test_a_block_that_nobody_can_execute_is_noticed(server: Halting, forks: Forks) -> None:
    with pytest.raises(AssertionError, match="who executes 'rust'"):
        execute(Block("rust", "fn main() {}\n", 1), server, forks)
    with pytest.raises(AssertionError, match="who executes 'rm"):
        execute(Block("sh", "rm -r .\n", 1), server, forks)
    with pytest.raises(AssertionError, match="who runs ls"):
        typed("ls", interrupt=False, forks=forks, server=server)
    for wanted in ('"embedcore[acme]"', "./providers/acme", "embedcore-openai"):
        with pytest.raises(AssertionError, match="no distribution"):
            execute(Block("sh", f"pip install . {wanted}\n", 1), server, forks)
    with pytest.raises(AssertionError, match="no target"):
        execute(Block("sh", "make coffee\n", 1), server, forks)
    with pytest.raises(AssertionError):
        execute(Block("python", "print(1)  # 2\n", 1), server, forks)
    with pytest.raises(ConfigurationError):
        execute(Block("toml", "modle = 'hashing:512'\n", 1), server, forks)
