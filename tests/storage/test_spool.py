"""Is an outcome that waits for the next commit written in time, once, and where it belongs?

What was not written yet counts with all that was reserved for it, whatever becomes of the process.
"""

from __future__ import annotations

import contextvars
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import waiting

from embedcore.errors import StorageFull, TokenBudgetExceeded
from embedcore.forksafe import Lazy
from embedcore.storage import spool, usage
from embedcore.storage.amounts import Amount, Attempt, Limit
from embedcore.storage.database import Database
from embedcore.storage.inspection import faults
from embedcore.storage.ledger import Ledger
from embedcore.storage.outcomes import Outcome
from embedcore.storage.schema import STATE

HUNDRED = (Limit(scope="s", period="day", unit="tokens", amount=100),)
Open = Callable[..., Ledger]


class Unwatched(spool._Writer):
    """Nothing is written because time passes."""

    def _start(self) -> bool:
        return True


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_writers", Lazy())
    spool._writers.get(Unwatched)


def send(ledger: Ledger, tokens: int, limits: Any = ()) -> Attempt:
    ask = partial(ledger.hold_and_send, "s", Amount(tokens=tokens), limits)
    return ledger.spool.asked(ask)


def settled(attempt: Attempt, tokens: int, **how: Any) -> Outcome:
    actual = Amount(tokens=tokens)
    return Outcome(
        what="settled", grant=attempt.grant, attempt=attempt, actual=actual, closes=True, **how
    )


def in_file(path: Path) -> tuple[int, int]:
    """Spent and held, as any other process sees it. No step of the ledger, which would write."""
    database = Database(path, STATE)
    with database.read() as connection:
        row = connection.execute(
            "SELECT sum(tokens_spent), sum(tokens_held) FROM window"
            " WHERE scope = 's' AND lane = 'all' AND period = 'total'"
        ).fetchone()
    database.close()
    return tuple(row)


@pytest.mark.usefixtures("unwatched")
def test_it_is_written_with_the_next_commit_and_held_until_then(
    ledger: Ledger, state_path: Path
) -> None:
    ledger.spool.add(settled(send(ledger, 10), 4))
    assert in_file(state_path) == (0, 10)
    second = send(ledger, 20)
    assert in_file(state_path) == (4, 20)
    grant = ledger.spool.asked(partial(ledger.hold, "s", Amount(tokens=5)))
    ledger.spool.add(settled(second, 9))
    ledger.spool.asked(partial(ledger.send, grant, Amount(tokens=5)))
    assert in_file(state_path) == (13, 5)
    assert faults(ledger.database).counters == []


def test_it_is_written_soon_though_nothing_follows(ledger: Ledger, state_path: Path) -> None:
    for _ in range(2):
        ledger.spool.add(settled(send(ledger, 10), 4))
        waiting.until(lambda: in_file(state_path)[1] == 0)
    assert in_file(state_path) == (8, 0)


def test_no_thread_is_left_once_nothing_waits(ledger: Ledger) -> None:
    def threads() -> list[str]:
        return [one.name for one in threading.enumerate() if one.name == "embedcore-outcomes"]

    waiting.until(lambda: not threads())
    attempt = send(ledger, 10)
    assert not threads()
    ledger.spool.add(settled(attempt, 4))
    waiting.until(lambda: not threads())


@pytest.mark.parametrize("over", ["no thread", "the end has come"])
def test_where_no_thread_can_write_it_it_is_written_at_once(
    ledger: Ledger, state_path: Path, monkeypatch: pytest.MonkeyPatch, over: str
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(spool, "_writers", Lazy())
    if over == "no thread":
        monkeypatch.setattr(threading.Thread, "start", refuse)
    else:
        spool._writers.get(spool._Writer).is_ending = True
    ledger.spool.add(settled(send(ledger, 10), 4))
    assert in_file(state_path) == (4, 0)


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize(
    "read",
    [
        lambda ledger: usage.of_scope(ledger, "s").spent.tokens,
        lambda ledger: usage.windows_now(ledger)[0].spent.tokens,
        lambda ledger: usage.by_model(ledger)[0].spent.tokens,
        lambda ledger: usage.limits_now(ledger, "s", HUNDRED, "all")[0].spent,
        lambda ledger: usage.audit(ledger)[-1]["actual_tokens"],
        lambda ledger: usage.cost_of_texts(ledger)["p:m"],
    ],
)
def test_who_reads_usage_sees_it_by_whichever_ledger(open_ledger: Open, read: Any) -> None:
    mine, other = open_ledger(), open_ledger()
    attempt = mine.hold_and_send("s", Amount(tokens=10, cost=10), model="p:m", inputs=1)
    outcome = settled(attempt, 4)
    outcome.actual = Amount(tokens=4, cost=4)
    mine.spool.add(outcome)
    assert read(other) == 4


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("whose", ["its own", "another client's"])
@pytest.mark.parametrize("step", ["hold", "hold_and_send", "send", "hold_and_send_all"])
def test_no_limit_refuses_for_what_only_waits_to_be_free(
    open_ledger: Open, whose: str, step: str
) -> None:
    ledger = open_ledger()
    holder = ledger if whose == "its own" else open_ledger()
    grant = ledger.hold("s", Amount(tokens=1), HUNDRED)
    outcome = settled(holder.hold_and_send("s", Amount(tokens=80), HUNDRED), 1)
    holder.spool.add(outcome)
    asks = {
        "hold": partial(ledger.hold, "s", Amount(tokens=90), HUNDRED),
        "hold_and_send": partial(ledger.hold_and_send, "s", Amount(tokens=90), HUNDRED),
        "send": partial(ledger.send, grant, Amount(tokens=90), fresh=True),
        "hold_and_send_all": partial(
            ledger.hold_and_send_all, "s", [(Amount(tokens=90), 1)], HUNDRED
        ),
    }
    found = ledger.spool.asked(asks[step])
    if step == "hold_and_send_all" and whose != "its own":
        # Who is refused goes on alone, and asks again.
        assert isinstance(found[0], TokenBudgetExceeded)
    else:
        assert not isinstance(found, list) or isinstance(found[0], Attempt)
    assert usage.of_scope(ledger, "s").spent.tokens == 1


@pytest.mark.usefixtures("unwatched")
def test_a_real_refusal_stays_one_and_loses_nothing(ledger: Ledger, state_path: Path) -> None:
    ledger.spool.add(settled(send(ledger, 50, HUNDRED), 50))
    with pytest.raises(TokenBudgetExceeded):
        send(ledger, 60, HUNDRED)
    assert in_file(state_path) == (50, 0)


@pytest.mark.usefixtures("unwatched")
@pytest.mark.parametrize("ends", ["2026-01-15", "2026-01-16"])
def test_it_belongs_to_the_day_in_which_its_request_was_sent(
    ledger: Ledger, clock: Any, ends: str
) -> None:
    before = send(ledger, 10)
    clock.now += 86_400 * (ends == "2026-01-16")
    ledger.spool.add(settled(before, 4))
    clock.now += 86_400
    send(ledger, 20)
    today = usage.of_scope(ledger, "s")
    assert (today.spent.tokens, today.held.tokens) == (0, 20)
    assert usage.of_scope(ledger, "s", "total").spent.tokens == 4
    with ledger.database.read() as connection:
        spent = connection.execute(
            "SELECT start FROM window WHERE scope = 's' AND period = 'day' AND tokens_spent > 0"
        ).fetchall()
    assert [row["start"] for row in spent] == ["2026-01-15"]
    ended = [row["ended"] for row in usage.audit(ledger)]
    assert ended[0].startswith(ends), "when it ended, not when it was written"


@pytest.mark.usefixtures("unwatched")
def test_a_reset_takes_off_what_had_ended_before(ledger: Ledger) -> None:
    ledger.spool.add(settled(send(ledger, 10), 4))
    ledger.reset("s")
    assert usage.of_scope(ledger, "s").spent.tokens == 0


def test_who_nears_a_limit_is_told_at_once_in_the_callers_context(ledger: Ledger) -> None:
    name = contextvars.ContextVar("name", default="nobody")
    heard: list[tuple[int, str]] = []

    def tell(limit: Any) -> None:
        heard.append((limit.used, name.get()))

    name.set("caller")
    run = contextvars.copy_context().run
    outcome = settled(send(ledger, 90, HUNDRED), 90, tell=lambda limit: run(tell, limit))
    contextvars.Context().run(ledger.spool.add, outcome)
    assert heard == [(90, "caller")]


@pytest.mark.usefixtures("unwatched")
def test_what_cannot_be_written_fails_nothing_is_said_once_and_tried_again(
    ledger: Ledger,
    state_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempts = [send(ledger, 10), send(ledger, 10), send(ledger, 10)]
    real = ledger.database.transaction

    def full(**_: Any) -> Any:
        raise StorageFull("cannot grow")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(ledger.database, "transaction", full)
        for attempt in attempts[:2]:
            ledger.spool.add(settled(attempt, 4), at_once=True)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "cannot grow" in caplog.text
        with pytest.raises(StorageFull):
            send(ledger, 10)
    assert ledger.database.transaction == real
    assert in_file(state_path) == (0, 30)
    ledger.spool.add(settled(attempts[2], 5), at_once=True)
    assert in_file(state_path) == (13, 0)
    assert faults(ledger.database).counters == []


def test_a_file_that_is_gone_is_said_and_no_thread_goes_on_about_it(
    ledger: Ledger, state_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger.spool.add(settled(send(ledger, 10), 4))
    state_path.rename(state_path.with_suffix(".old"))
    with caplog.at_level(logging.WARNING):
        waiting.until(lambda: "could not be written down" in caplog.text)
    waiting.until(lambda: ledger.spool.due is None)
    assert not state_path.exists()


@pytest.mark.usefixtures("unwatched")
def test_an_attempt_of_another_file_keeps_none_from_being_written(
    open_ledger: Open, state_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, elsewhere = open_ledger(), open_ledger(state_path.with_name("other.db"))
    for _ in range(3):
        stranger = send(elsewhere, 10)
    ledger.spool.add(settled(stranger, 4), settled(send(ledger, 20), 7))
    # With that number there is another one here.
    third = [send(ledger, 1), send(ledger, 1)][1]
    assert third.id == stranger.id
    ledger.spool.add(settled(stranger, 4))
    ledger.spool.flush()
    assert in_file(state_path) == (7, 2)
    assert caplog.text.count("was not written down") == 2


@pytest.mark.usefixtures("unwatched")
def test_a_client_that_closes_leaves_nothing_behind(ledger: Ledger, state_path: Path) -> None:
    ledger.spool.add(settled(send(ledger, 10), 4))
    ledger.end()
    assert in_file(state_path) == (4, 0)
    assert ledger.spool.due is None


@pytest.mark.usefixtures("unwatched")
def test_many_threads_lose_none_and_write_none_twice(ledger: Ledger, state_path: Path) -> None:
    def work() -> None:
        for _ in range(20):
            ledger.spool.add(settled(send(ledger, 10), 3))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.spool.flush()
    assert in_file(state_path) == (4 * 20 * 3, 0)


# Ends of processes

PROGRAM = """
import os, sys, time
from pathlib import Path
from embedcore.storage.amounts import Amount
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.outcomes import Outcome
from embedcore.storage.schema import STATE
from embedcore.storage import spool
spool._WITHIN_SECONDS = 10_000.0
ledger = Ledger(Database(Path(sys.argv[1]), STATE))
def ask(tokens=10):
    attempt = ledger.hold_and_send("s", Amount(tokens=tokens))
    ledger.spool.add(Outcome(what="settled", grant=attempt.grant, attempt=attempt,
                             actual=Amount(tokens=4), closes=True))
    return attempt
"""


@pytest.fixture
def program(state_path: Path) -> Callable[[str], None]:
    """A process of its own, as it is started and ends outside of tests."""

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", PROGRAM + code, state_path], check=True, timeout=120)

    return run


def test_it_is_written_when_the_program_ends(program: Any, state_path: Path) -> None:
    """Also what handlers of the program bring that run at its end."""
    program("import atexit\natexit.register(ask)\nask()")
    assert in_file(state_path) == (8, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_children_of_multiprocessing_write_theirs(program: Any, state_path: Path) -> None:
    program(
        """
import multiprocessing
ledger.database.open()
child = multiprocessing.get_context("fork").Process(target=ask)
child.start()
child.join()
assert child.exitcode == 0
os._exit(0)
"""
    )
    assert in_file(state_path) == (4, 0)


def test_a_program_that_is_killed_is_charged_in_full(
    program: Any, state_path: Path, ledger: Ledger
) -> None:
    program("ask()\nask()\nos._exit(0)")
    assert in_file(state_path) == (0, 20)
    total = usage.of_scope(ledger, "s", "total")
    if Path("/proc/self/stat").exists():
        assert (total.spent.tokens, total.held.tokens) == (20, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.fault(112)
def test_a_fork_loses_none_and_its_child_writes_none_of_them(
    program: Any, state_path: Path
) -> None:
    """Not even where the parent ends at once, as a daemon's does."""
    program(
        """
ask()
pid = os.fork()
if pid:
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        os._exit(1)
    os._exit(0)
assert ledger.spool.due is None
ledger.spool.flush()
ask(7)
sys.exit(0)
"""
    )
    assert in_file(state_path) == (8, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_what_comes_after_the_fork_began_stays_with_the_parent(
    program: Any, state_path: Path
) -> None:
    """It could not be written before the fork; the parent still does, and the child never."""
    program(
        """
from embedcore import forksafe
forksafe._finishes.clear()
attempt = ask()
pid = os.fork()
if not pid:
    assert ledger.spool.due is None
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
with ledger.database.read() as connection:
    assert connection.execute("SELECT state FROM attempt").fetchone()[0] == "sent"
"""
    )
    assert in_file(state_path) == (4, 0)


@pytest.fixture(autouse=True)
def _no_thread_outlives_a_test() -> Iterator[None]:
    yield
    spool.flush_all()
