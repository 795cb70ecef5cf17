"""Stopped in any way at any moment: what was billed is kept, and it is said how to go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest

from embedcore.cli.process import Signals
from embedcore.cli.screen import Screen
from embedcore.storage.database import driver
from embedcore.testing import vector_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")

COMMAND = [sys.executable, "-m", "embedcore.cli"]
WIDTH = 32
# What a server that may take its time is waited for.
PATIENT = 3600.0


@pytest.fixture(autouse=True)
def _narrow(name_settings) -> None:
    """Small vectors and small requests, two at a time: it is not their size that matters here."""
    name_settings(
        f"concurrency = 2\n[options.openai]\ndimensions = {WIDTH}\nmax_texts_per_request = 50\n"
    )


def until_stopping(run) -> None:
    """It has heard the signal, and waits for what is under way."""
    while "Stopping" not in (line := run.stderr.readline()):
        assert line


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
def test_stopped_in_order_it_pays_nothing_twice(
    held_server, texts_file, read_output, begun, number, code
):
    server = held_server(10)
    texts_file(1_000)
    command = ["embed", "texts.jsonl", "-o", "out.jsonl"]
    run = begun(*command, grace=PATIENT)
    server.wait_for(12)
    run.send_signal(number)
    until_stopping(run)
    server.go.set()
    out, said = run.communicate(timeout=120)
    assert run.returncode == code
    assert out == ""
    assert "vectors are kept in" in said
    assert "embedcore embed texts.jsonl -o out.jsonl" in said
    assert "Spent by this run" in said
    assert "Traceback" not in said
    assert server.meter.billed_texts.total() == 600
    done = begun(*command)
    out, said = done.communicate(timeout=120)
    assert done.returncode == 0, said
    assert "embedded before" in said
    assert server.meter.billed_twice == {}
    assert len(server.meter.billed_texts) == 1_000
    check_output(read_output, 1_000)


@pytest.mark.fault(144)
def test_killed_it_loses_no_more_than_the_requests_in_flight(
    held_server, texts_file, read_output, begun
):
    server = held_server(14)
    texts_file(1_000)
    command = ["embed", "texts.jsonl", "-o", "out.jsonl"]
    run = begun(*command)
    server.wait_for(16)
    run.kill()
    run.communicate(timeout=120)
    server.go.set()
    done = begun(*command)
    _, said = done.communicate(timeout=120)
    assert done.returncode == 0, said
    # Two were under way, and two more may have been answered but not yet written down.
    assert server.meter.billed_texts.total() <= 1_000 + 4 * 50
    assert len(server.meter.billed_texts) == 1_000
    check_output(read_output, 1_000)


@pytest.mark.fault(142)
@pytest.mark.parametrize("locked", [False, True], ids=["waiting", "ledger-locked"])
def test_a_second_ctrl_c_is_immediate(held_server, texts_file, state_home, begun, locked):
    server = held_server(0)
    texts_file(10)
    grace = 0.5 if locked else PATIENT
    run = begun("embed", "texts.jsonl", "-o", "out.jsonl", grace=grace)
    server.wait_for(1)
    if locked:
        # While SQLite waits for the ledger no Python runs, and no handler of Python's either.
        ledger = driver().connect(state_home / "state.db", isolation_level=None)
        ledger.execute("BEGIN IMMEDIATE")
    run.send_signal(signal.SIGINT)
    until_stopping(run)
    if locked:
        time.sleep(grace + 1)
    assert run.poll() is None
    run.send_signal(signal.SIGINT)
    # Who waited for the reply, or for the ledger, would end by a code of its own.
    assert run.wait(timeout=120) == -signal.SIGINT
    run.communicate()
    if locked:
        ledger.close()


@pytest.mark.fault(142)
def test_a_reply_that_never_comes_is_charged_and_said_to_be_unconfirmed(
    held_server, texts_file, cli, begun
):
    server = held_server(0)
    texts_file(10)
    run = begun("embed", "texts.jsonl", "-o", "out.jsonl", grace=0.5)
    server.wait_for(1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130
    assert "may have been billed" in said
    assert "nothing was kept" in said
    usage = cli("usage", "--json").json["models"]
    assert usage[0]["unconfirmed_tokens"] > 0


def test_stopped_before_anything_was_sent(held_server, begun):
    server = held_server(0)
    os.mkfifo("slow.txt")
    run = begun("embed", "slow.txt", "-o", "out.jsonl")
    # Session as soon as it reads there, and waits for more.
    with Path("slow.txt").open("w") as pipe:
        pipe.write("a\n")
        pipe.flush()
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=120)
    assert run.returncode == 130
    assert "nothing was sent" in said
    assert server.meter.requests == 0


DELIVERED_TO_ANOTHER = """
import pathlib, signal, threading, time
def send():
    while not pathlib.Path("now").exists():
        time.sleep(0.01)
    # The system call that the main thread waits in is not interrupted by this one.
    signal.pthread_kill(threading.get_ident(), signal.{name})
threading.Thread(target=send, daemon=True).start()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_that_interrupts_nothing_is_heard(begun, name, code):
    """It came just before the wait, or the system gave it to another thread."""
    os.mkfifo("slow.txt")
    run = begun(
        "embed", "slow.txt", "-o", "out.jsonl", first=DELIVERED_TO_ANOTHER.format(name=name)
    )
    with Path("slow.txt").open("w") as pipe:
        pipe.write("a\n")
        pipe.flush()
        Path("now").touch()
        run.communicate(timeout=120)
    assert run.returncode == code


@pytest.mark.fault(145)
def test_a_broken_pipe_is_quiet(server, texts_file, begun):
    """Also when Python ends, which the first one does itself."""
    texts_file(5)
    for number, command in enumerate(
        (
            ["embed", "-c", "x", "-m", "hashing:4096"],
            ["embed", "texts.jsonl", "-o", "out.npy", "-m", "hashing:16"],
            ["models"],
            ["--help"],
        )
    ):
        reader, writer = os.pipe()
        os.close(reader)
        streams = {"stdout": writer, "stderr": subprocess.PIPE, "text": True}
        run = (
            begun(*command, **streams)
            if number
            else subprocess.Popen([*COMMAND, *command], **streams)
        )
        os.close(writer)
        _, said = run.communicate(timeout=120)
        assert run.returncode == 141, said
        assert "rror" not in said
        assert "Traceback" not in said
    assert Path("out.npy").exists()


@pytest.mark.fault(145)
def test_nobody_listening_to_messages_does_not_stop_the_work(server, texts_file):
    texts_file(300)
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
    assert server.meter.snapshot()["billed_texts"] == 300


def test_a_bar_on_a_terminal(terminal, held_server, texts_file):
    server = held_server(16)
    texts_file(1_000)
    screen = terminal("embed", "texts.jsonl", "-o", "out.npy")
    screen.wait_for(r"Embedding ━+.*800/1,000 [\d,]+ tokens, \$0\.00\d+")
    server.go.set()
    assert screen.close() == 0
    assert "1,000/1,000" in screen.plain
    assert "1,000 vectors of 32 dimensions" in screen.plain
    # The cursor is back, whatever the bar did with it.
    assert screen.shown.rfind("\x1b[?25h") > screen.shown.rfind("\x1b[?25l")


@pytest.mark.fault(142)
def test_ctrl_c_on_a_terminal(terminal, held_server, texts_file):
    server = held_server(16)
    texts_file(1_000)
    screen = terminal("embed", "texts.jsonl", "-o", "out.npy", grace=PATIENT)
    # Read all the time: a terminal that nobody reads stops who writes to it.
    screen.wait_for("800/1,000")
    screen.send("\x03")
    screen.wait_for("Ctrl-C again stops at once")
    server.go.set()
    assert screen.close() == 130
    assert "vectors are kept in" in screen.plain
    assert screen.shown.rfind("\x1b[?25h") > screen.shown.rfind("\x1b[?25l")


@pytest.mark.parametrize(
    ("command", "kind", "typed"),
    [
        (("embed", "-", "-o", "out.jsonl"), "texts, one a line", "a\nb\n"),
        (
            ("embed", "-", "-o", "out.jsonl", "--format", "jsonl", "--dry-run"),
            "JSON objects, one a line",
            '{"text": "a"}\n{"text": "b"}\n',
        ),
        (("batch", "submit", "-", "--dry-run"), "texts, one a line", "a\nb\n"),
    ],
)
def test_a_terminal_that_is_read_says_what_is_waited_for(
    terminal, server, name_settings, command, kind, typed
):
    name_settings("[options.openai]\nbatch = true\n")
    run = terminal(*command, columns=200)
    run.wait_for(f"Reading {kind}, from this terminal: end with Ctrl-D")
    assert "Reading ━" not in run.plain
    run.send(f"{typed}\x04")
    run.wait_for("rows +2")
    run.close()


def test_nothing_is_waited_for_where_a_program_writes(shell, server):
    run = shell("embed", "-", "-o", "out.jsonl", stdin=b"a\n")
    assert run.code == 0
    assert "terminal" not in run.err


def test_an_interrupt_that_python_drops_while_it_asks_is_no_answer(monkeypatch):
    def confirm(*_: object, **__: object) -> bool:
        # As input() does while it flushes its streams.
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return True

    monkeypatch.setattr(click, "confirm", confirm)
    screen = Screen()
    with Signals(screen), pytest.raises(KeyboardInterrupt):
        screen.ask("Go on?")


def test_no_bar_and_no_escapes_where_there_is_no_terminal(shell, server, texts_file):
    texts_file(100)
    run = shell("embed", "texts.jsonl", "-o", "out.npy")
    assert "\x1b" not in run.out + run.err
    assert "━" not in run.err
