"""Is what a call sends on record, whatever other threads do between any two of its steps?"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from waiting import until

from embedcore.errors import EmbeddingError, OutcomeUnknown, ProviderUnavailable, RequestRejected
from embedcore.events import Reserved
from embedcore.policy.immediate.front import Front
from embedcore.policy.planning import Size
from embedcore.storage.amounts import Amount
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import FakeClock, FakeEmbedder
from embedcore.testing.fakes.embedder import FAKE_INFO, FakeTokenizer, Outcome

INFO = replace(FAKE_INFO, dimensions=8)
SECONDS = 120.0
# A second later it is tomorrow, and no lease has ended.
NIGHT = datetime(2026, 1, 15, 23, 59, 59, tzinfo=UTC)
COMMITS = ("hold", "hold_and_send_all", "send", "write", "give_back", "charge", "close")


def _with_null(request, reply):
    vectors = reply.vectors.copy()
    vectors[0] = float("nan")
    return replace(reply, vectors=vectors)


FAULTS = {
    "free": ProviderUnavailable("down", billed="no"),
    "unknown": OutcomeUnknown("lost", billed="unknown"),
    "rejected": RequestRejected("no", billed="no"),
    "charged": RequestRejected("no", billed="yes"),
    "null": Outcome(reply=_with_null),
    "fine": None,
}


class Interrupted(Ledger):
    """Before and after each of its commits ``meanwhile()`` is called, as if another thread came."""

    def __init__(self, database, meanwhile, **options):
        super().__init__(database, **options)
        for name in COMMITS:
            setattr(self, name, self._interrupted(getattr(self, name), meanwhile))

    @staticmethod
    def _interrupted(step, meanwhile):
        @functools.wraps(step)
        def interrupted(*arguments, **how):
            meanwhile()
            found = step(*arguments, **how)
            meanwhile()
            return found

        return interrupted


class Others:
    """What other threads do, one thing at each point where they may come first."""

    def __init__(self, actions, clock):
        self._actions = list(reversed(actions))
        self._clock = clock
        self._busy = threading.Lock()
        self._asked = 0
        self.one = None

    def __call__(self):
        if not self._busy.acquire(blocking=False):
            return
        try:
            action = self._actions.pop() if self.one is not None and self._actions else None
            if action is not None:
                getattr(self, action)()
        finally:
            self._busy.release()

    def end(self):
        """Nothing comes any more. What was begun in another thread, in that of the spool say, has
        come to its end."""
        with self._busy:
            self.one = None

    def smaller(self):
        failed = Size(texts=64, in_bytes=10**6)
        self.one.engine.sizes.learn(failed, [Size(texts=1, in_bytes=1)])

    def dearer(self):
        self.one.engine.learned.billed(2.0)

    def served(self):
        self.one.engine.learned.was_served(self.one.engine.learned.leaves())

    def tomorrow(self):
        self._clock.advance(1)

    def asks(self):
        if self.one.engine.learned.probing._is_owned():
            # Another call may wait for this thread.
            return
        self._asked += 1
        with contextlib.suppress(EmbeddingError):
            self.one.embed([f"{text} of another {self._asked}" for text in ("a", "one more")])


class Checked(FakeEmbedder):
    """Sees, as each request arrives, whether it is on record. ``unheard``: those that are not."""

    def __init__(self, **options):
        super().__init__(**options)
        self.one, self.unheard = None, []

    def embed(self, request):
        billed, used = self.meter.billed_tokens, self.one.used
        if billed + self.cost(request.texts) > used.held.tokens + used.spent.tokens:
            self.unheard.append(request.texts)
        return super().embed(request)


def _script(faults):
    def script(request, number):
        fault = FAULTS[faults[number]] if number < len(faults) else None
        return copy.copy(fault) if isinstance(fault, EmbeddingError) else fault

    return script


def _ask_together(one, callers):
    front = Front(one.engine)
    front._free = 1

    async def main():
        asked = [front.aembed(one.engine, texts) for texts in callers]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), SECONDS)

    try:
        return asyncio.run(main())
    finally:
        front.close()


def _ask_alone(one, callers):
    found = []
    for texts in callers:
        try:
            found.append(one.embed(texts))
        except EmbeddingError as error:
            found.append(error)
    return found


TEXTS = [f"text {number} " + "of words " * (number % 4) for number in range(6)]
ACTIONS = ["smaller", "dearer", "served", "tomorrow", "asks", None, None]


@example(
    callers=[TEXTS[:2]],
    faults=[],
    actions=[None, "smaller"],
    together=False,
    exact=True,
)
@example(
    callers=[TEXTS[:1], TEXTS[1:3]],
    faults=["charged", "fine", "fine"],
    actions=[None] * 8 + ["smaller"],
    together=True,
    exact=True,
)
@given(
    callers=st.lists(
        st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4, unique=True),
        min_size=1,
        max_size=3,
    ),
    faults=st.lists(st.sampled_from(sorted(FAULTS)), max_size=4),
    actions=st.lists(st.sampled_from(ACTIONS), max_size=24),
    together=st.booleans(),
    exact=st.booleans(),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_what_leaves_is_on_record_whatever_others_do_between_two_steps(
    desk, callers, faults, actions, together, exact
):
    clock = FakeClock(NIGHT)
    others = Others(actions, clock)
    ledger = Interrupted(Database(None, STATE), others, clock=clock.time)
    fake = Checked(info=INFO, script=_script(faults), tokenizer=FakeTokenizer(exact=exact))
    with desk(fake, ledger=ledger, threads=8) as one:
        others.one = fake.one = one
        found = (_ask_together if together else _ask_alone)(one, callers)
        for texts, result in zip(callers, found, strict=True):
            result = getattr(result, "partial", result)
            assert not isinstance(result, BaseException), result
            one.right(result, texts)
        # To read what was used may be a commit as well.
        others.end()
        used = one.used
        assert fake.unheard == []
        assert used.held == Amount()
        assert fake.meter.billed_tokens <= used.spent.tokens
        if exact and "dearer" not in actions:
            assert fake.meter.billed_tokens == used.spent.tokens


@pytest.mark.parametrize("billed", ["no", "yes"])
def test_a_call_whose_size_is_too_large_once_its_turn_comes_pays_for_each_of_its_parts(
    desk, billed
):
    """Reserved and sent in one commit as one request, it waits for a thread while another call
    finds out that requests must be smaller."""
    go = threading.Event()

    class Held(FakeEmbedder):
        def embed(self, request):
            assert go.wait(SECONDS)
            return super().embed(request)

    def script(request, number):
        return RequestRejected("no", billed=billed) if len(request.texts) > 1 else None

    with desk(Held(info=INFO, script=script), threads=1) as one:
        go.set()
        one.embed(["a first one"])
        go.clear()
        asked = [
            threading.Thread(target=one.embed, args=[[f"{name} one", f"{name} and another one"]])
            for name in "AB"
        ]
        for each in asked:
            each.start()
        until(lambda: len(one.told(Reserved)) == 3)
        go.set()
        for each in asked:
            each.join(SECONDS)
        assert [len(call.texts) for call in one.embedder.calls] == [1, 2, 1, 1, 1, 1]
        one.check()
