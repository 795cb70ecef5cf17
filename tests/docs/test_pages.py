"""The README, the tutorial and the pages of concepts, followed word for word.

The blocks of a page are executed in their order in one folder, against a server that counts and
bills as the API does. What a transcript shows is compared with what the real commands print, and
what ``print(…)  # this`` promises with what is printed. A block in a language that has no executor
here fails, and so does a command.
"""

from __future__ import annotations

import csv
import os
import re
import select
import shlex
import subprocess
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
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    DOCS / "tutorial.md",
    *sorted(DOCS.glob("explanation/*.md")),
    DOCS / "how-to/answer-questions.md",
    *(DOCS / "reference" / name for name in ("errors.md", "events.md", "python.md")),
]
# Their blocks are run by a test of their own, or by nothing, since they have none that runs.
ELSEWHERE = {
    "how-to/batch.md": "test_batch.py",
    "how-to/compatible-batch-servers.md": "../batchservers/test_how_to.py",
    "how-to/embed-a-stream.md": "test_embed_a_stream.py",
    "how-to/embed-into-lancedb.md": "../recipes/test_recipes.py",
    "how-to/embed-into-postgresql.md": "../recipes/test_recipes.py",
    "how-to/embed-into-qdrant.md": "../recipes/test_recipes.py",
    "how-to/trace-with-opentelemetry.md": "../adapters/test_how_to.py",
    "how-to/use-with-langchain.md": "../adapters/test_how_to.py",
    "how-to/test-with-a-key.md": "../live/test_live.py",
    "how-to/test-a-provider.md": "test_write_a_provider.py",
    "how-to/test-your-application.md": "test_test_your_application.py",
    "how-to/use-a-compatible-server.md": "../../providers/openai/tests/test_presets.py",
    "how-to/write-a-batch-provider.md": "test_batch_provider.py",
    "how-to/write-a-provider.md": "test_write_a_provider.py",
    "how-to/write-an-http-provider.md": "test_http_provider.py",
    "reference/batch-commands.md": "test_batch.py",
    "reference/configuration.md": "../test_reference.py",
    "reference/openai-presets.md": "../../providers/openai/tests/test_presets.py",
    "reference/state-file.md": "../test_reference.py",
}
CLI = "import sys; from embedcore.cli.app import main; sys.exit(main())"
STRICT = "import warnings; warnings.simplefilter('error')\n"
SECONDS = 120.0
# The file that the pages embed: one row in thirty repeats another.
ROWS, TEXTS = 3_000, 2_900
# Where the transcripts were recorded, and what depends on the moment in which Ctrl-C came.
RECORDED_IN = "/home/you"
TIMED = re.compile(r"^Embedding |^Spent |^[\d,]+ vectors are kept|^ +(billed|cached) ")
TIMED_AGAIN = re.compile(r"^(rows|to embed|cost) ")
ID = re.compile(r"\b\d{8}-[0-9a-f]{8}\b")
BATCHES = "[options.openai]\nbatch = true\n"


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line``: where it begins, for messages."""

    language: str
    text: str
    line: int


def blocks_of(page: str) -> list[Block]:
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(one[1], one[2], page[: one.start()].count("\n") + 1) for one in found]


class Halting(FakeOpenAI):
    """An OpenAI that can be told to wait with its replies, after so many of them."""

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


class Reader:
    """Somebody who does what a page says, block by block."""

    def __init__(self, server: Halting, forks: Forks, patch: pytest.MonkeyPatch) -> None:
        self.server, self.forks, self.patch = server, forks, patch
        self.batch = "no id yet"

    def follow(self, block: Block) -> None:
        run = getattr(self, f"run_{block.language}", None)
        assert run is not None, f"line {block.line}: who executes {block.language!r}?"
        run(block)

    def run_console(self, block: Block) -> None:
        if os.name != "posix":
            pytest.skip("needs a terminal of POSIX")
        transcript, codes = self.play(block.text)
        assert normal(transcript) == normal(block.text), f"line {block.line}:\n{transcript}"
        assert codes == [exits.INTERRUPTED] * ("^C" in block.text) + [exits.OK]
        for shown in (block.text, transcript):
            check_sums(shown)
        assert self.server.meter.billed_twice == {}
        # Wherever a text was billed there is a vector, at its own row.
        with Path("articles.csv").open(encoding="utf-8", newline="") as table:
            rows = list(csv.DictReader(table))
        vectors = np.load("articles.npy")
        assert len(vectors) == len(rows)
        for number in range(0, len(rows), 500):
            wanted = vector_of(rows[number]["body"], vectors.shape[1])
            assert np.array_equal(vectors[number], wanted)

    def play(self, transcript: str) -> tuple[str, list[int]]:
        """The commands of a transcript again: the new transcript, and the exit codes."""
        lines: list[str] = []
        codes = []
        for step in re.split(r"^\$ ", transcript, flags=re.MULTILINE)[1:]:
            command, _, shown = step.partition("\n")
            lines.append(f"$ {command}")
            if command.startswith("export "):
                self.export(command.removeprefix("export "))
                continue
            screen, code = self.typed(command, interrupt="^C" in shown)
            lines += screen
            codes.append(code)
        return "\n".join(lines).replace(str(Path.cwd()), RECORDED_IN), codes

    def export(self, assignment: str) -> None:
        name, _, value = assignment.partition("=")
        assert name == "OPENAI_API_KEY", f"who knows {name}?"
        assert value in ("sk-...", "…")
        self.patch.setenv(name, str(self.server.api_key))

    def typed(self, command: str, *, interrupt: bool) -> tuple[list[str], int]:
        """What a terminal shows, and the exit code. Ctrl-C comes with the first vectors."""
        program, *arguments = shlex.split(command)
        assert program == "embedcore", f"who runs {program}?"
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}
        if interrupt:
            # With all requests under way at once there would be nothing left to stop.
            environment["EMBEDCORE_CONCURRENCY"] = "2"
            self.server.hold(after=2)
        terminal, other_end = os.openpty()
        run = self.forks(
            CLI,
            *arguments,
            stdin=other_end,
            stdout=other_end,
            stderr=other_end,
            env=environment,
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
                self.server.go.set()
        else:
            run.kill()
        os.close(terminal)
        return screen_of(written.decode()), run.wait(timeout=SECONDS)

    def run_python(self, block: Block) -> None:
        """What ``print(…)  # this`` prints is this."""
        out = self.ran(STRICT + block.text)
        promised = re.findall(r"^ *print\(.*\)  # (.*)$", block.text, re.MULTILINE)
        assert out.splitlines() == promised

    def ran(self, code: str, *arguments: str) -> str:
        """What it prints."""
        run = self.forks(code, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = run.communicate(timeout=SECONDS)
        assert run.returncode == 0, err
        return str(out)

    def run_toml(self, block: Block) -> None:
        """Settings are valid, take effect, and stay for what follows on the page."""
        # Only OpenAI's own servers are taken to have a batch API.
        head = "[options.openai]\n"
        own = block.text.replace(head, BATCHES) if head in block.text else block.text + BATCHES
        Path("embedcore.toml").write_text(own)
        config = Config.load()
        assert set(tomllib.loads(block.text)) <= config.model_fields_set
        with EmbeddingClient() as client:
            assert config.profile(None).model == f"{client.provider}:{client.model}"
            assert client.embed(["a text"]).ok.all()

    def run_sh(self, block: Block) -> None:
        if "batch submit" in block.text:
            # Nothing is cached there: all of it is submitted.
            self.patch.setenv("EMBEDCORE_HOME", str(Path("elsewhere").absolute()))
        for line in block.text.splitlines():
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                run = getattr(self, f"_{words[0]}", None) if words else None
                assert run is not None, f"line {block.line}: who executes {line!r}?"
                run(words[1:])

    def _export(self, words: list[str]) -> None:
        self.export(words[0])

    def _embedcore(self, words: list[str]) -> None:
        out = self.ran(CLI, *(self.batch if word == "ID" else word for word in words))
        if words[:2] == ["batch", "submit"]:
            (self.batch,) = set(ID.findall(out))

    def _make(self, targets: list[str]) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in targets:
            found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
            assert found, f"no target {target!r}"
            assert {"demo": "embedcore demo", "test": "$(PYTEST)"}.get(target, "$(") in found[1]
        if "demo" in targets:
            # In this environment, rather than in one that make would set up.
            assert self.ran(CLI, "demo").count("?\n") == 3

    def _uv(self, words: list[str]) -> None:
        """A clone has by default what the line for pip installs."""
        assert words == ["sync"]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        uv = project["tool"]["uv"]
        groups = project["dependency-groups"]
        by_uv = {name for group in uv["default-groups"] for name in groups[group]}
        line = re.search(r"^pip install (.*)$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE)
        assert line is not None
        assert by_uv == {self.distribution(one) for one in shlex.split(line[1])}
        members = {path for one in uv["workspace"]["members"] for path in ROOT.glob(one)}
        for name in by_uv:
            name = name.partition("[")[0]
            assert uv["sources"][name] == {"workspace": True}
        assert members >= {path.parent for path in ROOT.glob("providers/*/pyproject.toml")}

    def distribution(self, folder: str) -> str:
        """The name, with its extras, of what ``pip install FOLDER`` installs."""
        name, bracket, extras = folder.partition("[")
        path = ROOT / name / "pyproject.toml"
        assert path.is_file(), f"no distribution {folder!r}"
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        for extra in filter(None, extras.rstrip("]").split(",")):
            assert extra in project["optional-dependencies"], f"no extra {extra!r}"
        return f"{project['name']}{bracket}{extras}"

    def _pip(self, words: list[str]) -> None:
        """What is installed is here: every argument is the folder of a distribution."""
        install, *wanted = words
        assert install == "install"
        assert wanted
        for name in wanted:
            self.distribution(name)

    def _python3(self, words: list[str]) -> None:
        assert words == ["-m", "venv", ".venv"]

    def _source(self, words: list[str]) -> None:
        assert words == [".venv/bin/activate"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Halting]:
    """For this process and those that it starts."""
    with Halting() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        yield fake


@pytest.fixture
def reader(server: Halting, forks: Forks, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """In a working directory with ``articles.csv``, and nothing else but the word for batches."""
    Path("embedcore.toml").write_text(BATCHES)
    with Path("articles.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "title", "body"])
        for number in range(ROWS):
            step = number % TEXTS
            text = f"If step {step:04} fails, switch the machine off, wait a minute, start again."
            table.writerow([f"a{number}", f"Step {step}", text])
    return Reader(server, forks, monkeypatch)


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


def normal(transcript: str) -> list[str]:
    """Without what differs from run to run; blank lines do not count."""
    lines: list[str] = []
    commands, interrupted = 0, "^C" in transcript
    # Where this line is broken depends on the length of the folder's name.
    kept = re.compile(r"vectors are kept in.*?is embedded", re.DOTALL)
    transcript = kept.sub(lambda found: " ".join(found[0].split()), transcript)
    for line in filter(str.strip, transcript.splitlines()):
        commands += line.startswith("$ embedcore")
        # The bar may be drawn once more over what the terminal made of Ctrl-C.
        line = re.sub(r"━[━╸╺]*|[╸╺]━*", "━", line.removesuffix("^C"))
        line = re.sub(r"\d+:\d\d(:\d\d)?|--:--", "TIME", line)
        if interrupted and (TIMED.search(line) or (commands > 1 and TIMED_AGAIN.search(line))):
            line = re.sub(r"\d[\d,]*(\.\d+)?", "#", line)
        lines.append(re.sub(r"(took +).*", r"\1#", line))
    return lines


def number_in(pattern: str, transcript: str) -> int:
    (found,) = re.findall(pattern, transcript, re.MULTILINE)
    return int(found.replace(",", ""))


def check_sums(transcript: str) -> None:
    """What was kept is what was taken from there, and nothing was billed twice."""
    total = number_in(rf"{TEXTS:,} texts, ([\d,]+) tokens, \d+ requests", transcript)
    billed = number_in(r"^ +billed .*, ([\d,]+) tokens", transcript)
    if "^C" not in transcript:
        assert billed == total
        return
    kept = number_in(r"^([\d,]+) vectors are kept", transcript)
    assert kept == number_in(r"^ +cached +([\d,]+) texts", transcript) > 0
    assert kept + number_in(r"^ +billed +([\d,]+) texts", transcript) == TEXTS
    assert number_in(r"Spent by this run: ([\d,]+) tokens", transcript) + billed == total


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_followed_word_for_word(page: Path, reader: Reader) -> None:
    for block in blocks_of(page.read_text(encoding="utf-8")):
        reader.follow(block)


def test_one_row_that_was_edited_is_one_text_that_is_sent(reader: Reader) -> None:
    command = ["embed", "articles.csv", "--text", "body", "-o", "articles.npy"]
    reader.ran(CLI, *command)
    before = len(reader.server.meter.billed_texts)
    table = Path("articles.csv")
    table.write_text(table.read_text().replace("If step 0012 fails", "When step 12 fails"))
    reader.ran(CLI, *command)
    assert len(reader.server.meter.billed_texts) - before == 1


def test_every_page_with_blocks_has_a_test() -> None:
    for path in DOCS.rglob("*.md"):
        name = path.relative_to(DOCS).as_posix()
        if path in PAGES or name.startswith(("decisions/",)):
            continue
        if blocks_of(path.read_text(encoding="utf-8")):
            assert name in ELSEWHERE, f"who executes the blocks of {name}?"
    for test in ELSEWHERE.values():
        assert (Path(__file__).parent / test).is_file(), test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_block_hides(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)
    assert len(fences) == 2 * len(blocks_of(text))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^(?: {4}|\t)|<pre|<code", prose, re.MULTILINE)


def test_a_screen_is_what_a_person_sees() -> None:
    assert screen_of("a\r\n\x1b[1mbar 1\x1b[0m\r\x1b[2Kbar 22\rbaz\n\x1b[1A\r\x1b[2Kb") == [
        "a",
        "b",
        "",
    ]


def test_a_block_that_nothing_can_execute_is_noticed(reader: Reader) -> None:
    def follow(language: str, text: str) -> None:
        reader.follow(Block(language, text, 1))

    with pytest.raises(AssertionError, match="who executes 'rust'"):
        follow("rust", "fn main() {}\n")
    with pytest.raises(AssertionError, match="who executes 'rm"):
        follow("sh", "rm -r .\n")
    with pytest.raises(AssertionError, match="who runs ls"):
        follow("console", "$ ls\n")
    with pytest.raises(AssertionError, match="who knows PATH"):
        follow("console", "$ export PATH=/\n")
    for wanted in ('"embedcore[acme]"', "./providers/acme", "embedcore-openai"):
        with pytest.raises(AssertionError, match="no distribution"):
            follow("sh", f"pip install . {wanted}\n")
    with pytest.raises(AssertionError, match="no extra"):
        follow("sh", 'pip install ".[acme]"\n')
    with pytest.raises(AssertionError, match="no target"):
        follow("sh", "make coffee\n")
    with pytest.raises(AssertionError):
        follow("python", "print(1)  # 2\n")
    with pytest.raises(AssertionError):
        follow("console", "$ embedcore embed articles.csv --text body -o articles.npy\nnothing\n")
    with pytest.raises(ConfigurationError):
        follow("toml", "modle = 'hashing:512'\n")
