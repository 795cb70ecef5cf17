"""Who may take what somebody else held?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from embedcore.storage.ownership import is_free, myself


@pytest.fixture(scope="module")
def dead() -> str:
    """A process of this host that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{myself().rpartition(':')[0]}:{process.pid}"


def test_the_name_has_host_and_process() -> None:
    host, _, process = myself().rpartition(":")
    assert host
    assert int(process) == os.getpid()


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


def test_of_another_host_only_the_lease_is_known(dead: str) -> None:
    elsewhere = f"elsewhere:{dead.rpartition(':')[2]}"
    assert not is_free(elsewhere, 10, 9)
    assert is_free(elsewhere, 10, 11)


def test_a_process_of_somebody_else_is_alive() -> None:
    assert not is_free(f"{myself().rpartition(':')[0]}:1", 10, 0)


@pytest.mark.parametrize("name", ["", "host", "host:", f"{'x'}:abc", "host:77x"])
def test_a_name_that_is_none_is_believed_until_its_lease_ends(name: str) -> None:
    assert not is_free(name, 10, 0)
    assert is_free(name, 10, 11)
