"""Is a client one of LangChain's embeddings, with its budget and its errors as they are?"""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import traceback
from dataclasses import replace

import pytest

WHY = "needs the extra integrations: make test-integrations"
pytest.importorskip("langchain_core", reason=WHY)
pytest.importorskip("langchain_tests", reason=WHY)

from hypothesis import (  # noqa: E402
    HealthCheck,
    given,
    settings,
    strategies as st,
)
from langchain_core.embeddings import Embeddings  # noqa: E402
from langchain_tests.integration_tests import EmbeddingsIntegrationTests  # noqa: E402
from langchain_tests.unit_tests import EmbeddingsUnitTests  # noqa: E402
from pydantic import BaseModel, ConfigDict  # noqa: E402

from embedcore import (  # noqa: E402
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingClient,
    InputRejected,
    RateLimited,
    TokenBudgetExceeded,
    TokenTracker,
)
from embedcore.adapters.langchain import EmbedcoreEmbeddings  # noqa: E402
from embedcore.events import RequestFinished  # noqa: E402
from embedcore.testing import FakeEmbedder, tokens_of, vector_of, vectors_of  # noqa: E402
from embedcore.testing.fakes.embedder import FAKE_INFO  # noqa: E402

MODEL = "text-embedding-3-small"
QUICK = {"retry": {"first_wait": 0.0, "attempts": 2}}
PARAMETERS = {"model": f"openai:{MODEL}", "options": {"dimensions": 16}}


class Standard:
    """What LangChain's own tests are told."""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return EmbedcoreEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, object]:
        return PARAMETERS


@pytest.mark.disable_socket
class TestUnit(Standard, EmbeddingsUnitTests):
    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, object], dict[str, object]]:
        variables = {"OPENAI_API_KEY": "sk-test", "EMBEDCORE_MODEL": f"openai:{MODEL}"}
        return variables, {}, {"model": MODEL}


@pytest.mark.usefixtures("server")
class TestIntegration(Standard, EmbeddingsIntegrationTests):
    pass


@pytest.fixture
def fake():
    return FakeEmbedder(info=replace(FAKE_INFO, input_types=("query", "document")))


@pytest.fixture
def embeddings(fake):
    with EmbeddingClient(embedder=fake, config=QUICK) as client:
        yield EmbedcoreEmbeddings(client=client)


def expected(texts, width=32):
    return vectors_of(texts, width).tolist()


# What it answers


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text("abc é🍏", min_size=1).filter(str.strip), max_size=150))
def test_row_i_is_the_vector_of_text_i(embeddings, texts):
    assert embeddings.embed_documents(texts) == expected(texts)
    assert asyncio.run(embeddings.aembed_documents(texts)) == expected(texts)


def test_nothing_costs_nothing(embeddings, fake):
    assert embeddings.embed_documents([]) == []
    assert asyncio.run(embeddings.aembed_documents([])) == []
    assert fake.calls == []


def test_documents_and_questions_are_told_apart(embeddings, fake):
    assert embeddings.embed_documents(["a"]) == expected(["a"])
    assert embeddings.embed_query("b") == vector_of("b", 32).tolist()
    assert asyncio.run(embeddings.aembed_documents(["c"])) == expected(["c"])
    assert asyncio.run(embeddings.aembed_query("d")) == vector_of("d", 32).tolist()
    assert [(call.texts, call.input_type) for call in fake.calls] == [
        (("a",), "document"),
        (("b",), "query"),
        (("c",), "document"),
        (("d",), "query"),
    ]


def test_the_event_loop_goes_on_meanwhile(fake):
    fake.latency = 0.3

    async def program():
        ticks = 0
        work = asyncio.gather(*(embeddings.aembed_query(f"text {n}") for n in range(8)))
        while not work.done():
            ticks += 1
            await asyncio.sleep(0.01)
        return await work, ticks

    with EmbeddingClient(embedder=fake) as client:
        embeddings = EmbedcoreEmbeddings(client=client)
        vectors, ticks = asyncio.run(program())
    assert vectors == expected([f"text {n}" for n in range(8)])
    assert ticks >= 10


def test_it_is_shared_between_threads(embeddings, fake):
    wrong = []

    def work(number):
        texts = [f"thread {number} text {n}" for n in range(20)]
        asked = [embeddings.embed_query(text) for text in texts]
        if asked != expected(texts):
            wrong.append(number)
        if embeddings.embed_documents(texts) != expected(texts):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Money


def test_every_way_is_in_the_ledger(server):
    embeddings = EmbedcoreEmbeddings(MODEL, scope="search")
    embeddings.embed_documents(["one two", "three"])
    embeddings.embed_query("four")
    asyncio.run(embeddings.aembed_documents(["five"]))
    asyncio.run(embeddings.aembed_query("six"))
    used = TokenTracker(scope="search").get_usage_today()["tokens_used"]
    assert used == server.meter.billed_tokens > 0
    assert embeddings.client.scope == "search"
    embeddings.close()


def test_questions_may_use_what_is_kept_for_them(fake):
    budget = {"daily_token_limit": 100, "query_share": 0.5}
    with EmbeddingClient(embedder=fake, config={"budget": budget}) as client:
        embeddings = EmbedcoreEmbeddings(client=client)
        half = ["x" * 40] * 1 + ["y" * 160]
        assert sum(map(tokens_of, half)) == 50
        embeddings.embed_documents(half)
        with pytest.raises(TokenBudgetExceeded):
            embeddings.embed_documents(["one more"])
        with pytest.raises(TokenBudgetExceeded):
            asyncio.run(embeddings.aembed_documents(["one more"]))
        assert embeddings.embed_query("one more") == vector_of("one more", 32).tolist()
        again = asyncio.run(embeddings.aembed_query("one more"))
        assert again == vector_of("one more", 32).tolist()


# What goes wrong


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("position", [0, 1, 69])
def test_a_bad_text_is_named_by_its_place(embeddings, fake, position, awaited):
    texts = [f"text {n}" for n in range(70)]
    texts[position] = ""
    with pytest.raises(InputRejected) as caught:
        if awaited:
            asyncio.run(embeddings.aembed_documents(texts))
        else:
            embeddings.embed_documents(texts)
    assert caught.value.position == position
    assert fake.calls == []


def test_errors_stay_ours(server, monkeypatch):
    embeddings = EmbedcoreEmbeddings(config={"retry": {"attempts": 1}})
    server.faults.push("rate_limited", times=5)
    with pytest.raises(RateLimited):
        embeddings.embed_documents(["a"])
    server.faults.clear()
    assert len(embeddings.embed_query("a")) == 1536
    embeddings.close()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(AuthenticationFailed):
        asyncio.run(EmbedcoreEmbeddings().aembed_query("never asked before"))


def test_a_call_that_is_cancelled_sends_no_more(fake):
    fake.latency = 0.1
    fake.info = replace(fake.info, max_texts_per_request=1, max_concurrency=1)

    async def program():
        work = asyncio.ensure_future(embeddings.aembed_documents([f"text {n}" for n in range(50)]))
        while not fake.calls:
            await asyncio.sleep(0.001)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    with EmbeddingClient(embedder=fake) as client:
        embeddings = EmbedcoreEmbeddings(client=client)
        asyncio.run(program())
    assert 1 <= len(fake.calls) < 50


# How it is made


def test_a_client_is_used_as_it_is_and_closed(fake):
    client = EmbeddingClient(embedder=fake)
    embeddings = EmbedcoreEmbeddings(client=client)
    assert embeddings.client is client
    assert embeddings.model == "fake-embedding"
    embeddings.embed_query("a")
    embeddings.close()
    assert fake.times_closed == 1
    assert embeddings.embed_query("a") == vector_of("a", 32).tolist()
    client.close()


@pytest.mark.parametrize(
    "setting",
    [
        {"model": MODEL},
        {"api_key": "sk-a"},
        {"config": {}},
        {"scope": "a"},
        {"options": {}},
        {"observers": [print]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_client_and_settings_for_another_contradict_each_other(fake, setting):
    with (
        EmbeddingClient(embedder=fake) as client,
        pytest.raises(ConfigurationError, match="client="),
    ):
        EmbedcoreEmbeddings(client=client, **setting)


def test_settings_reach_the_client(server, monkeypatch, canary):
    monkeypatch.delenv("OPENAI_API_KEY")
    events = []
    embeddings = EmbedcoreEmbeddings(
        "small",
        lambda: canary,
        config={"profiles": {"small": {"model": f"openai:{MODEL}"}}},
        scope="team",
        options={"dimensions": 24},
        observers=[events.append],
    )
    assert embeddings.embed_query("a") == vector_of("a", 24).tolist()
    assert [event.inputs for event in events if isinstance(event, RequestFinished)] == [1]
    embeddings.close()


@pytest.mark.fault(131)
def test_it_pickles_without_its_key(server, canary):
    embeddings = EmbedcoreEmbeddings(api_key=canary, options={"dimensions": 16})
    assert canary not in repr(embeddings)
    assert repr(embeddings) == f"EmbedcoreEmbeddings(openai:{MODEL}, scope='default')"
    pickled = pickle.dumps(embeddings)
    assert canary.encode() not in pickled
    # The key is in the environment here.
    other = pickle.loads(pickled)
    assert type(other) is EmbedcoreEmbeddings
    assert other.embed_query("a") == vector_of("a", 16).tolist()
    other.close()
    embeddings.close()


class Chain(BaseModel):
    """What LangChain keeps one in."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    embeddings: Embeddings


@pytest.mark.case("H1")
@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        lambda one: Chain(embeddings=one).model_copy(deep=True).embeddings,
        lambda one: copy.deepcopy({"of": [one]})["of"][0],
    ],
    ids=["copy", "deepcopy", "deep copy of a model", "in containers"],
)
def test_a_copy_keeps_the_account_and_its_observers(server, monkeypatch, copied):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-B-another-account-0123456789")
    server.api_key, events = None, []
    embeddings = EmbedcoreEmbeddings(
        api_key="sk-A-this-account-0123456789",
        options={"dimensions": 16},
        observers=[events.append],
    )
    other = copied(embeddings)
    assert other.embed_query("a") == vector_of("a", 16).tolist()
    sent = server.requests[-1].headers["authorization"]
    assert sent == "Bearer sk-A-this-account-0123456789"
    assert RequestFinished in map(type, events)
    other.close()
    embeddings.close()


@pytest.mark.case("H5")
@pytest.mark.parametrize("texts", [[""], ["a", "", "b"]])
def test_it_raises_for_an_empty_text_whatever_the_setting(fake, texts):
    client = EmbeddingClient(embedder=fake, config={"on_empty": "keep"})
    embeddings = EmbedcoreEmbeddings(client=client)
    with pytest.raises(InputRejected, match="empty text"):
        embeddings.embed_documents(texts)
    with pytest.raises(InputRejected, match="empty text"):
        asyncio.run(embeddings.aembed_documents(texts))
    with pytest.raises(InputRejected, match="empty text"):
        embeddings.embed_query("")
    with pytest.raises(InputRejected, match="empty text"):
        asyncio.run(embeddings.aembed_query(""))
    assert fake.calls == []
    embeddings.close()


def as_a_debugger(value):
    try:
        return repr(value)
    except AttributeError:
        return "an object whose construction failed"


@pytest.mark.fault(131)
@pytest.mark.parametrize("how", ["options", "option of another", "client", "unknown provider"])
def test_a_failed_construction_shows_no_key(canary, how, fake):
    settings = {
        "options": {"options": {"api_key": canary, "timeuot": 1}},
        "option of another": {"model": "hashing:64", "api_key": canary},
        "client": {"client": EmbeddingClient(embedder=fake), "api_key": canary},
        "unknown provider": {"model": "nobody:x", "api_key": canary},
    }[how]
    with pytest.raises(ConfigurationError) as caught:
        EmbedcoreEmbeddings(**settings)
    shown = "".join(traceback.format_exception(caught.value))
    frame = caught.value.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename != __file__:
            shown += "".join(map(as_a_debugger, frame.tb_frame.f_locals.values()))
        frame = frame.tb_next
    assert canary not in shown
    del settings, caught, frame
    gc.collect()
