"""Is each text paid for once, whoever asks for it, and does each row get its own vector?"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import threading
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from waiting import SECONDS, SINGLE, Gated, until

from embedcore import EmbeddingClient
from embedcore.errors import (
    AuthenticationFailed,
    InputTooLong,
    OutcomeUnknown,
    RequestRejected,
    StorageFull,
    TokenBudgetExceeded,
    TransientProviderError,
)
from embedcore.events import Cached, CacheProblem, Reserved
from embedcore.policy.engine import Stop
from embedcore.policy.threads import Stopped
from embedcore.provider.types import Price
from embedcore.storage.keys import Keys
from embedcore.testing import FakeClock, FakeEmbedder, tokens_of, vector_of, vectors_of
from embedcore.testing.fakes.embedder import FakeTokenizer

WIDTH = 8


def right(result, texts, *, salt=""):
    assert result.ok.all()
    assert result.vectors.tobytes() == vectors_of(texts, WIDTH, salt=salt).tobytes()


class Calls:
    """Calls in threads of their own, and how they ended."""

    def __init__(self):
        self.threads, self.results, self.errors = {}, {}, {}

    def start(self, name, call):
        def run():
            try:
                self.results[name] = call()
            except BaseException as error:  # noqa: BLE001 - looked at by the test
                self.errors[name] = error

        self.threads[name] = threading.Thread(target=run, daemon=True)
        self.threads[name].start()

    def end(self):
        for name, thread in self.threads.items():
            thread.join(SECONDS)
            assert not thread.is_alive(), f"{name} waits for ever"


@pytest.fixture
def shop(home):
    """``shop(embedder, …)``: a client of an embedder in this process, over one home."""
    opened = []

    def open_one(embedder=None, *, observers=(), **config):
        embedder = embedder or FakeEmbedder(info=SINGLE)
        waits = {"first_wait": 0.001, "longest_wait": 0.002, **config.pop("retry", {})}
        config = {"home": home, "cache": True, "retry": waits, **config}
        opened.append(EmbeddingClient(embedder=embedder, config=config, observers=observers))
        return opened[-1]

    yield open_one
    for client in opened:
        client.close()


def hurried(client, **engine):
    """It waits only a moment for what is under way when a call ends."""
    running = client._running
    hurried = replace(running.engine, grace=0.1, **engine)
    client._opened._thing = replace(running, engine=hurried)
    return client


def waiting_for(client, count):
    """Until so many calls wait for what another buys."""
    claims = client._engine.cache.in_flight
    until(lambda: len({one for some in claims._waiting.values() for one, _ in some}) == count)


def nothing_is_claimed(client):
    claims = client._engine.cache.in_flight
    return claims._owners == {} == claims._waiting


# Over HTTP, in every interleaving


def begin_together(calls):
    """Every call in a thread, all let go at the same moment."""
    together = threading.Barrier(len(calls))
    running = Calls()
    for number, call in enumerate(calls):

        def run(call=call):
            together.wait(SECONDS)
            return call()

        running.start(number, run)
    running.end()
    assert running.errors == {}
    return [running.results[number] for number in range(len(calls))]


numbers = st.lists(st.integers(0, 11), max_size=14)
count = itertools.count()


@pytest.mark.fault(115)
@settings(
    max_examples=settings.default.max_examples // 2,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    before=st.sets(st.integers(0, 11)),
    wants=st.lists(numbers, min_size=1, max_size=4),
    size=st.integers(1, 4),
    two=st.booleans(),
)
@example(before={1}, wants=[[0, 1, 2]], size=3, two=False)
@example(before={1, 3}, wants=[[3, 3, 0, 1, 0], [1, 0, 2, 3]], size=2, two=True)
def test_whatever_was_there_row_i_is_the_vector_of_text_i(
    server, connect, tmp_path, before, wants, size, two
):
    folder, name = tmp_path / str(next(count)), next(count)
    options = {"max_texts_per_request": size}
    clients = [connect(cache=True, home=folder, options=options) for _ in range(1 + two)]
    named = [[f"text {name} {number}" for number in wanted] for wanted in wants]
    stored = {f"text {name} {number}" for number in before}
    clients[0].embed(sorted(stored))
    results = begin_together(
        [
            lambda client=client, texts=texts: client.embed(texts)
            for client, texts in zip(itertools.cycle(clients), named, strict=False)
        ]
    )
    charged = Counter()
    for texts, result in zip(named, results, strict=True):
        right(result, texts)
        first = [texts.index(text) == row for row, text in enumerate(texts)]
        for row, text in enumerate(texts):
            assert result.reused[row] or first[row]
            charged[text] += not result.reused[row]
        assert result.usage.requests <= len(texts)
    every = stored.union(*named)
    billed = {text: n for text, n in server.meter.billed_texts.items() if text in every}
    assert billed == dict.fromkeys(every, 1)
    assert {text for text, times in charged.items() if times} == every - stored
    assert all(times <= 1 for times in charged.values())
    for client in clients:
        assert nothing_is_claimed(client)
        client.close()


def test_16_threads_with_overlapping_lists_pay_each_text_once(server, connect):
    client = connect(cache=True, options={"max_texts_per_request": 5})
    server.latency = 0.01
    texts = [f"text {number}" for number in range(80)]
    lists = [texts[start : start + 50] + texts[start + 20 : start + 25] for start in range(16)]
    results = begin_together([lambda some=some: client.embed(some) for some in lists])
    for some, result in zip(lists, results, strict=True):
        right(result, some)
    assert server.meter.billed_texts == dict.fromkeys(texts[: 15 + 50], 1)
    spent = sum(result.usage.tokens for result in results)
    assert spent == server.meter.billed_tokens
    assert nothing_is_claimed(client)


STORM = """
import json, random, sys, threading
from embedcore import EmbeddingClient
from embedcore.testing import vectors_of

settings, seed = json.loads(sys.argv[1]), sys.argv[2]
texts = [f"text {number}" for number in range(150)]
wrong = []
with EmbeddingClient(**settings) as client:
    print("ready", flush=True)
    sys.stdin.readline()
    def go(name):
        dice = random.Random(f"{seed} {name}")
        for _ in range(6):
            some = [dice.choice(texts) for _ in range(40)]
            result = client.embed(some)
            if not result.ok.all() or result.vectors.tobytes() != vectors_of(some, 8).tobytes():
                wrong.append(some)
    threads = [threading.Thread(target=go, args=(name,)) for name in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
print(len(wrong))
"""


@pytest.mark.fault(118)
def test_a_storm_of_partial_reuse_from_four_processes_with_four_threads_each(
    server, connect, home, ledger, forks
):
    options = {"base_url": server.base_url, "api_key": server.api_key, "dimensions": WIDTH}
    given_ = {
        "options": {**options, "max_texts_per_request": 7},
        "config": {"home": str(home), "cache": True},
    }
    running = [
        forks(STORM, json.dumps(given_), seed, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for seed in range(4)
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=300)[0] for process in running] == ["0\n"] * 4
    assert [process.returncode for process in running] == [0] * 4
    # Between processes nobody waits for anybody: at most each of them buys a text, once.
    assert max(server.meter.billed_texts.values()) <= 4
    used = ledger()
    assert used.spent.tokens == server.meter.billed_tokens
    texts = list(server.meter.billed_texts)
    bill = server.meter.billed_tokens
    result = connect(cache=True).embed(texts)
    right(result, texts)
    assert result.reused.all()
    assert server.meter.billed_tokens == bill


# Who leads and who follows


@pytest.mark.parametrize("own_client", [False, True])
def test_what_a_failing_call_left_is_charged_by_exactly_one_of_those_who_wait(shop, own_client):
    embedder = Gated(script=lambda request, _: refuse(request, AuthenticationFailed("no")))
    client = shop(embedder, concurrency=1)
    other = shop(embedder) if own_client else client
    calls = Calls()
    calls.start("leader", lambda: client.embed(["GATE", "x", "y", "z"]))
    assert embedder.inside.wait(SECONDS)
    for name in "abc":
        # The one request at a time that may be in flight is the leader's: others of a few texts
        # would wait for a place, and claim nothing. These do not pass the front.
        ask = partial(other.embed, ["z", name, "x", "z"], on_arrival=lambda _: None)
        calls.start(name, ask)
    waiting_for(client, 3)
    embedder.go.set()
    calls.end()
    assert list(calls.errors) == ["leader"]
    assert isinstance(calls.errors["leader"], AuthenticationFailed)
    for name in "abc":
        right(calls.results[name], ["z", name, "x", "z"])
        assert not calls.results[name].reused[1]
        assert calls.results[name].reused[3]
    charged = [calls.results[name].reused.tolist() for name in "abc"]
    assert sum(not row[0] for row in charged) == sum(not row[2] for row in charged) == 1
    assert embedder.meter.billed_texts == dict.fromkeys(["x", "z", "a", "b", "c"], 1)
    assert nothing_is_claimed(client)


def refuse(request, error):
    return error if any("GATE" in text for text in request.texts) else None


def interrupted(shop, embedder):
    embedder._script = lambda request, _: refuse(request, KeyboardInterrupt())
    return shop(embedder, concurrency=1).embed, embedder.go.set, KeyboardInterrupt


def stopped(shop, embedder):
    client, stop = hurried(shop(embedder, concurrency=1)), Stop()
    return lambda texts: client._embed(texts, stop=stop), stop.set, Stopped


def too_late(shop, embedder):
    clock = FakeClock()
    client = shop(embedder, concurrency=1, retry={"deadline": 30})
    hurried(client, monotonic=clock.monotonic)
    return client.embed, lambda: clock.advance(31), OutcomeUnknown


@pytest.mark.parametrize("ending", [interrupted, stopped, too_late])
def test_a_call_that_is_ended_leaves_no_claim_behind(shop, ending):
    embedder = Gated()
    embed, end, error = ending(shop, embedder)
    calls = Calls()
    calls.start("leader", lambda: embed(["GATE", "x", "y"]))
    assert embedder.inside.wait(SECONDS)
    second = shop(embedder)
    calls.start("follower", lambda: second.embed(["x", "own", "y"]))
    waiting_for(second, 1)
    end()
    calls.end()
    embedder.go.set()
    assert isinstance(calls.errors.pop("leader"), error)
    assert calls.errors == {}
    right(calls.results["follower"], ["x", "own", "y"])
    assert {text: embedder.meter.billed_texts[text] for text in "xy"} == {"x": 1, "y": 1}
    assert nothing_is_claimed(second)


def test_a_call_that_waits_can_be_ended_and_has_its_own_part(shop):
    embedder = Gated()
    client, stop = shop(embedder), Stop()
    calls = Calls()
    calls.start("leader", lambda: client.embed(["GATE"]))
    assert embedder.inside.wait(SECONDS)
    calls.start("follower", lambda: client._embed(["own", "GATE"], stop=stop))
    waiting_for(client, 1)
    until(lambda: embedder.meter.billed_texts["own"])
    stop.set()
    until(lambda: "follower" in calls.errors)
    assert isinstance(calls.errors["follower"], Stopped)
    assert calls.errors["follower"].partial.ok.tolist() == [True, False]
    embedder.go.set()
    calls.end()
    right(calls.results["leader"], ["GATE"])


def test_a_call_that_waits_keeps_its_deadline(shop):
    embedder = Gated()
    leader, follower = shop(embedder), shop(embedder, retry={"deadline": 0.3})
    calls = Calls()
    calls.start("leader", lambda: leader.embed(["GATE"]))
    assert embedder.inside.wait(SECONDS)
    with pytest.raises(TransientProviderError, match="another call of this program") as caught:
        follower.embed(["GATE"])
    assert caught.value.billed == "no"
    embedder.go.set()
    calls.end()
    right(calls.results["leader"], ["GATE"])
    assert embedder.meter.billed_texts == {"GATE": 1}


@pytest.mark.parametrize("from_the_store", [False, True])
def test_a_receiver_that_raises_hurts_only_its_own_call(shop, from_the_store):
    embedder = Gated()
    client = shop(embedder)
    calls = Calls()

    def full(_):
        raise StorageFull("the disk of the output")

    if from_the_store:
        embedder.go.set()
        client.embed(["GATE"])
    calls.start("leader", lambda: client.embed(["GATE", "x"]))
    assert embedder.inside.wait(SECONDS)
    calls.start("bad", lambda: client.embed(["GATE"], on_arrival=full))
    calls.start("good", lambda: client.embed(["GATE"]))
    if not from_the_store:
        waiting_for(client, 2)
    embedder.go.set()
    calls.end()
    assert list(calls.errors) == ["bad"]
    assert "of the output" in str(calls.errors["bad"])
    right(calls.results["leader"], ["GATE", "x"])
    right(calls.results["good"], ["GATE"])
    assert embedder.meter.billed_texts == {"GATE": 1, "x": 1}


@pytest.mark.parametrize("from_the_store", [False, True])
def test_what_a_receiver_does_to_its_vectors_is_seen_by_nobody_else(shop, home, from_the_store):
    embedder = Gated()
    client = shop(embedder)

    def spoil(arrival):
        # Where it may not be written there is nothing to be seen by others.
        with contextlib.suppress(ValueError):
            arrival.vectors[:] = 0

    if from_the_store:
        client.embed(["GATE"], on_arrival=embedder.go.set() or spoil)
    calls = Calls()
    calls.start("leader", lambda: client.embed(["GATE"], on_arrival=spoil))
    assert embedder.inside.wait(SECONDS)
    seen = []
    for name in "ab":
        calls.start(name, lambda: client.embed(["GATE"], on_arrival=spoil))
    calls.start(
        "c",
        lambda: client.embed(["GATE"], on_arrival=lambda one: seen.append(one.vectors.copy())),
    )
    if not from_the_store:
        waiting_for(client, 3)
    embedder.go.set()
    calls.end()
    assert calls.errors == {}
    for result in calls.results.values():
        right(result, ["GATE"])
    assert [one.tobytes() for one in seen] == [vector_of("GATE", WIDTH).tobytes()]
    right(client.embed(["GATE"]), ["GATE"])
    assert embedder.meter.billed_texts == {"GATE": 1}


def test_rows_that_failed_for_one_are_tried_by_the_other(shop):
    def script(request, number):
        return RequestRejected("not now", billed="no") if number == 0 else None

    embedder = Gated(script=script)
    client = shop(embedder)
    calls = Calls()
    calls.start("leader", lambda: client.embed(["GATE"], on_error="keep"))
    assert embedder.inside.wait(SECONDS)
    calls.start("follower", lambda: client.embed(["GATE"]))
    waiting_for(client, 1)
    embedder.go.set()
    calls.end()
    assert not calls.results["leader"].ok[0]
    right(calls.results["follower"], ["GATE"])
    assert not calls.results["follower"].reused[0]


def test_what_failed_for_a_call_is_free_before_the_call_ends(shop):
    def script(request, number):
        return RequestRejected("no", billed="no") if request.texts == ["BAD"] else None

    embedder = Gated(script=script)
    client = shop(embedder)
    calls = Calls()
    calls.start("leader", lambda: client.embed(["GATE", "BAD"], on_error="keep"))
    assert embedder.inside.wait(SECONDS)
    result = client.embed(["BAD", "x"], on_error="keep")
    assert result.ok.tolist() == [False, True]
    assert not embedder.go.is_set()
    embedder.go.set()
    calls.end()
    assert calls.results["leader"].ok.tolist() == [True, False]


def test_a_text_that_had_to_be_shortened_is_handed_to_nobody_as_whole(shop):
    class Short(Gated):
        def embed(self, request):
            super().embed(replace(request, texts=()))
            if any(len(text) > 20 for text in request.texts):
                if "GATE" in request.texts[0]:
                    self.inside.set()
                    assert self.go.wait(SECONDS)
                raise InputTooLong("too long for the server", billed="no")
            return FakeEmbedder.embed(self, request)

    long = "GATE " + "x" * 30
    embedder = Short(info=replace(SINGLE, max_input_tokens=20), tokenizer=FakeTokenizer())
    client = shop(embedder)
    calls = Calls()
    calls.start("leader", lambda: client.embed([long]))
    assert embedder.inside.wait(SECONDS)
    calls.start("follower", lambda: client.embed([long, "other"]))
    waiting_for(client, 1)
    embedder.go.set()
    calls.end()
    assert calls.errors == {}
    for result in [*calls.results.values(), client.embed([long])]:
        cut = result.tokens_cut[0]
        assert cut > 0
        kept = FakeTokenizer().prefix(long, tokens_of(long) - cut)
        assert result.vectors[0].tobytes() == vector_of(kept, WIDTH).tobytes()
    # As it was sent it is kept, for whoever has exactly that.
    (kept_text,) = {text for text in embedder.meter.billed_texts if "GATE" in text}
    bill = embedder.meter.billed_texts[kept_text]
    again = client.embed([kept_text])
    right(again, [kept_text])
    assert again.reused.all()
    assert again.tokens_cut == {}
    assert embedder.meter.billed_texts[kept_text] == bill


@pytest.mark.fault(127)
def test_a_reply_that_comes_too_late_is_kept_nevertheless(shop):
    embedder = Gated()
    clock, calls = FakeClock(), Calls()
    client = hurried(shop(embedder, retry={"deadline": 30}), monotonic=clock.monotonic)
    calls.start("late", lambda: client.embed(["GATE"]))
    assert embedder.inside.wait(SECONDS)
    clock.advance(31)
    calls.end()
    assert isinstance(calls.errors["late"], OutcomeUnknown)
    embedder.go.set()
    until(lambda: embedder.meter.billed_texts["GATE"] == 1)
    other = shop(embedder)
    until(lambda: found_without_buying(other, "GATE"))
    right(other.embed(["GATE"]), ["GATE"])
    assert embedder.meter.billed_texts == {"GATE": 1}


def found_without_buying(client, text):
    there = []
    cache, engine = client._engine.cache, client._engine
    keys = Keys(
        provider=engine.info.provider,
        model=engine.info.model,
        fingerprint=engine.fingerprint,
        input_type=None,
    ).of([text])
    cache.store.get(keys, WIDTH, lambda places, _: there.extend(places))
    return bool(there)


# On and off


def test_a_second_program_pays_nothing_and_says_so(server, connect, home):
    texts = ["a", "b", "a"]
    told = []
    with connect(cache=True) as client:
        first = client.embed(texts)
    again = connect(cache=True, observers=[told.append]).embed([*texts, "c"])
    right(again, [*texts, "c"])
    assert first.reused.tolist() == [False, False, True]
    assert again.reused.tolist() == [True, True, True, False]
    assert again.usage.tokens == server.meter.billed_tokens - first.usage.tokens == 1
    assert [event.texts for event in told if isinstance(event, Cached)] == [2]
    assert server.meter.billed_texts == dict.fromkeys("abc", 1)


def test_one_call_without_it_buys_anew_and_keeps_nothing(server, connect, home):
    client = connect(cache=True)
    client.embed(["a"])
    fresh = client.embed(["a", "b"], cache=False)
    right(fresh, ["a", "b"])
    assert not fresh.reused.any()
    assert server.meter.billed_texts == {"a": 2, "b": 1}
    assert not client.embed(["b"]).reused.any(), "it was not kept"
    assert client.embed(["a", "b"]).reused.all()


@pytest.mark.parametrize("where", ["config", "profile", "environment"])
def test_turned_off_there_is_no_file(server, home, monkeypatch, where, name_settings):
    config = {"home": str(home), "model": "docs"}
    profile = {"model": "openai:text-embedding-3-small", "options": {"dimensions": WIDTH}}
    monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    if where == "config":
        config["cache"] = False
    elif where == "profile":
        config["cache"], profile["cache"] = True, False
    else:
        monkeypatch.setenv("EMBEDCORE_CACHE", "0")
    lines = [f"{key} = {json.dumps(value)}" for key, value in config.items()]
    lines += ["[profiles.docs]", f"model = '{profile['model']}'", "options.dimensions = 8"]
    lines += ["cache = false"] if "cache" in profile else []
    name_settings("\n".join(lines))
    with EmbeddingClient() as client:
        for _ in range(2):
            right(client.embed(["a"]), ["a"])
    assert server.meter.billed_texts == {"a": 2}
    assert not (home / "vectors").exists()


@pytest.mark.parametrize(
    ("info", "kept"),
    [
        ({}, True),
        ({"price": None}, False),
        ({"price": Price()}, False),
        ({"local": True}, False),
    ],
)
def test_by_itself_it_is_on_for_what_costs(shop, home, info, kept):
    client = shop(FakeEmbedder(info=replace(SINGLE, **info)), cache=None)
    client.embed(["a"])
    assert (home / "vectors").exists() == kept
    again = shop(FakeEmbedder(info=replace(SINGLE, **info)), cache=True)
    assert again.embed(["a"]).reused.all() == kept, "asked for, it is on for all"


def test_the_file_can_be_elsewhere(shop, home, tmp_path):
    client = shop(cache_dir=tmp_path / "elsewhere")
    client.embed(["a"])
    assert (tmp_path / "elsewhere" / "vectors").exists()
    assert not (home / "vectors").exists()


@pytest.mark.fault(115)
def test_what_decides_the_vector_is_never_mixed(shop):
    infos = {
        "plain": SINGLE,
        "wide": replace(SINGLE, dimensions=WIDTH * 2),
        "elsewhere": replace(SINGLE, endpoint="https://other.example"),
        "other": replace(SINGLE, model="other"),
        "variant": replace(SINGLE, variant="v2"),
        "provider": replace(SINGLE, provider="another"),
    }
    for salt, info in infos.items():
        client = shop(FakeEmbedder(info=info, salt=salt))
        for _ in range(2):
            result = client.embed(["a", "b"])
            expected = vectors_of(["a", "b"], info.dimensions, salt=salt)
            assert result.vectors.tobytes() == expected.tobytes()
        assert result.reused.all()
    typed = FakeEmbedder(info=replace(SINGLE, input_types=("query", "document")))
    client = shop(typed)
    for kind in (None, "query", "document"):
        assert not client.embed(["a"], input_type=kind).reused.any() or kind is None
    assert client.embed(["a"], input_type="query").reused.all()


def test_a_model_of_unknown_width_is_read_back(shop):
    def open_one():
        return shop(Widthless(info=replace(SINGLE, dimensions=None)))

    first = open_one()
    right(first.embed(["a", "b"]), ["a", "b"])
    again = open_one()
    result = again.embed(["b", "a"])
    right(result, ["b", "a"])
    assert result.reused.all()


class Widthless(FakeEmbedder):
    def embed(self, request):
        inner = FakeEmbedder(info=replace(self.info, dimensions=WIDTH))
        return inner.embed(request)


# Money


@pytest.mark.fault(92)
def test_what_is_there_costs_nothing_even_without_any_money(server, connect, ledger):
    texts = [f"text {number}" for number in range(30)]
    connect(cache=True).embed(texts)
    bill, told = server.meter.billed_tokens, []
    poor = connect(cache=True, daily=0, observers=[told.append])
    right(poor.embed(texts), texts)
    assert not [event for event in told if isinstance(event, Reserved)]
    with pytest.raises(TokenBudgetExceeded) as caught:
        poor.embed([*texts, "one more"])
    partial = caught.value.partial
    assert partial.ok.tolist() == [True] * 30 + [False]
    assert server.meter.billed_tokens == bill == ledger().spent.tokens
    assert nothing_is_claimed(poor)


def test_only_what_must_be_charged_is_held(connect, server, ledger):
    texts = [f"text {number}" for number in range(30)]
    connect(cache=True).embed(texts)
    spent = ledger().spent.tokens
    tight = connect(cache=True, daily=spent + 4)
    right(tight.embed([*texts, "one"]), [*texts, "one"])
    assert ledger().spent.tokens == server.meter.billed_tokens == spent + 1


def test_a_call_that_waits_for_another_keeps_no_money_from_it(shop, ledger):
    """What a failed row gave back must not stand in the way of the call that is waited for."""
    embedder = Gated(
        script=lambda request, _: (
            RequestRejected("no", billed="no") if "BAD" in request.texts[0] else None
        )
    )
    client = shop(embedder, budget={"daily_token_limit": 100})
    calls = Calls()
    calls.start("leader", lambda: client.embed(["GATE"]))
    assert embedder.inside.wait(SECONDS)
    calls.start("follower", lambda: client.embed(["BAD " + "x" * 76, "GATE"], on_error="keep"))
    waiting_for(client, 1)
    until(lambda: ledger().held.tokens <= len("GATE"))
    embedder.go.set()
    calls.end()
    assert calls.errors == {}
    assert calls.results["follower"].ok.tolist() == [False, True]


# Where the store cannot help


def spoiled(path):
    path.write_bytes(b"no database at all, and long enough to be looked at\n" * 100)


def emptied(path):
    path.write_bytes(b"")


def a_folder(path):
    path.mkdir()


@pytest.mark.fault(120)
@pytest.mark.parametrize("damage", [spoiled, emptied, a_folder])
def test_a_store_that_is_broken_changes_nothing_but_the_bill(server, connect, home, ledger, damage):
    (home / "vectors").mkdir(parents=True)
    damage(home / "vectors" / "index.db")
    told = []
    client = connect(cache=True, observers=[told.append], daily=10_000)
    texts = [f"text {number}" for number in range(20)]
    for _ in range(3):
        right(client.embed(texts), texts)
    assert len([event for event in told if isinstance(event, CacheProblem)]) == 1
    assert server.meter.billed_texts == dict.fromkeys(texts, 3)
    assert ledger().spent.tokens == server.meter.billed_tokens
    assert ledger().held.tokens == 0


@pytest.mark.fault(120)
def test_a_store_that_is_full_changes_nothing_but_the_bill(server, connect, ledger, caplog):
    told = []
    client = connect(cache=True, cache_cap=0, observers=[told.append])
    texts = [f"text {number}" for number in range(20)]
    for _ in range(2):
        right(client.embed(texts), texts)
    assert len([event for event in told if isinstance(event, CacheProblem)]) == 1
    assert "what does not fit is not kept" in caplog.text
    assert server.meter.billed_texts == dict.fromkeys(texts, 2)
    assert ledger().spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(120)
def test_threads_share_what_they_buy_even_without_a_store(shop):
    embedder = Gated()
    client = shop(embedder, cache_cap=0)
    calls = Calls()
    for name in "abcd":
        calls.start(name, lambda: client.embed(["GATE"]))
    waiting_for(client, 3)
    embedder.go.set()
    calls.end()
    assert calls.errors == {}
    assert embedder.meter.billed_texts == {"GATE": 1}


@pytest.mark.fault(120)
def test_a_store_that_another_program_has_locked_delays_a_call_once(
    connect, server, home, monkeypatch, forks
):
    connect(cache=True).embed(["a"])
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = forks(HOLD_THE_LOCK, home / "vectors" / "index.db", **streams)
    assert holder.stdout.readline() == "locked\n"
    told = []
    client = connect(cache=True, observers=[told.append], options={"max_texts_per_request": 2})
    store = client._engine.cache.store
    store.database._timeout = 0.5
    waits = []

    def counted(step):
        return lambda *arguments, **options: waits.append(step) or step(*arguments, **options)

    monkeypatch.setattr(store, "put", counted(store.put))
    monkeypatch.setattr(store.claims, "take", counted(store.claims.take))
    texts = [f"text {number}" for number in range(16)]
    for _ in range(3):
        right(client.embed(texts), texts)
    assert len(waits) == 1, "each request waited for it"
    assert len([event for event in told if isinstance(event, CacheProblem)]) == 1
    assert "stayed locked" in next(e.message for e in told if isinstance(e, CacheProblem))
    holder.kill()
    holder.communicate()


HOLD_THE_LOCK = """
import sys
from embedcore.storage.database import driver
connection = driver().connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.fault(116)
def test_a_damaged_vector_is_charged_again_and_told_of(server, connect, home, flip_vectors):
    texts = ["a", "b", "c"]
    with connect(cache=True) as client:
        client.embed(texts)
        flip_vectors(home / "vectors", "id = 2")
    told = []
    client = connect(cache=True, observers=[told.append])
    result = client.embed(texts)
    right(result, texts)
    assert result.reused.tolist() == [True, False, True]
    assert "1 damaged" in next(e.message for e in told if isinstance(e, CacheProblem))
    assert client.embed(texts).reused.all(), "it is whole again"
    assert server.meter.billed_texts == {"a": 1, "b": 2, "c": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_of_a_fork_buys_and_finds_on_its_own(server, connect, home):
    client = connect(cache=True)
    client.embed(["a"])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            result = client.embed(["a", "b"])
            right(result, ["a", "b"])
            assert result.reused.tolist() == [True, False]
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    result = client.embed(["b", "a"])
    right(result, ["b", "a"])
    assert result.reused.all()
    assert server.meter.billed_texts == {"a": 1, "b": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_gets_what_its_parent_is_paying_for(shop):
    """As any other process does: the threads that its copy of the parent's calls waits for are not
    in it."""
    embedder = Gated()
    client = shop(embedder)
    calls = Calls()
    calls.start("leader", lambda: client.embed(["GATE"]))
    assert embedder.inside.wait(SECONDS)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            mine = Gated()
            mine.go.set()
            own = shop(mine)
            assert own.fingerprint == client.fingerprint
            right(own.embed(["GATE"]), ["GATE"])
            assert not mine.calls
            status = 0
        finally:
            os._exit(status)
    embedder.go.set()
    status = os.waitpid(child, 0)[1]
    calls.end()
    assert os.waitstatus_to_exitcode(status) == 0
