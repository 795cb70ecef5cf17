"""When a call is cut short, is all its money accounted for, and is nothing more sent?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from waiting import until

from embedcore.errors import OutcomeUnknown, RateLimited
from embedcore.policy.engine import Stop
from embedcore.policy.threads import Stopped
from embedcore.settings import RetrySettings
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE
from embedcore.testing import FakeClock, FakeEmbedder, tokens_of
from embedcore.testing.fakes.embedder import FAKE_INFO, Outcome

SINGLE = replace(FAKE_INFO, dimensions=8, max_texts_per_request=1)


class Hanging(FakeEmbedder):
    """Hangs in every request with the word in it, whatever the time-out, until released."""

    def __init__(self, word="HANG", **options):
        super().__init__(info=options.pop("info", SINGLE), **options)
        self.word = word
        self.release = threading.Event()
        self.hanging = 0

    def embed(self, request):
        if any(self.word in text for text in request.texts):
            self.hanging += 1
            assert self.release.wait(120)
        return super().embed(request)


def deadline(seconds):
    return RetrySettings(first_wait=0.001, longest_wait=0.002, deadline=seconds)


@contextlib.contextmanager
def late(clock, when):
    """When that holds, the deadline of ``deadline(30)`` and the grace after it pass; not before
    they have passed may the call end."""
    ended, early = threading.Event(), []

    def pass_time():
        until(when)
        clock.advance(30 + 4.9)
        early.append(ended.wait(0.3))
        clock.advance(0.2)

    passing = threading.Thread(target=pass_time)
    passing.start()
    yield
    ended.set()
    passing.join()
    assert early == [False]


# A provider that hangs


@pytest.mark.fault(127)
@pytest.mark.fault(53)
def test_a_provider_that_hangs_is_given_up_soon_after_the_deadline(desk):
    rows, clock = ["a", "b", "HANG", "c"], FakeClock()
    embedder = Hanging()
    with desk(embedder, retry=deadline(30), grace=5, monotonic=clock.monotonic) as one:
        with (
            late(clock, lambda: embedder.hanging == 1 and one.spent == 3),
            pytest.raises(OutcomeUnknown, match="deadline") as caught,
        ):
            one.embed(rows)
        partial = caught.value.partial
        one.right(partial, rows)
        assert partial.ok.tolist() == [True, True, False, True]
        # Charged, and the pool is whole again.
        assert one.used.held == Amount()
        assert one.spent == tokens_of("a") * 3 + tokens_of("HANG")
        assert partial.usage.unconfirmed_tokens == tokens_of("HANG")
        one.right(one.embed(["d", "e", "f", "g", "h"]), ["d", "e", "f", "g", "h"])
        # The answer that came after all corrects the ledger.
        embedder.release.set()
        until(lambda: one.spent == one.embedder.meter.billed_tokens)
        one.check()


@pytest.mark.fault(127)
def test_an_answer_too_late_that_nothing_was_billed_corrects_the_ledger_as_well(desk):
    class Refusing(Hanging):
        def embed(self, request):
            super().embed(request)
            raise RateLimited("slow")

    embedder = Refusing(script=[Outcome(bills=False)])
    clock = FakeClock()
    with desk(embedder, retry=deadline(30), grace=5, monotonic=clock.monotonic) as one:
        with late(clock, lambda: embedder.hanging == 1), pytest.raises(OutcomeUnknown):
            one.embed(["HANG"])
        assert one.spent == tokens_of("HANG")
        embedder.release.set()
        until(lambda: one.spent == 0)
        assert one.used.held == Amount()


@pytest.mark.fault(127)
def test_threads_that_come_back_do_not_add_up(desk):
    clock = FakeClock()
    settings = {"retry": deadline(30), "grace": 5, "monotonic": clock.monotonic}
    with desk(Hanging(), threads=3, **settings) as one:
        for number in range(4):
            one.embedder.release.clear()
            hang = 3 * (number + 1)
            with (
                late(clock, lambda hang=hang: one.embedder.hanging == hang),
                pytest.raises(OutcomeUnknown),
            ):
                one.embed([f"HANG {number} {row}" for row in range(3)])
            one.embedder.release.set()
        until(lambda: one.embedder.meter.requests == one.embedder.hanging == 12)
        until(lambda: one.embedder.meter.in_flight == 0)
        one.engine = replace(one.engine, retry=deadline(None))
        one.embedder.latency, one.embedder.meter.max_in_flight = 0.005, 0
        one.embed([f"row {row}" for row in range(30)])
        assert one.embedder.meter.max_in_flight <= 3
        one.check(certain=False)


@pytest.mark.fault(53)
def test_a_gate_that_stays_closed_ends_with_the_deadline(desk):
    clock = FakeClock()
    with desk(retry=deadline(30), grace=5, monotonic=clock.monotonic) as one:
        one.engine.gate.close(3600)
        with late(clock, lambda: one.engine.gate.state().waiting), pytest.raises(OutcomeUnknown):
            one.embed(["a"])
        assert one.embedder.meter.requests == 0
        one.check()


# From outside


@pytest.mark.fault(148)
def test_a_call_stopped_from_outside_sends_nothing_more(desk, halting):
    rows = [f"row {number}" for number in range(100)]
    stop = Stop()
    with desk(halting(6, info=SINGLE), threads=2) as one:
        raised = []

        def go():
            with pytest.raises(Stopped) as caught:
                one.embed(rows, stop=stop)
            raised.append(caught.value)

        thread = threading.Thread(target=go)
        thread.start()
        until(lambda: one.embedder.begun == 8)
        stop.set()
        one.embedder.go.set()
        thread.join(120)
        sent = one.embedder.meter.requests
        assert sent == 8
        one.right(raised[0].partial, rows)
        # What was under way was waited for, and is all there.
        assert raised[0].partial.ok.sum() == sent
        one.check()
        time.sleep(0.1)
        assert one.embedder.meter.requests == sent


@pytest.mark.fault(148)
def test_a_call_stopped_while_it_waits_for_money_sends_nothing(desk):
    """Others hold loosely what this call needs: it waits, and is cancelled meanwhile."""
    stop, row = Stop(), "x" * 36  # nine tokens
    waiting = threading.Event()

    def wait_for(event, seconds):
        waiting.set()
        return event.wait(seconds)

    with desk(daily=20, wait_for=wait_for) as one:
        held = one.ledger.hold(
            "default", Amount(tokens=15), one.engine.account.limits, loose=True, final=True
        )

        def go():
            with pytest.raises(Stopped):
                one.embed([row], stop=stop)

        thread = threading.Thread(target=go)
        thread.start()
        assert waiting.wait(120)
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
        one.ledger.close(held)
        assert one.embedder.meter.requests == 0
        one.check()


@pytest.mark.fault(148)
@pytest.mark.parametrize("seed", range(20))
def test_a_call_may_be_stopped_at_any_moment(desk, seed):
    """No moment exists at which a request is sent and nobody accounts for it."""
    chance, stop = random.Random(seed), Stop()
    rows = [f"row {number}" for number in range(60)]
    with desk(FakeEmbedder(info=SINGLE, latency=0.0005), threads=4, grace=0.0) as one:
        timer = threading.Timer(chance.uniform(0, 0.03), stop.set)
        timer.start()
        try:
            result = one.embed(rows, stop=stop)
        except Stopped as error:
            result = error.partial
        timer.join()
        one.right(result, rows)
        until(lambda: one.embedder.meter.in_flight == 0)
        until(lambda: one.spent == one.embedder.meter.billed_tokens)
        # A thread that had taken money and was too late to send gives it back on its own.
        until(lambda: one.used.held == Amount())
        one.check()


@pytest.mark.fault(148)
def test_a_cancelled_task_leaves_nothing_held(server, connect, ledger, hold_replies):
    go = hold_replies(after=0)
    client = connect(options={"max_texts_per_request": 1}, concurrency=2)
    rows = [f"row {number}" for number in range(20)]

    async def main():
        task = asyncio.create_task(client.aembed(rows))
        while server.meter.requests < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()

    asyncio.run(main())
    until(lambda: ledger().held == Amount())
    sent = server.meter.requests
    assert sent == 2
    until(lambda: ledger().spent.tokens == server.meter.billed_tokens)
    time.sleep(0.3)
    assert server.meter.requests == sent


# Signals, in a process of their own


PROGRAM = """
import json, signal, sys, time
from dataclasses import replace
from embedcore import EmbeddingClient
from embedcore.policy.immediate.workers import Workers

settings = json.loads(sys.argv[1])
client = EmbeddingClient(
    options={**settings["options"], "max_texts_per_request": 1, "dimensions": 8},
    config={"home": settings["home"], "concurrency": 4, "retry": settings.get("retry", {})},
)
# It waits for what is under way as long as that takes.
running = client._running
client._opened._thing = replace(running, engine=replace(running.engine, grace=3600.0))
wait = Workers._wait_for_answers
Workers._wait_for_answers = lambda workers: (print("ending", flush=True), wait(workers))
print("ready", flush=True)
try:
    client.embed([f"row {number}" for number in range(200)])
except KeyboardInterrupt as error:
    ok = [] if error.partial is None else error.partial.ok.tolist()
    print(json.dumps({"ok": sum(ok), "rows": len(ok)}), flush=True)
    sys.exit(130)
"""


@pytest.fixture
def start(server, home, forks):
    def start(**settings):
        options = {"base_url": server.base_url, "api_key": server.api_key}
        given = json.dumps({"options": options, "home": str(home), **settings})
        process = forks(PROGRAM, given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout.readline() == "ready\n"
        return process

    return start


@pytest.mark.fault(142)
def test_an_interrupt_waits_for_what_is_under_way_and_says_what_was_kept(
    server, start, ledger, hold_replies
):
    go = hold_replies(after=6)
    process = start()
    until(lambda: server.meter.requests == 10)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ending\n"
    go.set()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    said = json.loads(out.splitlines()[-1])
    assert said["rows"] == 200
    assert said["ok"] == server.meter.requests == 10
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(142)
def test_a_second_interrupt_ends_at_once_and_charges(server, start, ledger, hold_replies):
    hold_replies(after=3)
    process = start()
    until(lambda: server.meter.requests == 7)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ending\n"
    assert process.poll() is None
    # What is under way would be waited for for an hour.
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens >= server.meter.billed_tokens


@pytest.mark.fault(144)
@pytest.mark.fault(86)
@pytest.mark.fault(85)
@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.campaign)])
def test_after_a_kill_the_bill_is_covered_once_the_leases_end(server, home, start, kills):
    """What was in flight stays held, then is charged; what was never sent is released."""
    for number in range(kills):
        server.faults.always("late", seconds=0.05)
        before = server.meter.requests
        process = start()
        until(lambda before=before: server.meter.requests >= before + 5)
        time.sleep(number % 7 * 0.01)
        process.kill()
        process.communicate()
    path = home / "state.db"
    now = Ledger(Database(path, STATE))
    later = Ledger(Database(path, STATE), clock=lambda: time.time() + 700)
    try:
        used = usage.of_scope(now, "default", "total")
        assert used.held.tokens + used.spent.tokens >= server.meter.billed_tokens
        # Anything that begins after the leases have run out closes them.
        later.close(later.hold("default", Amount()))
        used = usage.of_scope(later, "default", "total")
        assert used.held == Amount()
        assert used.spent.tokens >= server.meter.billed_tokens
        # Only what was in flight at the kills can be charged without having been billed.
        assert used.spent.tokens <= server.meter.billed_tokens + kills * 5 * len("row 199")
    finally:
        now.database.close()
        later.database.close()
