"""Who may take what somebody else held?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedcore.storage import grants as ownership
from embedcore.storage.grants import has_ended, is_free, myself

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="the system does not say when a process started"
)
SAY = "from embedcore.storage.grants import myself\nprint(myself(), flush=True)\ninput()"

Start = Callable[[], "tuple[subprocess.Popen[str], str]"]


@pytest.fixture
def start(forks: Callable[..., Any]) -> Iterator[Start]:
    """Another process, and what it calls itself."""
    started = []

    def begin() -> tuple[subprocess.Popen[str], str]:
        started.append(forks(SAY, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        return started[-1], started[-1].stdout.readline().strip()

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def dead(start: Start) -> str:
    process, name = start()
    process.kill()
    process.wait()
    return name


def with_part(owner: str, place: int, value: str) -> str:
    parts = owner.split(" ")
    parts[place] = value
    return " ".join(parts)


def named(owner: str, number: int, host: str | None = None) -> str:
    """The same, of another number or host."""
    first = owner.split(" ")[0].rpartition(":")[0]
    return with_part(owner, 0, f"{first if host is None else host}:{number}")


def test_the_name_has_host_and_process() -> None:
    host, _, process = myself().split(" ")[0].rpartition(":")
    assert host
    assert int(process) == os.getpid()
    assert not has_ended(myself())


@needs_proc
def test_a_name_is_of_one_process_only(start: Start) -> None:
    (_, one), (_, other) = start(), start()
    assert len({one, other, myself()}) == 3
    assert len(one.split(" ")) == 4
    assert not has_ended(one)


@needs_proc
def test_a_child_of_a_fork_has_a_name_of_its_own(tmp_path: Path) -> None:
    """Also one whose number is that of its parent's parent."""
    mine = myself()
    ownership._own[0] = mine
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, f"{myself()}|{len(ownership._own)}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    said, known = os.read(read, 1000).decode().split("|")
    del ownership._own[0]
    assert said.split(" ")[0] == named(mine, child).split(" ")[0]
    assert known == "1", "what the parent knew is forgotten"
    assert has_ended(said)
    assert not has_ended(mine)


@needs_proc
@pytest.mark.case("C7")
def test_it_is_proved_that_a_killed_process_has_ended() -> None:
    """Of a child of ours: others are waited for at once, by who forked them."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", SAY], **pipes)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert not has_ended(name)
    process.kill()
    # Not yet waited for by its parent: it is still in the list of processes.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(name)
    process.communicate()
    assert has_ended(name)


@needs_proc
@pytest.mark.case("C7")
def test_a_number_that_another_process_has_by_now(start: Start) -> None:
    _, living = start()
    assert has_ended(with_part(living, 3, "1"))


@needs_proc
@pytest.mark.case("C7")
@pytest.mark.parametrize(
    ("place", "value"),
    [
        pytest.param(1, "00000000-1111-2222-3333-444444444444", id="another boot, or machine"),
        pytest.param(2, "pid:[1],time:[1]", id="another container"),
        pytest.param(2, "", id="unknown"),
    ],
)
@pytest.mark.parametrize("started", ["as it was", "1"])
def test_who_cannot_be_seen_from_here_is_not_taken_for_dead(
    dead: str, place: int, value: str, started: str
) -> None:
    elsewhere = with_part(dead, place, value)
    if started != "as it was":
        elsewhere = with_part(elsewhere, 3, started)
    assert has_ended(dead)
    assert not has_ended(elsewhere)
    assert not has_ended(named(elsewhere, os.getpid()))


@pytest.mark.case("C7")
def test_without_proof_nobody_is_dead(dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = dead.split(" ")[0]
    assert not has_ended(name), "written by an embedcore of before, or on another system"
    for odd in ("", ":", "host:77x a b c", "host: a b c", f"{name} a b", f"{dead} more"):
        assert not has_ended(odd)
    monkeypatch.setattr(ownership, "_PROC", Path("/nowhere"))
    ownership._own.clear()
    try:
        assert " " not in myself()
        assert not has_ended(dead)
        assert not has_ended(myself())
    finally:
        ownership._own.clear()


@needs_proc
@pytest.mark.case("C7")
def test_a_proc_of_somebody_else_tells_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dead: str
) -> None:
    """That of the host in a container shows other processes under these numbers."""
    (tmp_path / "self").symlink_to("1")
    monkeypatch.setattr(ownership, "_PROC", tmp_path)
    ownership._own.clear()
    try:
        assert " " not in myself()
        assert not has_ended(dead)
    finally:
        ownership._own.clear()


@needs_proc
@pytest.mark.parametrize(
    ("state", "threads", "over"),
    [("S", 1, False), ("R", 9, False), ("Z", 1, True), ("Z", 2, False), ("X", 0, True)],
)
def test_a_thread_that_lives_on_is_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, threads: int, over: bool
) -> None:
    """The first thread of a program may end before the others."""
    folder = tmp_path / str(os.getpid())
    folder.mkdir()
    rest = [state, *["0"] * 16, str(threads), "0", "77", "0"]
    (folder / "stat").write_text(f"{os.getpid()} (a) b (c) {' '.join(rest)}")
    mine = with_part(myself(), 3, "77")
    monkeypatch.setattr(ownership, "_PROC", tmp_path)
    assert has_ended(mine) is over
    assert has_ended(with_part(mine, 3, "78"))


def test_what_nobody_holds_is_free() -> None:
    assert is_free(None, None, 0)
    assert is_free(None, 10, 0)
    assert is_free(myself(), None, 0)


@pytest.mark.fault(75)
def test_what_is_held_is_free_at_the_end_of_the_lease() -> None:
    assert not is_free(myself(), 10, 9)
    assert not is_free(myself(), 10, 10)
    assert is_free(myself(), 10, 11)


def test_what_a_dead_process_held_is_free_at_once(dead: str) -> None:
    assert is_free(dead, 10, 0)
    assert is_free(dead.split(" ")[0], 10, 0), "named by an embedcore of before"


def test_of_another_host_only_the_lease_is_known(dead: str) -> None:
    number = int(dead.split(" ")[0].rpartition(":")[2])
    elsewhere = named(dead.split(" ")[0], number, "elsewhere")
    assert not is_free(elsewhere, 10, 9)
    assert is_free(elsewhere, 10, 11)


def test_a_process_of_somebody_else_is_alive() -> None:
    assert not is_free(named(myself().split(" ")[0], 1), 10, 0)


@pytest.mark.parametrize("name", ["", "host", "host:", f"{'x'}:abc", "host:77x"])
def test_a_name_that_is_none_is_believed_until_its_lease_ends(name: str) -> None:
    assert not is_free(name, 10, 0)
    assert is_free(name, 10, 11)
