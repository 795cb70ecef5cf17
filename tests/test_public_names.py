"""What may be imported from embedcore, and what importing it costs."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import embedcore
from embedcore import errors

PROMISED = {
    "EmbeddingClient",
    "EmbeddingResult",
    "TokenTracker",
    "embed_texts",
    "batch_embed_texts",
    "check_daily_limit",
    "record_usage",
    "estimate_tokens",
    "EmbeddingError",
    "TokenBudgetExceeded",
    "BatchEmbeddingFailed",
}
BESIDE = {"Arrival", "Config", "Plan", "RowOutcome", "Spending", "TextCut"}
BESIDE |= {"BatchJob", "BatchReport", "RemoteJob"}
BESIDE |= {"Block", "EmbeddingStream", "AsyncEmbeddingStream", "StoppedAt"}
REPOSITORY = Path(__file__).parents[1]


def error_names() -> set[str]:
    return {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.EmbeddingError)
    }


def test_the_names_are_exactly_these():
    assert set(embedcore.__all__) == PROMISED | BESIDE | error_names()
    assert embedcore.__all__ == sorted(embedcore.__all__)
    assert set(embedcore._HOMES) == set(embedcore.__all__)


@pytest.mark.parametrize("name", embedcore.__all__)
def test_each_is_what_it_is_at_home(name):
    value = getattr(embedcore, name)
    assert value is getattr(importlib.import_module(embedcore._HOMES[name]), name)
    assert value.__module__ == embedcore._HOMES[name]
    assert inspect.getdoc(value), f"{name} says nothing of itself"
    assert getattr(embedcore, name) is value


def test_the_type_checker_sees_the_same_names():
    source = Path(embedcore.__file__).read_text(encoding="utf-8")
    checked = source.partition("if TYPE_CHECKING:")[2].partition("# Loaded at first use")[0]
    declared = {}
    home = ""
    for line in checked.splitlines():
        if line.strip().startswith("from "):
            home = line.split()[1]
        elif " as " in line:
            name, _, alias = line.strip().rstrip(",").partition(" as ")
            assert name == alias
            declared[name] = home
    assert declared == embedcore._HOMES


def test_dir_lists_them():
    assert set(embedcore.__all__) <= set(dir(embedcore))
    assert dir(embedcore) == sorted(dir(embedcore))


def test_there_is_nothing_else():
    with pytest.raises(AttributeError, match=r"'embedcore' has no attribute 'EmbedingClient'"):
        embedcore.EmbedingClient  # noqa: B018
    with pytest.raises(ImportError):
        exec("from embedcore import nothing_of_this_name")


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert embedcore.__version__ == version("embedcore")


def in_a_fresh_interpreter(program: str) -> object:
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(answer.stdout)


HEAVY = ("numpy", "pydantic", "sqlite3", "sqlite_utils", "openai", "tiktoken", "tenacity", "pluggy")
HEAVY += ("hypothesis", "pytest", "click", "rich", "pyarrow", "pysqlite3", "urllib3")
LOADED = f"import sys, json; print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"


@pytest.mark.parametrize(
    "program",
    ["import embedcore", "import embedcore; dir(embedcore)", "import embedcore.errors"],
)
def test_importing_loads_nothing_that_is_not_needed(program):
    assert in_a_fresh_interpreter(f"{program}; {LOADED}") == []


def test_a_star_brings_every_name():
    program = "from embedcore import *; import json; print(json.dumps(sorted(dir())))"
    names = in_a_fresh_interpreter(program)
    assert isinstance(names, list)
    assert set(embedcore.__all__) <= set(names)


def test_building_a_client_loads_no_sdk_and_no_database():
    program = f"from embedcore import EmbeddingClient; EmbeddingClient(); {LOADED}"
    loaded = in_a_fresh_interpreter(program)
    assert isinstance(loaded, list)
    assert set(loaded) <= {"pydantic", "tenacity", "pluggy"}


def test_the_package_is_typed():
    assert (Path(embedcore.__file__).parent / "py.typed").is_file()


def test_the_public_types_are_those_that_programs_rely_on():
    """The files are checked and never run: a change of a type that breaks callers fails here."""
    pytest.importorskip("mypy")
    paths = [REPOSITORY / "tests" / "typing" / name for name in ("user.py", "plugin_author.py")]
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-error-summary"),
            *("--config-file", REPOSITORY / "pyproject.toml", *paths),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
