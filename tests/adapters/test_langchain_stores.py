"""Does a LangChain program around the embeddings find, cache, chain and fail as it should?"""

from __future__ import annotations

import asyncio
import uuid

import pytest

WHY = "needs the extra integrations: make test-integrations"
pytest.importorskip("langchain_core", reason=WHY)

from hypothesis import (  # noqa: E402
    HealthCheck,
    given,
    settings,
    strategies as st,
)
from langchain_core.documents import Document  # noqa: E402
from langchain_core.runnables import RunnableLambda, RunnablePassthrough  # noqa: E402
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore  # noqa: E402

from embedcore import OutcomeUnknown, ProviderUnavailable, TokenBudgetExceeded  # noqa: E402
from embedcore.adapters.langchain import EmbedcoreEmbeddings  # noqa: E402

WORDS = st.text("abcdefgh ", min_size=1, max_size=12).filter(str.strip)
QUICK = {"first_wait": 0.0, "attempts": 2}


@pytest.fixture
def embeddings(server):
    made = EmbedcoreEmbeddings(config={"retry": QUICK}, options={"dimensions": 32})
    yield made
    made.close()


def chroma(embeddings):
    found = pytest.importorskip("langchain_chroma", reason=WHY)
    return found.Chroma(f"c{uuid.uuid4().hex}", embeddings)


STORES = {"memory": InMemoryVectorStore, "chroma": chroma}


@pytest.fixture(params=STORES)
def new_store(request, embeddings):
    return lambda: STORES[request.param](embeddings)


def documents(texts):
    return [Document(text, metadata={"row": row}) for row, text in enumerate(texts)]


# Finding


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(WORDS, min_size=1, max_size=40, unique=True))
def test_a_document_is_found_by_its_own_text(new_store, texts):
    store = new_store()
    store.add_documents(documents(texts))
    for row, text in enumerate(texts):
        (found,) = store.similarity_search(text, k=1)
        assert (found.page_content, found.metadata["row"]) == (text, row)


def test_awaited_calls_find_the_same(new_store):
    async def program():
        store = new_store()
        await store.aadd_documents(documents(texts))
        return await asyncio.gather(*(store.asimilarity_search(text, k=1) for text in texts))

    texts = [f"text number {number}" for number in range(30)]
    found = asyncio.run(program())
    assert [[one.page_content for one in answer] for answer in found] == [[text] for text in texts]


def test_a_store_made_of_texts_asks_once_for_each(embeddings, server):
    texts = [f"text number {number}" for number in range(50)]
    store = InMemoryVectorStore.from_texts(texts, embeddings)
    assert server.meter.requests == 1
    assert server.meter.billed_twice == {}
    (found,) = store.similarity_search_with_score(texts[17], k=1)
    assert found[0].page_content == texts[17]
    assert found[1] == pytest.approx(1.0, abs=1e-6)


# Chains


def chain_over(store: VectorStore):
    retriever = store.as_retriever(search_kwargs={"k": 1})
    tell = RunnableLambda(lambda found: found["context"][0].page_content + " <- " + found["ask"])
    return {"context": retriever, "ask": RunnablePassthrough()} | tell


def test_a_chain_asks_in_every_way(new_store):
    texts = [f"text number {number}" for number in range(60)]
    answers = [f"{text} <- {text}" for text in texts]
    store = new_store()
    store.add_documents(documents(texts))
    chain = chain_over(store)
    assert chain.invoke(texts[3]) == answers[3]
    assert chain.batch(texts, config={"max_concurrency": 8}) == answers
    assert asyncio.run(chain.ainvoke(texts[4])) == answers[4]
    assert asyncio.run(chain.abatch(texts)) == answers


# Caching


def test_a_cache_around_them_asks_once(embeddings, server):
    classic = pytest.importorskip("langchain_classic.embeddings", reason=WHY)
    from langchain_core.stores import InMemoryByteStore

    cached = classic.CacheBackedEmbeddings.from_bytes_store(
        embeddings,
        InMemoryByteStore(),
        namespace=embeddings.client.fingerprint,
        key_encoder="sha256",
        query_embedding_cache=True,
    )
    texts = [f"text number {number}" for number in range(20)]
    first = cached.embed_documents(texts)
    sent = server.meter.requests
    assert cached.embed_documents(texts[::-1]) == first[::-1]
    assert server.meter.requests == sent
    assert cached.embed_query("a") == cached.embed_query("a")
    assert server.meter.requests == sent + 1
    assert first == embeddings.embed_documents(texts)


# Failing


def test_a_budget_that_ends_midway_is_our_error(server):
    budget = {"daily_token_limit": 60}
    embeddings = EmbedcoreEmbeddings(config={"budget": budget}, options={"dimensions": 32})
    store = InMemoryVectorStore(embeddings)
    stored = 0
    with pytest.raises(TokenBudgetExceeded) as caught:
        for start in range(0, 1000, 5):
            store.add_texts([f"text number {number}" for number in range(start, start + 5)])
            stored += 5
    assert caught.value.limit == 60
    assert 0 < server.meter.billed_tokens <= 60
    assert len(store.store) == stored > 0
    with pytest.raises(TokenBudgetExceeded):
        asyncio.run(store.aadd_texts([f"one more text {number}" for number in range(5)]))
    chain = chain_over(store)
    answers = chain.batch(
        [f"a question of some words, {n}" for n in range(40)], return_exceptions=True
    )
    assert {type(answer) for answer in answers} <= {str, TokenBudgetExceeded}
    assert type(answers[-1]) is TokenBudgetExceeded
    assert server.meter.billed_tokens <= 60
    embeddings.close()


def test_a_failure_puts_nothing_into_a_store(new_store, server):
    store = new_store()
    server.faults.push("reset", times=20)
    with pytest.raises((OutcomeUnknown, ProviderUnavailable)):
        store.add_texts(["one", "two"])
    server.faults.clear()
    assert store.similarity_search("one", k=5) == []
    store.add_texts(["one", "two"])
    assert store.similarity_search("two", k=1)[0].page_content == "two"
