"""A process need not have a home folder, and works all the same where it needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedcore import Config, ConfigurationError, EmbeddingClient, folders
from embedcore.config import state_folder, user_file
from embedcore.testing import FakeOpenAI

pwd = pytest.importorskip("pwd", reason="home folders of POSIX")

pytestmark = pytest.mark.case("H3")

# Nobody has this number here, as in a container that runs under one of its own.
STRANGER = """
import pwd, sys
def nobody(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")
pwd.getpwuid = nobody
"""


def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(number: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")


def relative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "somewhere")


@pytest.fixture(params=[unset, empty, relative])
def homeless(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[pytest.MonkeyPatch], None]:
    """No home folder, and nothing that stands for one."""
    for name in list(os.environ):
        if name.startswith("XDG_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("EMBEDCORE_HOME")
    request.param(monkeypatch)
    found: Callable[[pytest.MonkeyPatch], None] = request.param
    return found


def test_no_home_means_no_file_of_the_users(homeless: object) -> None:
    assert folders.home() is None
    assert user_file() is None
    assert Config.load().model == "text-embedding-3-small"


def test_with_nothing_to_keep_state_in_the_error_names_the_variable(
    homeless: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="EMBEDCORE_HOME"):
        state_folder(Config.load())
    with pytest.raises(ConfigurationError, match="EMBEDCORE_HOME"):
        EmbeddingClient(options={"api_key": "sk-none-0123456789"}).embed_text("a")
    monkeypatch.setenv("EMBEDCORE_HOME", str(tmp_path))
    assert state_folder(Config.load()) == tmp_path


def test_what_keeps_no_state_needs_no_home(homeless: object) -> None:
    assert len(EmbeddingClient("hashing:64").embed_text("a word")) == 64
    assert not list(Path.cwd().iterdir())


def test_an_xdg_variable_stands_for_a_home(
    homeless: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if sys.platform == "darwin":
        pytest.skip("macOS has folders of its own")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert user_file() == tmp_path / "config" / "embedcore" / "embedcore.toml"
    assert state_folder(Config()) == tmp_path / "data" / "embedcore"


@pytest.mark.parametrize("name", ["~/state", "~nobody-has-this-name/state", "~"])
@pytest.mark.parametrize("setting", ["home", "cache_dir", "EMBEDCORE_HOME", "EMBEDCORE_CONFIG"])
def test_a_tilde_that_stands_for_nothing_is_named(
    homeless: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, setting: str
) -> None:
    path = tmp_path / "embedcore.toml"
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(path))
    path.write_text("" if setting.isupper() else f'{setting} = "{name}"')
    if setting.isupper():
        monkeypatch.setenv(setting, name)
    with pytest.raises(ConfigurationError, match="write the path in full") as caught:
        state_folder(Config.load())
    assert name in str(caught.value)


def test_another_users_folder_is_found_as_the_shell_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/users/me")
    assert folders.expanded("~/a") == Path("/users/me/a")
    assert folders.expanded("~root/a") == Path(pwd.getpwnam("root").pw_dir) / "a"
    assert folders.expanded("a/~/b") == Path("a/~/b")


@pytest.mark.parametrize("home", [None, ""])
def test_a_bare_environment_is_enough(
    tmp_path: Path, forks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    """As under env -i, with a number that is no user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedcore.toml").write_text("[options.openai]\ndimensions = 8\n")
    with FakeOpenAI() as server:
        environment = {
            "OPENAI_API_KEY": str(server.api_key),
            "OPENAI_BASE_URL": server.base_url,
            "EMBEDCORE_HOME": str(tmp_path),
            "EMBEDCORE_CONFIG": str(tmp_path / "embedcore.toml"),
            **({} if home is None else {"HOME": home}),
        }

        def program(*arguments: str) -> str:
            return f"{STRANGER}\nfrom embedcore.cli import main\nsys.exit(main({list(arguments)}))"

        def run(*arguments: str) -> tuple[int, str, str]:
            both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = forks(program(*arguments), env=environment, **both)
            said, complaints = process.communicate(timeout=120)
            return process.returncode, said, complaints

        if home is None:
            # What is imported has to do without as well.
            command = [sys.executable, "-c", program("embed", "-c", "a word", "--json")]
            started = subprocess.run(command, env=environment, capture_output=True, text=True)
            code, complaints = started.returncode, started.stderr
        else:
            code, _, complaints = run("embed", "-c", "a word", "--json")
        assert code == 0, complaints
        assert server.meter.billed_texts == {"a word": 1}
        for name in ("config", "usage", "doctor"):
            _, said, complaints = run(name, "--json")
            assert "fault in embedcore" not in complaints
            assert json.loads(said)
        environment.pop("EMBEDCORE_HOME")
        code, _, complaints = run("embed", "-c", "another", "--json")
        assert code == 2
        assert "EMBEDCORE_HOME" in complaints
        assert run("config")[0] == 0
        assert server.meter.billed_texts == {"a word": 1}
