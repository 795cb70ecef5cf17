"""Where settings come from, which one wins, and what a mistake in them says."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from embedcore import Config, ConfigurationError, EmbeddingClient
from embedcore.choice import as_config
from embedcore.config import VARIABLES, state_folder, user_file
from embedcore.settings import Limits
from embedcore.storage.amounts import ALL_SCOPES


def toml(value: object) -> str:
    """Settings as TOML: dotted keys and JSON scalars are enough for them."""
    lines = []

    def walk(table: dict, path: str) -> None:
        for key, inner in table.items():
            here = f"{path}.{json.dumps(key)}" if path else json.dumps(key)
            if isinstance(inner, dict):
                walk(inner, here)
            else:
                lines.append(f"{here} = {json.dumps(inner)}")

    assert isinstance(value, dict)
    walk(value, "")
    return "\n".join(lines)


def write(path: Path, text: str | dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else toml(text), encoding="utf-8")
    return path


@pytest.fixture
def places(monkeypatch):
    """The settings files in their order of precedence, and how each is put in place."""
    here = Path.cwd()
    (here.parent / ".git").mkdir()

    def named(text):
        monkeypatch.setenv("EMBEDCORE_CONFIG", str(write(here.parent / "named.toml", text)))

    def pyproject(text):
        write(here / "pyproject.toml", "[tool.embedcore]\n" + text)

    return {
        "named": named,
        "nearest": lambda text: write(here / "embedcore.toml", text),
        "above": lambda text: write(here.parent / "embedcore.toml", text),
        "pyproject": pyproject,
        "user": lambda text: write(user_file(), text),
    }


@pytest.mark.parametrize(
    "there", [c for n in range(1, 6) for c in itertools.combinations(range(5), n)]
)
def test_the_first_place_that_has_settings_has_all_of_them(places, there):
    names = list(places)
    for index in there:
        places[names[index]](f'model = "acme:{names[index]}"')
    config = Config.load()
    assert config.model == f"acme:{names[there[0]]}"
    assert set(config.origins) == {"model", "home"}


def test_without_any_settings_the_defaults_hold():
    config = Config.load()
    assert config.model_dump() == Config(home=os.environ["EMBEDCORE_HOME"]).model_dump()
    assert config.origins == {"home": "environment EMBEDCORE_HOME"}


def test_a_nearer_file_is_taken_from_a_folder_below(monkeypatch):
    Path(".git").mkdir()
    write(Path("embedcore.toml"), 'scope = "outer"')
    inner = write(Path("a/embedcore.toml"), 'scope = "inner"').parent
    (inner / "b").mkdir()
    monkeypatch.chdir(inner / "b")
    assert Config.load().scope == "inner"


def test_a_pyproject_without_our_table_is_passed_by(monkeypatch):
    Path(".git").mkdir()
    write(Path("pyproject.toml"), '[tool.embedcore]\nscope = "outer"')
    inner = write(Path("a/pyproject.toml"), "[tool.other]\nx = 1").parent
    monkeypatch.chdir(inner)
    assert Config.load().scope == "outer"
    write(Path("pyproject.toml"), "tool = 3")
    assert Config.load().scope == "outer"


def test_a_path_in_python_goes_over_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(write(tmp_path / "a.toml", 'scope = "a"')))
    assert Config.load(write(tmp_path / "b.toml", 'scope = "b"')).scope == "b"
    assert EmbeddingClient("hashing:64", config=str(tmp_path / "b.toml")).scope == "b"


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("EMBEDCORE_MODEL", "acme:m", "model", "acme:m"),
        ("EMBEDCORE_PROVIDER", "acme", "provider", "acme"),
        ("EMBEDCORE_SCOPE", "team", "scope", "team"),
        ("EMBEDCORE_TIMEZONE", "Europe/Berlin", "timezone", "Europe/Berlin"),
        ("EMBEDCORE_OVERLONG", "reject", "overlong", "reject"),
        ("EMBEDCORE_CONCURRENCY", "3", "concurrency", 3),
        ("EMBEDCORE_CONFIRM_ABOVE", "2.50", "confirm_above", Decimal("2.50")),
        ("EMBEDCORE_HOME", "/srv/state", "home", Path("/srv/state")),
        ("EMBEDCORE_CACHE", "false", "cache", False),
        ("EMBEDCORE_CACHE_DIR", "/srv/cache", "cache_dir", Path("/srv/cache")),
    ],
)
def test_the_environment_goes_over_the_file(monkeypatch, variable, text, name, value):
    file = {"concurrency": 9, "confirm_above": 5, "overlong": "truncate"}
    file |= {"cache": True, "cache_dir": "/c"}
    settings = {"model": "m", "provider": "p", "scope": "s", "timezone": "UTC", "home": "/f"}
    path = write(Path("named.toml"), {**settings, **file}).absolute()
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(path))
    monkeypatch.delenv("EMBEDCORE_HOME")
    before = Config.load()
    assert getattr(before, name) != value
    assert before.origins[name] == str(path)
    monkeypatch.setenv(variable, text)
    config = Config.load()
    assert getattr(config, name) == value
    assert config.origins[name] == f"environment {variable}"
    monkeypatch.setenv(variable, "")
    assert Config.load() == before, "an empty variable says nothing"


def test_every_variable_of_the_settings_is_tested_above():
    limits = {f"EMBEDCORE_{name.upper()}" for name in Limits.model_fields}
    over_all = {f"EMBEDCORE_ALL_SCOPES_{name.upper()}" for name in Limits.model_fields}
    others = {"MODEL", "PROVIDER", "SCOPE", "TIMEZONE", "OVERLONG", "CONCURRENCY", "HOME"}
    others |= {"CONFIRM_ABOVE", "CONFIG", "POLICY", "CACHE", "CACHE_DIR", "TRUST"}
    assert set(VARIABLES) == limits | over_all | {f"EMBEDCORE_{name}" for name in others}


LAYERS = ("policy", "user", "project", "environment")
amounts = st.one_of(st.none(), st.integers(0, 10**9))
layered = st.fixed_dictionaries(
    {
        layer: st.fixed_dictionaries(
            {(owner, name): amounts for owner in ("", ALL_SCOPES) for name in Limits.model_fields}
        )
        for layer in LAYERS
    }
)


@given(layered)
def test_a_lower_layer_can_only_tighten(said):
    """Effective limit == the least of all layers, and it is known which layer set it."""
    with pytest.MonkeyPatch.context() as patch:
        here = Path.cwd()
        files = {"policy": here / "policy.toml", "user": user_file(), "project": here / "p.toml"}
        for layer, path in files.items():
            table: dict = {"budget": {}}
            for (owner, name), value in said[layer].items():
                if value is not None:
                    place = (
                        table["budget"].setdefault("all_scopes", {}) if owner else table["budget"]
                    )
                    place[name] = value % 10**6 if "cost" in name else value
            write(path, table)
        patch.setenv("EMBEDCORE_POLICY", str(files["policy"]))
        for (owner, name), value in said["environment"].items():
            if value is not None:
                value = value % 10**6 if "cost" in name else value
                patch.setenv(
                    f"EMBEDCORE_{'ALL_SCOPES_' if owner else ''}{name.upper()}", str(value)
                )
        config = Config.load(files["project"])
        in_python = as_config({"budget": {"daily_token_limit": 500}})
    for owner, name in said["policy"]:
        values = {
            layer: said[layer][owner, name] % 10**6 if "cost" in name else said[layer][owner, name]
            for layer in LAYERS
            if said[layer][owner, name] is not None
        }
        place = config.budget.all_scopes if owner else config.budget
        path = f"budget.{'all_scopes.' if owner else ''}{name}"
        assert getattr(place, name) == min(values.values(), default=None)
        if values:
            winner = next(layer for layer in LAYERS if values.get(layer) == min(values.values()))
            variable = f"EMBEDCORE_{'ALL_SCOPES_' if owner else ''}{name.upper()}"
            expected = str(files[winner]) if winner in files else f"environment {variable}"
            assert config.origins[path] == expected
        else:
            assert path not in config.origins
    above = [said[layer]["", "daily_token_limit"] for layer in LAYERS if layer != "project"]
    assert in_python.budget.daily_token_limit == min([500, *(v for v in above if v is not None)])


def test_the_callers_own_settings_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "10")
    own = Config(budget={"daily_token_limit": 20})
    assert as_config(own).budget.daily_token_limit == 10
    assert own.budget.daily_token_limit == 20
    assert as_config(as_config(own)) == as_config(own)


def test_the_layers_are_told_highest_first(monkeypatch, tmp_path):
    policy = write(tmp_path / "policy.toml", "[budget]\ndaily_token_limit = 5")
    monkeypatch.setenv("EMBEDCORE_POLICY", str(policy))
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "6")
    path = write(Path("embedcore.toml"), "[budget]\ndaily_token_limit = 7").absolute()
    told = [(origin, budget.daily_token_limit) for origin, budget in Config.load().layers]
    variable = "environment EMBEDCORE_DAILY_TOKEN_LIMIT"
    assert told == [(str(policy), 5), (str(path), 7), (variable, 6)]


@pytest.mark.parametrize(
    "text", ["daily_token_limit = 5", "[budgt]\n", "[budget]\nx = 1\n", 'model = "m"']
)
def test_a_policy_holds_limits_and_nothing_else(monkeypatch, tmp_path, text):
    """A policy with a slip of the pen must not come out as no limit at all."""
    path = write(tmp_path / "policy.toml", text)
    monkeypatch.setenv("EMBEDCORE_POLICY", str(path))
    with pytest.raises(ConfigurationError) as caught:
        Config.load()
    assert str(path) in str(caught.value)


def test_a_policy_that_is_named_and_absent_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("EMBEDCORE_POLICY", str(tmp_path / "gone.toml"))
    with pytest.raises(ConfigurationError, match=r"gone\.toml does not exist"):
        EmbeddingClient("hashing:64", config={})


@pytest.mark.fault(129)
def test_a_mistake_in_the_users_file_is_told_even_beside_a_project(monkeypatch):
    write(user_file(), "[budgt]\ndaily_token_limit = 5")
    write(Path("embedcore.toml"), 'scope = "project"')
    with pytest.raises(ConfigurationError, match="budgt: unknown key; did you mean 'budget'"):
        Config.load()


@pytest.mark.fault(129)
@pytest.mark.parametrize(
    "text", ["model = ", "[", "a = 1\na = 2", b"\xff\xfe", b"model = '\xe4'", '{"model": "m"}']
)
def test_bad_toml_names_the_file(text):
    path = Path("embedcore.toml").absolute()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError) as caught:
        Config.load()
    assert f"{path} is not valid TOML" in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.fault(129)
@given(st.binary(max_size=60))
def test_no_file_makes_anything_else_than_a_configuration_error(content):
    path = Path("embedcore.toml")
    path.write_bytes(content)
    message = None
    try:
        Config.load()
    except ConfigurationError as error:
        message = str(error)
    assert message is None or str(path.absolute()) in message


@pytest.mark.fault(129)
@pytest.mark.parametrize("text", ['modle = "m"', "model = 7", "budget = 5", 'retry = "often"'])
def test_a_mistake_names_its_file(places, text):
    for name in reversed(places):
        places[name](text)
        with pytest.raises(ConfigurationError) as caught:
            Config.load()
        expected = {"named": "named.toml", "pyproject": "pyproject.toml [tool.embedcore]"}
        assert expected.get(name, "embedcore.toml") in str(caught.value)


@pytest.mark.fault(129)
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("EMBEDCORE_DAILY_TOKEN_LIMIT", "1e6"),
        ("EMBEDCORE_DAILY_TOKEN_LIMIT", "-1"),
        ("EMBEDCORE_ALL_SCOPES_TOTAL_COST_LIMIT", "ten"),
        ("EMBEDCORE_MONTHLY_COST_LIMIT", "nan"),
        ("EMBEDCORE_CONCURRENCY", "0"),
        ("EMBEDCORE_CONCURRENCY", "two"),
        ("EMBEDCORE_OVERLONG", "cut"),
        ("EMBEDCORE_SCOPE", "a b"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(monkeypatch, variable, value):
    write(Path("embedcore.toml"), 'scope = "project"')
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as caught:
        Config.load()
    assert variable in str(caught.value)
    assert "embedcore.toml" not in str(caught.value)


@pytest.mark.fault(129)
def test_a_file_that_is_absent_or_a_folder_is_told():
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml does not exist"):
        Config.load("nowhere.toml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Config.load(Path.cwd())


def test_a_file_may_begin_with_a_byte_order_mark():
    Path("embedcore.toml").write_bytes(b"\xef\xbb\xbfscope = 'x'")
    assert Config.load().scope == "x"


def test_a_folder_named_in_a_file_is_meant_from_there(monkeypatch):
    """Two programs in two folders of one project must not have two budgets."""
    monkeypatch.delenv("EMBEDCORE_HOME")
    path = write(Path("embedcore.toml"), 'home = "state"').absolute()
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(path))
    (path.parent / "below").mkdir()
    for start in (path.parent, path.parent / "below"):
        monkeypatch.chdir(start)
        assert state_folder(Config.load()) == path.parent / "state"
    path.rename(path.parent / "moved.toml")
    monkeypatch.delenv("EMBEDCORE_CONFIG")
    assert state_folder(Config.load("../moved.toml")) == Path.cwd() / "../state"
    monkeypatch.setenv("EMBEDCORE_HOME", "here")
    assert state_folder(Config.load()) == Path.cwd() / "here"


@pytest.mark.parametrize("variable", ["EMBEDCORE_CONFIG", "EMBEDCORE_POLICY"])
def test_a_relative_name_is_meant_from_the_working_directory_and_said_in_full(
    monkeypatch, variable
):
    top = Path.cwd()
    write(Path("named.toml"), "[budget]\ndaily_token_limit = 7")
    (top / "below").mkdir()
    monkeypatch.setenv(variable, "named.toml")
    config = Config.load()
    assert config.budget.daily_token_limit == 7
    assert config.origins["budget.daily_token_limit"] == str(top / "named.toml")
    monkeypatch.chdir("below")
    for name in ("named.toml", "../named.toml"):
        monkeypatch.setenv(variable, name)
        if name.startswith(".."):
            assert Config.load().budget.daily_token_limit == 7
            write(top / "named.toml", "[budget]\nnonsense = 7")
        with pytest.raises(ConfigurationError) as told:
            Config.load()
        assert str(Path.cwd() / name) in str(told.value)


def test_a_child_elsewhere_is_told_which_file_it_looked_for(monkeypatch, tmp_path):
    """What a program has read stays read; a process of its own looks from where it is."""
    monkeypatch.delenv("EMBEDCORE_HOME")
    write(Path("named.toml"), 'scope = "mine"\nhome = "state"')
    monkeypatch.setenv("EMBEDCORE_CONFIG", "named.toml")
    top, config = Path.cwd(), Config.load()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "from embedcore import Config; print(Config.load().scope)"
    for folder, said in ((top, "mine"), (elsewhere, str(elsewhere / "named.toml"))):
        child = [sys.executable, "-c", code]
        ran = subprocess.run(child, cwd=folder, capture_output=True, text=True, check=False)
        assert said in ran.stdout + ran.stderr
    monkeypatch.chdir(elsewhere)
    assert state_folder(config) == top / "state"
    assert state_folder(pickle.loads(pickle.dumps(config))) == top / "state"


def test_a_home_may_begin_with_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    monkeypatch.setenv("EMBEDCORE_HOME", "~/vectors")
    assert state_folder(Config.load()) == Path("/users/me/vectors")
    assert state_folder(Config()) == Path("/users/me/vectors")


def test_the_home_of_the_environment_holds_for_settings_made_in_python(state_home):
    assert state_folder(as_config({"model": "hashing:64"})) == state_home
    assert state_folder(Config(home="/elsewhere")) == Path("/elsewhere")


@pytest.mark.fault(149)
@pytest.mark.parametrize("name", ["with space", "a?b", "a#b", "a%20b", "ä", "'q\""])
def test_any_folder_can_be_the_home(monkeypatch, tmp_path, name):
    from embedcore import TokenTracker

    monkeypatch.setenv("EMBEDCORE_HOME", str(tmp_path / name))
    tracker = TokenTracker()
    tracker.record_usage(3)
    tracker.close()
    assert (tmp_path / name / "state.db").is_file()
    assert TokenTracker().get_usage_today()["tokens_used"] == 3


MODEL = '[profiles.docs]\nmodel = "{}"\noverlong = "reject"\n'


def test_another_model_is_one_line(monkeypatch):
    """And nothing else: neither of the settings nor of the program."""

    def program() -> tuple[str, str]:
        client = EmbeddingClient("docs")
        return client.provider, client.model

    before, after = MODEL.format("text-embedding-3-small"), MODEL.format("hashing:256")
    changed = [a != b for a, b in zip(before.splitlines(), after.splitlines(), strict=True)]
    assert sum(changed) == 1
    write(Path("embedcore.toml"), before)
    assert program() == ("openai", "text-embedding-3-small")
    write(Path("embedcore.toml"), after)
    assert program() == ("hashing", "256")


def test_the_working_directory_may_be_gone(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert Config.load().model == "text-embedding-3-small"


@pytest.mark.fault(129)
def test_a_misspelt_limit_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMT", "5")
    with pytest.raises(ConfigurationError, match="did you mean EMBEDCORE_DAILY_TOKEN_LIMIT"):
        Config.load()
    with pytest.raises(ConfigurationError, match="EMBEDCORE_DAILY_TOKEN_LIMT means nothing"):
        as_config(Config())


def test_a_variable_of_somebody_elses_is_left_alone(monkeypatch):
    monkeypatch.setenv("EMBEDCORE_ACME_REGION", "eu")
    assert Config.load().model == "text-embedding-3-small"
