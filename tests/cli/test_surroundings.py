"""The command line where something is missing: a script on the path, a locale, a console."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedcore.testing import FakeOpenAI

pytestmark = pytest.mark.case("H8")


def test_the_package_is_a_program() -> None:
    for module in ("embedcore", "embedcore.cli"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("embedcore ")
        assert done.stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="bytes are arguments on POSIX only")
@pytest.mark.parametrize("utf8_mode", ["0", "1"])
def test_without_a_locale_an_argument_is_utf8(server: FakeOpenAI, utf8_mode: str) -> None:
    name = "d\u00f6c.txt".encode()
    Path(os.fsdecode(name)).write_text("one line\n")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8_mode}

    def run(*arguments: str | bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "embedcore", *arguments],
            env=environment,
            capture_output=True,
            check=False,
        )

    done = run("embed", "-c", "h\u00e9llo \U0001f3e0".encode(), "--json")
    assert done.returncode == 0, done.stderr
    assert server.meter.billed_texts == {"h\u00e9llo \U0001f3e0": 1}
    if utf8_mode == "1":
        return
    # The name of a file stays what it is.
    done = run("embed", name, "-o", "v\u00e9.npy".encode(), "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert server.meter.billed_texts["one line"] == 1
    assert Path(os.fsdecode("v\u00e9.npy".encode())).exists()
    done = run("similar", "-c", "h\u00e9llo \U0001f3e0".encode(), "-i", "v\u00e9.npy".encode())
    assert done.returncode == 0, done.stderr
    assert server.meter.billed_texts["h\u00e9llo \U0001f3e0"] <= 2


@pytest.mark.skipif(os.name != "posix", reason="bytes are arguments on POSIX only")
@pytest.mark.parametrize(
    ("arguments", "utf8_mode"),
    [
        (["embed", "-c", b"h\xe9llo"], "0"),
        (["similar", "-c", b"h\xe9llo", "-i", "x.npy"], "1"),
    ],
)
def test_an_argument_in_another_encoding_is_named(
    server: FakeOpenAI, arguments: list[Any], utf8_mode: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "embedcore", *arguments],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": utf8_mode},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "neither UTF-8 nor in this system's encoding" in done.stderr
    assert "C.UTF-8" in done.stderr
    assert server.meter.requests == 0


@pytest.mark.parametrize("streams", ["stdout", "stderr", "stdout stderr", "stdin stdout stderr"])
def test_a_program_without_a_console_works(
    server: FakeOpenAI, begun: Callable[..., Any], streams: str
) -> None:
    """As under pythonw: the streams are None."""
    Path("texts.txt").write_text("one line\n")
    gone = "; ".join(f"sys.{name} = None" for name in streams.split())
    program = begun("embed", "texts.txt", "-o", "out.npy", "--yes", first=gone)
    _, complaints = program.communicate(timeout=120)
    assert program.returncode == 0, complaints
    assert Path("out.npy").exists()
    assert server.meter.billed_texts == {"one line": 1}


def test_an_argument_of_any_command_may_be_any_text(cli: Callable[..., Any]) -> None:
    done = cli("embed", "-c", "h\u00e9llo \u4f60", "-m", "hashing:64", "--json")
    assert done.code == 0
    assert len(json.loads(done.out)["vectors"][0]) == 64
