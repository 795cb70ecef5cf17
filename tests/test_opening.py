"""Nothing is imported in a thread of ours, no attempt waits for an import, and ``open`` does for
free what the first call would wait for.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embedcore import ConfigurationError, EmbeddingClient, ProviderError, ProviderUnavailable
from embedcore.events import RequestFailed, RequestFinished
from embedcore.provider.base import BaseEmbedder, WrapperEmbedder
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price
from embedcore.testing import FakeEmbedder, FakeOpenAI, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

# Which modules are imported where, in a process that has imported nothing yet.
PROGRAM = """
import os, sys, threading

found = []

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        thread = threading.current_thread()
        where = "main" if thread is threading.main_thread() else thread.name
        found.append((where, name))

sys.meta_path.insert(0, Finder)

from embedcore import EmbeddingClient
from embedcore.provider.base import BaseEmbedder

class Mine(BaseEmbedder):
    def __init__(self):
        from embedcore.provider.types import ModelInfo
        self.info = ModelInfo(provider="mine", model="m", dimensions=8, max_texts_per_request=9)

    def embed(self, request):
        import numpy
        from embedcore.provider.types import EmbedReply
        return EmbedReply(vectors=numpy.ones((len(request.texts), 8), dtype="float32"))

async def stream(client, texts):
    async for block in client.aembed_iter(texts):
        pass

def main(kind, way, opened):
    config = {"budget": {"daily_token_limit": 10**9}}
    if kind == "by hand":
        client = EmbeddingClient(embedder=Mine(), config={"cache": True})
    else:
        client = EmbeddingClient(options={"dimensions": 8}, config=config)
    if opened:
        client.open()
    texts = [f"text {number}" for number in range(300)]
    if way == "now":
        client.embed(texts)
        if kind == "openai":
            # Too long: it is counted and cut in the thread that was refused.
            client.embed(["x " * 9000])
    elif way == "stream":
        for block in client.embed_iter(iter(texts)):
            pass
    elif way == "asyncio":
        import asyncio
        asyncio.run(client.aembed(texts))
        asyncio.run(stream(client, texts))
    elif way == "forked":
        if child := os.fork():
            os.waitpid(child, 0)
            return
        found.clear()
        client.embed_texts(texts[:20])
    client.close()
    import json
    print(json.dumps([one for one in found if one[1] != "json"]), flush=True)
    os._exit(0)

main(sys.argv[1], sys.argv[2], sys.argv[3] == "opened")
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        yield fake


def imports(kind: str, way: str, *, opened: bool = False) -> list[tuple[str, str]]:
    """Thread and module of every import in a cold process."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, way, "opened" if opened else ""],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout, done.stderr
    return [(thread, module) for thread, module in json.loads(done.stdout)]


@pytest.mark.case("H4")
@pytest.mark.case("H6")
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("openai", "stream"),
        ("openai", "asyncio"),
        ("by hand", "now"),
        ("by hand", "stream"),
    ],
)
def test_nothing_is_imported_in_a_thread_of_ours(server: FakeOpenAI, kind: str, way: str) -> None:
    found = imports(kind, way)
    assert [one for one in found if one[0].startswith("embedcore")] == []
    assert {"numpy"} <= {module for _, module in found}


@pytest.mark.case("H4")
@pytest.mark.parametrize("way", ["now", "asyncio"])
def test_once_it_is_open_only_the_program_itself_imports(server: FakeOpenAI, way: str) -> None:
    found = imports("openai", way, opened=True)
    assert {thread for thread, _ in found} == {"main"}


@pytest.mark.case("H4")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_an_open_client_has_nothing_left_to_import(server: FakeOpenAI) -> None:
    assert imports("openai", "forked", opened=True) == []


@pytest.mark.case("H4")
@pytest.mark.case("H6")
def test_only_the_first_process_needs_what_makes_the_tables(server: FakeOpenAI) -> None:
    """And neither imports in a thread of ours."""
    first, next_one = (imports("openai", "now") for _ in range(2))
    for found in (first, next_one):
        assert [one for one in found if one[0].startswith("embedcore")] == []
    assert {"numpy", "sqlite_utils"} <= {module for _, module in first}
    assert "sqlite_utils" not in {module for _, module in next_one}


# What it does


@pytest.mark.case("H4")
def test_to_open_costs_nothing_and_connects(
    server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch, state_home: Path
) -> None:
    with EmbeddingClient(
        options={"dimensions": 8}, config={"budget": {"total_cost_limit": 0}}
    ) as c:
        c.open()
        c.open()
    client = EmbeddingClient(options={"dimensions": 8, "headers": {"X-Team": "search"}})
    with client:
        client.open()
        assert server.meter.requests == 0
        assert {path.name for path in state_home.iterdir()} >= {"state.db", "vectors"}
        asked = server.requests[-1]
        assert (asked.method, asked.path) == ("GET", "/v1/")
        assert "authorization" not in asked.headers
        assert asked.headers["x-team"] == "search"

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("it is connected already")

        monkeypatch.setattr(socket, "create_connection", refuse)
        assert client.embed(["a"]).ok.all()
        assert server.meter.billed_requests == 1


@pytest.mark.case("H4")
@pytest.mark.parametrize("status", [200, 204, 301, 401, 403, 404, 429, 500, 503])
def test_any_answer_is_a_connection(server: FakeOpenAI, status: int) -> None:
    server.faults.push("status", status=status, path="/v1/")
    with EmbeddingClient(options={"dimensions": 8}) as client:
        client.open()
        assert client.embed(["a"]).ok.all()


@pytest.mark.case("H4")
def test_what_cannot_be_reached_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    options = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "sk-none-0123456789"}
    client = EmbeddingClient(options=options)
    with pytest.raises(ProviderUnavailable) as caught:
        client.open()
    assert caught.value.billed == "no"
    # For this machine itself no proxy is asked.
    monkeypatch.setenv("HTTPS_PROXY", "nonsense://nowhere")
    options["base_url"] = "https://elsewhere.example/v1"
    with pytest.raises(ConfigurationError, match="the proxy of the environment"):
        EmbeddingClient(options=options).open()


@pytest.mark.case("H4")
def test_it_opens_and_closes_without_blocking_the_loop(server: FakeOpenAI) -> None:
    async def main() -> None:
        client = EmbeddingClient(options={"dimensions": 8})
        await client.aopen()
        assert len(await client.aembed_query("a")) == 8
        await client.aclose()
        await client.aclose()

    asyncio.run(main())


@pytest.mark.case("G4")
@pytest.mark.parametrize("fails", [False, True])
def test_a_client_is_an_asynchronous_context(server: FakeOpenAI, fails: bool) -> None:
    async def main() -> None:
        async with EmbeddingClient(options={"dimensions": 8}) as client:
            assert isinstance(client, EmbeddingClient)
            assert len(await client.aembed_text("a")) == 8
            async for block in client.aembed_iter(["b", "c"]):
                assert block.ok.all()
            running = client._opened._thing
            assert running is not None
            if fails:
                raise ZeroDivisionError
        raise AssertionError("closed below")

    with pytest.raises(ZeroDivisionError if fails else AssertionError):
        asyncio.run(main())


# What a provider does


class Slow(BaseEmbedder):
    """Takes three seconds of a clock to be ready, a fiftieth of one to answer."""

    info = ModelInfo(
        provider="slow", model="slow", dimensions=4, max_texts_per_request=1, price=Price()
    )

    def __init__(self) -> None:
        self.now = 0.0
        self.did: list[str] = []
        self.threads: list[threading.Thread] = []
        self.fails: Exception | None = None

    @property
    def startup(self) -> Slow:  # type: ignore[override]
        return self

    def load(self) -> None:
        self.did.append("load")
        self.threads.append(threading.current_thread())
        self.now += 3.0
        if self.fails is not None:
            raise self.fails

    def connect(self) -> None:
        self.did.append("connect")

    def embed(self, request: EmbedRequest) -> EmbedReply:
        self.did.append("embed")
        self.now += 0.02
        return EmbedReply(vectors=vectors_of(request.texts, 4))


WAYS: dict[str, Callable[[EmbeddingClient], Any]] = {
    "embed": lambda client: client.embed(["a", "b"]),
    "embed_iter": lambda client: list(client.embed_iter(["a", "b"])),
    "open": lambda client: (client.open(), client.embed(["a", "b"])),
}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``timed(embedder, **more)``: a client whose clock is the embedder's."""

    def client_of(embedder: Slow, **more: Any) -> EmbeddingClient:
        client = EmbeddingClient(embedder=more.pop("given", embedder), **more)
        running = client._running
        running.engine = replace(running.engine, monotonic=lambda: embedder.now)
        return client

    return client_of


@pytest.mark.case("H6")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_clock_of_an_attempt_starts_when_the_request_leaves(
    timed: Callable[..., EmbeddingClient], way: Callable[[EmbeddingClient], Any], wrapped: bool
) -> None:
    slow, events = Slow(), []
    given = WrapperEmbedder(slow) if wrapped else slow
    with timed(slow, given=given, observers=[events.append], config={"concurrency": 1}) as client:
        way(client)
        client.embed(["c"])
    seconds = [event.seconds for event in events if isinstance(event, RequestFinished)]
    assert seconds == [pytest.approx(0.02)] * 3
    assert slow.did.count("load") == 1
    assert slow.did[0] == "load"
    assert slow.threads == [threading.current_thread()]
    assert ("connect" in slow.did) == (way is WAYS["open"])


@pytest.mark.case("H4")
def test_threads_that_begin_together_load_once(timed: Callable[..., EmbeddingClient]) -> None:
    slow = Slow()
    with timed(slow) as client:
        threads = [
            threading.Thread(target=client.embed, args=([f"text {number}"],)) for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert slow.did.count("load") == 1


@pytest.mark.case("H4")
@pytest.mark.parametrize(
    "error", [MemoryError("no room"), ImportError("libfoo.so"), ConfigurationError("a package")]
)
def test_what_cannot_be_loaded_is_an_error_before_anything_is_sent(
    timed: Callable[..., EmbeddingClient], error: Exception
) -> None:
    slow, events = Slow(), []
    slow.fails = error
    config = {"budget": {"total_token_limit": 1000}}
    with timed(slow, config=config, observers=[events.append]) as client:
        for way in WAYS.values():
            with pytest.raises((ProviderError, ConfigurationError)) as caught:
                way(client)
            assert str(error) in str(caught.value)
            assert caught.value.billed == "no"
        assert "embed" not in slow.did
        assert not any(isinstance(event, RequestFailed) for event in events)
        # Nothing is held for it, and the next call tries again.
        slow.fails = None
        assert client.embed(["a"]).ok.all()
        plan = client.plan(["x" * 990])
        assert plan.tokens == 990
        assert client.embed(["x" * 990]).ok.all()


@pytest.mark.case("H4")
def test_an_embedder_without_that_is_opened_as_well() -> None:
    class Plain:
        """The five members and nothing else."""

        def __init__(self) -> None:
            self.inner = FakeEmbedder(info=replace(FAKE_INFO, dimensions=4))
            self.info, self.tokenizer = self.inner.info, self.inner.tokenizer
            self.batch, self.close = None, self.inner.close
            self.embed = self.inner.embed

    for embedder in (Plain(), WrapperEmbedder(Plain())):
        with EmbeddingClient(embedder=embedder) as client:
            client.open()
            assert client.embed(["a"]).ok.all()
