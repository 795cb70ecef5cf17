"""What a layer of settings may set, by where it comes from; owners of files; trust."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel

from embedcore import Config, ConfigurationError, EmbeddingClient, TokenTracker
from embedcore.config import beyond_message, records, settings_at, user_file
from embedcore.folders import search_folders
from embedcore.provider import registry
from embedcore.settings import BatchSettings, Budget, Limits, Profile, RetrySettings
from embedcore.trust import (
    TRUST_VARIABLE,
    Entry,
    FoundFile,
    Others,
    Permission,
    Record,
    digest,
    entries,
    is_loopback,
    line_of,
    location,
    may_set,
    owner_problem,
    sensitive,
)

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="only root can give a file to another user"
)
POSIX = pytest.mark.skipif(os.name != "posix", reason="owners and permissions of POSIX")

# The issue's own list, key by key. Everything else must be refused.
FREELY = {
    *("model", "overlong", "on_empty", "strategy", "deadline"),
    *("options.openai.dimensions", "options.openai.batch", "models.team.dimensions"),
    *(f"budget.{limit}" for limit in Limits.model_fields),
    *(f"budget.all_scopes.{limit}" for limit in Limits.model_fields),
    *(f"budget.scopes.team.{limit}" for limit in Limits.model_fields),
    "budget.query_share",
    *(
        f"batch.{key}"
        for key in (
            "grace",
            "look_again",
            "watch",
            "output_wait",
            "input_wait",
            "quickest",
            "drain_before",
        )
    ),
}
DOWNWARDS = {
    *("concurrency", "requests_per_minute", "tokens_per_minute", "texts_per_minute"),
    *("retry.attempts", "retry.quota", "retry.quota_ratio"),
    *("batch.parts", "batch.attempts", "batch.enqueued_tokens"),
}
WITHOUT_LIMITS = {
    "scope",
    *(
        f"{of}.{key}"
        for of in ("options.openai", "models.team")
        for key in ("price", "batch_price")
    ),
}

SAMPLES: dict[str, Any] = {
    "scope": "team",
    "provider": "openai",
    "overlong": "reject",
    "on_empty": "keep",
    "on_zero": "reject",
    "strategy": "auto",
    "cache": True,
    "cache_dir": "c",
    "home": "h",
    "timezone": "UTC",
    "cache_cap": 9,
    "allow_network_filesystem": True,
    "query_share": 0.1,
    "quota_ratio": 0.05,
    "base_url": "https://stranger.example",
    "batch": True,
    "tokenizer": "t.json",
}


def keys_of(model: type[BaseModel], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every setting, through tables and named tables."""
    for name, described in model.model_fields.items():
        kinds = [described.annotation, *getattr(described.annotation, "__args__", ())]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        named = "dict[" in str(described.annotation)
        if name == "options":
            yield from option_keys((*place, name), within_profile=model is Profile)
        elif inner is not None:
            yield from keys_of(inner, (*place, name, "team") if named else (*place, name))
        else:
            yield (*place, name)


def option_keys(place: tuple[str, ...], *, within_profile: bool) -> Iterator[tuple[str, ...]]:
    for provider in ("openai",) if within_profile else ("openai", "hashing"):
        for option in registry.load(provider).options.model_fields:
            yield (*place, option) if within_profile else (*place, provider, option)
    # Somebody else's provider, whose options have whatever names.
    for option in ("key", "url", "endpoint", "region", "proxy", "prompt", "model_path"):
        yield (*place, option) if within_profile else (*place, "acme", option)


EVERY_KEY = sorted(set(keys_of(Config)))


def table_with(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    table: Any = value
    for key in reversed(path):
        table = {key: table}
    if path[0] == "profiles":
        table["profiles"][path[1]].setdefault("model", "openai:m")
    return table


def sample(path: tuple[str, ...]) -> Any:
    name = path[-1]
    if name == "model":
        return "openai:m"
    return SAMPLES.get(name, 1)


def toml(table: Mapping[str, Any]) -> str:
    return "".join(f"{entry.key} = {json.dumps(entry.value)}\n" for entry in entries(table))


def put(path: Path, text: str | Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else toml(text), encoding="utf-8")
    path.chmod(0o644)
    return path.absolute()


def without_profile(path: tuple[str, ...]) -> str:
    if path[0] == "profiles":
        path = path[2:]
        if path[0] == "options":
            path = ("options", "openai", *path[1:])
    return ".".join(path).replace("options.hashing.", "options.openai.")


# The allow-list


def test_there_are_keys_to_walk():
    assert len(EVERY_KEY) > 150
    walked = {without_profile(path) for path in EVERY_KEY}
    assert walked >= FREELY | DOWNWARDS | WITHOUT_LIMITS
    assert {"options.openai.api_key", "home", "budget.wait", "options.acme.url"} <= walked
    assert {path[-1] for path in EVERY_KEY} >= set(
        BatchSettings.model_fields | RetrySettings.model_fields | Budget.model_fields
    ) - {"all_scopes", "scopes"}


@pytest.mark.case("D1")
@pytest.mark.parametrize("path", EVERY_KEY, ids=".".join)
def test_a_found_file_sets_what_is_listed_and_nothing_else(path):
    key = without_profile(path)
    table = table_with(path, sample(path))
    Config.model_validate(table)
    file = put(Path("embedcore.toml"), table)
    if key in FREELY | DOWNWARDS | WITHOUT_LIMITS:
        assert Config.load().standing == "found"
    else:
        with pytest.raises(ConfigurationError, match=re.escape(f"{'.'.join(path)} (line ")) as it:
            Config.load()
        assert f"embedcore trust {file}" in str(it.value)
        assert f"EMBEDCORE_CONFIG={file}" in str(it.value)
        assert "stranger" not in str(it.value), "a value may be a key"


@pytest.mark.parametrize("path", EVERY_KEY, ids=".".join)
def test_named_by_the_user_every_file_sets_everything(path, monkeypatch):
    table = table_with(path, sample(path))
    file = put(Path("embedcore.toml"), table)
    assert Config.load(file).standing == "named"
    file.rename("elsewhere.toml")
    monkeypatch.setenv("EMBEDCORE_CONFIG", "elsewhere.toml")
    assert Config.load().standing == "named"
    monkeypatch.delenv("EMBEDCORE_CONFIG")
    put(user_file(), table)
    assert (Config.load().standing, Config.load().file) == ("named", str(user_file()))


@pytest.mark.parametrize("path", EVERY_KEY, ids=".".join)
def test_trusted_a_found_file_sets_everything(path):
    put(Path("embedcore.toml"), table_with(path, sample(path)))
    trust()
    assert Config.load().standing in ("trusted", "found")


def test_the_page_lists_what_the_code_allows():
    page = (Path(__file__).parents[1] / "docs/explanation/trust.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \|.*\|$", page.partition("**Every other key")[0], re.M)
    listed = {key for row in rows for key in re.findall(r"`([^`]+)`", row)} - {"profiles.*"}
    code = {
        key.replace("options.openai.", "options.*.").replace("models.team.", "models.*.")
        for key in FREELY | DOWNWARDS | WITHOUT_LIMITS
        if ".all_scopes." not in key and ".scopes." not in key
    }
    assert listed == code | {"options.*.base_url"}


@pytest.mark.case("D1")
@pytest.mark.parametrize(("key", "least"), [("grace", 60), ("watch", 3_600), ("output_wait", 60)])
@pytest.mark.parametrize("table", ["batch", "profiles.docs.batch"])
def test_a_found_file_does_not_make_a_batch_lose_its_jobs_too_soon(key, least, table, monkeypatch):
    for said, holds in ((0, least), (least + 1, least + 1)):
        file = put(
            Path("embedcore.toml"), f"profiles.docs.model = 'openai:m'\n{table}.{key} = {said}"
        )
        config = Config.load()
        batch = config.batch if table == "batch" else config.profiles["docs"].batch
        assert getattr(batch, key) == holds
    put(file, f"profiles.docs.model = 'openai:m'\n{table}.{key} = 0")
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(file))
    config = Config.load()
    batch = config.batch if table == "batch" else config.profiles["docs"].batch
    assert getattr(batch, key) == 0


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("retry.attempts", 3, True),
        ("retry.attempts", 4, False),
        ("retry.quota", 35.5, False),
        ("retry.quota_ratio", 0.1, True),
        ("batch.parts", 9, False),
        ("batch.attempts", 4, False),
        ("concurrency", 1_000, True),
        ("retry.attempts", "2", False),
    ],
)
@pytest.mark.parametrize("profile", ["", "profiles.docs."])
def test_numbers_go_down_and_not_up(key, value, allowed, profile):
    put(Path("embedcore.toml"), f'profiles.docs.model = "m"\n{profile}{key} = {json.dumps(value)}')
    if allowed:
        Config.load()
    else:
        with pytest.raises(ConfigurationError, match=rf"{re.escape(key)} \(line 2\)"):
            Config.load()


@pytest.mark.parametrize("place", ["", "profiles.docs."])
@pytest.mark.parametrize(
    "key", ["concurrency", "requests_per_minute", "tokens_per_minute", "texts_per_minute"]
)
def test_a_rate_of_the_users_own_file_is_not_raised(place, key):
    put(user_file(), f"{key} = 5")
    put(Path("embedcore.toml"), f'profiles.docs.model = "m"\n{place}{key} = 9')
    config = Config.load()
    holder = config.profiles["docs"] if place else config
    assert getattr(holder, key) == 5
    assert config.origins[f"{place}{key}"] == str(user_file())
    put(Path("embedcore.toml"), f'profiles.docs.model = "m"\n{place}{key} = 2')
    config = Config.load()
    assert getattr(config.profiles["docs"] if place else config, key) == 2


def test_a_profile_does_not_raise_what_the_environment_lowers(monkeypatch):
    monkeypatch.setenv("EMBEDCORE_CONCURRENCY", "2")
    put(Path("embedcore.toml"), 'profiles.docs.model = "m"\nprofiles.docs.concurrency = 50')
    assert Config.load().profiles["docs"].concurrency == 2


def test_a_mistake_in_the_environment_is_not_laid_at_the_door_of_the_file(monkeypatch):
    monkeypatch.setenv("EMBEDCORE_CONCURRENCY", "0")
    put(Path("embedcore.toml"), "concurrency = 50")
    with pytest.raises(ConfigurationError, match=r"^environment variable EMBEDCORE_CON"):
        Config.load()


def test_what_the_users_own_file_raised_may_be_used_up_to_there():
    put(user_file(), "retry.attempts = 10")
    put(Path("embedcore.toml"), "retry.attempts = 7")
    assert Config.load().retry.attempts == 7
    put(Path("embedcore.toml"), "retry.attempts = 11")
    with pytest.raises(ConfigurationError, match=r"retry\.attempts"):
        Config.load()
    trust()
    assert Config.load().retry.attempts == 11


@pytest.mark.case("D3")
@pytest.mark.parametrize("layer", ["policy", "user", "user's profile", "environment"])
@pytest.mark.parametrize(
    "line",
    [
        'scope = "another"',
        "options.openai.price = 0",
        "options.openai.batch_price = 0",
        'profiles.docs = { model = "m", scope = "another" }',
        'profiles.docs = { model = "m", options = { price = 0 } }',
    ],
)
def test_while_there_is_a_limit_scope_and_price_are_sensitive(monkeypatch, layer, line):
    put(Path("embedcore.toml"), line)
    assert Config.load().standing == "found"
    if layer == "policy":
        policy = put(Path("policy.toml"), "budget.all_scopes.monthly_cost_limit = 5")
        monkeypatch.setenv("EMBEDCORE_POLICY", str(policy))
    elif layer == "user":
        put(user_file(), "budget.scopes.default.daily_token_limit = 5")
    elif layer == "user's profile":
        put(user_file(), 'profiles.p = { model = "m", budget = { total_cost_limit = 1 } }')
    else:
        monkeypatch.setenv("EMBEDCORE_TOTAL_COST_LIMIT", "5")
    with pytest.raises(ConfigurationError, match="while there are limits"):
        Config.load()
    trust()
    assert Config.load().standing == "trusted"


@pytest.mark.case("D3")
@pytest.mark.parametrize("line", ['home = "./fresh"', 'cache_dir = "."'])
@pytest.mark.parametrize("limited", [True, False])
def test_folders_are_sensitive_with_and_without_limits(monkeypatch, line, limited):
    if limited:
        monkeypatch.setenv("EMBEDCORE_TOTAL_COST_LIMIT", "5")
    put(Path("embedcore.toml"), line)
    with pytest.raises(ConfigurationError, match="may not set that unasked"):
        Config.load()


def test_limits_of_the_found_file_itself_do_not_forbid_its_scope():
    put(Path("embedcore.toml"), 'scope = "docs"\nbudget.total_cost_limit = 3')
    assert Config.load().scope == "docs"


@pytest.mark.case("D3")
def test_a_limit_that_a_program_sets_is_not_evaded_by_a_scope_that_was_found():
    put(Path("embedcore.toml"), 'scope = "another"')
    assert TokenTracker().scope == "another"
    for config in (None, Config.load()):
        with pytest.raises(ConfigurationError, match=r"scope \(line 1\)"):
            TokenTracker(daily_limit=1_000, config=config)
    assert TokenTracker(daily_limit=1_000, config={"scope": "mine"}).scope == "mine"
    trust()
    Config.load()


def test_empty_tables_set_nothing_and_an_empty_option_is_one():
    put(Path("embedcore.toml"), "[profiles]\n[options]\n[options.openai]\n[budget]\n[batch]\n")
    assert Config.load().standing == "found"
    put(Path("embedcore.toml"), "[options.acme.allowed_hosts]\n")
    with pytest.raises(ConfigurationError, match="allowed_hosts"):
        Config.load()


@pytest.mark.parametrize("value", ['"http://evil.example"', '"$HOME"', "1.5", "[1]", "{ a = 1 }"])
@pytest.mark.parametrize("option", ["batch", "dimensions"])
def test_an_option_that_another_provider_understands_in_another_way_is_sensitive(option, value):
    put(Path("embedcore.toml"), f"options.acme.{option} = {value}")
    with pytest.raises(ConfigurationError, match=rf"options\.acme\.{option}"):
        Config.load()


def test_a_mistake_is_told_before_trust_is_asked_for():
    put(Path("embedcore.toml"), 'modle = "m"\nhome = "x"')
    with pytest.raises(ConfigurationError, match="did you mean 'model'"):
        Config.load()


names = st.text("abcdefgh.-_ \"'", min_size=1, max_size=6)
values = st.one_of(st.integers(), st.booleans(), st.text(max_size=5), st.floats(allow_nan=False))
tables = st.recursive(
    st.dictionaries(names, values, max_size=3),
    lambda inner: st.dictionaries(names, st.one_of(values, inner), max_size=3),
    max_leaves=8,
)


@given(tables, st.sampled_from(["", "options", "profiles", "budget", "retry", "batch"]))
def test_what_is_not_in_the_list_is_refused_whatever_its_place(table, below):
    """Of the keys that tests invent, none is in the list."""
    whole = {below: table} if below else table
    for entry in entries(whole):
        if entry.value != {}:
            assert not may_set("found", entry, Others())
            assert may_set("named", entry, Others(limited=True))
            assert may_set("trusted", entry, Others(limited=True))


# Addresses

LOCAL = [
    *(
        "http://localhost",
        "http://localhost/",
        "https://localhost:8443/v1",
        "HTTP://LOCALHOST:1/v1",
    ),
    *("http://127.0.0.1:11434/v1", "http://127.8.9.10/", "http://[::1]:8000/v1/", "https://[::1]"),
    *(
        "http://[::ffff:127.0.0.1]:80/",
        "http://[0:0:0:0:0:0:0:1]/",
        "http://localhost:65535/a-b/~c",
    ),
]
ELSEWHERE = [
    *("https://evil.example", "http://localhost.evil.com", "http://127.0.0.1.evil.com/"),
    *("http://localhost@evil.com", "http://evil.com@localhost", "http://user:pw@localhost/"),
    *("http://localhost:80@evil.com", "http://evil.com#@localhost", "http://localhost#@evil.com"),
    *("http://localhost?@evil.com", "http://localhost\\@evil.com", "http://evil.com\\@localhost"),
    *(
        "http://localhost\t.evil.com",
        "http://local\nhost",
        " http://localhost",
        "http://localhost ",
    ),
    *("http://[::1].evil.com/", "http://evil.com[::1]/", "http://[::1", "http://::1/"),
    *("http://[::1%25eth0]/", "http://[::1%eth0]/", "http://[::ffff:8.8.8.8]/", "http://[::2]/"),
    *("http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/"),
    *("http://127.0.0.1./", "http://localhost./", "http://127.0.0.256/", "http://0.0.0.0/"),
    *("http://[::]/", "http://localhost:0/", "http://localhost:65536/", "http://localhost:/v1"),
    *("http://localhost:99999999", "http://localhost:8o", "ftp://localhost/", "//localhost/"),
    *("http:localhost", "http:/localhost", "http:///localhost", "localhost:8000", "file:///etc"),
    *(
        "http://ⓛocalhost/",
        "http://localhost%2eevil.com/",
        "http://127。0。0。1/",
        "http://1７.0.0.1",
    ),
    *("http://evil.localhost/", "http://169.254.169.254/", "http://10.0.0.1/", "http://[fe80::1]/"),
    *("$NAME", "http://$HOST/", "", "http://", "http://localhost/%2e%2e@evil.com", None, 5, True),
    *(["http://localhost"], {"http://localhost": 1}, b"http://localhost"),
]


@pytest.mark.case("D1")
@pytest.mark.parametrize("url", LOCAL)
def test_an_address_on_this_machine_is_allowed(url):
    assert is_loopback(url)
    put(Path("embedcore.toml"), {"options": {"openai": {"base_url": url}}})
    assert Config.load().standing == "found"


@pytest.mark.case("D1")
@pytest.mark.parametrize("url", ELSEWHERE, ids=repr)
def test_every_other_address_is_sensitive(url):
    assert not is_loopback(url)
    entry = Entry(path=("options", "openai", "base_url"), value=url)
    assert not may_set("found", entry, Others())


@given(st.text(max_size=12), st.text(max_size=12))
def test_nothing_around_a_local_name_keeps_it_local_by_accident(before, after):
    """What is taken for local is local to a parser that knows nothing of this one."""
    from urllib.parse import urlsplit

    url = f"http://{before}localhost{after}"
    if is_loopback(url):
        assert before == ""
        parts = urlsplit(url)
        assert (parts.hostname, parts.username) == ("localhost", None)


def test_only_base_url_is_an_address_that_may_be_local():
    for option in ("url", "endpoint", "host", "api_base"):
        put(Path("embedcore.toml"), f'options.acme.{option} = "http://localhost/"')
        with pytest.raises(ConfigurationError, match=option):
            Config.load()


# Owners and permissions


@POSIX
@given(st.integers(0, 3), st.integers(0, 0o777), st.integers(0, 3))
def test_a_file_that_another_user_could_have_written_is_not_used(owner, mode, user):
    writable_for_all, writable_for_group = mode & 0o002, mode & 0o020
    fine = (owner == user and not writable_for_all) or (
        owner == 0 and not writable_for_all and not writable_for_group
    )
    assert (owner_problem(owner, mode, user=user) is None) is fine


@POSIX
@pytest.mark.case("D2")
@pytest.mark.parametrize("name", ["embedcore.toml", "pyproject.toml"])
@pytest.mark.parametrize("mode", [0o666, 0o646, 0o602, 0o777])
def test_a_file_that_everybody_may_change_is_an_error(name, mode):
    file = put(Path(name), "[tool.embedcore]\n" * (name[0] == "p") + "budget.total_cost_limit = 1")
    file.chmod(mode)
    with pytest.raises(ConfigurationError, match="can be changed by everybody") as it:
        Config.load()
    assert f"{file} can be" in str(it.value)
    assert f"EMBEDCORE_CONFIG={file}" in str(it.value)
    if name == "embedcore.toml":
        Config.load(file)
    file.chmod(0o664)
    assert Config.load().budget.total_cost_limit == 1, "a group of the user's own is fine"


@AS_ROOT
@pytest.mark.case("D2")
@pytest.mark.parametrize("name", ["embedcore.toml", "pyproject.toml"])
def test_a_file_of_another_user_is_an_error_and_never_passed_over(name, monkeypatch):
    file = put(Path(name), "[tool.embedcore]\n" * (name[0] == "p") + "budget.total_cost_limit = 1")
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(ConfigurationError, match=rf"belongs to another user \(uid {NOBODY}\)"):
        Config.load()
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert Config.load().standing == "found"
    os.chown(file, 0, 0)
    assert Config.load().standing == "found", "root's files are fine"
    file.chmod(0o664)
    with pytest.raises(ConfigurationError, match="belongs to root and can be changed by a group"):
        Config.load()


@AS_ROOT
def test_a_pyproject_of_another_user_without_our_table_concerns_nobody():
    file = put(Path("pyproject.toml"), "[tool.other]\nx = 1")
    os.chown(file, NOBODY, NOBODY)
    file.chmod(0o666)
    assert Config.load().file is None


@POSIX
@pytest.mark.case("D2")
def test_links_are_followed_as_config_maps_need_it_and_looked_at():
    data = put(Path("..2026_11/embedcore.toml"), 'scope = "mounted"')
    Path("..data").symlink_to(data.parent)
    Path("embedcore.toml").symlink_to("..data/embedcore.toml")
    assert Config.load().scope == "mounted"
    data.chmod(0o666)
    with pytest.raises(ConfigurationError, match="can be changed by everybody"):
        Config.load()
    data.unlink()
    with pytest.raises(ConfigurationError, match="a link to a file that does not exist"):
        Config.load()


@AS_ROOT
@pytest.mark.case("D2")
def test_a_link_of_another_user_to_a_file_of_ours_is_an_error(tmp_path):
    own = put(tmp_path / "own.toml", 'scope = "own"')
    Path("embedcore.toml").symlink_to(own)
    assert Config.load().scope == "own"
    os.chown("embedcore.toml", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(ConfigurationError, match="a link that belongs to another user"):
        Config.load()


@POSIX
@pytest.mark.case("D1")
def test_a_link_to_a_file_that_may_do_more_gives_no_more(tmp_path):
    """Neither the user's own file nor a trusted one lends its standing to a link elsewhere."""
    put(user_file(), 'options.openai.base_url = "https://gateway.example"')
    Path("embedcore.toml").symlink_to(user_file())
    with pytest.raises(ConfigurationError, match=r"base_url \(line 1\)"):
        Config.load()
    Path("embedcore.toml").unlink()
    trusted = put(tmp_path / "mine/embedcore.toml", 'cache_dir = "."')
    trust(trusted)
    Path("embedcore.toml").symlink_to(trusted)
    with pytest.raises(ConfigurationError, match=r"cache_dir \(line 1\)"):
        Config.load()


@POSIX
def test_what_is_no_file_is_an_error_and_does_not_wait():
    os.mkfifo("embedcore.toml")
    with pytest.raises(ConfigurationError, match="is not a regular file"):
        Config.load()
    Path("embedcore.toml").unlink()
    Path("embedcore.toml").symlink_to("/dev/zero")
    with pytest.raises(ConfigurationError, match="is not a regular file"):
        Config.load()
    Path("embedcore.toml").unlink()
    Path("embedcore.toml").mkdir()
    assert Config.load().file is None


@POSIX
def test_the_file_that_was_opened_is_judged_and_not_its_name(monkeypatch):
    """Between a look at a path and opening it another file may take its place."""
    put(Path("embedcore.toml"), 'scope = "a"')
    evil = put(Path("evil.toml"), 'scope = "evil"')
    evil.chmod(0o666)
    opened = os.open

    def swapped(path, *more, **named):
        if str(path).endswith("embedcore.toml"):
            path = evil
        return opened(path, *more, **named)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(ConfigurationError, match="can be changed by everybody"):
        Config.load()


@AS_ROOT
@pytest.mark.case("D2")
def test_a_link_that_is_taken_away_once_it_was_followed_is_not_forgotten(monkeypatch, tmp_path):
    """Who put a link to one of our files there could otherwise hide that he did."""
    own, path = put(tmp_path / "own.toml", 'scope = "own"'), Path("embedcore.toml")
    path.symlink_to(own)
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    opened = os.open

    def replaced(name, *more, **named):
        descriptor = opened(name, *more, **named)
        if str(name).endswith("embedcore.toml"):
            path.unlink()
            put(path, 'scope = "a"')
            os.chown(path, NOBODY, NOBODY)
        return descriptor

    monkeypatch.setattr(os, "open", replaced)
    with pytest.raises(ConfigurationError, match="was replaced while it was read"):
        Config.load()


@pytest.mark.parametrize(
    "text",
    [
        f"a = {'[' * 5000}{']' * 5000}",
        "options." + ".".join("a" * 3000) + " = 1",
        f"x = {'9' * 5000}",
        f"options.openai.x = 0x{'f' * 20000}",
        f"model = 'm' #{' ' * 4_000_000}",
    ],
    ids=["arrays", "tables", "digits", "hexadecimal", "size"],
)
def test_absurd_files_are_errors_of_configuration(text):
    put(Path("embedcore.toml"), text)
    with pytest.raises(ConfigurationError, match=r"embedcore\.toml|too long"):
        Config.load()


# Where files are looked for


trees = st.lists(
    st.fixed_dictionaries(
        {
            "git": st.sampled_from([None, None, None, "folder", "file"]),
            "settings": st.sampled_from([None, None, "embedcore.toml", "pyproject.toml"]),
        }
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.case("D2")
@given(trees, st.integers(-1, 6))
def test_settings_are_found_up_to_the_repository_or_home_and_no_further(
    tmp_path_factory, levels, home
):
    """``levels``: from the working directory upwards; ``home``: the one that is the home folder."""
    top = tmp_path_factory.mktemp("top")
    folder = top
    folders = [folder := folder / f"d{n}" for n in reversed(range(len(levels)))][::-1]
    folders[0].mkdir(parents=True)
    for place, level in zip(folders, levels, strict=True):
        if level["git"] == "folder":
            (place / ".git").mkdir()
        elif level["git"] == "file":
            (place / ".git").write_text("gitdir: /elsewhere\n")
        if level["settings"]:
            head = "[tool.embedcore]\n" if level["settings"] == "pyproject.toml" else ""
            put(place / level["settings"], f'{head}scope = "{place.name}"')
    borders = [n for n, level in enumerate(levels) if level["git"] or n == home]
    inside = folders[: borders[0] + 1] if borders else folders[:1]
    wanted = next(
        (
            place.name
            for name in ("embedcore.toml", "pyproject.toml")
            for place in inside
            if (place / name).exists()
        ),
        "default",
    )
    with pytest.MonkeyPatch.context() as patch, chdir(folders[0]):
        patch.setenv("HOME", str(folders[home] if 0 <= home < len(folders) else top / "nobody"))
        assert Config.load().scope == wanted


@pytest.mark.parametrize("home", ["", "/", None, "relative"])
def test_an_account_without_a_home_folder_has_no_border_there(monkeypatch, home):
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("none")))
    else:
        monkeypatch.setenv("HOME", home)
    assert search_folders()[0] == [Path.cwd()]


def test_a_home_behind_a_link_is_the_border(monkeypatch, tmp_path):
    (tmp_path / "real/work").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    put(tmp_path / "real/embedcore.toml", 'scope = "home"')
    monkeypatch.chdir(tmp_path / "real/work")
    assert Config.load().scope == "home"


def test_the_users_own_file_is_named_wherever_the_program_starts(monkeypatch):
    put(user_file(), 'home = "state"')
    monkeypatch.chdir(user_file().parent)
    assert Config.load().standing == "named"


@pytest.mark.case("D2")
@pytest.mark.parametrize("name", ["embedcore.toml", "pyproject.toml"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("budget.daily_token_limit = 5", True),
        ("budget.scopes.a.total_cost_limit = 5", True),
        ('profiles.p = { model = "m", budget = { daily_cost_limit = 5 } }', True),
        ("budget.wait = 5", False),
        ('model = "m"', False),
        ("budget = [", False),
        ("budget = 3", False),
    ],
)
def test_limits_beyond_the_border_are_said(caplog, name, text, said):
    head = "[tool.embedcore]\n" if name == "pyproject.toml" else ""
    beyond = put(Path(name), f"{head}{text}")
    inner = Path("repository/folder")
    inner.mkdir(parents=True)
    (inner.parent / ".git").mkdir()
    with chdir(inner):
        config = Config.load()
        assert config.file is None
        assert (beyond_message(beyond) in caplog.text) is said
        caplog.clear()
        Config.load()
        assert not caplog.text, "once is enough"


@POSIX
def test_what_others_put_above_the_border_disturbs_nothing():
    os.mkfifo("embedcore.toml")
    Path("pyproject.toml").symlink_to("/dev/zero")
    Path("work").mkdir()
    with chdir("work"):
        assert Config.load().file is None


# Lines

POOL: list[tuple[str, ...]] = [
    *[("model",), ("home",), ("scope",), ("on_zero",)],
    *[("options", "openai", "base_url"), ("options", "openai", "headers", "X-Key")],
    *[("options", "openai", "headers", "X"), ("options", "a.b", "k"), ("options", "hashing", "h")],
    *[("profiles", "docs", "model"), ("profiles", "docs", "options", "base_url")],
    *[("profiles", "q q", "cache_dir"), ("budget", "all_scopes", "daily_cost_limit")],
    *[("retry", "attempts"), ("batch", "keep_days")],
]
VALUES = [
    "1",
    "'text'",
    '"a # b"',
    '"""\nhome = 1\n[options.openai]\nbase_url = 2\n"""',
    "'''\nmodel = 3\n'''",
    "[\n  1, # home = 4\n  2,\n]",
    "[ {a = 1}, {b = 2} ]",
    "2026-11-29T10:00:00Z",
]
SHORT = ["1", "'text'", '"a, }b"', "[1, 2]", "{ z = 1 }"]


def key_forms(key: str) -> list[str]:
    escaped = "".join(f"\\u{ord(character):04x}" for character in key)
    forms = [json.dumps(key), f"'{key}'", f'"{escaped}"']
    return [*forms, key] if re.fullmatch(r"[\w-]+", key) else forms


@st.composite
def files(draw: st.DrawFn) -> tuple[str, dict[tuple[str, ...], int]]:
    """A TOML text, and the line on which each key of ``POOL`` that it sets is set."""
    paths = draw(st.lists(st.sampled_from(POOL), min_size=1, unique=True))
    lines: list[str] = []
    places: dict[tuple[str, ...], int] = {}

    def written(path: tuple[str, ...]) -> str:
        dot = draw(st.sampled_from([".", " . ", "."]))
        return dot.join(draw(st.sampled_from(key_forms(key))) for key in path)

    def add(statement: str, *found: tuple[str, ...]) -> None:
        between = st.sampled_from(["", "# home = 1", "   ", "\t# [options]"])
        lines.extend(draw(st.lists(between, max_size=2)))
        places.update(dict.fromkeys(found, len(lines) + 1))
        lines.extend(statement.split("\n"))

    groups: dict[str, list[tuple[str, ...]]] = {}
    for path in paths:
        groups.setdefault(path[0], []).append(path)
    below = []
    for first, members in groups.items():
        style = draw(st.sampled_from(["dotted", "inline", "table", "tables"]))
        if members == [(first,)] or style == "dotted":
            for path in members:
                add(f"{written(path)} = {draw(st.sampled_from(VALUES))}", path)
        elif style == "inline":
            inner = ", ".join(
                f"{written(path[1:])} = {draw(st.sampled_from(SHORT))}" for path in members
            )
            add(f"{written((first,))} = {{ {inner} }}", *members)
        else:
            below.append((first, members, style))
    for first, members, style in below:
        if style == "table":
            add(f"[{written((first,))}]")
            for path in members:
                add(f"{written(path[1:])} = {draw(st.sampled_from(VALUES))}", path)
        else:
            heads: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
            for path in members:
                heads.setdefault(path[:-1], []).append(path)
            for head, leaves in heads.items():
                add(f"[{written(head)}]")
                for path in leaves:
                    add(f"{written(path[-1:])} = {draw(st.sampled_from(VALUES))}", path)
    ending = draw(st.sampled_from(["\n", "\r\n"]))
    return ending.join(lines) + draw(st.sampled_from(["", ending])), places


@given(files())
def test_the_line_of_a_key_is_found_however_it_is_written(written):
    text, places = written
    tomllib.loads(text)
    for path, line in places.items():
        assert line_of(text, path) == line, text


@given(files())
def test_the_message_names_every_sensitive_line_of_a_generated_file(written):
    text, places = written
    found = FoundFile(path=Path("/r/embedcore.toml"), text=text, table=tomllib.loads(text))
    refused = sensitive(found.table)
    message = found.refusal(refused, "")
    for entry in refused[:5]:
        key = entry.path
        while key not in places:
            key = key[:-1]
        assert f"{entry.key} (line {places[key]})" in message


def test_a_long_file_is_searched_quickly_and_exactly():
    lines = [f"[tool.t{n}]\nx = 1" for n in range(2_000)]
    lines.insert(1_000, '[tool.embedcore]\nmodel = "m"\nhome = "h"')
    file = put(Path("pyproject.toml"), "\n".join(lines))
    with pytest.raises(ConfigurationError, match=rf"{file} sets home \(line 2003\)"):
        Config.load()


def test_keys_of_a_file_cannot_write_on_the_screen():
    put(Path("embedcore.toml"), 'options.openai."a\\u001b[31m\\n" = 1')
    with pytest.raises(ConfigurationError) as it:
        Config.load()
    assert "\x1b" not in str(it.value)
    assert "(line 1)" in str(it.value).partition("\n")[0]
    assert str(it.value).count("\n") == 6


# Trust


def trust(path: Path | str = "embedcore.toml") -> Record | None:
    """As ``embedcore trust PATH --yes``."""
    found = settings_at(location(Path(path)))
    assert found is not None
    asked = sensitive(found.table)
    if not asked:
        return None
    record = Record(path=location(found.path), sha256=digest(asked))
    records().add(record)
    return record


SENSITIVE = 'options.openai.base_url = "https://gateway.example/v1"\n'


def refused() -> bool:
    try:
        Config.load()
    except ConfigurationError:
        return True
    return False


@POSIX
def test_a_record_is_readable_for_its_user_alone():
    put(Path("embedcore.toml"), SENSITIVE)
    trust()
    (file,) = records().folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert "gateway" not in file.read_text(), "no value is in it"


def test_trust_ends_with_a_change_of_what_it_is_about_and_with_no_other():
    put(Path("embedcore.toml"), SENSITIVE)
    assert refused()
    trust()
    assert Config.load().standing == "trusted"
    put(Path("embedcore.toml"), f'# a remark\nmodel = "m"\n[budget]\ntotal_cost_limit = 3\n{""}')
    assert Config.load().standing == "found"
    put(Path("embedcore.toml"), f'model = "m"\noverlong = "reject"\nconcurrency = 4\n{SENSITIVE}')
    assert Config.load().standing == "trusted", "other edits do not ask again"
    for other in (
        SENSITIVE.replace("/v1", "/v2"),
        SENSITIVE + 'options.openai.organization = "x"',
        SENSITIVE.replace("openai", "acme"),
        'options.openai.organization = "x"',
    ):
        put(Path("embedcore.toml"), other)
        assert refused(), other
    put(Path("embedcore.toml"), SENSITIVE)
    assert not refused()
    assert records().remove(location(Path("embedcore.toml")))
    assert not records().remove(location(Path("embedcore.toml")))
    assert refused()


def test_trust_is_for_one_path():
    put(Path("a/embedcore.toml"), SENSITIVE)
    put(Path("b/embedcore.toml"), SENSITIVE)
    trust("a/embedcore.toml")
    with chdir("a"):
        assert not refused()
    with chdir("b"):
        assert refused()


def test_a_moved_record_trusts_nothing():
    """The name of a record is the hash of a path, and what is in it must say the same path."""
    put(Path("a/embedcore.toml"), SENSITIVE)
    put(Path("b/embedcore.toml"), SENSITIVE)
    store = records()
    record = trust("a/embedcore.toml")
    assert record is not None
    other = location(Path("b/embedcore.toml"))
    store._place(record.path).rename(store._place(other))
    with chdir("b"):
        assert refused()


@POSIX
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_record_that_others_can_write_is_an_error(mode):
    put(Path("embedcore.toml"), SENSITIVE)
    trust()
    (file,) = records().folder.iterdir()
    file.chmod(mode)
    with pytest.raises(ConfigurationError, match="can be changed by others"):
        Config.load()


@POSIX
@pytest.mark.case("D2")
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_record_that_is_no_plain_file_is_an_error(tmp_path, kind):
    """A link could lead to a file of the user's that somebody else wrote, in a clone of his."""
    put(Path("embedcore.toml"), SENSITIVE)
    trust()
    (file,) = records().folder.iterdir()
    if kind == "link":
        file.rename(tmp_path / "elsewhere.json")
        file.symlink_to(tmp_path / "elsewhere.json")
    else:
        file.unlink()
        os.mkfifo(file, 0o600)
    with pytest.raises(ConfigurationError, match="is a link" if kind == "link" else "is damaged"):
        Config.load()


@AS_ROOT
def test_a_record_of_another_user_is_an_error():
    put(Path("embedcore.toml"), SENSITIVE)
    trust()
    (file,) = records().folder.iterdir()
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        Config.load()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"path": 5, "sha256": 1, "keys": 2}', "null"])
def test_a_damaged_record_is_an_error(content):
    put(Path("embedcore.toml"), SENSITIVE)
    trust()
    (file,) = records().folder.iterdir()
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="is damaged: delete it"):
        Config.load()


@given(tables, tables)
def test_two_files_with_one_digest_have_the_same_sensitive_entries(one, other):
    first, second = sensitive(one), sensitive(other)
    same = {entry.path: repr(entry.value) for entry in first} == {
        entry.path: repr(entry.value) for entry in second
    }
    assert (digest(first) == digest(second)) is same
    assert digest(list(reversed(first))) == digest(first)


def test_a_digest_tells_kinds_of_values_apart():
    texts = ["1", "1.0", '"1"', "true", '"true"', "2026-11-29", '"2026-11-29"', "[1]", "{ a = 1 }"]
    found = {digest(sensitive(tomllib.loads(f"options.acme.x = {text}"))) for text in texts}
    assert len(found) == len(texts)


def test_a_digest_is_the_same_in_every_release():
    table = tomllib.loads(f'model = "m"\n{SENSITIVE}home = "x"')
    pinned = "e5c8b55c11813c3ec57bef8601446b152f1ac5600fd9ef6062a516ebe34172ef"
    assert digest(sensitive(table)) == pinned


def test_the_variable_trusts_a_path_with_a_digest(monkeypatch):
    file = put(Path("embedcore.toml"), SENSITIVE)
    sha256 = digest(sensitive(tomllib.loads(SENSITIVE)))
    for value, works in [
        (f"{file}@{sha256}", True),
        (f"{file}@{sha256.upper()}", True),
        (f"/other/x@{'0' * 64}{os.pathsep}{file}@{sha256}", True),
        (f"{file}@{'0' * 64}{os.pathsep}{file}@{sha256}", True),
        (f"{file}@{'0' * 64}", False),
        (f"{file.parent / 'pyproject.toml'}@{sha256}", False),
        (f"{os.pathsep}", False),
    ]:
        monkeypatch.setenv(TRUST_VARIABLE, value)
        assert refused() is not works, value
    put(Path("embedcore.toml"), SENSITIVE + 'home = "x"')
    monkeypatch.setenv(TRUST_VARIABLE, f"{file}@{sha256}")
    assert refused(), "for these entries, and for no later ones"


@pytest.mark.parametrize("value", ["x", "/a/b", "/a@12", f"rel/embedcore.toml@{'0' * 64}", "/a@"])
def test_a_variable_that_is_misspelt_is_an_error(monkeypatch, value):
    put(Path("embedcore.toml"), SENSITIVE)
    monkeypatch.setenv(TRUST_VARIABLE, value)
    with pytest.raises(ConfigurationError, match=TRUST_VARIABLE):
        Config.load()


def test_a_pyproject_is_trusted_and_named_as_well(monkeypatch):
    text = f"[tool.other]\nbase_url = 1\n[tool.embedcore]\n{SENSITIVE}"
    file = put(Path("pyproject.toml"), text)
    with pytest.raises(ConfigurationError, match=r"pyproject\.toml sets .*base_url \(line 4\)"):
        Config.load()
    trust("pyproject.toml")
    assert Config.load().standing == "trusted"
    records().remove(location(file))
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(file))
    config = Config.load()
    assert config.standing == "named"
    assert config.options["openai"]["base_url"] == "https://gateway.example/v1"
    put(file, "[tool.other]")
    with pytest.raises(ConfigurationError, match=r"has no table \[tool\.embedcore\]"):
        Config.load()


# Keys

KEYLESS = 'model = "openai:m"\noptions.openai.base_url = "http://localhost:8000/v1"'


def key_of(client: EmbeddingClient) -> object:
    provider = registry.load(client.provider)
    return client._choice.resolve(provider).values.get("api_key")


@pytest.mark.case("D1")
def test_a_key_of_the_environment_is_not_for_an_address_that_was_found(monkeypatch, canary):
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    put(Path("embedcore.toml"), KEYLESS)
    assert key_of(EmbeddingClient()) is None
    copy = pickle.loads(pickle.dumps(EmbeddingClient()))
    assert key_of(copy) is None
    by_config = EmbeddingClient(config=Config.load())
    assert key_of(by_config) is None
    changed = Config.load().model_copy(update={"scope": "x"})
    assert key_of(EmbeddingClient(config=changed)) is None
    named = EmbeddingClient(options={"base_url": "http://localhost:8000/v1"})
    assert key_of(named) == canary
    assert key_of(EmbeddingClient("openai:m", config=Path("embedcore.toml"))) == canary
    trust()
    assert key_of(EmbeddingClient()) == canary
    put(Path("embedcore.toml"), KEYLESS.replace("8000", "8001"))
    assert key_of(EmbeddingClient()) is None, "another port is another server"


@pytest.mark.case("D1")
def test_in_a_profile_as_well(monkeypatch, canary):
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    put(
        Path("embedcore.toml"),
        'model = "p"\n[profiles.p]\nmodel = "openai:m"\noptions = { base_url = "http://[::1]/" }',
    )
    assert key_of(EmbeddingClient()) is None
    put(user_file(), "concurrency = 2")
    text = Path("embedcore.toml").read_text()
    put(Path("embedcore.toml"), text.replace("options =", "concurrency = 9\noptions ="))
    assert Config.load().origins["profiles.p.concurrency"] == str(user_file())
    assert key_of(EmbeddingClient()) is None, "whoever lowered a number named no address"


def test_a_permission_is_explained():
    assert all(permission.value for permission in Permission)
