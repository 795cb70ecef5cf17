"""Is a provider found by its name, alone, and does a bad one fail alone and by name?"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError, field_validator

from embedcore.errors import AuthenticationFailed, ConfigurationError, PluginError, UnknownProvider
from embedcore.events import Throttled
from embedcore.observers import observed_by
from embedcore.provider import known, registry
from embedcore.provider.hookspecs import Provider
from embedcore.provider.known import how_to_install, near_models
from embedcore.provider.registry import (
    build,
    create,
    explain_validation,
    installed,
    load,
    split_model,
    validate_options,
)
from embedcore.testing.fakes.embedder import FakeEmbedder

Install = Callable[..., str]
ROOT = Path(__file__).parents[2]

GOOD = """
from pydantic import BaseModel, ConfigDict
from embedcore.provider.hookspecs import Provider, hookimpl
from embedcore.testing.fakes.embedder import FakeEmbedder

class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    url: str = ""

def create(model, options):
    return FakeEmbedder()

@hookimpl
def embedcore_provider():
    return Provider(name={name!r}, options=Options, create=create)
"""


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """The registry remembers what it loaded for the life of a process: here, of a test."""
    registry._load.cache_clear()
    registry._load_observers.cache_clear()
    registry._manager.cache_clear()
    registry.plugin_observers.clear()
    yield
    registry._load.cache_clear()
    registry._load_observers.cache_clear()
    registry._manager.cache_clear()
    registry.plugin_observers.clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution on the path; its module imports under the returned name."""
    modules = []

    def put(
        name: str,
        code: str = GOOD,
        *,
        distribution: str = "",
        attribute: str = "",
        entry: str = "",
        group: str = "embedcore",
    ) -> str:
        distribution = distribution or f"embedcore-{name}"
        module = f"plugin_{distribution.replace('-', '_')}"
        modules.append(module)
        site = tmp_path / distribution
        information = site / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
        information.mkdir(parents=True)
        (site / f"{module}.py").write_text(code.replace("{name!r}", repr(name)))
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n"
        )
        target = entry or module + (f":{attribute}" if attribute else "")
        (information / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
        monkeypatch.syspath_prepend(str(site))
        return module

    yield put
    for module in modules:
        sys.modules.pop(module, None)


def told(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    for part in parts:
        assert part in str(error.value)


# Found


def test_a_provider_is_loaded_by_name_and_only_that_one(install: Install) -> None:
    wanted, other = install("acme"), install("other", "raise SystemExit('never imported')")
    provider = load("acme")
    assert (provider.name, load("acme")) == ("acme", provider)
    assert wanted in sys.modules
    assert other not in sys.modules
    assert isinstance(create("acme", "m", {"url": "x"}), FakeEmbedder)


def test_what_is_installed_is_listed_without_being_imported(install: Install) -> None:
    module = install("acme", "raise RuntimeError", distribution="acme-vectors")
    (found,) = [one for one in installed() if one.name == "acme"]
    assert (found.distribution, found.version, found.module) == ("acme-vectors", "1.2.3", module)
    assert module not in sys.modules
    assert [one.name for one in installed()] == sorted(one.name for one in installed())


def test_what_is_installed_or_removed_meanwhile_is_noticed(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def names() -> set[str]:
        return {one.name for one in installed()}

    install("acme")
    site = tmp_path / "embedcore-acme"
    information = site / "late-1.0.dist-info"
    # As if the clock of the disk had gone on since it was last looked through.
    os.utime(site, (1, 1))
    assert {"acme", "late"} & names() == {"acme"}
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[embedcore]\nlate = late\n")
    assert {"acme", "late"} <= names()
    monkeypatch.setenv("EMBEDCORE_LOAD_PLUGINS", "late")
    assert names() == {"late"}
    monkeypatch.delenv("EMBEDCORE_LOAD_PLUGINS")
    os.utime(site, (2, 2))
    assert {"acme", "late"} <= names()
    shutil.rmtree(information)
    assert {"acme", "late"} & names() == {"acme"}


def test_what_is_installed_is_read_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    real = registry.entry_points
    monkeypatch.setattr(registry, "entry_points", lambda **how: read.append(how) or real(**how))
    install("acme")
    assert [one.name for one in installed()] == [one.name for one in installed()]
    with pytest.raises(UnknownProvider):
        load("nobody")
    assert len(read) == 1
    monkeypatch.syspath_prepend(str(tmp_path))
    installed()
    assert len(read) == 2


def test_none_is_an_error_that_says_how_to_install_it(install: Install) -> None:
    install("acme")
    with pytest.raises(UnknownProvider) as unknown:
        load("acne")
    told(unknown, "'acne' is not installed", "Did you mean 'acme'?")
    assert "pip install" not in str(unknown.value), "a misspelt package may be anybody's"
    with pytest.raises(UnknownProvider) as unknown:
        load("opena1")
    told(unknown, "Did you mean 'openai'?")
    assert "acme" in unknown.value.installed
    with pytest.raises(UnknownProvider) as unknown:
        load("OpenAI")
    told(unknown, "Did you mean 'openai'?")
    with pytest.raises(UnknownProvider) as unknown:
        load("somewhere-else")
    told(unknown, "'somewhere-else' is not installed", "If you have its package, install it")
    with pytest.raises(UnknownProvider):
        create("acne", "m", {})


MODELS = ("text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002")


@pytest.mark.case("F9")
@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("3-small", MODELS[:1]),
        ("small", MODELS[:1]),
        ("ada-002", MODELS[2:]),
        ("openai/text-embedding-3-small", MODELS[:1]),
        ("Text-Embedding-3-Large", MODELS[1:2]),
        ("text-embedding-3-smal", MODELS[:1]),
        ("text-embeding-3-large", MODELS[1:2]),
        ("text-embedding-small", MODELS[:1]),
        ("text-embedding-3-small", ()),
        ("text-embedding-4-small", ()),
        ("text-embedding-3-medium", ()),
        ("text-embedding-v3", ()),
        ("embedding", ()),
        ("bge-m3", ()),
        ("openai/", ()),
    ],
)
def test_a_name_that_is_nearly_a_model(asked, meant):
    assert tuple(near_models(asked, MODELS)) == meant


@pytest.mark.case("F9")
@pytest.mark.parametrize(
    "name", ["bedrock", "jina", "acme", "embedcore", "openai-2", "../openai", "hashing ", ""]
)
def test_no_package_is_named_that_nobody_here_knows(name: str) -> None:
    """Who registers it first would be installed."""
    said = how_to_install(name)
    assert "pip install" not in said
    assert "embedcore-" not in said
    assert "docs/how-to/write-a-provider.md" in said
    with pytest.raises(UnknownProvider) as unknown:
        load(name or "none")
    assert "pip install" not in str(unknown.value)


@pytest.mark.case("F9")
def test_those_of_this_repository_are_named_by_their_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours = {path.parent.name for path in ROOT.glob("providers/*/pyproject.toml")}
    assert ours == set(known.IN_REPOSITORY)
    for name in ours:
        folder = ROOT / "providers" / name
        assert how_to_install(name) == f"Install it with: pip install {shlex.quote(str(folder))}"
    # Installed without the repository around it.
    monkeypatch.setattr(known, "__file__", str(tmp_path / "a" / "b" / "known.py"))
    for name in ours:
        assert f"pip install ./providers/{name}" in how_to_install(name)
        assert "clone" in how_to_install(name)


@pytest.mark.case("F9")
def test_a_package_on_the_list_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "OF_OTHERS", {"acme": "acme-vectors"})
    assert how_to_install("acme") == "Install it with: pip install acme-vectors"


@pytest.mark.fault(123)
def test_two_of_one_name_are_both_named(install: Install) -> None:
    install("acme", distribution="acme-old")
    install("acme", distribution="acme-new")
    install("fine")
    with pytest.raises(PluginError) as clash:
        load("acme")
    told(clash, "acme-new and acme-old", "uninstall")
    assert load("fine").name == "fine"


def test_one_distribution_that_is_on_the_path_twice_is_one(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme")
    twin = tmp_path / "twin"
    twin.symlink_to(tmp_path / "embedcore-acme")
    monkeypatch.syspath_prepend(str(twin))
    assert load("acme").name == "acme"


def test_loading_can_be_limited(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme")
    install("other")
    monkeypatch.setenv("EMBEDCORE_LOAD_PLUGINS", "other, more")
    assert [one.name for one in installed()] == ["other"]
    with pytest.raises(UnknownProvider) as hidden:
        load("acme")
    told(hidden, "EMBEDCORE_LOAD_PLUGINS='other, more' hides the others")
    assert load("other").name == "other"
    monkeypatch.setenv("EMBEDCORE_LOAD_PLUGINS", "")
    assert installed() == []
    monkeypatch.delenv("EMBEDCORE_LOAD_PLUGINS")
    assert load("acme").name == "acme"


# Broken

HOOK = "from embedcore.provider.hookspecs import Provider, hookimpl\n@hookimpl\n"


@pytest.mark.fault(122)
@pytest.mark.fault(124)
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("raise BaseException('odd')", "odd"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("", "not a Provider"),
        (HOOK + "def embedcore_provider(): return None", "not a Provider"),
        (HOOK + "def embedcore_provider(): return {'name': 'bad'}", "dict, not a Provider"),
        (HOOK + "def embedcore_providr(): return None", "embedcore_providr"),
        (HOOK + "def embedcore_provider(config): return None", "config"),
        (GOOD.replace("{name!r}", "'worse'"), "calls itself 'worse'"),
    ],
)
def test_a_broken_plugin_fails_by_name_and_alone(install: Install, code: str, said: str) -> None:
    install("bad", code, distribution="bad-plugin")
    install("fine")
    for _ in range(2):
        with pytest.raises(PluginError) as broken:
            load("bad")
        told(broken, "'bad'", "bad-plugin 1.2.3", said)
        assert broken.value.distribution == "bad-plugin"
        assert load("fine").name == "fine"


@pytest.mark.fault(122)
@pytest.mark.parametrize("entry", ["not_there.plugin", "sys:not_there"])
def test_an_entry_point_to_nothing(install: Install, entry: str) -> None:
    install("bad", entry=entry)
    with pytest.raises(PluginError, match="cannot be imported"):
        load("bad")


@pytest.mark.fault(124)
@pytest.mark.parametrize("error", ["KeyError('x')", "SystemExit(1)", "BaseException()"])
def test_a_hook_that_raises(install: Install, error: str) -> None:
    install("bad", HOOK + f"def embedcore_provider(): raise {error}")
    with pytest.raises(PluginError, match="'bad'"):
        load("bad")


@pytest.mark.fault(124)
def test_ctrl_c_passes_through(install: Install) -> None:
    install("bad", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load("bad")


CLASS = (
    GOOD
    + """
class Plugin:
    {before}
    @hookimpl
    def embedcore_provider(self):
        return Provider(name={name!r}, options=Options, create=create)
del embedcore_provider
plugin = Plugin if {is_class} else Plugin()
"""
)


@pytest.mark.parametrize("is_class", [True, False])
def test_a_plugin_may_be_a_class_or_an_instance(install: Install, is_class: bool) -> None:
    code = CLASS.replace("{is_class}", str(is_class)).replace("{before}", "")
    install("acme", code, attribute="plugin")
    assert load("acme").name == "acme"


@pytest.mark.fault(124)
def test_a_class_that_cannot_be_built(install: Install) -> None:
    before = "def __init__(self, needed): pass"
    code = CLASS.replace("{is_class}", "True").replace("{before}", before)
    install("bad", code, attribute="plugin")
    with pytest.raises(PluginError, match="needed"):
        load("bad")


# Built


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    region: str = ""


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    api_key: SecretStr | None = None
    timeout: float = 1.0
    inner: Inner | None = None
    many: dict[str, Inner] = {}

    @field_validator("api_key")
    @classmethod
    def long_enough(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and len(key.get_secret_value()) < 4:
            raise ValueError("a key has at least four characters")
        return key


def provider(make: Callable[[str, Any], Any] = lambda model, options: FakeEmbedder()) -> Provider:
    return Provider(name="acme", options=Options, create=make)


@pytest.mark.fault(124)
@pytest.mark.parametrize("error", [KeyError("boom"), SystemExit("boom")])
def test_what_escapes_a_plugin_while_building_is_typed(error: BaseException) -> None:
    def fail(model: str, options: object) -> Any:
        raise error

    with pytest.raises(PluginError) as broken:
        build(provider(fail), "m", Options())
    told(broken, "'acme'", "'m'", type(error).__name__, "boom")
    assert broken.value.__cause__ is error


def test_a_plugins_own_typed_errors_are_left_alone() -> None:
    def fail(model: str, options: object) -> Any:
        raise AuthenticationFailed("no key")

    with pytest.raises(AuthenticationFailed):
        build(provider(fail), "m", Options())


def test_options_reach_the_plugin_validated() -> None:
    seen: list[tuple[str, Any]] = []
    options = validate_options(provider(), {"timeout": "2.5", "api_key": "sk-12345"})
    build(provider(lambda *call: seen.append(call)), "v2", options)
    ((model, given_options),) = seen
    assert (model, given_options.timeout) == ("v2", 2.5)
    assert given_options.api_key.get_secret_value() == "sk-12345"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeuot": 1}, "timeuot: unknown key; did you mean 'timeout'?"),
        ({"zzz": 1}, "zzz: unknown key; valid names: api_key, inner, many, timeout"),
        ({"inner": {"regoin": "x"}}, "inner.regoin: unknown key; did you mean 'region'?"),
        ({"many": {"a": {"regoin": "x"}}}, "many.a.regoin: unknown key; did you mean 'region'?"),
        ({"timeout": "soon"}, "timeout: "),
        ({"timeout": 1, "zzz": 1, "inner": 5}, "; zzz: "),
    ],
)
def test_a_mistake_in_the_options_is_named_with_its_path(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        validate_options(provider(), options)
    told(wrong, "options of provider 'acme'", said)


SECRET = "sk-very-secret-value"


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": [SECRET]},
        {"api_kye": SECRET},
        {"timeout": SECRET},
        {"inner": SECRET},
        {"many": {"a": SECRET}},
    ],
)
def test_no_value_is_ever_repeated_in_a_message(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        validate_options(provider(), options)
    assert SECRET not in str(wrong.value)
    assert SECRET not in repr(wrong.value)
    assert wrong.value.__cause__ is None
    assert wrong.value.__suppress_context__


def test_an_error_at_the_root_has_a_name_too() -> None:
    class Both(BaseModel):
        one: int = 0

    with pytest.raises(ValidationError) as wrong:
        Both.model_validate("text")
    assert explain_validation(wrong.value, "here", Both).startswith("here: (all): ")


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m", ("openai", "m")),
        ("acme:m", ("acme", "m")),
        ("acme:m:v2", ("acme", "m:v2")),
        ("acme:org/m", ("acme", "org/m")),
    ],
)
def test_a_models_name_is_split_at_the_first_colon(name: str, expected: tuple[str, str]) -> None:
    assert split_model(name, default_provider="openai") == expected


@given(st.from_regex(r"[a-z]+", fullmatch=True), st.text(min_size=1).filter(str.strip))
def test_any_models_name_comes_back_whole(owner: str, model: str) -> None:
    assert split_model(f"{owner}:{model}", default_provider="openai") == (owner, model)


@pytest.mark.parametrize("name", ["", " ", ":", "acme:", "acme: ", ":m"])
def test_a_name_with_a_part_missing(name: str) -> None:
    with pytest.raises(ConfigurationError, match="provider:model"):
        split_model(name, default_provider="openai")


# Observers


def test_every_observer_is_told_whatever_the_others_do(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    watching = GOOD + "\nseen = []\n@hookimpl\ndef embedcore_observe(event): seen.append(event)\n"
    failing = GOOD + "\n@hookimpl\ndef embedcore_observe(event): raise KeyError('observer')\n"
    module = install("first", watching)
    install("second", failing)
    observed_by(())(Throttled(endpoint="nobody loaded yet", seconds=1))
    load("first")
    load("second")
    event = Throttled(endpoint="x", seconds=1)
    with caplog.at_level(logging.ERROR, "embedcore"):
        observed_by(())(event)
        observed_by(())(event)
    assert sys.modules[module].seen == [event, event]
    assert [record.message for record in caplog.records] == ["an observer failed on Throttled"] * 2


def test_a_plugin_that_was_refused_observes_nothing(install: Install) -> None:
    spy = GOOD.replace("{name!r}", "'worse'")
    module = install(
        "bad", spy + "\nseen = []\n@hookimpl\ndef embedcore_observe(event): seen.append(1)\n"
    )
    with pytest.raises(PluginError):
        load("bad")
    observed_by(())(Throttled(endpoint="x", seconds=1))
    assert sys.modules[module].seen == []


def test_this_machine_has_the_projects_own_providers() -> None:
    names = {one.name for one in installed()}
    if "hashing" not in names:
        pytest.skip("embedcore-hashing is not installed here")
    assert load("hashing").name == "hashing"
    assert os.environ.get("EMBEDCORE_LOAD_PLUGINS") is None


# Observers alone

WATCHING = """
from embedcore.provider.hookspecs import hookimpl
seen = []

@hookimpl
def embedcore_observe(event):
    seen.append(event)
"""


def test_a_distribution_may_only_observe(install: Install) -> None:
    module = install("watch", WATCHING, group="embedcore.observers")
    other = install("acme")
    assert [one.name for one in registry.installed_observers()] == ["watch"]
    assert "watch" not in [one.name for one in installed()]
    event = Throttled(endpoint="x", seconds=1)
    observed_by(())(event)
    observed_by(())(event)
    assert sys.modules[module].seen == [event, event]
    assert other not in sys.modules, "no provider is imported for it"
    load("acme")
    observed_by(())(event)
    assert len(sys.modules[module].seen) == 3


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
        ("x = 1", "must have the hook embedcore_observe, and no other: it has none"),
        (GOOD, "it has embedcore_provider"),
        (WATCHING.replace("embedcore_observe", "embedcore_observes"), "does not fit the hooks"),
        (WATCHING.replace("(event)", "(happening)", 1), "does not fit the hooks"),
    ],
)
def test_an_observer_that_cannot_be_used_is_left_out_and_said_once(
    install: Install, caplog: pytest.LogCaptureFixture, code: str, said: str
) -> None:
    install("bad", code, group="embedcore.observers")
    good = install("good", WATCHING, group="embedcore.observers")
    for _ in range(2):
        observed_by(())(Throttled(endpoint="x", seconds=1))
    assert len(sys.modules[good].seen) == 2
    (warning,) = [one.message for one in caplog.records if one.levelname == "WARNING"]
    assert said in warning
    assert said in registry.load_observers()["bad"]


def test_observers_may_be_kept_out(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    module = install("watch", WATCHING, group="embedcore.observers")
    monkeypatch.setenv("EMBEDCORE_LOAD_PLUGINS", "openai")
    observed_by(())(Throttled(endpoint="x", seconds=1))
    assert module not in sys.modules
