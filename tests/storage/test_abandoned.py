"""What a process left that was killed: free at once for the others, and never more than that."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedcore.errors import TokenBudgetExceeded
from embedcore.storage import usage
from embedcore.storage.amounts import Amount, HeldLoosely, Limit
from embedcore.storage.grants import myself
from embedcore.storage.inspection import faults
from embedcore.storage.ledger import Ledger

pytestmark = [
    pytest.mark.case("C7"),
    pytest.mark.skipif(
        not Path("/proc/self/stat").exists(), reason="nothing tells when a process started"
    ),
]

Start = Callable[..., "subprocess.Popen[str]"]
LIMITS = [Limit(scope="s", period="day", unit="tokens", amount=100)]
# Of 100 tokens: 50 set aside and not sent, 20 and 10 sent, and 5 of a batch.
LEFT = """
import threading
ledger = new_ledger(clock=lambda: {now})
grant = ledger.hold("s", Amount(tokens=70), loose=bool({loose}))
ledger.send(grant, Amount(tokens=20))
ledger.hold_and_send("s", Amount(tokens=10))
ledger.hold("s", Amount(tokens=5), leased=False)
print("held", flush=True)
threading.Event().wait()
"""
UNSENT, SENT, BATCH = 50, 30, 5


@pytest.fixture
def holder(start_python: Start, clock: Any) -> Callable[..., subprocess.Popen[str]]:
    """A process that has held and sent, and lives."""

    def begin(*, loose: bool = False) -> subprocess.Popen[str]:
        process = start_python(LEFT.format(now=clock.now, loose=int(loose)))
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    return begin


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def fits(ledger: Ledger, tokens: int) -> bool:
    try:
        ledger.close(ledger.hold("s", Amount(tokens=tokens), LIMITS))
    except (TokenBudgetExceeded, HeldLoosely):
        return False
    return True


@pytest.mark.parametrize("loose", [False, True])
def test_its_unsent_money_is_free_as_soon_as_somebody_needs_it(
    holder: Any, ledger: Ledger, loose: bool
) -> None:
    process = holder(loose=loose)
    free = 100 - UNSENT - SENT - BATCH
    assert fits(ledger, free)
    assert not fits(ledger, free + 1), "it lives"
    kill(process)
    assert not fits(ledger, free + UNSENT + 1), "what was sent may have been billed"
    assert fits(ledger, free + UNSENT)
    assert faults(ledger.database).counters == []
    notes = [row["note"] for row in usage.audit(ledger) if row["state"] == "charged"]
    assert notes == ["never answered: its process ended"] * 2


@pytest.mark.case("C8")
@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda ledger: usage.of_scope(ledger, "s").held.tokens, id="of_scope"),
        pytest.param(
            lambda ledger: next(
                one.held.tokens for one in usage.windows_now(ledger) if one.scope == "*"
            ),
            id="windows_now",
        ),
        pytest.param(
            lambda ledger: usage.limits_now(ledger, "s", LIMITS, "all")[0].held, id="limits_now"
        ),
        pytest.param(
            lambda ledger: (
                sum(row["tokens"] for row in usage.audit(ledger) if row["state"] == "sent") + BATCH
            ),
            id="audit",
        ),
    ],
)
@pytest.mark.parametrize("seen", [True, False])
def test_what_is_shown_as_held_is_what_somebody_may_still_send(
    holder: Any, ledger: Ledger, clock: Any, read: Callable[[Ledger], int], seen: bool
) -> None:
    """Though nothing else runs. Of a process that cannot be seen it is known with its leases."""
    process = holder()
    assert read(ledger) >= SENT + BATCH
    if seen:
        kill(process)
    else:
        clock.now += 661
    assert read(ledger) == BATCH
    (model,) = [one for one in usage.by_model(ledger) if one.period == "total"]
    assert model.unconfirmed.tokens == SENT


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda host, boot, space, start: f"{host} {'0' * 36} {space} 1", id="boot"),
        pytest.param(lambda host, boot, space, start: f"{host} {boot} pid:[1],time:[1] 1", id="ns"),
        pytest.param(lambda host, boot, space, start: host, id="an embedcore of before"),
        pytest.param(lambda host, boot, space, start: "", id="nobody"),
    ],
)
def test_of_who_cannot_be_seen_only_the_leases_are_known(
    ledger: Ledger, clock: Any, change: Callable[..., str], start_python: Start, holder: Any
) -> None:
    process = holder()
    kill(process)
    with ledger.database.transaction() as connection:
        (owner,) = connection.execute(
            'SELECT DISTINCT owner FROM "grant" WHERE lease IS NOT NULL AND tokens > 0'
        ).fetchone()
        elsewhere = change(*owner.split(" "))
        connection.execute('UPDATE "grant" SET owner = ?', (elsewhere,))
        connection.execute("UPDATE attempt SET owner = nullif(?, '')", (elsewhere,))
    free = 100 - UNSENT - SENT - BATCH
    assert not fits(ledger, free + 1)
    assert usage.of_scope(ledger, "s").held.tokens == UNSENT + SENT + BATCH
    clock.now += 61
    assert fits(ledger, free + UNSENT)
    assert usage.of_scope(ledger, "s").held.tokens == SENT + BATCH
    clock.now += 600
    assert usage.of_scope(ledger, "s").held.tokens == BATCH


def test_a_number_that_is_used_again_is_another_process(ledger: Ledger) -> None:
    ledger.hold("s", Amount(tokens=90))
    mine = ledger.hold("s", Amount(tokens=5))
    with ledger.database.transaction() as connection:
        ended = f"{myself().rpartition(' ')[0]} 1"
        connection.execute('UPDATE "grant" SET owner = ? WHERE id <> ?', (ended, mine.id))
    assert fits(ledger, 95)
    assert not fits(ledger, 96), "my own is still held"


def test_a_batch_is_everybodys(holder: Any, ledger: Ledger) -> None:
    kill(holder())
    assert usage.of_scope(ledger, "s").held.tokens == BATCH
    with ledger.database.read() as connection:
        ((lease,),) = connection.execute('SELECT lease FROM "grant"').fetchall()
        assert lease is None


def test_who_was_taken_for_dead_pays_no_more_and_loses_nothing(
    open_ledger: Callable[..., Ledger],
) -> None:
    """Not even then is anything spent twice: the rest is held anew, the answer is a correction."""
    living, other = open_ledger(), open_ledger()
    grant = living.hold("s", Amount(tokens=60), LIMITS)
    attempt = living.send(grant, Amount(tokens=30))
    with other.database.transaction() as connection:
        ended = f"{myself().rpartition(' ')[0]} 1"
        connection.execute('UPDATE "grant" SET owner = ?', (ended,))
        connection.execute("UPDATE attempt SET owner = ?", (ended,))
    taken = other.hold("s", Amount(tokens=70), LIMITS)
    with pytest.raises(TokenBudgetExceeded):
        living.send(grant, Amount(tokens=30))
    living.settle(attempt, Amount(tokens=20))
    living.close(grant)
    other.close(taken)
    found = usage.of_scope(other, "s")
    assert (found.spent.tokens, found.held.tokens) == (20, 0)
    assert faults(other.database).counters == []


def test_a_child_goes_on_with_what_its_parent_held(run_python: Any, open_ledger: Any) -> None:
    """Its parent has ended, and it moves the rest to another day: nothing is released twice."""
    said = run_python(
        """
import os
now = [1_768_478_400.0 + 43_190]
ledger = new_ledger(clock=lambda: now[0])
limits = day_limit(100)
grant = ledger.hold("s", Amount(tokens=60), limits)
read, write = os.pipe()
middle = os.fork()
if middle == 0:
    # The holder is gone for the child of this one.
    if os.fork():
        os._exit(0)
    with ledger.database.transaction() as connection:
        owner = connection.execute('SELECT owner FROM "grant"').fetchone()[0]
        connection.execute('UPDATE "grant" SET owner = ?', (owner.rpartition(" ")[0] + " 1",))
    now[0] += 15
    other = ledger.hold("s", Amount(tokens=60), limits)
    try:
        attempt = ledger.send(grant, Amount(tokens=50))
        said = "sent"
    except BudgetExceeded:
        said = "refused"
    os.write(write, said.encode())
    os._exit(0)
os.close(write)
os.waitpid(middle, 0)
print(os.read(read, 100).decode())
"""
    )
    assert said == "refused"
    ledger = open_ledger()
    assert faults(ledger.database).counters == []


# What is held is an upper bound of what is billed.
BILLED = 5
LOOP = """
import random
from functools import partial
from embedcore.storage.outcomes import Outcome
go, seed, billed = sys.argv[2:]
billed = int(billed)
ledger, chance = new_ledger(), random.Random(int(seed))
limits = day_limit(10**9)
wait_for(go)
while True:
    try:
        way = chance.random()
        asked = ledger.spool.asked if way < 0.6 else lambda ask: ask()
        if chance.random() < 0.4:
            attempt = asked(partial(ledger.hold_and_send, "s", Amount(tokens=7), limits))
        else:
            grant = asked(partial(ledger.hold, "s", Amount(tokens=50), limits))
            attempt = asked(partial(ledger.send, grant, Amount(tokens=7)))
        print(7, flush=True)
        # Some wait for a commit, and the process dies with them.
        if way < 0.6:
            ledger.spool.add(
                Outcome(what="settled", grant=attempt.grant, attempt=attempt,
                        actual=Amount(tokens=billed), closes=True)
            )
        else:
            ledger.settle(attempt, Amount(tokens=billed), close=True)
    except BudgetExceeded:
        time.sleep(0.001)
"""


@pytest.mark.campaign(short=True)
@pytest.mark.fault(144)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(
    start_python: Start, open_ledger: Callable[..., Ledger], tmp_path: Path, seed: int
) -> None:
    """One after the other dies, and those who are left can use all that was not sent.

    What waited in one for a commit, and what was under way, is charged in full: never too little.
    """
    go = tmp_path / "go"
    processes = [start_python(LOOP, go, seed * 10 + number, BILLED) for number in range(4)]
    sent = 0
    watcher = Ledger(open_ledger().database)
    go.touch()
    for number, process in enumerate(processes):
        assert process.stdout is not None
        sent += 5 + 7 * seed + 3 * number
        for _ in range(5 + 7 * seed + 3 * number):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        sent += len(process.stdout.readlines())
        process.wait()
        assert faults(watcher.database).counters == []
    total = usage.of_scope(watcher, "s", "total")
    assert total.held.tokens == 0
    assert total.spent.tokens >= BILLED * sent
    states = [row["state"] for row in usage.audit(watcher)]
    assert set(states) == {"settled", "charged"}
    assert states.count("charged") <= 2 * len(processes)
    day = usage.of_scope(watcher, "s")
    assert day.spent.tokens <= 10**9
    limits = [Limit(scope="s", period="day", unit="tokens", amount=10**9)]
    watcher.close(watcher.hold("s", Amount(tokens=10**9 - day.spent.tokens), limits))
    assert faults(watcher.database).counters == []
