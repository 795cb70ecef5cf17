"""When a call is cut short, is all its money accounted for, and is nothing more sent?"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from embedcore.errors import OutcomeUnknown, RateLimited
from embedcore.policy.engine import Stop
from embedcore.policy.flights import Stopped
from embedcore.policy.retry import RetrySettings
from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE, STATE_VERSION
from embedcore.testing import FakeEmbedder, tokens_of
from embedcore.testing.fakes import FAKE_INFO, Outcome

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
            assert self.release.wait(60)
        return super().embed(request)


def until(true, seconds=20.0):
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.002)


def deadline(seconds):
    return RetrySettings(first_wait=0.001, longest_wait=0.002, deadline=seconds)


# A provider that hangs


@pytest.mark.fault(127)
@pytest.mark.fault(53)
def test_a_provider_that_hangs_is_given_up_soon_after_the_deadline(desk):
    rows = ["a", "b", "HANG", "c"]
    embedder = Hanging()
    with desk(embedder, retry=deadline(0.3), grace=0.3) as one:
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown, match="deadline") as caught:
            one.embed(rows)
        assert 0.6 <= time.monotonic() - began < 5
        partial = caught.value.partial
        one.right(partial, rows)
        assert partial.ok.tolist() == [True, True, False, True]
        # Charged in full, and the pool is whole again.
        assert one.used.held == Amount()
        assert one.spent == tokens_of("a") * 3 + len("HANG")
        assert partial.usage.uncertain_tokens == len("HANG")
        one.right(one.embed(["d", "e", "f", "g", "h"]), ["d", "e", "f", "g", "h"])
        # The answer that came after all corrects the books.
        embedder.release.set()
        until(lambda: one.spent == one.embedder.meter.billed_tokens)
        one.check()


@pytest.mark.fault(127)
def test_an_answer_too_late_that_nothing_was_billed_corrects_the_books_as_well(desk):
    class Refusing(Hanging):
        def embed(self, request):
            super().embed(request)
            raise RateLimited("slow")

    embedder = Refusing(script=[Outcome(bills=False)])
    with desk(embedder, retry=deadline(0.2), grace=0.1) as one:
        with pytest.raises(OutcomeUnknown):
            one.embed(["HANG"])
        assert one.spent == len("HANG")
        embedder.release.set()
        until(lambda: one.spent == 0)
        assert one.used.held == Amount()


@pytest.mark.fault(127)
def test_threads_that_come_back_do_not_add_up(desk):
    with desk(Hanging(), retry=deadline(0.1), grace=0.05, threads=3) as one:
        for number in range(4):
            one.embedder.release.clear()
            with pytest.raises(OutcomeUnknown):
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
    with desk(retry=deadline(0.2), grace=0.1) as one:
        one.engine.gate.close(60)
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            one.embed(["a"])
        assert time.monotonic() - began < 5
        assert one.embedder.meter.requests == 0
        one.check()


# From outside


@pytest.mark.fault(148)
def test_a_call_stopped_from_outside_sends_nothing_more(desk):
    rows = [f"row {number}" for number in range(100)]
    stop = Stop()
    with desk(FakeEmbedder(info=SINGLE, latency=0.01), threads=2, grace=2) as one:
        raised = []

        def go():
            with pytest.raises(Stopped) as caught:
                one.embed(rows, stop=stop)
            raised.append(caught.value)

        thread = threading.Thread(target=go)
        thread.start()
        until(lambda: one.embedder.meter.requests >= 6)
        stop.set()
        thread.join(20)
        sent = one.embedder.meter.requests
        assert sent < 100
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
    with desk(daily=20, wait=30.0) as one:
        held = one.ledger.hold(
            "default", Amount(tokens=15), one.engine.account.limits, loose=True, final=True
        )

        def go():
            with pytest.raises(Stopped):
                one.embed([row], stop=stop)

        thread = threading.Thread(target=go)
        thread.start()
        time.sleep(0.2)
        began = time.monotonic()
        stop.set()
        thread.join(20)
        assert time.monotonic() - began < 5
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
        until(lambda: one.spent == one.embedder.meter.billed_tokens, 5)
        # A thread that had taken money and was too late to send gives it back on its own.
        until(lambda: one.used.held == Amount(), 5)
        one.check()


@pytest.mark.fault(148)
def test_a_cancelled_task_leaves_nothing_held(server, connect, books):
    server.faults.always("late", seconds=0.3)
    client = connect(options={"max_texts_per_request": 1}, concurrency=2)
    rows = [f"row {number}" for number in range(20)]

    async def main():
        task = asyncio.create_task(client.aembed(rows))
        while server.meter.requests < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    until(lambda: books().held == Amount())
    sent = server.meter.requests
    assert sent <= 4
    until(lambda: books().spent.tokens == server.meter.billed_tokens)
    time.sleep(0.3)
    assert server.meter.requests == sent


# Signals, in a process of their own


PROGRAM = """
import json, signal, sys, time
from embedcore import EmbeddingClient

settings = json.loads(sys.argv[1])
client = EmbeddingClient(
    options={**settings["options"], "max_texts_per_request": 1, "dimensions": 8},
    config={"home": settings["home"], "concurrency": 4, "retry": settings.get("retry", {})},
)
print("ready", flush=True)
try:
    client.embed([f"row {number}" for number in range(200)])
except KeyboardInterrupt as error:
    ok = [] if error.partial is None else error.partial.ok.tolist()
    print(json.dumps({"ok": sum(ok), "rows": len(ok)}), flush=True)
    sys.exit(130)
"""


def start(server, home, **settings):
    options = {"base_url": server.base_url, "api_key": server.api_key}
    given = json.dumps({"options": options, "home": str(home), **settings})
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.fault(142)
def test_an_interrupt_waits_for_what_is_under_way_and_says_what_was_kept(server, home, books):
    server.faults.always("late", seconds=0.2)
    process = start(server, home)
    until(lambda: server.meter.requests >= 6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    said = json.loads(out)
    assert said["rows"] == 200
    assert said["ok"] == server.meter.requests < 200
    used = books()
    assert used.held == Amount()
    assert used.spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(142)
def test_a_second_interrupt_ends_at_once_and_charges(server, home, books):
    server.faults.push("ok", times=3)
    server.faults.always("hang", seconds=60)
    process = start(server, home)
    until(lambda: server.meter.requests >= 7)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 4
    assert process.returncode == 130, err
    used = books()
    assert used.held == Amount()
    assert used.spent.tokens >= server.meter.billed_tokens


@pytest.mark.fault(144)
@pytest.mark.fault(86)
@pytest.mark.fault(85)
@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.campaign)])
def test_after_a_kill_the_bill_is_covered_once_the_leases_end(server, home, kills):
    """What was in flight stays held, then is charged; what was never sent is released."""
    for number in range(kills):
        server.faults.always("late", seconds=0.05)
        before = server.meter.requests
        process = start(server, home)
        until(lambda before=before: server.meter.requests >= before + 5)
        time.sleep(number % 7 * 0.01)
        process.kill()
        process.communicate()
    path = home / "state.db"
    now = Ledger(Database(path, STATE, version=STATE_VERSION))
    later = Ledger(Database(path, STATE, version=STATE_VERSION), clock=lambda: time.time() + 700)
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
