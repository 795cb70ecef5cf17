"""Can a stranger's package be installed beside embedcore, and chosen by one line of config?

The wheels of embedcore, of the hashing provider and of the how-to's template go into a new virtual
environment, as they would on a user's machine. Needs a package registry; skipped without one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from embedcore_hashing.plugin import HashingOptions, create

from embedcore.cli.authors import write
from embedcore.provider.types import EmbedRequest
from embedcore.testing.vectors import tokens_of, vectors_of

ROOT = Path(__file__).parents[1]
HOW_TO = ROOT / "docs" / "how-to"
DISTRIBUTIONS = (ROOT, ROOT / "providers" / "hashing")
KEY = "acme-0123456789abcdef"
TEXTS = ("a red apple", "a green pear")  # those of the page's program

CONFIG = """\
model = "{model}"

[options.acme]
base_url = "{url}"
"""


class Acme(BaseHTTPRequestHandler):
    """The service of the how-to. ``asked``: the texts of each request with the right key."""

    asked: list[list[str]]

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = self.headers["Authorization"] == f"Bearer {KEY}"
        answer: dict[str, object] = {}
        if right:
            self.asked.append(question["texts"])
            answer = {
                "model": question["model"],
                "vectors": vectors_of(question["texts"], 16).tolist(),
                "tokens": sum(map(tokens_of, question["texts"])),
            }
        body = json.dumps(answer).encode()
        self.send_response(200 if right else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def acme() -> Iterator[tuple[str, list[list[str]]]]:
    """The service's address, and what it was asked."""
    asked: list[list[str]] = []
    handler = type("Handler", (Acme,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without anything that could lead to this checkout or to real settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("EMBEDCORE_", "PYTHON", "OPENAI_", "ACME_", "VIRTUAL_ENV"))
    }
    return kept | variables


def pip(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments],
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def python(once: Callable[..., Path]) -> Path:
    """The interpreter of a new environment with the wheels and what they depend on.

    Skips where pip reaches no registry.
    """
    place = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    return once("stranger", install) / "venv" / place


def install(folder: Path) -> None:
    builder, wheels, environment = folder / "builder", folder / "wheels", folder / "venv"
    probe = pip("install", "hatchling", "--target", str(builder))
    if probe.returncode:
        pytest.skip(f"pip reaches no package registry: {probe.stderr.strip()[-200:]}")
    write("acme", "plain", folder / "embedcore-acme")
    # Three environments to build in would have nothing else in them.
    built = pip(
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        *(str(path) for path in (*DISTRIBUTIONS, folder / "embedcore-acme")),
        PYTHONPATH=str(builder),
    )
    assert built.returncode == 0, built.stderr
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    assert len(found) == len(DISTRIBUTIONS) + 1
    venv.create(environment, symlinks=os.name != "nt")
    installed = pip("--python", str(environment), "install", "--no-compile", *found)
    assert installed.returncode == 0, installed.stderr


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The calling program, word for word as the how-to shows it."""
    page = (HOW_TO / "write-a-provider.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(import json\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "program.py"
    path.write_text(block, encoding="utf-8")
    return path


def run(
    python: Path, program: Path, *, named: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``named``: by the user; otherwise the settings are only found beside the program."""
    if named:
        variables["EMBEDCORE_CONFIG"] = str(program.parent / "embedcore.toml")
    return subprocess.run(
        [python, str(program)],
        cwd=program.parent,
        env=clean_environment(EMBEDCORE_HOME=str(program.parent / "state"), **variables),
        capture_output=True,
        text=True,
        check=False,
    )


def answer(done: subprocess.CompletedProcess[str]) -> list[list[float]]:
    assert done.returncode == 0, done.stderr
    vectors: list[list[float]] = json.loads(done.stdout)
    return vectors


def test_the_model_is_swapped_by_one_line(
    python: Path, program: Path, acme: tuple[str, list[list[str]]]
) -> None:
    url, asked = acme
    config = program.parent / "embedcore.toml"
    code = program.read_bytes()

    config.write_text(CONFIG.format(model="hashing:256", url=url), encoding="utf-8")
    lexical = answer(run(python, program, ACME_API_KEY=KEY))
    expected = create("256", HashingOptions()).embed(EmbedRequest(texts=TEXTS)).vectors
    np.testing.assert_array_equal(np.array(lexical, dtype=np.float32), expected)
    assert asked == []

    before = config.read_text(encoding="utf-8").splitlines()
    config.write_text(CONFIG.format(model="acme:v1", url=url), encoding="utf-8")
    after = config.read_text(encoding="utf-8").splitlines()
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1

    remote = answer(run(python, program, ACME_API_KEY=KEY))
    np.testing.assert_array_equal(np.array(remote, dtype=np.float32), vectors_of(TEXTS, 16))
    assert asked == [list(TEXTS)]
    assert program.read_bytes() == code


def test_a_missing_key_is_named_and_nothing_is_sent(
    python: Path, program: Path, acme: tuple[str, list[list[str]]]
) -> None:
    url, asked = acme
    config = CONFIG.format(model="acme:v1", url=url)
    (program.parent / "embedcore.toml").write_text(config, encoding="utf-8")
    done = run(python, program)
    assert done.returncode != 0
    assert "ACME_API_KEY" in done.stderr
    assert "ConfigurationError" in done.stderr
    assert asked == []


@pytest.mark.case("D1")
def test_an_address_that_was_only_found_gets_no_key(
    python: Path, program: Path, acme: tuple[str, list[list[str]]]
) -> None:
    """The core decides that, for a provider that knows nothing of it."""
    url, asked = acme
    config = program.parent / "embedcore.toml"
    config.write_text(CONFIG.format(model="acme:v1", url=url), encoding="utf-8")
    done = run(python, program, named=False, ACME_API_KEY=KEY)
    assert done.returncode != 0
    assert "ACME_API_KEY is set and was not sent" in done.stderr
    config.write_text(CONFIG.format(model="acme:v1", url="http://acme.invalid"), encoding="utf-8")
    done = run(python, program, named=False, ACME_API_KEY=KEY)
    assert "sets options.acme.base_url (line 4)" in done.stderr
    assert asked == []


def test_a_wrong_key_is_refused_and_not_shown(
    python: Path, program: Path, acme: tuple[str, list[list[str]]]
) -> None:
    url, asked = acme
    config = CONFIG.format(model="acme:v1", url=url)
    (program.parent / "embedcore.toml").write_text(config, encoding="utf-8")
    done = run(python, program, ACME_API_KEY="wrong-0123456789")
    assert done.returncode != 0
    assert "AuthenticationFailed" in done.stderr
    assert "wrong-0123456789" not in done.stderr + done.stdout
    assert asked == []


def test_a_provider_that_is_not_installed_is_named_and_no_package_of_that_name(
    python: Path, program: Path
) -> None:
    (program.parent / "embedcore.toml").write_text('model = "nobody:v1"\n', encoding="utf-8")
    done = run(python, program)
    assert done.returncode != 0
    assert "installed: acme, hashing" in done.stderr
    assert "If you have its package, install it" in done.stderr
    assert "pip install" not in done.stderr


def test_the_checkout_is_not_what_was_tested(python: Path, tmp_path: Path) -> None:
    code = (
        "import embedcore, embedcore_acme.plugin, embedcore_hashing\n"
        "for module in (embedcore, embedcore_acme, embedcore_hashing): print(module.__file__)"
    )
    done = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    environment = python.parents[1].resolve()
    for line in done.stdout.splitlines():
        assert Path(line).resolve().is_relative_to(environment)
