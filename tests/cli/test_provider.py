"""``embedcore provider probe``: what a person sees, is asked, and pays."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.embeddings import FakeModel
from embedcore.testing.openai.quirks import SERVERS

MODEL = "acme/tiny"


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(
        api_key=None, models={MODEL: FakeModel(dimensions=24)}, quirks=SERVERS["tei"]
    ) as server:
        yield server


def test_it_prints_a_profile_to_paste(cli: Callable[..., Any], server: FakeOpenAI) -> None:
    ran = cli("provider", "probe", server.base_url)
    assert ran.code == 0
    profile = tomllib.loads(ran.out[ran.out.index("[profiles.probed]") :])["profiles"]["probed"]
    assert profile["model"] == f"openai:{MODEL}"
    assert profile["options"]["max_texts_per_request"] == 32
    assert profile["options"]["truncation"] == "silent"
    assert "tei" in ran.out
    assert "no price is known" in ran.out
    assert f"{len(server.requests)} requests" in ran.out
    assert "at most 21 requests" in ran.err


def test_json_has_the_same(cli: Callable[..., Any], server: FakeOpenAI) -> None:
    found = cli("provider", "probe", server.base_url, "--json").json
    assert found["preset"] == "tei"
    assert found["models"] == [MODEL]
    assert not found["priced"]
    assert tomllib.loads(found["toml"])["profiles"]["probed"]["options"] == found["options"]


@pytest.mark.parametrize("count", [2, 6, 9])
def test_of_several_models_the_others_are_named(cli: Callable[..., Any], count: int) -> None:
    names = [f"acme/m{number}" for number in range(count)]
    models = {name: FakeModel(dimensions=24) for name in names}
    with FakeOpenAI(api_key=None, models=models) as server:
        ran = cli("provider", "probe", server.base_url)
    (asked,) = [name for name in names if f"Asking {name};" in ran.err]
    others = [name for name in names if name != asked]
    assert f"It lists {count} models." in ran.err
    assert all((name in ran.err) == (name in others[:5]) for name in others)
    assert ("and 3 more" in ran.err) == (count == 9)


def test_nothing_goes_to_another_machine_unasked(cli: Callable[..., Any]) -> None:
    ran = cli("provider", "probe", "http://10.255.255.1/v1", "--model", "m")
    assert ran.code == 2
    assert "nothing was sent" in ran.err


def test_a_public_address_wants_the_name_of_a_key(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    ran = cli("provider", "probe", "https://api.acme.example/v1", "--yes")
    assert ran.code == 2
    assert "--key-env" in ran.err


def test_a_variable_that_is_not_set_is_named(cli: Callable[..., Any], server: FakeOpenAI) -> None:
    ran = cli("provider", "probe", server.base_url, "--key-env", "ACME_NO_SUCH_KEY")
    assert ran.code == 2
    assert "ACME_NO_SUCH_KEY" in ran.err
    assert not server.requests


def test_a_model_with_a_price_is_counted(cli: Callable[..., Any]) -> None:
    with FakeOpenAI(api_key=None) as server:
        ran = cli("provider", "probe", server.base_url, "-m", "text-embedding-3-small", "--json")
        assert ran.json["priced"]
        billed = server.meter.billed_tokens
    spent = cli("usage", "--json").json
    assert ran.json["tokens"] >= billed > 0
    assert str(ran.json["tokens"]) in str(spent)


def test_a_limit_refuses_it_before_anything_is_sent(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "100")
    with FakeOpenAI(api_key=None) as server:
        ran = cli("provider", "probe", server.base_url, "-m", "text-embedding-3-small")
        assert ran.code == 3
        assert not [one for one in server.requests if one.path.endswith("/embeddings")]
