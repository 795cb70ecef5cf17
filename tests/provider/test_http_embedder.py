"""What every provider over HTTP gets from the core, with a service that is none of theirs."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    InputRejected,
    InvalidResponse,
    PermissionDenied,
    ProviderUnavailable,
)
from embedcore.provider import access
from embedcore.provider.hookspecs import FromEnvironment
from embedcore.provider.http_embedder import HttpEmbedder, HttpOptions, Key
from embedcore.provider.options import options_fingerprint
from embedcore.provider.replies import Form
from embedcore.provider.types import EmbedRequest, ModelInfo
from embedcore.testing.service import FakeService, Refused, ServiceContract

KEY = "acme-CANARY-0123456789"
LENGTHS = (0.25, 3.0)


class FakeAcme(FakeService):
    path = "/v1/embed"

    def reply(self, question: dict[str, Any]) -> object:
        self.take(question, {"model": str, "texts": list, "kind": ["q", "d"], "size?": int})
        texts, width = self.strings(question["texts"]), question.get("size", 16)
        rows = np.array(self.vectors(texts, width, salt=question["kind"]))
        rows *= np.resize(LENGTHS, (len(rows), 1))
        return {"rows": rows.tolist(), "echo": texts, "usage": {"total_tokens": self.bill(texts)}}


class AcmeOptions(HttpOptions):
    keys_at: ClassVar[str] = "https://acme.example/keys"

    api_key: Annotated[Key, FromEnvironment("ACME_KEY")] = None
    base_url: str = "https://acme.example/v1"


class AcmeEmbedder(HttpEmbedder):
    path = "/embed"
    form = Form(rows=("rows",), vector=None, numbered=False)
    words: ClassVar = {"query": "q", "document": "d"}
    normalises = True
    other = ModelInfo(
        provider="acme", input_types=("query", "document"), default_input_type="document"
    )
    models: ClassVar = {
        name: ModelInfo(
            provider="acme",
            model=name,
            dimensions=16,
            input_types=("query", "document"),
            default_input_type="document",
        )
        for name in ("one", "some", "any")
    }
    widths: ClassVar = {"some": (4, 8), "any": range(1, 17)}

    def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
        asked: dict[str, object] = {"model": self.info.model, "texts": texts, "kind": input_type}
        return asked if self.width is None else {**asked, "size": self.width}


@pytest.fixture
def server() -> Iterator[FakeAcme]:
    with FakeAcme(key=KEY) as fake:
        yield fake


def embedder(server: FakeAcme, model: str = "one", **options: Any) -> AcmeEmbedder:
    given_options = {"api_key": KEY, "base_url": f"{server.url}/v1", **options}
    return AcmeEmbedder(model, AcmeOptions(**given_options))


class TestContract(ServiceContract):
    secret = KEY
    examples = 5

    def embedder_of(self, server: FakeAcme) -> AcmeEmbedder:
        return embedder(server)


def test_vectors_get_length_one_and_keep_their_direction(server: FakeAcme) -> None:
    texts = [f"text {number}" for number in range(5)]
    vectors = embedder(server).embed(EmbedRequest(texts=texts)).vectors
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-6)
    assert np.allclose(vectors, server.vectors(texts, 16, salt="d"), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "width", "sent"),
    [
        ("one", None, None),
        ("one", 16, None),
        ("some", 8, 8),
        ("any", 5, 5),
        ("unknown", None, None),
        ("unknown", 12, 12),
    ],
)
def test_a_width_is_sent_where_it_is_not_the_models_own(
    server: FakeAcme, model: str, width: int | None, sent: int | None
) -> None:
    one = embedder(server, model, dimensions=width)
    reply = one.embed(EmbedRequest(texts=["a"]))
    assert server.seen[-1].get("size") == sent
    assert reply.vectors.shape == (1, width or 16)
    assert one.info.dimensions == (width or (None if model == "unknown" else 16))


@pytest.mark.parametrize(
    ("model", "width", "said"),
    [("one", 8, "no others"), ("some", 5, "4, 8"), ("any", 17, "1 to 16")],
)
def test_a_width_that_a_model_cannot_give_is_refused_at_once(
    model: str, width: int, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"dimensions = {width}.*{said}"):
        AcmeEmbedder(model, AcmeOptions(dimensions=width))


def test_options_stand_in_place_of_facts() -> None:
    info = AcmeEmbedder(
        "one", AcmeOptions(price="0.5", max_texts_per_request=7, max_input_tokens=9)
    ).info
    assert info.price is not None
    assert (str(info.price.immediate), info.price.source) == ("0.5", "options")
    assert (info.max_texts_per_request, info.max_input_tokens) == (7, 9)
    assert info.endpoint == "https://acme.example/v1"


def test_what_decides_the_vectors_is_in_the_fingerprint_and_no_more() -> None:
    info = AcmeEmbedder.models["one"]
    usual = options_fingerprint("acme", "one", AcmeOptions(), info)
    neutral = AcmeOptions(api_key=KEY, timeout=9, price=1, max_concurrency=2, verify=False)
    assert options_fingerprint("acme", "one", neutral, info) == usual
    for other in ({"dimensions": 8}, {"base_url": "https://other.example"}):
        assert options_fingerprint("acme", "one", AcmeOptions(**other), info) != usual


def test_a_long_text_that_is_repeated_is_no_endless_answer(server: FakeAcme) -> None:
    text = "\x01\u2028\N{PILE OF POO}" * 300_000
    assert embedder(server).embed(EmbedRequest(texts=[text])).vectors.shape == (1, 16)


def test_nothing_is_sent_for_no_text_no_time_and_no_unicode(server: FakeAcme) -> None:
    one = embedder(server)
    assert one.embed(EmbedRequest()).vectors.shape == (0, 16)
    for timeout in (0.0, -1.0):
        with pytest.raises(ProviderUnavailable) as caught:
            one.embed(EmbedRequest(texts=["a"], timeout=timeout))
        assert caught.value.billed == "no"
    with pytest.raises(InputRejected) as refused:
        one.embed(EmbedRequest(texts=["a", "\ud800"]))
    assert refused.value.position == 1
    assert server.meter.requests == 0


@pytest.mark.parametrize(("status", "kind"), [(401, AuthenticationFailed), (403, PermissionDenied)])
@pytest.mark.parametrize("renewable", [True, False])
def test_a_key_that_is_refused_may_be_asked_for_again(
    server: FakeAcme, status: int, kind: type[PermissionDenied], renewable: bool
) -> None:
    server.next_refusals = [Refused(status, {"error": {"message": "no access", "code": "no"}})]
    with pytest.raises(kind) as caught:
        embedder(server, api_key=(lambda: KEY) if renewable else KEY).embed(
            EmbedRequest(texts=["a"])
        )
    assert caught.value.again == ("key" if renewable else None)


def test_a_redirect_is_named_and_not_followed(server: FakeAcme) -> None:
    place = "https://elsewhere.example/v2/embed?token=hunter2"
    server.next_refusals = [Refused(307, {}, {"location": place})]
    with pytest.raises(ConfigurationError) as caught:
        embedder(server).embed(EmbedRequest(texts=["a"]))
    assert "https://elsewhere.example/v2/embed" in str(caught.value)
    assert "without /embed" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_page_in_place_of_a_reply_is_no_advice_for_another_service(server: FakeAcme) -> None:
    server.reply = lambda question: [1]  # type: ignore[method-assign]
    with pytest.raises(InvalidResponse, match="is base_url right") as caught:
        embedder(server).embed(EmbedRequest(texts=["a"]))
    assert "/v1" not in str(caught.value).partition("cannot be trusted")[2]


def test_who_can_read_what_is_sent_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "_warned", set())
    for url in ("http://10.0.0.8/v1", "http://10.0.0.8/v1/", "http://localhost/v1"):
        AcmeEmbedder("one", AcmeOptions(base_url=url))
    for verify in (True, False):
        AcmeEmbedder("one", AcmeOptions(verify=verify))
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "http://10.0.0.8/v1",
        "https://acme.example/v1",
    ]


def test_before_the_first_request_nothing_is_sent(server: FakeAcme) -> None:
    one = embedder(server)
    one.startup.load()
    one.startup.connect()
    assert server.meter.requests == 0
    with pytest.raises(ConfigurationError, match="certificates"):
        embedder(server, base_url="https://localhost:1", verify="/no/such/file").startup.load()


def test_options_pickle_without_the_key() -> None:
    copy = pickle.loads(pickle.dumps(AcmeOptions(api_key=KEY, timeout=5)))
    assert (copy.api_key, copy.timeout) == (None, 5)


@pytest.mark.parametrize("url", ["", "  ", "HTTPS://ACME.example:443/v1/"])
def test_spellings_of_one_address_are_one(url: str) -> None:
    assert AcmeOptions(base_url=url).base_url == "https://acme.example/v1"


@given(st.text().filter(lambda text: not text.strip().lower().startswith("http")))
def test_what_is_no_address_is_refused(text: str) -> None:
    if text.strip():
        with pytest.raises(ConfigurationError, match="base_url"):
            AcmeOptions(base_url=text)


def test_the_service_of_the_tests_is_strict(server: FakeAcme) -> None:
    class Odd(AcmeEmbedder):
        more: ClassVar[dict[str, object]] = {}

        def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
            return {**super().question(texts, input_type), **self.more}

    odd = Odd("one", AcmeOptions(api_key=KEY, base_url=f"{server.url}/v1"))
    for more in ({"kind": "x"}, {"size": True}, {"size": "8"}, {"texts": [1]}, {"also": 1}):
        Odd.more = more
        with pytest.raises(Exception, match="HTTP 400"):
            odd.embed(EmbedRequest(texts=["a"]))
    Odd.more = {}
    with pytest.raises(AuthenticationFailed):
        embedder(server, api_key="another").embed(EmbedRequest(texts=["a"]))
    with pytest.raises(Exception, match="HTTP 404"):
        embedder(server, base_url=server.url).embed(EmbedRequest(texts=["a"]))
    assert server.meter.billed_requests == 0
