"""How servers are asked: the form of the vectors, keys, further fields, certificates (cases B)."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedcore_openai.embedder import OpenAIEmbedder
from embedcore_openai.encodings import Encodings
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from hypothesis import given, strategies as st
from pydantic import ValidationError

from embedcore import EmbeddingClient, TokenTracker
from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    ProviderUnavailable,
    RequestRejected,
)
from embedcore.provider.types import EmbedRequest
from embedcore.testing import vector_of

EMBEDDINGS = "POST /v1/embeddings"
WIDTH = 4

Make = Callable[..., OpenAIEmbedder]


def answer(asked: Any, *, as_list: bool = False) -> dict[str, Any]:
    """An honest reply in the form that was asked for."""
    body = asked.json()
    vectors = [np.array(vector_of(text, WIDTH), "<f4") for text in body["input"]]
    packed = body.get("encoding_format") == "base64" and not as_list
    return {
        "object": "list",
        "model": body["model"],
        "usage": {"prompt_tokens": sum(len(text) for text in body["input"])},
        "data": [
            {
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode()
                if packed
                else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ],
    }


@pytest.fixture(autouse=True)
def _state_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EMBEDCORE_HOME", str(tmp_path / "home"))
    for name in ("XDG_CONFIG_HOME", "XDG_CONFIG_DIRS"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def make(api: Any) -> Iterator[Make]:
    """Embedders that talk to ``api``."""
    with contextlib.ExitStack() as made:

        def make(model: str = "m", **options: object) -> OpenAIEmbedder:
            given = {"base_url": api.base_url, **options}
            embedder = create(model, OpenAIOptions(**given))  # type: ignore[arg-type]
            made.callback(embedder.close)
            return embedder

        yield make


@pytest.fixture
def connect(api: Any) -> Iterator[Callable[..., EmbeddingClient]]:
    """Clients that talk to ``api``, with a ledger."""
    with contextlib.ExitStack() as made:

        def connect(model: str = "m", limit: int = 1_000_000, **options: object) -> EmbeddingClient:
            config = {
                "model": f"openai:{model}",
                "budget": {"daily_token_limit": limit},
                "retry": {"attempts": 1, "quota": 0},
                "options": {"openai": {"base_url": api.base_url, **options}},
            }
            client = EmbeddingClient(config=config)
            made.callback(client.close)
            return client

        yield connect


def spent() -> int:
    """Tokens in the ledger."""
    return TokenTracker().get_usage_today()["tokens_used"]


def forms(api: Any) -> list[str]:
    return [asked.json().get("encoding_format", "omit") for asked in api.asked]


# B3: what a server takes for encoding_format


def refusing(*refused: str, status: int = 400, body: Any = None) -> Callable[[Any], Any]:
    """A server that takes no request in these forms."""

    def reply(asked: Any) -> Any:
        form = asked.json().get("encoding_format", "omit")
        if form in refused:
            message = f"encoding_format {form} is not supported"
            return status, body or {"error": {"message": message, "type": "invalid_request_error"}}
        return answer(asked)

    return reply


MUTE = {"error": {"message": "Bad Request", "type": "invalid_request_error"}}
EXTRA = {
    "detail": [
        {
            "type": "extra_forbidden",
            "loc": ["body", "encoding_format"],
            "msg": "Extra inputs are not permitted",
            "input": "base64",
        }
    ]
}
LITELLM = {
    "error": {
        "message": "litellm.UnsupportedParamsError: ollama does not support parameters: "
        "['encoding_format'], for model=m. To drop these, set `litellm.drop_params=True`",
        "type": "None",
        "param": "None",
        "code": "400",
    }
}


@pytest.mark.case("B3")
@pytest.mark.parametrize(
    ("refused", "status", "body", "learned"),
    [
        (["base64"], 400, None, "float"),
        (["base64", "float"], 422, EXTRA, "omit"),
        (["base64", "float"], 400, LITELLM, "omit"),
        (["base64", "float"], 500, LITELLM, "omit"),
        (["base64"], 400, {"message": "value is not one of: float"}, "float"),
        (["base64", "float"], 422, b"Failed to deserialize the JSON body", "omit"),
    ],
)
def test_what_is_refused_is_asked_for_otherwise_and_remembered(
    api: Any,
    connect: Callable[..., EmbeddingClient],
    refused: list[str],
    status: int,
    body: Any,
    learned: str,
) -> None:
    api.routes[EMBEDDINGS] = refusing(*refused, status=status, body=body)
    client = connect()
    result = client.embed(["alpha"])
    assert np.array_equal(result.vectors, [vector_of("alpha", WIDTH)])
    asked = [*refused, learned]
    assert forms(api) == asked
    # A refused request is free, and each is on record; no retry was allowed for them.
    assert spent() == len("alpha")
    assert result.usage.requests == len(asked)
    assert client.embed(["beta", "gamma"]).ok.all()
    assert forms(api) == [*asked, learned]
    # For another client of this process as well.
    assert connect().embed(["delta"]).ok.all()
    assert forms(api) == [*asked, learned, learned]


@pytest.mark.case("B3")
def test_of_several_texts_it_is_learned_where_the_refusal_names_the_field(
    api: Any, connect: Callable[..., EmbeddingClient]
) -> None:
    api.routes[EMBEDDINGS] = refusing("base64")
    texts = [f"text {number}" for number in range(20)]
    assert connect().embed(texts).ok.all()
    assert forms(api) == ["base64", "float"]


@pytest.mark.case("B3")
def test_a_refusal_that_only_speaks_of_the_field_teaches_nothing(api: Any, make: Make) -> None:
    """The texts are refused in every form: it was not the form."""
    api.routes[EMBEDDINGS] = lambda asked: (
        (400, {"message": "base64 is no text to embed"})
        if "bad" in asked.json()["input"]
        else answer(asked)
    )
    embedder = make()
    ways = []
    for _ in range(3):
        with pytest.raises(RequestRejected) as caught:
            embedder.embed(EmbedRequest(texts=["bad"]))
        ways.append(caught.value.again and caught.value.again.partition(",")[0])
    assert ways == ["encoding_format = float", "encoding_format = none", None]
    assert embedder.embed(EmbedRequest(texts=["good"])).vectors.shape == (1, WIDTH)
    assert forms(api) == ["base64", "float", "omit", "base64"]
    # Proven: another refusal is not about it.
    with pytest.raises(RequestRejected) as caught:
        embedder.embed(EmbedRequest(texts=["bad"]))
    assert caught.value.again is None


@pytest.mark.case("A1")
@pytest.mark.case("B3")
@pytest.mark.parametrize("body", [None, MUTE])
@pytest.mark.parametrize("bad", [0, 7, 13, 19])
def test_a_bad_text_beside_it_costs_no_good_one(
    api: Any, connect: Callable[..., EmbeddingClient], bad: int, body: Any
) -> None:
    """The server refuses base64, and one of the texts, whatever the form."""
    texts = [f"text {number}" for number in range(20)]

    def reply(asked: Any) -> Any:
        if asked.json().get("encoding_format") == "base64":
            return 400, body or {"message": "encoding_format base64 is not supported"}
        if texts[bad] in asked.json()["input"]:
            return 400, {"message": "no"}
        return answer(asked)

    api.routes[EMBEDDINGS] = reply
    result = connect().embed(texts, on_error="keep")
    assert result.ok.tolist() == [number != bad for number in range(20)]


@pytest.mark.case("B3")
def test_a_refusal_of_several_texts_that_names_nothing_is_left_to_the_search(
    api: Any, make: Make
) -> None:
    api.routes[EMBEDDINGS] = (400, MUTE)
    with pytest.raises(RequestRejected) as caught:
        make().embed(EmbedRequest(texts=["a", "b"]))
    assert caught.value.again is None


@pytest.mark.case("B3")
def test_guesses_are_few(api: Any, make: Make) -> None:
    api.routes[EMBEDDINGS] = (400, MUTE)
    embedder = make()
    for number in range(40):
        for _ in range(4):
            with pytest.raises(RequestRejected) as caught:
                embedder.embed(EmbedRequest(texts=[f"text {number}"]))
            if caught.value.again is None:
                break
    assert len(api.asked) == 40 + 2 + 1


@pytest.mark.case("B3")
@pytest.mark.parametrize(("encoding", "asked"), [("omit", "omit"), ("float", "float")])
def test_the_form_can_be_set(api: Any, make: Make, encoding: str, asked: str) -> None:
    api.routes[EMBEDDINGS] = answer
    make(encoding=encoding).embed(EmbedRequest(texts=["a"]))
    assert forms(api) == [asked]


@pytest.mark.case("B3")
def test_each_model_of_an_endpoint_learns_for_itself(api: Any, make: Make) -> None:
    def reply(asked: Any) -> Any:
        return refusing("base64")(asked) if asked.json()["model"] == "old" else answer(asked)

    api.routes[EMBEDDINGS] = reply
    make("new").embed(EmbedRequest(texts=["a"]))
    old = make("old")
    with pytest.raises(RequestRejected, match="not supported") as caught:
        old.embed(EmbedRequest(texts=["a"]))
    assert caught.value.again
    assert old.embed(EmbedRequest(texts=["a"])).vectors.shape == (1, WIDTH)


@given(
    st.sampled_from(["base64", "float", "omit"]),
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=30),
    st.sets(st.sampled_from(["base64", "float", None]), max_size=2),
)
def test_a_form_is_believed_only_for_what_succeeds(
    first: str, requests: list[tuple[str, bool, bool]], taken: set[str | None]
) -> None:
    """Whatever is refused, and however often: in the end the form is one that the server takes."""
    known = Encodings(first)
    for text, bad, named in requests:
        for _ in range(4):
            form = known.form_for([text])
            if not bad and form in taken:
                known.succeeded(form)
                break
            if known.after_refusal(form, [text], b"base64" if named else b"") is None:
                break
    form = known.form_for(["new"])
    assert form in taken or not known._proven


# B8: one key

CREDENTIALS = ["Authorization", "AUTHORIZATION", "authorization", "api-key", "Api-Key", "x-api-key"]
CREDENTIALS += ["X-API-KEY", "apikey", "x-goog-api-key", "Ocp-Apim-Subscription-Key", "token"]
CREDENTIALS += ["X-Auth-Token", "x-access-token", "X-Acme-Api-Key", "x-functions-key"]
CREDENTIALS += ["PRIVATE-TOKEN", "X-RapidAPI-Key", "X-OpenAI-Key", "X-Amz-Security-Token"]
BESIDE = ["X-Team", "Helicone-Auth", "cf-aig-authorization", "X-Key-Count", "X-Portkey-Api-Key"]
BESIDE += ["Idempotency-Key", "X-Cache-Key", "Modal-Key", "CF-Access-Client-Secret"]


@pytest.mark.case("B8")
@pytest.mark.parametrize("name", CREDENTIALS)
@pytest.mark.parametrize("given", ["environment", "option", "callable"])
def test_a_configured_header_that_carries_a_key_is_the_only_one(
    api: Any,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    canary: str,
    name: str,
    given: str,
) -> None:
    api.routes[EMBEDDINGS] = answer
    options: dict[str, Any] = {"headers": {name: "theirs"}}
    if given == "environment":
        monkeypatch.setenv("OPENAI_API_KEY", canary)
    else:
        options["api_key"] = canary if given == "option" else lambda: pytest.fail("was asked")
    make(**options).embed(EmbedRequest(texts=["a"]))
    sent = api.asked[-1].headers
    assert sent[name.lower()] == "theirs"
    assert ("authorization" in sent) == (name.lower() == "authorization")
    assert canary not in repr(sent)


@pytest.mark.case("B8")
@pytest.mark.parametrize("name", BESIDE)
def test_other_headers_go_beside_the_key(api: Any, make: Make, canary: str, name: str) -> None:
    api.routes[EMBEDDINGS] = answer
    make(api_key=canary, headers={name: "x"}).embed(EmbedRequest(texts=["a"]))
    sent = api.asked[-1].headers
    assert (sent["authorization"], sent[name.lower()]) == (f"Bearer {canary}", "x")


@pytest.mark.case("B8")
def test_of_a_wrong_header_the_message_names_the_headers(api: Any, make: Make) -> None:
    api.routes[EMBEDDINGS] = (401, {"message": "no"})
    with pytest.raises(AuthenticationFailed, match="check the headers") as caught:
        make(headers={"api-key": "theirs"}).embed(EmbedRequest(texts=["a"]))
    assert caught.value.again is None


@pytest.mark.case("B8")
@pytest.mark.parametrize("given", ["the same", "another", "a callable"])
def test_of_a_wrong_key_the_message_names_its_origin(
    api: Any, make: Make, canary: str, monkeypatch: Any, given: str
) -> None:
    api.routes[EMBEDDINGS] = (401, {"message": "no"})
    monkeypatch.setenv("OPENAI_API_KEY", canary if given != "another" else "sk-of-the-environment")
    key = (lambda: canary) if given == "a callable" else canary
    with pytest.raises(AuthenticationFailed) as caught:
        make(api_key=key).embed(EmbedRequest(texts=["a"]))
    hint = "check OPENAI_API_KEY" if given == "the same" else "check the option api_key"
    assert hint in str(caught.value)


# B9: query, body, certificates


@pytest.mark.case("B9")
def test_a_classic_azure_deployment(api: Any, make: Make, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of another account")
    path = "/openai/deployments/small/embeddings"
    api.routes[f"POST {path}"] = answer
    embedder = make(
        base_url=api.base_url.removesuffix("/v1") + path.removesuffix("/embeddings"),
        query={"api-version": "2024-10-21"},
        headers={"api-key": "theirs"},
        base_model="text-embedding-3-small",
        dimensions=WIDTH,
    )
    assert embedder.embed(EmbedRequest(texts=["a"])).tokens == 1
    asked = api.asked[-1]
    assert (asked.path, asked.query) == (path, {"api-version": "2024-10-21"})
    assert asked.headers["api-key"] == "theirs"
    assert "authorization" not in asked.headers


@pytest.mark.case("B9")
def test_further_fields_are_sent_as_they_are(api: Any, make: Make) -> None:
    api.routes[EMBEDDINGS] = answer
    body = {"user": "u", "input_type": "passage", "truncate": "NONE", "provider": {"only": ["x"]}}
    make(body=body).embed(EmbedRequest(texts=["a"]))
    sent = api.asked[-1].json()
    assert {name: sent[name] for name in body} == body
    assert (sent["model"], sent["input"], sent["encoding_format"]) == ("m", ["a"], "base64")


@pytest.mark.case("B9")
def test_batches_have_the_same_fields_and_parameters(api: Any, batch_of: Any) -> None:
    from embedcore.provider.types import BatchItem

    api.routes["POST /v1/files"] = {"id": "file-1"}
    batch = batch_of(
        query={"api-version": "1"}, body={"input_type": "passage"}, batch_encoding="omit"
    )
    batch.upload([BatchItem(id="0", text="a")], key="k")
    assert api.asked[-1].query == {"api-version": "1"}
    line = next(one for one in api.asked[-1].body.splitlines() if one.startswith(b"{"))
    assert json.loads(line)["body"] == {
        "model": "text-embedding-3-small",
        "input": "a",
        "input_type": "passage",
    }


def fingerprint(**options: Any) -> str:
    client = EmbeddingClient(config={"model": "openai:m", "options": {"openai": options}})
    return client.fingerprint


@pytest.mark.case("B9")
def test_fields_count_for_the_fingerprint_unless_they_are_listed() -> None:
    plain = fingerprint()
    for same in (
        {"query": {"api-version": "1"}},
        {"body": {"user": "u"}},
        {"query": {}, "body": {}},
        {"body": {"trace": 1, "user": "u"}, "neutral_fields": ["trace"]},
        {"query": {"region": "eu"}, "neutral_fields": ["region"]},
        {"verify": False},
        {"encoding": "omit"},
        {"neutral_fields": ["x"]},
        {"refusals_billed": "unknown"},
    ):
        assert fingerprint(**same) == plain, same
    others = [
        fingerprint(body={"input_type": "query"}),
        fingerprint(body={"input_type": "passage"}),
        fingerprint(body={"input_type": "passage", "truncate": "END"}),
        fingerprint(query={"input_type": "passage"}),
        fingerprint(query={"region": "eu"}),
        fingerprint(trust_order=True),
    ]
    assert len({plain, *others}) == 1 + len(others)
    assert fingerprint(body={"input_type": "query", "user": "u"}) == others[0]


@pytest.mark.case("B9")
@pytest.mark.parametrize(
    "wrong",
    [
        {"query": {"key": "sk-CANARY"}},
        {"query": {"api_key": "sk-CANARY"}},
        {"query": {"subscription-key": "sk-CANARY"}},
        {"query": {"access_token": "sk-CANARY"}},
        {"query": {"sig": "sk-CANARY"}},
        {"body": {"apikey": "sk-CANARY"}},
        {"body": {"model": "sk-CANARY"}},
        {"body": {"input": "sk-CANARY"}},
        {"body": {"encoding_format": "sk-CANARY"}},
        {"body": {"dimensions": 3}},
        {"body": {"x": object()}},
        {"query": {"x": {"y": "z"}}},
    ],
)
def test_keys_and_fields_that_have_their_own_option_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        OpenAIOptions(**wrong)
    assert "sk-CANARY" not in str(caught.value)


@pytest.fixture
def secure(tmp_path: Path, api: Any) -> tuple[str, Path]:
    """``api`` behind TLS with a certificate that nobody signed but itself, and that certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    try:
        subprocess.run(
            [*command, "-keyout", key, "-out", certificate], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no openssl here to make a certificate with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = api._server
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return f"https://localhost:{server.server_port}/v1", certificate


@pytest.mark.case("B9")
def test_certificates_of_ones_own(
    secure: tuple[str, Path], api: Any, make: Make, tmp_path: Path
) -> None:
    url, certificate = secure
    api.routes[EMBEDDINGS] = answer
    request = EmbedRequest(texts=["a"])
    with pytest.raises(ProviderUnavailable, match="certificate") as caught:
        make(base_url=url).embed(request)
    assert caught.value.billed == "no"
    assert make(base_url=url, verify=str(certificate)).embed(request).tokens
    assert make(base_url=url, verify=False).embed(request).tokens
    with pytest.raises(ConfigurationError, match="PEM"):
        make(base_url=url, verify=str(tmp_path / "none.pem")).embed(request)
    (tmp_path / "empty.pem").write_text("nothing")
    with pytest.raises(ConfigurationError, match="PEM"):
        make(base_url=url, verify=str(tmp_path / "empty.pem")).embed(request)


@pytest.mark.case("B9")
def test_what_is_not_checked_is_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make(base_url="https://gateway.example/unchecked", verify=False)
    make(base_url="https://gateway.example/unchecked", verify=False)
    assert [record.message for record in caplog.records] == [
        "https://gateway.example/unchecked is not checked (verify = false): a program that answers "
        "in its place can read texts and key"
    ]


# B10: a key that expires


@pytest.mark.case("B10")
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"error": {"message": "token expired", "code": "token_expired"}}),
        (401, {}),
        (403, {"message": "The security token included in the request is expired"}),
        (403, {}),
        (400, {"error": {"message": "API key expired. Please renew the API key."}}),
    ],
)
def test_a_callable_key_is_asked_once_more_after_a_refusal(
    api: Any, connect: Callable[..., EmbeddingClient], status: int, body: Any
) -> None:
    def reply(asked: Any) -> Any:
        if asked.headers["authorization"] != "Bearer fresh":
            return status, body
        return answer(asked)

    api.routes[EMBEDDINGS] = reply
    keys = iter(["stale", "fresh", "fresh"])
    client = connect(api_key=lambda: next(keys))
    result = client.embed(["alpha"])
    assert result.ok.all()
    assert spent() == len("alpha")
    assert result.usage.requests == 2
    assert client.embed(["beta"]).ok.all()


@pytest.mark.case("B10")
def test_then_it_fails(api: Any, connect: Callable[..., EmbeddingClient]) -> None:
    api.routes[EMBEDDINGS] = (401, {"message": "no"})
    asked = []
    client = connect(api_key=lambda: f"key {len(asked)}".replace(" ", "-") + str(asked.append(1)))
    with pytest.raises(AuthenticationFailed):
        client.embed(["alpha"])
    assert len(api.asked) == 2
    assert spent() == 0


@pytest.mark.case("B10")
def test_a_key_that_does_not_change_is_not_asked_for_again(
    api: Any, connect: Callable[..., EmbeddingClient]
) -> None:
    api.routes[EMBEDDINGS] = (401, {"message": "no"})
    with pytest.raises(AuthenticationFailed):
        connect(api_key="sk-x").embed(["alpha"])
    assert len(api.asked) == 1


@pytest.mark.case("B10")
def test_many_requests_at_once_each_get_the_new_key(
    api: Any, connect: Callable[..., EmbeddingClient]
) -> None:
    stale = 8

    def key() -> str:
        nonlocal stale
        stale -= 1
        return "stale" if stale >= 0 else "fresh"

    api.routes[EMBEDDINGS] = lambda asked: (
        answer(asked) if asked.headers["authorization"] == "Bearer fresh" else (401, {})
    )
    client = connect(api_key=key, max_texts_per_request=1)
    try:
        assert client.embed([f"text {number}" for number in range(8)]).ok.all()
    except EmbeddingError:
        # A request whose second key was stale as well has been asked for twice.
        assert len(api.asked) >= 2
