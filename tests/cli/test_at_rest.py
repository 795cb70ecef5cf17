"""Where texts, vectors and keys lie, as docs/explanation/trust.md says, and what erases each."""

from __future__ import annotations

import array
import fcntl
import json
import os
import re
import signal
import stat
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedcore.cli import app
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "trust.md"
KEY = "sk-CANARY-at-rest-0123456789abcdef"
TEXT = "a text that must not stay anywhere for longer than it is said"
NAME = "a-name-of-a-row"
WIDTH = 8


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    with FakeOpenAI(api_key=KEY, batch=BatchSettings(progress=Progress())) as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        Path("embedcore.toml").write_text(
            f"options.openai = {{ batch = true, dimensions = {WIDTH} }}"
        )
        Path("rows.jsonl").write_text(json.dumps({"id": NAME, "text": TEXT}) + "\n")
        yield fake


def kept(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def holding(content: bytes, folder: Path) -> set[str]:
    """The files in which these bytes are, the files of SQLite's log without their endings."""
    return {
        re.sub("-(wal|shm|journal)$", "", n) for n, data in kept(folder).items() if content in data
    }


def packed(vector: list[float]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *vector)


def test_after_a_run_the_vector_is_in_the_cache_and_the_output_and_the_text_in_the_output(
    cli, server, state_home
):
    run = cli("embed", "rows.jsonl", "-o", "out.jsonl", "--no-text", "--verbose")
    assert run.code == 0, run.err
    (row,) = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    vector = packed(row.get("vector") or row["embedding"])
    assert holding(vector, state_home) == {"vectors/00000001.seg"}
    assert holding(TEXT.encode(), state_home) == set()
    assert TEXT not in Path("out.jsonl").read_text()
    assert TEXT not in run.err + run.out
    assert not list(Path().glob("out.jsonl.*")), "journal and lock go with the run"
    assert cli("embed", "rows.jsonl", "-o", "with.jsonl").code == 0
    assert TEXT in Path("with.jsonl").read_text()
    assert holding(KEY.encode(), state_home) == holding(KEY.encode(), Path()) == set()
    assert cli("cache", "prune", "--all", "--yes").code == 0
    assert holding(vector, state_home) == set()


def test_a_batch_keeps_its_texts_until_it_ends_and_its_rows_until_they_are_cleared_away(
    cli, server, state_home
):
    name = cli("batch", "submit", "rows.jsonl", "--yes", "--json").json["id"]
    assert holding(TEXT.encode(), state_home) == {f"batches/{name}.db"}
    assert cli("batch", "gc", "--older-than", "0d").code == 0
    assert holding(TEXT.encode(), state_home) == {f"batches/{name}.db"}, "it has not ended"
    server.batches.finish(server.batches.jobs[0].id)
    assert cli("batch", "status").code == 0
    assert cli("batch", "fetch", name, "-o", "out.npy").code == 0
    assert holding(TEXT.encode(), state_home) == set()
    assert holding(NAME.encode(), state_home) == {f"batches/{name}.db"}
    vector = Path("out.npy").read_bytes()[-4 * WIDTH :]
    assert holding(vector, state_home) == {"vectors/00000001.seg"}
    assert cli("cache", "prune", "--all", "--yes").code == 0
    assert holding(vector, state_home) == {"vectors/00000001.seg"}, "a batch may still need it"
    assert cli("cache", "prune", "--all", "--even-needed", "--yes").code == 0
    assert holding(vector, state_home) == set()
    assert cli("batch", "gc", "--older-than", "7d", "--json").json["batches"] == []
    assert cli("batch", "gc", "--older-than", "0d", "--json").json["batches"] == [name]
    assert holding(NAME.encode(), state_home) == set()
    assert holding(KEY.encode(), state_home) == set()


@pytest.mark.case("D7")
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("command", ["embed", "batch submit"])
def test_texts_of_standard_input_are_gone_with_a_process_that_is_killed(
    begun, held_server, tmp_path, command
):
    """While it still reads, and while its request is under way."""
    temporary, server = tmp_path / "temporary", held_server(0)
    temporary.mkdir()
    streams = {"stdin": subprocess.PIPE, "env": {**os.environ, "TMPDIR": str(temporary)}}
    arguments = ["embed", "-", "-o", str(tmp_path / "v.jsonl"), "--yes"]
    if command != "embed":
        arguments = ["batch", "submit", "-", "--yes"]
    for whole in (False, True) if command == "embed" else (False,):
        process = begun(*arguments, text=False, **streams)
        process.stdin.write(f"{TEXT}\n".encode() * 50_000)
        process.stdin.flush()
        if whole:
            process.stdin.close()
            server.wait_for(1)
        else:
            wait_until_read(process.stdin)
        assert kept(temporary) == {}
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert kept(temporary) == {}


def wait_until_read(pipe) -> None:
    """Until nothing is left in the pipe: all of it has arrived."""
    left = array.array("i", [1])
    while left[0]:
        fcntl.ioctl(pipe.fileno(), termios.FIONREAD, left)
        time.sleep(0.005)


@pytest.mark.parametrize("ending", ["cancel", "forget"])
def test_a_batch_that_is_ended_by_hand_keeps_no_text(cli, server, state_home, ending):
    name = cli("batch", "submit", "rows.jsonl", "--yes", "--json").json["id"]
    assert holding(TEXT.encode(), state_home) == {f"batches/{name}.db"}
    cli("batch", ending, name, *(["--yes"] if ending == "forget" else []))
    if ending == "cancel":
        server.batches.jobs[0].status = "cancelled"
        cli("batch", "status")
    assert holding(TEXT.encode(), state_home) == set()


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_all_state_is_readable_for_its_owner_only(cli, server, state_home):
    os.umask(0o022)
    cli("embed", "rows.jsonl", "-o", "out.npy")
    cli("batch", "submit", "rows.jsonl", "--yes")
    files = [path for path in state_home.rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_the_commands_of_the_page_are_there():
    table = PAGE.read_text(encoding="utf-8").partition("## Where texts")[2]
    commands = re.findall(r"`(?:embedcore )((?:batch |cache |trust)[^`]*)`", table)
    assert len(commands) >= 5
    for command in commands:
        first, *rest = command.split()
        found = app.group.get_command(None, first)
        if hasattr(found, "commands"):
            found = found.commands[rest.pop(0)]
        options = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options, command
