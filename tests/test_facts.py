"""What settings and the table of prices say of a model, laid over what its provider says."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from decimal import Decimal
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel, SecretBytes, SecretStr

from embedcore import ConfigurationError, EmbeddingClient, prices
from embedcore.assembly import create_embedder
from embedcore.choice import choose
from embedcore.errors import AuthenticationFailed
from embedcore.prices import newer, table_of
from embedcore.provider import registry
from embedcore.provider.called_keys import CalledBytes, CalledStr, called
from embedcore.provider.hookspecs import KeepsVectors, Provider, hookimpl
from embedcore.provider.types import EmbedReply, ModelInfo, Price
from embedcore.testing import FakeEmbedder, vectors_of

KEYS: list[str] = []
REFUSED: set[str] = set()


class Plain(BaseModel, extra="forbid", frozen=True):
    """Of a provider whose author thought of nothing."""

    api_key: Annotated[SecretStr, KeepsVectors()] = SecretStr("")
    headers: Annotated[Mapping[str, SecretStr], KeepsVectors()] = {}
    base_url: str = "https://acme.example"


class Knowing(Plain):
    """Of one with options for a model's facts."""

    price: Annotated[Decimal | None, KeepsVectors()] = None
    dimensions: int | None = None
    max_input_tokens: int | None = None


def create(model: str, options: Plain) -> FakeEmbedder:
    def answer(request: Any, number: int) -> EmbedReply:
        key = options.api_key.get_secret_value()
        KEYS.append(key)
        if key in REFUSED:
            raise AuthenticationFailed(f"acme refuses {key}", status=401, billed="no")
        return EmbedReply(vectors=vectors_of(request.texts, 8), tokens=len(request.texts))

    own = getattr(options, "price", None)
    known = Price(immediate=Decimal("0.5"), as_of=date(2026, 6, 1), source="acme's page")
    info = ModelInfo(
        provider="knowing" if isinstance(options, Knowing) else "plain",
        model=model,
        dimensions=getattr(options, "dimensions", None) or (8 if model == "known" else None),
        max_input_tokens=getattr(options, "max_input_tokens", None),
        price=known if model == "known" else None,
    )
    if own is not None:
        info = ModelInfo(provider="knowing", model=model, price=Price(immediate=own, source="o"))
    return FakeEmbedder(info=info, script=answer)


@pytest.fixture(autouse=True)
def providers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two providers, "plain" and "knowing", as if their distributions were installed."""
    KEYS.clear()
    REFUSED.clear()
    found = []
    for name, options in (("plain", Plain), ("knowing", Knowing)):
        module = ModuleType(f"facts_of_{name}")
        default = "known" if name == "plain" else None
        provider = Provider(name=name, options=options, create=create, default_model=default)
        module.embedcore_provider = hookimpl(  # type: ignore[attr-defined]
            specname="embedcore_provider"
        )(lambda provider=provider: provider)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        found.append(EntryPoint(name=name, value=module.__name__, group="embedcore"))
    real = registry._entry_points

    def entries(group: str = registry.GROUP) -> Iterator[EntryPoint]:
        yield from real(group)
        yield from found if group == registry.GROUP else ()

    monkeypatch.setattr(registry, "_entry_points", entries)
    registry._load.cache_clear()
    registry._manager.cache_clear()
    yield
    registry._load.cache_clear()
    registry._manager.cache_clear()


def made(model: str, config: dict[str, Any], **options: Any) -> tuple[ModelInfo, str]:
    """The facts in force, and the fingerprint."""
    choice = choose(model, config=config, scope=None, options=options)
    embedder, names, *_ = create_embedder(choice)
    return embedder.info, names[0]


def facts(name: str, **said: Any) -> dict[str, Any]:
    return {"models": {name: said}}


def test_facts_are_laid_over_a_provider_without_options_for_them() -> None:
    info, _ = made(
        "plain:new",
        facts("plain:new", price="0.25", batch_price="0.1", max_input_tokens=77, dimensions=8),
    )
    assert (info.max_input_tokens, info.dimensions) == (77, 8)
    assert info.price is not None
    assert (info.price.immediate, info.price.batch) == (Decimal("0.25"), Decimal("0.1"))
    assert info.price.source == "the configuration"
    other, _ = made("plain:other", facts("plain:new", price="0.25"))
    assert other.price is None


def test_a_fact_that_is_an_option_is_given_to_the_provider() -> None:
    config = facts("knowing:m", price="0.25", dimensions=8, max_input_tokens=9)
    choice = choose("knowing:m", config=config, scope=None, options={})
    resolved = choice.resolve(registry.load("knowing"))
    assert dict(resolved.values) == {
        "price": Decimal("0.25"),
        "dimensions": 8,
        "max_input_tokens": 9,
    }


def test_a_fact_goes_over_options_of_all_models_and_under_those_of_a_call() -> None:
    config = {**facts("knowing:m", price="0.25"), "options": {"knowing": {"price": "9"}}}
    assert made("knowing:m", config)[0].price.immediate == Decimal("0.25")  # type: ignore[union-attr]
    assert made("knowing:other", config)[0].price.immediate == 9  # type: ignore[union-attr]
    assert made("knowing:m", config, price="0.75")[0].price.immediate == Decimal("0.75")  # type: ignore[union-attr]
    profile = {"model": "knowing:m", "options": {"price": "0.5"}}
    config["profiles"] = {"p": profile}
    assert made("p", config)[0].price.immediate == Decimal("0.5")  # type: ignore[union-attr]


def test_a_batch_price_goes_beside_a_price_that_is_known() -> None:
    info, _ = made("plain:known", facts("plain:known", batch_price="0.1"))
    assert info.price is not None
    assert (info.price.immediate, info.price.batch) == (Decimal("0.5"), Decimal("0.1"))
    with pytest.raises(ConfigurationError, match=r'models\."plain:new".*set both'):
        made("plain:new", facts("plain:new", batch_price="0.1"))
    info, _ = made("knowing:m", facts("knowing:m", price="0.25", batch_price="0.1"))
    assert info.price is not None
    assert (info.price.immediate, info.price.batch) == (Decimal("0.25"), Decimal("0.1"))


def test_a_bare_name_is_one_of_the_default_provider() -> None:
    config = {"provider": "plain", **facts("new", price="0.25")}
    assert made("new", config)[0].price is not None
    assert made("knowing:new", config)[0].price is None


@pytest.mark.parametrize("provider", ["plain", "knowing"])
def test_the_fingerprint_knows_what_decides_vectors(provider: str) -> None:
    name = f"{provider}:m"
    _, bare = made(name, {})
    assert made(name, facts(name, price=1, batch_price="0.5"))[1] == bare
    assert made(name, facts(name, max_input_tokens=9))[1] != bare
    # Asked for where there is an option for it; else only expected.
    assert (made(name, facts(name, dimensions=8))[1] != bare) == (provider == "knowing")


def test_the_fingerprint_is_that_of_an_option_of_the_same_name() -> None:
    said = made("knowing:m", {"options": {"knowing": {"max_input_tokens": 9}}})
    assert made("knowing:m", facts("knowing:m", max_input_tokens=9)) == said


def test_a_tokenizer_of_the_settings_counts_exactly(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    config = facts("plain:m", tokenizer=str(tmp_path), max_input_tokens=2, price=0)
    with EmbeddingClient("plain:m", config=config, api_key="k-12345678") as client:
        assert client.plan(["a b", "a"]).tokens == 3
        found = client.embed(["a b a", "a"])
        assert found.tokens_cut == {0: 1}
    _, bare = made("plain:m", {})
    assert made("plain:m", facts("plain:m", tokenizer=str(tmp_path)))[1] != bare


def test_a_price_that_is_missing_names_the_table_that_mends_it() -> None:
    config = {"budget": {"daily_cost_limit": 1}}
    with (
        EmbeddingClient("plain:new", config=config, api_key="k-12345678") as client,
        pytest.raises(ConfigurationError, match=r'\[models\."plain:new"\]\n  price = '),
    ):
        client.embed_text("a")
    mended = {**config, **facts("plain:new", price="0.25")}
    with EmbeddingClient("plain:new", config=mended, api_key="k-12345678") as client:
        assert len(client.embed_text("a")) == 8


def test_a_found_file_says_a_price_while_there_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("embedcore.toml").write_text('[models."plain:new"]\nprice = 0\n')
    with EmbeddingClient("plain:new") as client:
        assert client.info.price == Price(source=client._choice.config.file or "")
    monkeypatch.setenv("EMBEDCORE_DAILY_COST_LIMIT", "1")
    with pytest.raises(ConfigurationError, match=r'models\."plain:new"\.price \(line 2\)'):
        EmbeddingClient("plain:new")


def test_a_provider_alone_is_its_default_model() -> None:
    assert EmbeddingClient("plain").model == "known"
    assert EmbeddingClient(config={"model": "plain"}).model == "known"
    with pytest.raises(ConfigurationError, match="'knowing' is a provider without a default"):
        EmbeddingClient("knowing")


# The table of prices

OWN = """
as_of = 2026-11-29
source = "https://acme.example/prices"

[models."plain:known"]
price = 0.3
batch_price = 0.15

[models."plain:new"]
price = 0.7
as_of = 2026-12-01
"""


def listed(text: str) -> None:
    prices.keep(table_of(text.encode(), origin="prices.toml", read_on=date(2026, 12, 1)))


def test_the_table_goes_over_the_providers_own_where_it_is_newer() -> None:
    listed(OWN)
    price = made("plain:known", {})[0].price
    assert price == Price(
        immediate=Decimal("0.3"),
        batch=Decimal("0.15"),
        as_of=date(2026, 11, 29),
        source="https://acme.example/prices",
    )
    new = made("plain:new", {})[0].price
    assert new is not None
    assert (new.immediate, new.as_of) == (Decimal("0.7"), date(2026, 12, 1))
    listed(OWN.replace("2026-11-29", "2026-05-31"))
    assert made("plain:known", {})[0].price.immediate == Decimal("0.5")  # type: ignore[union-attr]


def test_what_the_settings_say_goes_over_the_table() -> None:
    listed(OWN + '[models."knowing:m"]\nprice = 5\n')
    assert made("plain:new", facts("plain:new", price=2))[0].price.immediate == 2  # type: ignore[union-attr]
    assert made("knowing:m", {})[0].price.immediate == 5  # type: ignore[union-attr]
    assert made("knowing:m", {}, price=0)[0].price.immediate == 0  # type: ignore[union-attr]


def test_another_server_has_prices_of_its_own() -> None:
    listed(OWN)
    assert made("plain:new", {}, base_url="http://localhost:1")[0].price is None


def test_prices_change_no_fingerprint() -> None:
    before = made("plain:known", {})[1]
    listed(OWN)
    assert made("plain:known", {})[1] == before


DATES = st.dates(min_value=date(2020, 1, 1), max_value=date(2030, 1, 1)) | st.none()
AMOUNTS = st.decimals(min_value=0, max_value=1000, places=4)
PRICES = st.builds(Price, immediate=AMOUNTS, batch=st.none() | AMOUNTS, as_of=DATES)


@given(own=st.none() | PRICES, table=st.none() | PRICES)
def test_the_newer_price_is_taken(own: Price | None, table: Price | None) -> None:
    chosen = newer(own, table)
    assert chosen in (own, table)
    if own is not None and table is not None:
        older = own.as_of and table.as_of and table.as_of < own.as_of
        assert chosen is (own if older else table)
    else:
        assert chosen == (own or table)


@given(st.dictionaries(st.text(min_size=1), PRICES, max_size=5))
def test_what_is_kept_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, Price]
) -> None:
    folder = tmp_path_factory.mktemp("prices")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prices, "place", lambda: folder / "prices.json")
        prices.keep(table)
        read = prices.kept()
    for name, price in table.items():
        assert (read[name].immediate, read[name].batch) == (price.immediate, price.batch)
        assert read[name].as_of == (price.as_of or date.min)
    assert set(read) == set(table)


def test_litellms_table_is_understood() -> None:
    table = table_of(
        json.dumps(
            {
                "sample_spec": {"litellm_provider": "one of …", "mode": "one of: chat, embedding"},
                "text-embedding-3-small": {
                    "litellm_provider": "openai",
                    "mode": "embedding",
                    "input_cost_per_token": 2e-08,
                    "input_cost_per_token_batches": 1e-08,
                },
                "voyage/voyage-4": {
                    "litellm_provider": "voyage",
                    "mode": "embedding",
                    "input_cost_per_token": 6e-08,
                },
                "gpt": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 1},
                "none": {"litellm_provider": "x", "mode": "embedding", "input_cost_per_token": 0},
                "odd": {"litellm_provider": "x", "mode": "embedding", "input_cost_per_token": True},
            }
        ).encode(),
        origin="https://example.org/prices.json",
        read_on=date(2026, 12, 1),
    )
    source = {"as_of": date(2026, 12, 1), "source": "https://example.org/prices.json"}
    assert table == {
        "openai:text-embedding-3-small": Price(
            immediate=Decimal("0.02"), batch=Decimal("0.01"), **source
        ),
        "voyage:voyage-4": Price(immediate=Decimal("0.06"), **source),
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1, 2]",
        b"\xff\xfe",
        b"<html>no</html>",
        b'{"a": {"b": 1}}',
        b'{"models": {"a:b": {}}}',
        b'{"models": {"a:b": {"price": -1}}}',
        b'{"models": {"a:b": {"price": NaN}}}',
        b'{"models": {"a:b": {"price": 1e9}}}',
        b'[models."a:b"]\nprise = 1',
        b"[" * 100_000,
    ],
)
def test_what_is_no_table_is_refused_and_changes_nothing(content: bytes) -> None:
    listed(OWN)
    before = prices.kept()
    with pytest.raises(ConfigurationError, match="the-file"):
        table_of(content, origin="the-file", read_on=date(2026, 12, 1))
    assert prices.kept() == before


def test_a_damaged_table_is_an_error_and_not_another_price() -> None:
    listed(OWN)
    path = prices.place()
    assert path is not None
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ConfigurationError, match="--prices FILE, or delete it"):
        made("plain:known", {})


# Keys that are functions


def keys(*given: Any) -> Callable[[], Any]:
    left = list(given)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_a_key_that_is_a_function_is_asked_for_each_request() -> None:
    with EmbeddingClient("plain", api_key=keys("first-12345", "second-12345")) as client:
        client.embed_text("a")
        client.embed_text("b")
    assert KEYS == ["first-12345", "second-12345"]


def test_a_key_that_is_refused_is_asked_for_once_more() -> None:
    REFUSED.add("old-1234567")
    with EmbeddingClient("plain", api_key=keys("old-1234567", "new-1234567")) as client:
        client.embed_text("a")
    assert KEYS == ["old-1234567", "new-1234567"]
    KEYS.clear()
    with (
        EmbeddingClient("plain", api_key=keys("old-1234567")) as client,
        pytest.raises(AuthenticationFailed) as refused,
    ):
        client.embed_text("not cached")
    assert KEYS == ["old-1234567"] * 2
    assert "old-1234567" not in str(refused.value), "no key is in a message"


def test_no_key_is_asked_for_where_nothing_is_sent() -> None:
    def never() -> str:
        raise AssertionError("a key was asked for")

    options = {"headers": {"X-Key": never}}
    with EmbeddingClient("plain", api_key=never, options=options) as client:
        client.open()
        assert client.plan(["a"]).tokens
        assert client.embed([]).vectors.shape[0] == 0
        repr(client)


def test_a_function_that_fails_is_an_error_without_its_words() -> None:
    def failing() -> str:
        raise RuntimeError("the vault says: sesame-1234567")

    with (
        EmbeddingClient("plain", api_key=failing) as client,
        pytest.raises(
            AuthenticationFailed, match="given as api_key failed with RuntimeError"
        ) as it,
    ):
        client.embed_text("a")
    assert "sesame" not in str(it.value)
    with (
        EmbeddingClient("plain", api_key=lambda: 7) as client,
        pytest.raises(ConfigurationError, match="api_key gave a int"),
    ):
        client.embed_text("a")


def test_functions_become_secrets_wherever_a_key_may_be() -> None:
    class Odd(BaseModel):
        raw: SecretBytes = SecretBytes(b"")
        headers: Mapping[str, SecretStr] = {}
        plain: object = None

    found = called(Odd, {"raw": lambda: "r-1", "headers": {"a": lambda: "h-1"}, "plain": keys})
    options = Odd(**found)
    assert isinstance(options.raw, CalledBytes)
    assert options.raw.get_secret_value() == b"r-1"
    assert options.headers["a"].get_secret_value() == "h-1"
    assert options.plain is keys, "no key: nobody calls it"
    assert "r-1" not in repr(options) + str(options.model_dump(mode="json", exclude={"plain"}))


def test_a_called_key_shows_nothing_and_goes_nowhere() -> None:
    asked: list[int] = []
    key = CalledStr(lambda: asked.append(1) or "sesame-1", "api_key")
    assert key != CalledStr(lambda: "sesame-1", "api_key")
    assert {key: 1}[key] == 1
    assert bool(key)
    assert "sesame" not in f"{key} {key!r}"
    assert asked == []
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
