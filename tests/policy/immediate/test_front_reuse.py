"""Are the callers of a shared request looked up, and do they claim, at once and each for itself?"""

from __future__ import annotations

import asyncio
import contextvars
import tempfile
import threading
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings, strategies as st
from waiting import SECONDS, until

from embedcore.events import Cached, Progress
from embedcore.policy.cache import VectorCache
from embedcore.policy.immediate.front import Front
from embedcore.policy.immediate.reuse import keys_of
from embedcore.storage.amounts import Amount
from embedcore.storage.keys import Origin
from embedcore.storage.vectors import VectorStore
from embedcore.testing import FakeEmbedder, vectors_of
from embedcore.testing.fakes.embedder import FAKE_INFO

INFO = replace(FAKE_INFO, dimensions=8)
CALLER = contextvars.ContextVar("CALLER", default=-1)
TEXTS = [f"text {number}" for number in range(7)]


class Folder:
    """A cache as this process sees it, and as another one does."""

    def __init__(self, path):
        self.store, self.other, self.third = (VectorStore(path, cap=10**9) for _ in range(3))
        self.cache = VectorCache(self.store, observe=lambda event: None)

    def named(self, engine):
        self._keys = keys_of(engine, None)
        self._origin = Origin(model=engine.label, fingerprint=engine.fingerprint)

    def keys(self, texts):
        return self._keys.of(list(texts))

    def pays(self, texts):
        if texts:
            self.other.put(self.keys(texts), vectors_of(list(texts), 8), self._origin)

    def claims(self, texts):
        self.other.claims.take(self.keys(texts))

    def gives_up(self, texts):
        self.other.claims.give_up(self.keys(texts))
        self.other.claims.write_down()

    def close(self):
        for store in (self.store, self.other, self.third):
            store.close()


def test_many_callers_need_one_look_up_one_claim_and_one_put(desk, tmp_path, monkeypatch):
    folder, steps = Folder(tmp_path / "vectors"), Counter()
    fake = FakeEmbedder(info=INFO)

    def count(owner, name):
        step = getattr(owner, name)

        def counted(*arguments, **how):
            steps[name] += 1
            return step(*arguments, **how)

        monkeypatch.setattr(owner, name, counted)

    count(folder.store, "get")
    count(folder.store, "put")
    count(folder.store.claims, "take")
    with desk(fake, threads=1, cache=folder.cache) as one:
        folder.named(one.engine)
        folder.pays([f"question {number}" for number in range(10)])
        front = Front(one.engine)

        async def main():
            asked = [front.aembed(one.engine, [f"question {number}"]) for number in range(40)]
            return await asyncio.gather(*asked)

        for number, result in enumerate(asyncio.run(main())):
            one.right(result, [f"question {number}"])
            assert result.reused.all() == (number < 10)
        assert steps == {"get": 1, "take": 1, "put": 1}
        assert len(fake.calls) == 1
        one.check()
        front.close()
    folder.close()


class Cancelling:
    """Cancels callers at points that are reached in other threads, and waits until they know."""

    def __init__(self, asked):
        self._asked = asked
        self.loop = self.tasks = None

    def at(self, moment):
        if self.loop is None:
            return
        for caller, task in zip(self._asked, self.tasks, strict=True):
            if caller["cancelled"] == moment and not task.done():
                self.loop.call_soon_threadsafe(task.cancel)
                until(task.done)


callers = st.lists(
    st.fixed_dictionaries(
        {
            "texts": st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3),
            "cancelled": st.sampled_from([None, None, None, "looked up", "in flight"]),
        }
    ),
    min_size=1,
    max_size=8,
)


def _each(*texts, cancelled=None):
    return {"texts": list(texts), "cancelled": cancelled}


# One that others with its text follow is cancelled before it is sent.
@example(
    asked=[_each("text 0", cancelled="looked up"), _each("text 0"), _each("text 0", "text 1")],
    there=set(),
    elsewhere=set(),
    pays=set(),
)
# All are waited for, one of them in vain.
@example(
    asked=[_each("text 0"), _each("text 0", "text 1"), _each("text 2")],
    there={"text 2"},
    elsewhere={"text 0", "text 1"},
    pays={"text 0"},
)
@given(
    asked=callers,
    there=st.sets(st.sampled_from(TEXTS), max_size=3),
    elsewhere=st.sets(st.sampled_from(TEXTS), max_size=3),
    pays=st.sets(st.sampled_from(TEXTS)),
)
@settings(
    deadline=None,
    max_examples=settings.default.max_examples // 2,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_each_caller_has_what_it_would_have_alone_and_no_text_is_paid_for_twice(
    desk, asked, there, elsewhere, pays
):
    cancelling, heard = Cancelling(asked), defaultdict(list)

    class Watched(FakeEmbedder):
        def embed(self, request):
            cancelling.at("in flight")
            return super().embed(request)

    fake = Watched(info=INFO)
    with tempfile.TemporaryDirectory() as place:
        folder, looked_up = Folder(Path(place) / "vectors"), threading.Event()
        take = folder.store.claims.take

        def taken(*arguments):
            found = take(*arguments)
            looked_up.set()
            cancelling.at("looked up")
            return found

        folder.store.claims.take = taken
        with desk(fake, threads=1, cache=folder.cache) as one:
            one.engine = replace(
                one.engine, observe=lambda event: heard[CALLER.get()].append(event)
            )
            folder.named(one.engine)
            folder.pays(there)
            folder.claims(elsewhere - there)
            found = asyncio.run(
                _ask_all(
                    one,
                    asked,
                    cancelling,
                    looked_up,
                    lambda: _end(folder, elsewhere - there, pays),
                )
            )
            for number, (caller, result) in enumerate(zip(asked, found, strict=True)):
                if isinstance(result, asyncio.CancelledError):
                    assert caller["cancelled"] is not None
                    continue
                one.right(result, caller["texts"])
                assert result.ok.all()
                _check_told(heard[number], caller["texts"], result)
            assert heard.keys() <= set(range(len(asked))), "each hears of itself"
            free = there | (elsewhere & pays)
            assert set(fake.meter.billed_texts).isdisjoint(free)
            assert fake.meter.billed_twice == {}
            assert one.used.held == Amount()
            assert fake.meter.billed_tokens == one.spent
            everything = folder.keys(TEXTS)
            assert not folder.third.claims.take(everything).elsewhere, "no claim is left"
        folder.close()


async def _ask_all(one, asked, cancelling, looked_up, others):
    """``others`` is what another process does once the first were looked up."""
    front = Front(one.engine)

    async def ask(number, texts):
        CALLER.set(number)
        return await front.aembed(one.engine, texts)

    tasks = [
        asyncio.ensure_future(ask(number, caller["texts"])) for number, caller in enumerate(asked)
    ]
    cancelling.tasks, cancelling.loop = tasks, asyncio.get_running_loop()
    ending = threading.Thread(target=lambda: (looked_up.wait(), others()))
    ending.start()
    found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SECONDS)
    looked_up.set()
    await asyncio.to_thread(ending.join, SECONDS)
    front.close()
    return found


def _end(folder, claimed, pays):
    """The other process comes to its end: with vectors of some of its texts."""
    folder.pays(claimed & pays)
    folder.gives_up(claimed)


def _check_told(events, texts, result):
    """It hears of each of its texts once, and what it need not pay for is named."""
    different = len(set(texts))
    done = [event for event in events if isinstance(event, Progress)]
    assert {event.total for event in done} == {different}
    assert [event.done for event in done] == sorted({event.done for event in done})
    assert done[-1].done == different
    reused = {text for text, again in zip(texts, result.reused, strict=True) if again}
    cached = sum(event.texts for event in events if isinstance(event, Cached))
    assert cached >= len(reused) - (len(texts) - different)
