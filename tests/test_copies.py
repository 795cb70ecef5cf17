"""A copy in the process is the same client: its key, its embedder, its observers. A pickle keeps
what can be kept and says what it does not.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.options import OpenAIOptions
from pydantic import BaseModel, ConfigDict, SecretStr

from embedcore import Config, EmbeddingClient
from embedcore.events import Event, RequestFinished
from embedcore.provider.base import BaseEmbedder, WrapperEmbedder
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price
from embedcore.testing import FakeOpenAI, vectors_of

MODEL = "text-embedding-3-small"


@dataclass
class Program:
    """What a program may keep a client in."""

    client: EmbeddingClient
    name: str = "one"


class Settings(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    client: EmbeddingClient


class Mine(EmbeddingClient):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.labels = ["a"]


def _deep_in_a_model(client: EmbeddingClient) -> EmbeddingClient:
    return Settings(client=client).model_copy(deep=True).client


def _deep_in_containers(client: EmbeddingClient) -> EmbeddingClient:
    first, again = copy.deepcopy({"all": [client, (client,)]})["all"]
    assert first is again[0]
    return first


COPIES: dict[str, Callable[[EmbeddingClient], EmbeddingClient]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda client: copy.deepcopy(copy.deepcopy(client)),
    "copy of a model": lambda client: Settings(client=client).model_copy().client,
    "deep copy of a model": _deep_in_a_model,
    "dataclasses.replace": lambda client: replace(Program(client), name="two").client,
    "deep copy of a dataclass": lambda client: copy.deepcopy(Program(client)).client,
    "in containers": _deep_in_containers,
    "bound method": lambda client: copy.deepcopy(client.embed_text).__self__,
}


class Key:
    """A callable that cannot be copied itself."""

    def __init__(self, key: str) -> None:
        self.key = (one for one in [key] * 9)

    def __call__(self) -> str:
        return next(self.key)


KEYS: dict[str, Callable[[str], dict[str, Any]]] = {
    "api_key": lambda key: {"api_key": key},
    "callable": lambda key: {"api_key": Key(key)},
    "config": lambda key: {"config": Config(options={"openai": {"api_key": SecretStr(key)}})},
    "profile": lambda key: {
        "config": {"model": "p", "profiles": {"p": {"model": MODEL, "options": {"api_key": key}}}}
    },
    "embedder": lambda key: {
        "embedder": OpenAIEmbedder(
            MODEL, OpenAIOptions(api_key=SecretStr(key), base_url=_base_url[0])
        )
    },
    "wrapped embedder": lambda key: {
        "embedder": WrapperEmbedder(
            OpenAIEmbedder(MODEL, OpenAIOptions(api_key=lambda: key, base_url=_base_url[0]))
        )
    },
}
_base_url: list[str] = []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    with FakeOpenAI(api_key=None) as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-B-another-account-0123456789")
        _base_url[:] = [fake.base_url]
        yield fake


@pytest.mark.case("H1")
# What is copied differs by the key; the other ways to copy come to one of the first two.
@pytest.mark.parametrize(
    ("copied", "keyed"),
    [
        pytest.param(copied, keyed, id=f"{way}-{kind}")
        for way, copied in COPIES.items()
        for kind, keyed in KEYS.items()
        if way in ("copy", "deepcopy") or kind == "callable"
    ],
)
def test_a_copy_keeps_the_account_and_its_observers(
    server: FakeOpenAI,
    copied: Callable[[EmbeddingClient], EmbeddingClient],
    keyed: Callable[[str], dict[str, Any]],
) -> None:
    key, events = "sk-A-this-account-0123456789", []
    client = EmbeddingClient(**keyed(key), observers=[events.append])
    with client, copied(client) as twin:
        assert twin.fingerprint == client.fingerprint
        assert twin.embed(["a"]).vectors.tolist() == vectors_of(["a"], 1536).tolist()
        # Each has connections of its own.
        twin.close()
        assert client.embed(["b"]).ok.all()
    sent = [request.headers["authorization"] for request in server.requests]
    assert sent == [f"Bearer {key}"] * 2
    assert [type(event) for event in events].count(RequestFinished) == 2


@pytest.mark.case("H1")
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_keeps_secret_headers(
    server: FakeOpenAI, copied: Callable[[EmbeddingClient], EmbeddingClient]
) -> None:
    client = EmbeddingClient(options={"headers": {"X-Account": "A-0123456789"}})
    with client, copied(client) as twin:
        twin.embed(["a"])
    assert server.requests[-1].headers["x-account"] == "A-0123456789"


@pytest.mark.case("H1")
def test_what_a_subclass_adds_is_copied_as_deep_as_asked(server: FakeOpenAI) -> None:
    client = Mine("text-embedding-3-small", "sk-A-this-account-0123456789")
    assert copy.copy(client).labels is client.labels
    twin = copy.deepcopy(client)
    assert type(twin) is Mine
    assert twin.labels == client.labels
    assert twin.labels is not client.labels


@pytest.mark.case("H1")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_an_embedder_that_is_a_client_of_its_own_is_copied_with_its_key(
    server: FakeOpenAI, copied: Callable[[Any], Any]
) -> None:
    key = "sk-A-this-account-0123456789"
    plain = OpenAIEmbedder(MODEL, OpenAIOptions(api_key=SecretStr(key), base_url=server.base_url))
    twin = copied(plain)
    plain.close()
    twin.embed(EmbedRequest(texts=["a"]))
    twin.close()
    assert server.requests[-1].headers["authorization"] == f"Bearer {key}"


# Pickles

_told: list[Event] = []


def tell(event: Event) -> None:
    _told.append(event)


class Collector:
    """Holds what the test likes, the client itself for instance."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.client: EmbeddingClient | None = None

    def __call__(self, event: Event) -> None:
        self.events.append(event)


class Cheap(BaseEmbedder):
    info = ModelInfo(provider="house", model="own", dimensions=4, price=Price(), local=True)

    def embed(self, request: EmbedRequest) -> EmbedReply:
        return EmbedReply(vectors=vectors_of(request.texts, 4))


@pytest.mark.case("G2")
def test_a_pickle_keeps_the_observers_that_can_be_pickled(caplog: pytest.LogCaptureFixture) -> None:
    _told.clear()
    collector, never = Collector(), lambda event: None
    observers = [tell, never, collector, partial(never)]
    client = EmbeddingClient(embedder=Cheap(), observers=observers)
    pair = pickle.loads(pickle.dumps((client, collector)))
    twin, same = pair
    twin.embed_text("a")
    assert RequestFinished in map(type, _told)
    # Pickled together they stay together.
    assert RequestFinished in map(type, same.events)
    assert collector.events == []
    (said,) = [record.getMessage() for record in caplog.records]
    assert "test_a_pickle_keeps_the_observers_that_can_be_pickled.<locals>.<lambda>" in said
    assert "functools.partial" in said
    assert "Collector" not in said
    # Said once for each client, and of the copy nothing is missing any more.
    pickle.dumps(client)
    pickle.loads(pickle.dumps(twin)).close()
    assert len(caplog.records) == 1


@pytest.mark.case("G2")
def test_an_observer_may_hold_the_client_that_it_observes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    collector = Collector()
    client = EmbeddingClient(embedder=Cheap(), observers=[collector])
    collector.client = client
    for twin in (
        pickle.loads(pickle.dumps(client)),
        pickle.loads(pickle.dumps(collector)).client,
        copy.deepcopy(client),
    ):
        before = len(collector.events)
        twin.embed_text("a")
        (observer,) = twin._observers
        assert len(observer.events) > (before if observer is collector else 0)
    assert not caplog.records


@pytest.mark.case("G2")
def test_nothing_is_said_where_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    pickle.loads(pickle.dumps(EmbeddingClient(embedder=Cheap())))
    pickle.loads(pickle.dumps(EmbeddingClient(embedder=Cheap(), observers=[tell])))
    assert not caplog.records
