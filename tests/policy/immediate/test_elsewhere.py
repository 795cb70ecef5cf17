"""What another process with the same cache is paying for: is it waited for, and paid for if need
be, in every form of a call?

The other process is a claimant of its own over the same folder. With real ones:
``processes/test_claims.py``.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time

import numpy as np
import pytest
from waiting import SECONDS, Gated, until

from embedcore import EmbeddingClient
from embedcore.errors import (
    AuthenticationFailed,
    RequestRejected,
    StorageFull,
    TokenBudgetExceeded,
    TransientProviderError,
)
from embedcore.events import Cached, CacheProblem, Reserved
from embedcore.policy.engine import Stop
from embedcore.policy.immediate.reuse import keys_of
from embedcore.policy.threads import Stopped
from embedcore.storage.amounts import HeldLoosely, TighterBoundNeeded
from embedcore.storage.keys import Origin
from embedcore.storage.vectors import VectorStore
from embedcore.testing import vectors_of

WIDTH = 8


class Elsewhere:
    """Another process, that has claimed texts of a client's."""

    def __init__(self, client):
        engine = client._engine
        self._keys = keys_of(engine, None)
        self._origin = Origin(model=engine.label, fingerprint=engine.fingerprint)
        self.store = VectorStore(engine.cache.store.path, cap=10**9)

    def claims(self, *texts):
        taken = self.store.claims.take(self._keys.of(texts))
        return [not (key in taken.elsewhere or key in taken.there) for key in self._keys.of(texts)]

    def pays(self, *texts, vectors=None):
        vectors = vectors_of(texts, WIDTH) if vectors is None else vectors
        self.store.put(self._keys.of(texts), vectors, self._origin)

    def gives_up(self, *texts):
        self.store.claims.give_up(self._keys.of(texts))
        self.store.claims.write_down()


def right(result, texts):
    assert result.ok.all()
    assert result.vectors.tobytes() == vectors_of(texts, WIDTH).tobytes()


class Background:
    """A call in a thread of its own."""

    def __init__(self, call):
        self.result = self.error = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call):
        try:
            self.result = call()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def end(self):
        self._thread.join(SECONDS)
        assert not self._thread.is_alive(), "it waits for ever"
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def embedder():
    return Gated()


@pytest.fixture
def shop(home, embedder):
    """``shop(…)``: a client of the embedder."""
    opened = []

    def open_one(*, observers=(), **config):
        waits = {"first_wait": 0.001, "longest_wait": 0.002, **config.pop("retry", {})}
        config = {"home": home, "cache": True, "retry": waits, **config}
        opened.append(EmbeddingClient(embedder=embedder, config=config, observers=observers))
        return opened[-1]

    yield open_one
    for client in opened:
        client.close()


@pytest.fixture
def elsewhere(shop):
    client = shop()
    client.open()
    other = Elsewhere(client)
    yield other
    other.store.close()


def waits(client):
    """Until a call of this client waits for another process."""
    looks = client._engine.cache.store.claims
    gone, asked = looks.gone, threading.Event()

    def noted(keys):
        asked.set()
        return gone(keys)

    looks.gone = noted
    assert asked.wait(SECONDS)


@pytest.mark.case("G5")
def test_what_another_process_pays_for_is_waited_for_and_costs_nothing(shop, elsewhere, embedder):
    told = []
    client = shop(observers=[told.append], budget={"daily_token_limit": 10**6})
    assert elsewhere.claims("theirs", "theirs too") == [True, True]
    call = Background(lambda: client.embed(["theirs", "own", "theirs too"]))
    until(lambda: embedder.meter.billed_texts == {"own": 1})
    waits(client)
    elsewhere.pays("theirs")
    elsewhere.pays("theirs too")
    result = call.end()
    right(result, ["theirs", "own", "theirs too"])
    assert result.reused.tolist() == [True, False, True]
    assert result.usage.requests == 1
    assert embedder.meter.billed_texts == {"own": 1}
    assert sum(event.texts for event in told if isinstance(event, Cached)) == 2
    assert len([event for event in told if isinstance(event, Reserved)]) == 1
    assert elsewhere.claims("own", "theirs") == [False, False], "both are there"
    assert elsewhere.claims("another") == [True]


def test_what_came_between_the_look_up_and_the_claim_is_found(shop, elsewhere, embedder):
    client = shop()
    client.open()
    store = client._engine.cache.store
    take = store.claims.take

    def late(keys, since):
        elsewhere.pays("theirs")
        return take(keys, since)

    store.claims.take = late
    result = client.embed(["theirs", "own"])
    right(result, ["theirs", "own"])
    assert embedder.meter.billed_texts == {"own": 1}


def test_what_the_other_ends_without_is_reserved_and_paid_for_then(shop, elsewhere, embedder):
    told = []
    client = shop(observers=[told.append], budget={"daily_token_limit": 10**6})
    elsewhere.claims("theirs", "lost")
    call = Background(lambda: client.embed(["theirs", "lost", "own"]))
    until(lambda: embedder.meter.billed_texts == {"own": 1})
    waits(client)
    elsewhere.gives_up("lost")
    until(lambda: embedder.meter.billed_texts == {"own": 1, "lost": 1})
    assert len([event for event in told if isinstance(event, Reserved)]) == 2
    elsewhere.pays("theirs")
    result = call.end()
    right(result, ["theirs", "lost", "own"])
    assert result.reused.tolist() == [True, False, False]


def test_what_was_lost_may_pass_a_limit(shop, elsewhere, embedder):
    client = shop(budget={"total_token_limit": 1})
    elsewhere.claims("lost")
    call = Background(lambda: client.embed(["own", "lost"]))
    until(lambda: embedder.meter.billed_texts == {"own": 1})
    elsewhere.gives_up("lost")
    with pytest.raises(TokenBudgetExceeded) as caught:
        call.end()
    assert caught.value.partial.ok.tolist() == [True, False]
    assert elsewhere.claims("lost") == [True]


def test_a_call_that_stops_at_its_limit_has_what_the_other_paid_for(shop, elsewhere):
    client = shop(budget={"total_token_limit": 1})
    elsewhere.claims("theirs", "lost")
    call = Background(lambda: client.embed(["a", "b", "theirs", "lost"], on_budget="stop"))
    waits(client)
    elsewhere.pays("theirs")
    elsewhere.gives_up("lost")
    result = call.end()
    assert result.ok.tolist() == [True, False, True, False]
    assert elsewhere.claims("b", "lost") == [True, True]


def test_zeros_of_another_are_asked_for_again(shop, elsewhere, embedder):
    client = shop()
    elsewhere.claims("theirs")
    call = Background(lambda: client.embed(["theirs"]))
    waits(client)
    elsewhere.pays("theirs", vectors=np.zeros((1, WIDTH), dtype=np.float32))
    elsewhere.gives_up("theirs")
    right(call.end(), ["theirs"])
    assert embedder.meter.billed_texts == {"theirs": 1}


def test_a_damaged_vector_of_another_is_paid_for(shop, elsewhere, embedder, flip_vectors):
    client = shop()
    elsewhere.claims("theirs")
    gone = client._engine.cache.store.claims.gone

    def spoiled(keys):
        found = gone(keys)
        if found:
            flip_vectors(client._engine.cache.store.path, "id = 1")
        return found

    # Before the call: it may be in the middle of asking when the vector comes.
    client._engine.cache.store.claims.gone = spoiled
    call = Background(lambda: client.embed(["theirs"]))
    waits(client)
    elsewhere.pays("theirs")
    right(call.end(), ["theirs"])
    assert embedder.meter.billed_texts == {"theirs": 1}


def test_a_call_that_waits_keeps_its_deadline(shop, elsewhere):
    client = shop(retry={"deadline": 0.3})
    elsewhere.claims("theirs")
    with pytest.raises(TransientProviderError, match="with the same cache") as caught:
        client.embed(["own", "theirs"])
    assert caught.value.billed == "no"
    assert caught.value.partial.ok.tolist() == [True, False]


def test_a_call_that_waits_can_be_ended(shop, elsewhere):
    client, stop = shop(), Stop()
    elsewhere.claims("theirs")
    call = Background(lambda: client._embed(["own", "theirs"], stop=stop))
    waits(client)
    stop.set()
    with pytest.raises(Stopped) as caught:
        call.end()
    assert caught.value.partial.ok.tolist() == [True, False]
    elsewhere.gives_up("theirs")
    assert elsewhere.claims("theirs") == [True]


def test_ctrl_c_ends_the_wait(shop, elsewhere, monkeypatch):
    client = shop()
    elsewhere.claims("theirs")
    client.open()

    def interrupted(keys):
        raise KeyboardInterrupt

    monkeypatch.setattr(client._engine.cache.store.claims, "gone", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        client.embed(["own", "theirs"])
    assert caught.value.partial.ok.tolist() == [True, False]


def test_awaited_calls_wait_and_can_be_cancelled(shop, elsewhere, embedder):
    client = shop()
    elsewhere.claims("theirs", "never")

    async def both():
        good = asyncio.create_task(client.aembed(["theirs", "own"]))
        cancelled = asyncio.create_task(client.aembed(["never"]))
        await asyncio.to_thread(until, lambda: embedder.meter.billed_texts == {"own": 1})
        await asyncio.to_thread(waits, client)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await asyncio.to_thread(elsewhere.pays, "theirs")
        return await good

    right(asyncio.run(both()), ["theirs", "own"])


def test_who_waits_takes_no_place_of_those_who_send(shop, elsewhere):
    client = shop(concurrency=1)
    elsewhere.claims("theirs")
    call = Background(lambda: client.embed(["theirs"]))
    waits(client)
    right(client.embed(["a", "b"]), ["a", "b"])
    elsewhere.pays("theirs")
    right(call.end(), ["theirs"])


def test_a_stream_gives_its_rows_in_order(shop, elsewhere, embedder):
    client = shop(concurrency=2)
    texts = [f"text {number}" for number in range(12)]
    elsewhere.claims(*texts[2:4])
    rows = Background(
        lambda: [block.vectors.tobytes() for block in client.embed_iter(texts, block_size=2)]
    )
    waits(client)
    elsewhere.pays(texts[2])
    elsewhere.gives_up(texts[3])
    assert b"".join(rows.end()) == vectors_of(texts, WIDTH).tobytes()
    assert embedder.meter.billed_texts == dict.fromkeys([*texts[:2], *texts[3:]], 1)


def test_threads_follow_the_one_that_waits_for_another_process(shop, elsewhere, embedder):
    client = shop()
    elsewhere.claims("theirs")
    calls = [Background(lambda: client.embed(["theirs", "own"])) for _ in range(3)]
    waits(client)
    elsewhere.gives_up("theirs")
    for call in calls:
        right(call.end(), ["theirs", "own"])
    assert embedder.meter.billed_texts == {"theirs": 1, "own": 1}


def test_calls_that_wait_for_each_other_and_for_the_same_process_all_end(shop, elsewhere, embedder):
    """Each follows the other for one text, and the other process for the other text."""
    client = shop()
    elsewhere.claims("x", "y")
    claims = client._engine.cache.in_flight
    one = Background(lambda: client.embed(["x", "GATE"]))
    assert embedder.inside.wait(SECONDS)
    two = Background(lambda: client.embed(["y", "x"]))
    until(lambda: len(claims._waiting) == 1)
    three = Background(lambda: client.embed(["x", "y"]))
    until(lambda: sum(map(len, claims._waiting.values())) == 3)
    elsewhere.gives_up("x", "y")
    until(lambda: embedder.meter.billed_texts == {"y": 1})
    embedder.go.set()
    right(one.end(), ["x", "GATE"])
    right(two.end(), ["y", "x"])
    right(three.end(), ["x", "y"])
    assert embedder.meter.billed_texts == {"x": 1, "y": 1, "GATE": 1}


# What this process has claimed


ENDS = {
    "refused": TokenBudgetExceeded,
    "failed": AuthenticationFailed,
    "interrupted": SystemExit,
    "stopped": Stopped,
}


@pytest.mark.parametrize("how", [*ENDS, "kept as failed"])
def test_a_call_that_ends_without_its_texts_leaves_no_claim(
    shop, elsewhere, embedder, how, monkeypatch
):
    config = {"budget": {"total_token_limit": 1}} if how == "refused" else {}
    client, stop = shop(**config), Stop()
    client.open()
    texts = ["GATE", "b", "c"]
    embed = embedder.embed

    def failing(request):
        if how == "failed":
            raise AuthenticationFailed("no", billed="no")
        if "c" in request.texts:
            # Of the one text: others were served before.
            until(lambda: embedder.meter.billed_requests == 2)
            raise RequestRejected("no", billed="no")
        return embed(request)

    if how in ("failed", "kept as failed"):
        monkeypatch.setattr(embedder, "embed", failing)
        embedder.go.set()
    call = Background(
        lambda: client._embed(
            texts, stop=stop, on_error="keep" if how == "kept as failed" else "raise"
        )
    )
    if how in ("interrupted", "stopped"):
        assert embedder.inside.wait(SECONDS)
        assert elsewhere.claims("GATE") == [False]
        if how == "interrupted":
            monkeypatch.setattr(
                type(client._engine), "renew_claims", lambda _: (_ for _ in ()).throw(SystemExit)
            )
        else:
            stop.set()
        embedder.go.set()
    if how == "kept as failed":
        assert call.end().ok.tolist() == [True, True, False]
    else:
        with pytest.raises(ENDS[how]):
            call.end()
    billed = set(embedder.meter.billed_texts)
    assert elsewhere.claims(*texts) == [text not in billed for text in texts]


def test_the_lease_is_renewed_while_an_answer_is_waited_for(shop, elsewhere, embedder):
    client = shop()
    client.open()
    clock = [time.time()]
    for store in (client._engine.cache.store, elsewhere.store):
        store.claims._now = lambda: clock[0]
    call = Background(lambda: client.embed(["GATE"]))
    assert embedder.inside.wait(SECONDS)
    for _ in range(4):
        clock[0] += 19
        own = client._engine.cache.store.claims._own.get(None)
        until(lambda own=own: own.renewed >= round(clock[0] * 1e6))
        assert elsewhere.claims("GATE") == [False]
    embedder.go.set()
    right(call.end(), ["GATE"])


def test_the_lease_is_renewed_while_money_is_waited_for(shop, elsewhere, monkeypatch):
    client = shop(budget={"daily_token_limit": 10**6})
    client.open()
    clock = [time.time()]
    for store in (client._engine.cache.store, elsewhere.store):
        store.claims._now = lambda: clock[0]
    seen = []

    def held_by_others(*_, final, **__):
        if not final:
            raise TighterBoundNeeded
        if len(seen) == 4:
            monkeypatch.undo()
        seen.append(elsewhere.claims("own"))
        clock[0] += 19
        raise HeldLoosely(TokenBudgetExceeded("others reserve it"))

    monkeypatch.setattr(client._engine.account.ledger, "hold", held_by_others)
    monkeypatch.setattr(client._engine.account.ledger, "hold_and_send", held_by_others)
    right(client.embed(["own"]), ["own"])
    assert seen == [[False]] * 5


@pytest.mark.parametrize("step", ["take", "renew", "write_down"])
def test_a_claim_that_cannot_be_written_harms_no_call(shop, embedder, step, monkeypatch):
    told = []
    client = shop(observers=[told.append])
    client.open()

    def full(*_, **__):
        raise StorageFull("no room")

    monkeypatch.setattr(client._engine.cache.store.claims, step, full)
    if step == "write_down":
        monkeypatch.setattr(client._engine.cache.store, "put", full)
    embedder.go.set()
    right(client.embed(["a", "b", "GATE"]), ["a", "b", "GATE"])
    right(client.embed(["c"]), ["c"])
    problems = [event for event in told if isinstance(event, CacheProblem)]
    assert len(problems) == 1, "it is told of once"


def test_where_nothing_can_be_kept_others_do_not_wait_for_it(shop, elsewhere, embedder):
    client = shop(cache_cap=0)
    embedder.go.set()
    right(client.embed(["a"]), ["a"])
    assert elsewhere.claims("a") == [True], "it was given up with the vector"
    right(client.embed(["a", "b"]), ["a", "b"])
    assert elsewhere.claims("b") == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_a_fork_waits_for_its_parent(shop, embedder):
    client = shop()
    call = Background(lambda: client.embed(["GATE", "x"]))
    assert embedder.inside.wait(SECONDS)
    until(lambda: embedder.meter.billed_texts == {"x": 1})
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            claims = client._engine.cache.store.claims
            gone = claims.gone
            claims.gone = lambda keys: os.write(write, b".") and gone(keys)
            embedder.go.set()
            result = client.embed(["GATE", "x", "own"])
            right(result, ["GATE", "x", "own"])
            assert result.reused.tolist() == [True, True, False]
            status = 0
        finally:
            os._exit(status)
    assert os.read(read, 1) == b".", "it waits"
    embedder.go.set()
    right(call.end(), ["GATE", "x"])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
