"""Which options a provider gets, from where, what becomes of keys, and what names a vector set."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, ConfigDict, Field, SecretBytes, SecretStr

from embedcore.errors import ConfigurationError, PluginError
from embedcore.provider.hookspecs import FromEnvironment, KeepsVectors, Provider
from embedcore.provider.options import (
    HiddenValues,
    OptionLayer,
    embedder_fingerprint,
    environment_options,
    former_fingerprints,
    is_secret,
    options_fingerprint,
    resolve_options,
    without_secrets,
)
from embedcore.provider.types import ModelInfo


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    key: Annotated[SecretStr | Callable[[], str] | None, FromEnvironment("ACME_KEY")] = None
    raw: SecretBytes | None = None
    base_url: Annotated[str, FromEnvironment("ACME_URL")] = "https://acme.example"
    headers: Annotated[Mapping[str, SecretStr], KeepsVectors()] = Field(default_factory=dict)
    labels: dict[str, str] = {}
    dimensions: int | None = None
    mode: Literal["fast", "good"] = "good"
    timeout: Annotated[float, KeepsVectors()] = 60.0


def _create(model: str, options: Options) -> Any:
    raise AssertionError("not built here")


ACME = Provider(name="acme", options=Options, create=_create)
INFO = ModelInfo(provider="acme", model="m", dimensions=8)


def layer(origin: str, values: dict[str, Any]) -> OptionLayer:
    return OptionLayer(origin=origin, values=values, plain_keys=origin == "Python")


def resolve(**values: dict[str, Any]):
    """``file``, ``profile`` and ``Python``, each over the one before."""
    return resolve_options(
        ACME, [layer(origin, values.get(origin, {})) for origin in ("file", "profile", "Python")]
    )


texts = st.text("ab:/.", min_size=1, max_size=5)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("file", "profile", "Python"), texts)),
    st.one_of(st.none(), texts),
)
def test_the_environment_is_over_files_and_below_python(said, variable):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACME_URL", raising=False)
        if variable is not None:
            patch.setenv("ACME_URL", variable)
        found = resolve(**{origin: {"base_url": url} for origin, url in said.items()})
    order = [
        ("Python", said.get("Python")),
        ("environment ACME_URL", variable),
        ("profile", said.get("profile")),
        ("file", said.get("file")),
    ]
    expected = next(((origin, url) for origin, url in order if url is not None), None)
    if expected is None:
        assert "base_url" not in found.values
    else:
        assert (found.origins["base_url"], found.values["base_url"]) == expected


def test_a_reference_is_the_environment_already(monkeypatch):
    monkeypatch.setenv("ACME_KEY", "of the variable")
    monkeypatch.setenv("OTHER", "of the other")
    found = resolve(profile={"key": "$OTHER"}, file={"key": "$ACME_KEY"})
    assert found.values["key"] == "of the other"
    assert found.origins["key"] == "profile"


@pytest.mark.case("D1")
@pytest.mark.parametrize("origin", ["file", "profile", "Python"])
@pytest.mark.parametrize(
    "values",
    [
        {"base_url": "$CANARY"},
        {"labels": {"a": "$CANARY"}},
        {"mode": "$CANARY"},
        {"no_such_option": "$CANARY"},
        {"dimensions": "$CANARY"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_reference_is_read_for_keys_and_headers_and_for_nothing_else(
    monkeypatch, canary, origin, values
):
    monkeypatch.setenv("CANARY", canary)
    with pytest.raises(ConfigurationError, match=r"\$CANARY: a variable is read for options") as it:
        resolve(**{origin: values})
    assert canary not in str(it.value)
    for name in ("key", "raw"):
        assert resolve(**{origin: {name: "$CANARY"}}).values[name] == canary
    assert resolve(**{origin: {"headers": {"X": "$CANARY"}}}).values["headers"] == {"X": canary}


class OpenHeaders(BaseModel):
    """A provider whose headers are no secrets by their type."""

    headers: dict[str, str] = {}


def test_headers_take_references_whatever_their_type(monkeypatch):
    monkeypatch.setenv("TENANT", "blue")
    provider = Provider(name="acme", options=OpenHeaders, create=_create)
    found = resolve_options(provider, [layer("file", {"headers": {"X-Tenant": "$TENANT"}})])
    assert found.values["headers"] == {"X-Tenant": "blue"}


@pytest.mark.parametrize("origin", ["file", "profile", "Python"])
@pytest.mark.parametrize("text", ["Bearer {}", "{} ", "key={}", "{}{}", "a{}b"])
@pytest.mark.parametrize("reference", ["$CANARY", "${CANARY}", "$no_such_variable"])
def test_a_reference_that_is_a_part_of_a_value_is_refused_and_not_sent(
    monkeypatch, canary, origin, text, reference
):
    monkeypatch.setenv("CANARY", canary)
    value = text.format(reference, reference)
    for name, option in (
        ("key", value),
        ("raw", value),
        ("headers.Authorization", {"X-Other": "$CANARY", "Authorization": value}),
    ):
        with pytest.raises(ConfigurationError) as it:
            resolve(**{origin: {name.partition(".")[0]: option}})
        message = str(it.value)
        assert f"{name} of provider 'acme' ({origin})" in message
        assert "it is the whole value" in message
        assert canary not in message


@given(st.text("$5 -%é{}", max_size=8))
def test_a_dollar_that_names_no_variable_is_a_text(text):
    provider = Provider(name="acme", options=OpenHeaders, create=_create)
    layers = [layer("file", {"headers": {"X": text}}), layer("Python", {})]
    assert resolve_options(provider, layers).values["headers"] == {"X": text}
    assert resolve(Python={"key": text}).values["key"] == text
    assert resolve(Python={"key": f"$${text}"}).values["key"] == f"$${text}"


def test_what_is_meant_as_it_is_written_is_said_to_be_a_secret():
    secret = SecretStr("pa$word")
    found = resolve(Python={"key": secret, "headers": {"X": secret}})
    assert found.values["key"] is secret
    assert found.values["headers"] == {"X": secret}


def found_layer(values: dict[str, Any]) -> OptionLayer:
    return OptionLayer(origin="found.toml", values=values, trusted=False)


LOCAL = "http://localhost:8000"


@pytest.mark.case("D1")
@pytest.mark.parametrize(
    ("layers", "variable", "withheld"),
    [
        ([found_layer({"base_url": LOCAL})], None, True),
        ([found_layer({"dimensions": 8})], None, False),
        ([found_layer({"base_url": LOCAL})], "https://named.example", False),
        ([found_layer({"base_url": LOCAL}), layer("Python", {"base_url": LOCAL})], None, False),
        ([layer("file", {"base_url": LOCAL})], None, False),
        ([layer("file", {"base_url": LOCAL}), found_layer({"base_url": LOCAL})], None, True),
        ([], None, False),
    ],
)
def test_a_key_of_the_environment_goes_where_the_user_or_the_provider_says(
    monkeypatch, canary, layers, variable, withheld
):
    monkeypatch.setenv("ACME_KEY", canary)
    if variable is not None:
        monkeypatch.setenv("ACME_URL", variable)
    found = resolve_options(ACME, layers)
    assert ("key" not in found.values) is withheld
    assert found.withheld == ({"key": "ACME_KEY"} if withheld else {})


def test_a_key_that_python_gives_goes_where_it_is_sent(monkeypatch, canary):
    """The user named it for this client: it is no key of the environment."""
    layers = [found_layer({"base_url": LOCAL}), layer("Python", {"key": canary})]
    assert resolve_options(ACME, layers).values["key"] == canary


@pytest.mark.fault(130)
@pytest.mark.parametrize("value", [None, ""])
def test_a_reference_that_leads_nowhere_is_told_and_not_used(monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("OTHER_KEY", value)
    found = resolve(file={"key": "$OTHER_KEY", "headers": {"X": "$OTHER_KEY"}})
    assert found.missing == {"key": "OTHER_KEY", "headers": "OTHER_KEY"}


def test_references_hold_inside_a_table(monkeypatch):
    monkeypatch.setenv("GATEWAY_KEY", "g-123")
    found = resolve(file={"headers": {"api-key": "$GATEWAY_KEY"}})
    assert found.values["headers"] == {"api-key": "g-123"}
    options = Options.model_validate(found.values)
    assert options.headers["api-key"].get_secret_value() == "g-123"


@pytest.mark.fault(131)
@pytest.mark.parametrize("origin", ["file", "profile"])
@pytest.mark.parametrize("shape", ["key", "raw", "headers"])
def test_a_key_in_plain_in_a_file_is_refused_and_not_shown(canary, origin, shape):
    values = {shape: {"Authorization": canary} if shape == "headers" else canary}
    with pytest.raises(ConfigurationError) as caught:
        resolve(**{origin: values})
    message = str(caught.value)
    assert canary not in message
    assert shape in message
    assert origin in message
    assert "$" in message
    trace = caught.value.__traceback__
    while trace is not None:
        if "embedcore/provider" in trace.tb_frame.f_code.co_filename:
            assert canary not in repr(trace.tb_frame.f_locals)
        trace = trace.tb_next


@pytest.mark.fault(131)
def test_a_key_in_plain_in_python_is_taken(canary):
    found = resolve(Python={"key": canary})
    assert found.values["key"] == canary
    assert canary not in repr(found)


def test_what_holds_a_key_is_told_by_its_type():
    assert {name for name in Options.model_fields if is_secret(Options, name)} == {
        "key",
        "raw",
        "headers",
    }
    assert not is_secret(Options, "no such option")
    assert dict(environment_options(Options)) == {"key": "ACME_KEY", "base_url": "ACME_URL"}


@pytest.mark.fault(131)
def test_what_may_be_pickled(canary):
    given = {
        "key": canary,
        "raw": canary.encode(),
        "headers": {"Authorization": canary, "X-Team": "$TEAM"},
        "labels": {"a": SecretStr(canary)},
        "base_url": lambda: canary,
        "dimensions": 8,
        "unknown": SecretStr(canary),
    }
    kept = without_secrets(Options, given)
    assert kept == {"dimensions": 8}
    references = {"key": "$ACME", "headers": {"A": "$B"}, "labels": {"a": "b"}}
    assert without_secrets(Options, references) == references
    assert pickle.loads(pickle.dumps(without_secrets(Options, references))) == references
    assert without_secrets(Options, {"key": "$not a name"}) == {}


@pytest.mark.fault(131)
def test_hidden_values_are_hidden(canary):
    assert repr(HiddenValues(key=canary)) == "<values of key>"
    assert str(HiddenValues()) == "<values of no options>"


def fingerprint(model: str = "m", info: ModelInfo = INFO, provider: str = "acme", **values: Any):
    return options_fingerprint(provider, model, Options(**values), info)


@pytest.mark.fault(115)
@pytest.mark.parametrize(
    "values",
    [
        {"base_url": "https://other.example"},
        {"dimensions": 8},
        {"mode": "fast"},
        {"labels": {"a": "b"}},
    ],
)
def test_whatever_may_change_vectors_changes_the_fingerprint(values):
    assert fingerprint(**values) != fingerprint()


@pytest.mark.fault(115)
def test_so_does_the_model_the_provider_and_the_variant():
    names = [
        fingerprint(),
        fingerprint("m2"),
        fingerprint(provider="acme2"),
        fingerprint(info=replace(INFO, variant="v2")),
    ]
    assert len(set(names)) == len(names)


@pytest.mark.fault(115)
@pytest.mark.parametrize(
    "values",
    [
        *({"timeout": 1.0}, {"key": SecretStr("k")}, {"key": lambda: "k"}, {"raw": b"k"}),
        {"headers": {"X": "k"}},
    ],
)
def test_what_cannot_change_vectors_keeps_it(values):
    assert fingerprint(**values) == fingerprint()


class Before(BaseModel):
    """Options of a version in which what is believed was part of the name."""

    dimensions: int | None = None
    names: tuple[str, ...] = ()


class After(Before):
    names: Annotated[tuple[str, ...], KeepsVectors(counted_as=())] = ()


@pytest.mark.case("E5")
@pytest.mark.parametrize("names", [(), ("a",), ("a", "b")])
@pytest.mark.parametrize("dimensions", [None, 8])
def test_an_option_that_counts_no_more_is_hashed_as_its_old_default(names, dimensions):
    before = options_fingerprint("acme", "m", Before(dimensions=dimensions), INFO)
    after = After(names=names, dimensions=dimensions)
    assert options_fingerprint("acme", "m", after, INFO) == before
    old = options_fingerprint("acme", "m", Before(names=names, dimensions=dimensions), INFO)
    assert former_fingerprints("acme", "m", after, INFO) == ((old,) if names else ())


def test_what_never_counted_has_no_former_name():
    assert former_fingerprints("acme", "m", Options(timeout=3.0), INFO) == ()


def test_a_fingerprint_is_the_same_in_every_process_and_release():
    assert fingerprint() == "42a0f0a2d390bd7a84aa56b27ce3ea68"


class ByHand:
    """As little of an embedder as a fingerprint needs."""

    def __init__(self, info):
        self.info = info


class WithAPrefix(ByHand):
    """Says the same of itself, and has other vectors."""


def test_an_embedder_built_by_hand_is_named_by_its_info_and_its_class():
    names = {
        embedder_fingerprint(ByHand(info))
        for info in (
            INFO,
            replace(INFO, model="n"),
            replace(INFO, dimensions=9),
            replace(INFO, variant="v"),
            replace(INFO, endpoint="https://a.example"),
        )
    }
    names.add(embedder_fingerprint(WithAPrefix(INFO)))
    assert len(names) == 6
    other = ByHand(replace(INFO, max_concurrency=99))
    assert embedder_fingerprint(other) == embedder_fingerprint(ByHand(INFO))


@pytest.mark.fault(131)
@pytest.mark.parametrize("name", ["key", "api_key", "access_token", "client_secret", "password"])
def test_an_option_named_like_a_key_must_be_a_secret(name):
    from pydantic import create_model

    from embedcore.provider.options import require_secret_keys

    with pytest.raises(PluginError, match=f"option '{name}' is named like a key"):
        require_secret_keys(create_model("Options", **{name: (str | None, None)}), "acme 1.0")
    require_secret_keys(create_model("Options", **{name: (SecretStr | None, None)}), "acme 1.0")


@pytest.mark.parametrize("name", ["tokens_per_minute", "keyboard", "max_tokens", "base_url"])
def test_other_names_may_be_plain(name):
    from pydantic import create_model

    from embedcore.provider.options import require_secret_keys

    require_secret_keys(create_model("Options", **{name: (str, "x")}), "acme 1.0")
