"""Stopped in any way at any moment: what was bought is kept, and it is said how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from embedcore.storage.engine import driver
from embedcore.testing import vector_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")

COMMAND = [sys.executable, "-m", "embedcore.cli"]
REQUEST = 2048
BLOCK = 8192
GRACE = 5.0
WIDTH = 32


@pytest.fixture(autouse=True)
def _narrow() -> None:
    """Small vectors: it is not their size that matters here."""
    Path("embedcore.toml").write_text(f"[options.openai]\ndimensions = {WIDTH}\n")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check_output(read_output, count: int) -> None:
    rows = read_output(Path("out.jsonl"))
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(count)]
    for row in rows[:: count // 20]:
        wanted = vector_of(row["text"], WIDTH)
        assert np.array_equal(np.asarray(row["vector"], np.float32), wanted)


@pytest.mark.fault(142)
@pytest.mark.fault(143)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_stopped_in_order_it_pays_nothing_twice(far_server, texts_file, read_output, number, code):
    server = far_server(0.4)
    texts_file(20_000)
    command = ["embed", "texts.jsonl", "-o", "out.jsonl"]
    run = start(*command)
    server.wait_for(BLOCK + REQUEST)
    run.send_signal(number)
    out, said = run.communicate(timeout=60)
    assert run.returncode == code
    assert out == ""
    assert "vectors are kept in" in said
    assert "embedcore embed texts.jsonl -o out.jsonl" in said
    assert "Spent by this run" in said
    assert "Traceback" not in said
    bought = server.meter["billed_texts"]
    assert bought < 20_000
    done = start(*command)
    out, said = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert "embedded before" in said
    assert server.meter["billed_texts"] == server.meter["distinct_texts"] == 20_000
    check_output(read_output, 20_000)


@pytest.mark.fault(144)
def test_killed_it_loses_no_more_than_the_requests_in_flight(
    far_server, texts_file, read_output, name_settings
):
    server = far_server(0.1)
    texts_file(3_000)
    narrow = Path("embedcore.toml").read_text()
    name_settings(f"concurrency = 2\n{narrow}max_texts_per_request = 50\n")
    command = ["embed", "texts.jsonl", "-o", "out.jsonl"]
    run = start(*command)
    server.wait_for(600)
    run.kill()
    run.communicate(timeout=60)
    time.sleep(0.5)
    done = start(*command)
    _, said = done.communicate(timeout=120)
    assert done.returncode == 0, said
    # Two were under way, and two more may have been answered but not yet written down.
    assert server.meter["billed_texts"] <= 3_000 + 4 * 50
    assert server.meter["distinct_texts"] == 3_000
    check_output(read_output, 3_000)


@pytest.mark.fault(142)
@pytest.mark.parametrize("locked", [False, True], ids=["waiting", "books-locked"])
def test_a_second_ctrl_c_is_immediate(far_server, texts_file, state_home, locked):
    server = far_server(30.0)
    texts_file(10)
    run = start("embed", "texts.jsonl", "-o", "out.jsonl")
    end = time.monotonic() + 20
    while "cost" not in (line := run.stderr.readline()):
        assert line
        assert time.monotonic() < end
    time.sleep(0.5)
    assert server.meter["requests"] == 0
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)
    if locked:
        # While SQLite waits for the books no Python runs, and no handler of Python's either.
        books = driver().connect(state_home / "state.db", isolation_level=None)
        books.execute("BEGIN IMMEDIATE")
        time.sleep(GRACE + 1)
    assert run.poll() is None
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=20) == -signal.SIGINT
    assert time.monotonic() - began < 1.0
    run.communicate()
    if locked:
        books.close()


@pytest.mark.fault(142)
def test_a_reply_that_never_comes_is_charged_and_said_to_be_uncertain(far_server, texts_file, cli):
    far_server(60.0)
    texts_file(10)
    run = start("embed", "texts.jsonl", "-o", "out.jsonl")
    while "cost" not in (line := run.stderr.readline()):
        assert line
    time.sleep(0.7)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "may have been billed" in said
    assert "nothing was kept" in said
    usage = cli("usage", "--json").json["models"]
    assert usage[0]["uncertain_tokens"] > 0


def test_stopped_before_anything_was_sent(far_server, tmp_path):
    server = far_server(0.0)
    os.mkfifo("slow.txt")
    run = start("embed", "slow.txt", "-o", "out.jsonl")
    with Path("slow.txt").open("w") as pipe:  # it reads, and waits for more
        pipe.write("a\n")
        pipe.flush()
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "nothing was sent" in said
    assert server.meter["requests"] == 0


@pytest.mark.fault(145)
def test_a_broken_pipe_is_quiet(server, texts_file):
    texts_file(5)
    for command in (
        ["embed", "-c", "x", "-m", "hashing:4096"],
        ["embed", "texts.jsonl", "-o", "out.npy", "-m", "hashing:16"],
        ["models"],
        ["--help"],
    ):
        reader, writer = os.pipe()
        os.close(reader)
        run = subprocess.run(
            [*COMMAND, *command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(writer)
        assert run.returncode == 141, run.stderr
        assert "rror" not in run.stderr
        assert "Traceback" not in run.stderr
    assert Path("out.npy").exists()


@pytest.mark.fault(145)
def test_nobody_listening_to_messages_does_not_stop_the_work(server, texts_file):
    texts_file(3000)
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [*COMMAND, "embed", "texts.jsonl", "-o", "out.npy"],
        stdout=subprocess.PIPE,
        stderr=writer,
        check=False,
    )
    os.close(writer)
    assert run.returncode == 0
    assert server.meter.snapshot()["billed_texts"] == 3000


def test_a_bar_on_a_terminal(terminal, far_server, texts_file):
    far_server(0.6)
    texts_file(10_000)
    screen = terminal("embed", "texts.jsonl", "-o", "out.npy")
    screen.wait_for(r"Embedding ━+.*8,192/10,000 [\d,]+ tokens, \$0\.00\d+")
    assert screen.close() == 0
    assert "10,000/10,000" in screen.plain
    assert "10,000 vectors of 32 dimensions" in screen.plain
    # The cursor is back, whatever the bar did with it.
    assert screen.shown.rfind("\x1b[?25h") > screen.shown.rfind("\x1b[?25l")


@pytest.mark.fault(142)
def test_ctrl_c_on_a_terminal(terminal, far_server, texts_file):
    server = far_server(0.6)
    texts_file(20_000)
    screen = terminal("embed", "texts.jsonl", "-o", "out.npy")
    server.wait_for(BLOCK + 1)
    screen.send("\x03")
    screen.wait_for("Ctrl-C again stops at once")
    assert screen.close() == 130
    assert "vectors are kept in" in screen.plain
    assert screen.shown.rfind("\x1b[?25h") > screen.shown.rfind("\x1b[?25l")


def test_no_bar_and_no_escapes_where_there_is_no_terminal(shell, server, texts_file):
    texts_file(100)
    run = shell("embed", "texts.jsonl", "-o", "out.npy")
    assert "\x1b" not in run.out + run.err
    assert "━" not in run.err
