"""What is valid, and that limits of several layers only ever tighten."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from embedcore import Config, ConfigurationError, EmbeddingClient
from embedcore.choice import as_config, choose
from embedcore.money import in_dollars
from embedcore.settings import DEFAULTS, Budget, Limits, Profile, RetrySettings, Rules, Settings
from embedcore.storage.amounts import ALL_SCOPES

TOKEN_LIMITS = [name for name in Limits.model_fields if "token" in name]
COST_LIMITS = [name for name in Limits.model_fields if "cost" in name]

tokens = st.integers(0, 10**15)
dollars = st.decimals(0, 10**6, places=2)
limits = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(TOKEN_LIMITS, tokens),
        **dict.fromkeys(COST_LIMITS, dollars),
    },
)
budgets = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(TOKEN_LIMITS, tokens),
        **dict.fromkeys(COST_LIMITS, dollars),
        "all_scopes": limits,
        "scopes": st.dictionaries(st.sampled_from(["default", "other"]), limits),
        "query_share": st.floats(0, 1),
        "wait": st.floats(0, 100),
    },
)


def stated(budget: dict, scope: str) -> dict[tuple[str, str], object]:
    """(owner, name) → the tightest of what one budget says for calls of ``scope``."""
    places = [
        (scope, budget),
        (scope, budget.get("scopes", {}).get(scope, {})),
        (ALL_SCOPES, budget.get("all_scopes", {})),
    ]
    found: dict[tuple[str, str], object] = {}
    for owner, table in places:
        for name in (*TOKEN_LIMITS, *COST_LIMITS):
            if name in table:
                value = table[name]
                found[owner, name] = min(found.get((owner, name), value), value)
    return found


def in_force(config: Config, scope: str = "default", profile: Profile | None = None):
    names = {"day": "daily", "month": "monthly", "total": "total"}
    found = {}
    for limit in config.limits(profile or config.profile(None), scope):
        word = "token" if limit.unit == "tokens" else "cost"
        amount = limit.amount if word == "token" else in_dollars(limit.amount)
        found[limit.scope, f"{names[limit.period]}_{word}_limit"] = amount
    return found


@given(st.lists(budgets, max_size=4), budgets, st.sampled_from(["default", "other", "third"]))
def test_what_holds_is_the_tightest_of_every_layer(layers, of_profile, scope):
    merged = Budget()
    for layer in layers:
        merged = merged.tightened_by(Budget.model_validate(layer))
    config = Config(model="p", budget=merged, profiles={"p": Profile(model="m", budget=of_profile)})
    expected: dict[tuple[str, str], object] = {}
    for layer in (*layers, of_profile):
        for key, value in stated(layer, scope).items():
            expected[key] = min(expected.get(key, value), value)
    assert in_force(config, scope) == expected


@given(st.lists(budgets, min_size=1, max_size=4))
def test_a_lower_layer_never_takes_back_what_is_kept_for_queries(layers):
    merged = Budget()
    for layer in layers:
        merged = merged.tightened_by(Budget.model_validate(layer))
    share = max(layer.get("query_share", 0.0) for layer in layers)
    for limit in Config(budget=merged).limits(Profile(model="m"), "default"):
        kept = int(limit.amount * share) if limit.scope == "default" else 0
        assert limit.reserved == kept


def test_the_query_share_holds_for_a_limit_of_another_layer():
    config = Config(
        budget={"query_share": 0.25, "daily_token_limit": 1000},
        profiles={"small": Profile(model="m", budget={"daily_token_limit": 100})},
    )
    (limit,) = config.limits(config.profiles["small"], "default")
    assert (limit.amount, limit.reserved) == (100, 25)


def test_the_patience_of_a_profile_goes_over_that_of_the_configuration():
    upper, lower = Budget(wait=1.0), Budget(wait=7.0)
    assert upper.tightened_by(lower).wait == 7.0
    assert upper.tightened_by(Budget()).wait == 1.0


def test_there_is_no_default_limit():
    assert Config().limits(Profile(model="m"), "default") == ()


@pytest.mark.fault(92)
def test_zero_is_a_limit():
    (limit,) = Config(budget={"daily_token_limit": 0}).limits(Profile(model="m"), "default")
    assert limit.amount == 0


NO_LIMIT_AT_ALL = st.one_of(
    st.integers(max_value=-1),
    st.floats(max_value=-0.01),
    st.just(float("nan")),
    st.just(float("inf")),
    st.booleans(),
    st.sampled_from(["", "many", "-1", "NaN", "1e999"]),
    st.lists(st.integers(), max_size=2),
    st.binary(max_size=3),
)


@pytest.mark.fault(93)
@given(st.sampled_from([*TOKEN_LIMITS, *COST_LIMITS]), NO_LIMIT_AT_ALL, st.booleans())
def test_a_limit_that_is_none_is_refused(name, value, over_all):
    table = {"all_scopes": {name: value}} if over_all else {name: value}
    with pytest.raises(ConfigurationError) as caught:
        as_config({"budget": table})
    assert name in str(caught.value)
    assert "config argument" in str(caught.value)


@pytest.mark.fault(93)
@given(st.sampled_from(TOKEN_LIMITS), st.floats(0, 1e6))
def test_tokens_are_whole_numbers(name, value):
    with pytest.raises(ConfigurationError, match=name):
        as_config({"budget": {name: value}})


@pytest.mark.fault(93)
@pytest.mark.parametrize(
    "path",
    [
        *("concurrency", "confirm_above", "budget.wait", "budget.query_share", "retry.attempts"),
        *("retry.quota", "retry.quota_ratio", "retry.deadline", "retry.request_timeout"),
    ],
)
@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), -1, "x", [], {}])
def test_a_number_that_is_none_is_refused(path, value):
    outer, _, inner = path.rpartition(".")
    settings = {outer: {inner: value}} if outer else {inner: value}
    with pytest.raises(ConfigurationError) as caught:
        as_config(settings)
    assert path in str(caught.value)


@pytest.mark.fault(129)
@given(st.data())
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_valid_name(data):
    places = {"": Config, "budget": Budget, "budget.all_scopes": Limits, "retry": RetrySettings}
    path = data.draw(st.sampled_from(sorted(places)))
    name = data.draw(st.sampled_from(sorted(places[path].model_fields)))
    at = data.draw(st.integers(1, len(name) - 1))
    wrong = name[:at] + data.draw(st.sampled_from("xq")) + name[at:]
    settings: dict = {wrong: 1}
    for part in reversed(path.split(".") if path else []):
        settings = {part: settings}
    with pytest.raises(ConfigurationError) as caught:
        as_config(settings)
    dotted = f"{path}.{wrong}" if path else wrong
    assert f"{dotted}: unknown key" in str(caught.value)
    assert f"did you mean {name!r}?" in str(caught.value)


@pytest.mark.fault(129)
def test_an_unknown_key_of_a_profile_is_named():
    with pytest.raises(ConfigurationError, match=r"profiles\.fast\.overlng.*'overlong'"):
        as_config({"profiles": {"fast": {"model": "m", "overlng": "reject"}}})


@pytest.mark.fault(129)
@pytest.mark.parametrize("settings", [5, [], object(), {"profiles": {"p": "m"}}, {"budget": 7}])
def test_settings_of_another_kind_are_refused(settings):
    with pytest.raises(ConfigurationError):
        as_config(settings)


@pytest.mark.fault(131)
def test_a_mistake_is_explained_without_the_value(canary):
    with pytest.raises(ConfigurationError) as caught:
        as_config({"options": canary, "retry": canary})
    assert canary not in str(caught.value)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def test_models_are_frozen():
    with pytest.raises(ValidationError):
        Config().model = "other"


@pytest.mark.fault(138)
@pytest.mark.parametrize("scope", ["", "*", "a b", "x" * 129, "'; DROP TABLE window; --", "a\n"])
def test_a_scope_has_a_plain_name(scope):
    with pytest.raises(ConfigurationError):
        as_config({"scope": scope})
    with pytest.raises(ConfigurationError):
        EmbeddingClient("hashing:64", scope=scope)


@pytest.mark.parametrize(("table", "other"), [("retry", "first_wait"), ("batch", "grace")])
def test_a_profile_goes_over_the_configuration_one_setting_at_a_time(table, other):
    profiles = {"mine": {"model": "m", table: {"attempts": 9}}}
    config = Config.model_validate({table: {"attempts": 7, other: 1.0}, "profiles": profiles})
    for name, attempts in (("m", 7), ("mine", 9)):
        found = getattr(choose(name, config=config, scope=None, options={}).settings, table)
        changed = {"attempts": attempts, other: 1.0}
        assert found == getattr(DEFAULTS, table).model_copy(update=changed)


def test_what_is_not_set_is_as_by_default():
    assert choose(None, config={}, scope=None, options={}).settings == DEFAULTS


@pytest.mark.parametrize(
    ("rule", "lower", "upper"),
    [
        ("overlong", "reject", "truncate"),
        ("on_empty", "keep", "reject"),
        ("on_zero", "reject", "warn"),
        ("concurrency", 3, 2),
        ("requests_per_minute", 7, 8),
        ("tokens_per_minute", 7, 8),
        ("cache", True, False),
        ("cache_dir", Path("/a"), Path("/b")),
        ("cache_cap", 5, 0),
        ("strategy", "auto", "batch"),
        ("deadline", 5.0, 6.0),
    ],
)
def test_a_rule_of_the_profile_goes_over_that_of_the_configuration(rule, lower, upper):
    profiles = {"mine": {"model": "m", rule: upper}, "p": {"model": "m"}}
    config = Config.model_validate({rule: lower, "profiles": profiles})
    for name, expected in (("mine", upper), ("p", lower)):
        settings = choose(name, config=config, scope=None, options={}).settings
        assert getattr(settings, rule) == expected


def test_every_rule_has_its_setting():
    named = {field.name for field in fields(Settings)}
    assert named == {*Rules.model_fields, "retry", "batch"}


@pytest.mark.fault(131)
def test_nothing_shows_options(canary):
    config = Config(
        options={"openai": {"api_key": canary}},
        profiles={"p": Profile(model="m", options={"api_key": canary})},
    )
    assert canary not in repr(config)
    assert canary not in str(config)
