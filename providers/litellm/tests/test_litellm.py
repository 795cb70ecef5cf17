"""The bridge to litellm, at a socket: one request for one call, and nothing else anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from embedcore_litellm.plugin import LiteLLMEmbedder, LiteLLMOptions
from pydantic import SecretStr

from embedcore import errors
from embedcore.provider.types import EmbedRequest
from embedcore.testing import EmbedderContract, FakeOpenAI, ProviderContract
from embedcore.testing.service import Refused, ServiceContract

KEY = "sk-CANARY0123456789abcdefXYZ"
sys.path += [
    str(Path(__file__).parents[2] / name / "tests")
    for name in ("cohere", "mistral")
    if str(Path(__file__).parents[2] / name / "tests") not in sys.path
]
# A type of its own warns when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:Items? .* on TypedDict class")
needs_litellm = pytest.mark.skipif(
    find_spec("litellm") is None, reason="litellm is not installed here: make test-litellm"
)
# Service → the fake of this repository, the model, and where litellm looks for it.
SERVICES = {
    "cohere": ("fake_cohere", "FakeCohere", "cohere/embed-v4.0", "/v2/embed"),
    "mistral": ("fake_mistral", "FakeMistral", "mistral/mistral-embed", "/v1"),
}


def fake(service: str) -> Any:
    module, name, _, _ = SERVICES[service]
    return getattr(__import__(module), name)(key=KEY)


def embedder(server: Any, service: str, **options: Any) -> LiteLLMEmbedder:
    _, _, model, path = SERVICES[service]
    given = {"base_url": server.url + path, "api_key": KEY, **options}
    return LiteLLMEmbedder(model, LiteLLMOptions(**given))


@needs_litellm
class TestCohere(ServiceContract):
    secret = KEY
    examples = 5
    option_values: ClassVar = {"dimensions": 256, "base_url": None, "litellm_prices": None}

    @pytest.fixture
    def server(self) -> Iterator[Any]:
        with fake("cohere") as service:
            yield service

    def embedder_of(self, server: Any) -> LiteLLMEmbedder:
        return embedder(server, "cohere")


@needs_litellm
class TestOpenAI(EmbedderContract):
    """A service that litellm reaches with a package of its vendor's, not over its own HTTP."""

    secret = KEY
    examples = 5
    option_values: ClassVar = {"dimensions": 256, "base_url": None, "litellm_prices": None}
    known_failures: ClassVar = {
        "test_secret_is_not_in_errors": "at DEBUG httpcore logs an answer's headers, and the fake "
        "repeats the key in one of them",
    }

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with FakeOpenAI(api_key=KEY) as self._fake:
            yield

    def make_embedder(self) -> LiteLLMEmbedder:
        options = LiteLLMOptions(base_url=self._fake.base_url, api_key=KEY)
        return LiteLLMEmbedder("openai/text-embedding-3-small", options)

    def make_broken_embedder(self) -> LiteLLMEmbedder:
        # The fake repeats the key in its reply, in several spellings.
        self._fake.faults.always("echo_key")
        return self.make_embedder()

    def make_slow_embedder(self) -> LiteLLMEmbedder:
        self._fake.faults.always("hang")
        return self.make_embedder()

    def server_bill(self) -> int:
        return self._fake.meter.billed_tokens

    def server_requests(self) -> int:
        return self._fake.meter.requests


@needs_litellm
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_vendors_package_sends_a_request_that_fails_once(status: int) -> None:
    with FakeOpenAI(api_key=KEY) as server:
        options = LiteLLMOptions(base_url=server.base_url, api_key=KEY)
        one = LiteLLMEmbedder("openai/text-embedding-3-small", options)
        server.faults.always("status", status=status)
        with pytest.raises(errors.TransientProviderError) as caught:
            one.embed(EmbedRequest(texts=["a"]))
        assert (server.meter.requests, caught.value.status) == (1, status)


class TestLiteLLMProvider(ProviderContract):
    provider = "litellm"
    model = "cohere/embed-v4.0"
    option_values: ClassVar = {"litellm_prices": None}


@needs_litellm
@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_request_that_fails_is_sent_once(service: str, status: int) -> None:
    with fake(service) as server:
        one = embedder(server, service)
        # By itself litellm sends it three times.
        server.next_refusals = [Refused(status, {"message": "no"})] * 5
        with pytest.raises(errors.TransientProviderError) as caught:
            one.embed(EmbedRequest(texts=["a"]))
        assert (len(server.seen), caught.value.status) == (1, status)


@needs_litellm
def test_cohere_is_kept_from_cutting_and_gets_its_words() -> None:
    with fake("cohere") as server:
        one = embedder(server, "cohere")
        texts = ["A  Ä\r\n", "e\u0301 "]
        for kind in (None, "query"):
            reply = one.embed(EmbedRequest(texts=texts, input_type=kind))
        assert reply.tokens == server.meter.billed_tokens / 2
        assert [asked["texts"] for asked in server.seen] == [texts, texts]
        assert [asked["input_type"] for asked in server.seen] == ["search_document", "search_query"]
        assert {asked["truncate"] for asked in server.seen} == {"NONE"}
        assert one.info.truncation == "error"


@needs_litellm
def test_an_option_that_a_service_does_not_have_is_an_error() -> None:
    with fake("mistral") as server:
        one = embedder(server, "mistral", dimensions=256)
        with pytest.raises(errors.ProviderError) as caught:
            one.embed(EmbedRequest(texts=["a"]))
        assert caught.value.billed == "no"
        assert server.meter.billed_requests == 0


@needs_litellm
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, errors.AuthenticationFailed),
        (404, errors.ModelNotFound),
        (402, errors.QuotaExhausted),
        (422, errors.RequestRejected),
    ],
)
def test_a_refusal_is_what_the_service_answered(status: int, kind: type[Exception]) -> None:
    with fake("cohere") as server:
        server.next_refusals = [Refused(status, {"message": f"no, {KEY}"})]
        with pytest.raises(kind) as caught:
            embedder(server, "cohere").embed(EmbedRequest(texts=["a text that nobody sees"]))
        assert KEY not in str(caught.value)
        assert caught.value.status == status


@needs_litellm
def test_a_callable_is_asked_for_the_key_of_each_request() -> None:
    asked = list[str]()

    def key() -> Any:
        asked.append(KEY)
        if len(asked) == 3:
            raise OSError(KEY)
        return SecretStr(KEY) if len(asked) == 2 else KEY

    with fake("mistral") as server:
        one = embedder(server, "mistral", api_key=key)
        for _ in range(2):
            assert len(one.embed(EmbedRequest(texts=["a"])).vectors) == 1
        with pytest.raises(errors.AuthenticationFailed) as caught:
            one.embed(EmbedRequest(texts=["a"]))
        assert KEY not in str(caught.value)
        assert len(server.seen) == 2


@needs_litellm
def test_what_cannot_be_reached_was_not_billed() -> None:
    options = LiteLLMOptions(base_url="http://127.0.0.1:9/v1", api_key=KEY)
    with pytest.raises(errors.ProviderUnavailable) as caught:
        LiteLLMEmbedder("openai/text-embedding-3-small", options).embed(EmbedRequest(texts=["a"]))
    assert caught.value.billed == "no"


@needs_litellm
def test_a_time_out_may_have_been_billed() -> None:
    with fake("mistral") as server:
        server.delay = 10.0
        with pytest.raises(errors.TimedOut) as caught:
            embedder(server, "mistral").embed(EmbedRequest(texts=["a"], timeout=0.5))
        assert caught.value.billed == "unknown"


@needs_litellm
def test_prices_of_its_table_are_per_million_tokens_and_plausible() -> None:
    from embedcore_litellm.library import price_of

    known = price_of("voyage/voyage-3.5")
    assert known is not None
    assert known.immediate == Decimal("0.06")
    # 100 dollars for a million tokens: a mistake in its unit.
    assert price_of("cohere/embed-multilingual-light-v3.0") is None
    assert price_of("nothing/of-it") is None
    options = LiteLLMOptions(litellm_prices=True)
    assert LiteLLMEmbedder("voyage/voyage-3.5", options).info.price == known
    assert LiteLLMEmbedder("voyage/voyage-3.5", LiteLLMOptions()).info.price is None


_QUIET = """
import json, os, socket, sys
asked = []
really = socket.getaddrinfo
def noted(host, *rest, **named):
    asked.append(str(host))
    return really(host, *rest, **named)
socket.getaddrinfo = noted
before = dict(os.environ)
from embedcore.provider.types import EmbedRequest
from embedcore_litellm.plugin import LiteLLMEmbedder, LiteLLMOptions
assert "litellm" not in sys.modules
one = LiteLLMEmbedder("mistral/mistral-embed", LiteLLMOptions(base_url=sys.argv[1], api_key="KEY"))
assert "litellm" not in sys.modules
for _ in range(2):
    one.embed(EmbedRequest(texts=["a", "b"]))
import litellm
assert not (litellm.success_callback or litellm.failure_callback or litellm.callbacks)
assert dict(os.environ) == before
json.dump(asked, sys.stderr)
"""


@needs_litellm
def test_nothing_but_the_service_is_asked_and_nothing_is_printed() -> None:
    """Neither at the import nor by a request: no lists, no telemetry, no second request."""
    with fake("mistral") as server:
        program = _QUIET.replace("KEY", KEY)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, server.url + "/v1"],
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            # An import takes a minute on a machine with ten things to do; it does end.
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout == ""
        assert set(json.loads(done.stderr.splitlines()[-1])) <= {"127.0.0.1"}
        assert len(server.seen) == 2


def test_nothing_of_litellm_is_loaded_to_ask_for_facts() -> None:
    program = (
        "import sys\n"
        "from embedcore_litellm.plugin import LiteLLMOptions, embedcore_provider\n"
        "one = embedcore_provider().create('voyage/voyage-3', LiteLLMOptions())\n"
        "assert one.info.input_types == ('query', 'document')\n"
        "sys.exit('litellm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_the_package_the_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedcore_litellm import library

    from embedcore.forksafe import Lazy

    monkeypatch.setattr(library, "_module", Lazy())
    monkeypatch.setitem(sys.modules, "litellm", None)
    with pytest.raises(errors.ConfigurationError, match="pip install litellm"):
        LiteLLMEmbedder("voyage/voyage-3", LiteLLMOptions()).embed(EmbedRequest(texts=["a"]))
