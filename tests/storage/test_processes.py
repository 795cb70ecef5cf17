"""Do many processes, some of which are killed, ever spend more than one limit allows?"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedcore.errors import TokenBudgetExceeded
from embedcore.storage import usage
from embedcore.storage.amounts import Amount, Limit
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE

Start = Callable[..., "subprocess.Popen[str]"]

needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")

SPEND = """
import threading
*numbers, go = sys.argv[2:]
count, tokens, limit, threads = map(int, numbers)
amount, limits = Amount(tokens=tokens), day_limit(limit)
ledger = new_ledger()
granted = []
def spend():
    for number in range(count):
        try:
            if number % 2:
                attempt = ledger.hold_and_send("s", amount, limits)
            else:
                attempt = ledger.send(ledger.hold("s", amount, limits), amount)
        except TokenBudgetExceeded:
            continue
        granted.append(tokens)
        ledger.settle(attempt, amount, close=True)
wait_for(go)
workers = [threading.Thread(target=spend) for _ in range(threads)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(sum(granted))
"""


def all_printed(processes: list[subprocess.Popen[str]], timeout: float = 300) -> list[str]:
    printed = [process.communicate(timeout=timeout)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return printed


@pytest.mark.fault(84)
@pytest.mark.parametrize(
    ("processes", "grants", "threads"),
    [
        pytest.param(8, 50, 1, id="8x50"),
        pytest.param(4, 10, 4, id="threads"),
        pytest.param(64, 100, 1, id="64x100", marks=pytest.mark.campaign),
    ],
)
def test_no_limit_is_passed_however_many_spend_at_once(
    start_python: Start,
    open_ledger: Callable[..., Ledger],
    tmp_path: Path,
    processes: int,
    grants: int,
    threads: int,
) -> None:
    """The file is new: that they all create it at the same moment is part of it."""
    asked = processes * grants * threads * 3
    limit = asked // 2 + 1
    go = tmp_path / "go"
    started = [start_python(SPEND, grants, 3, limit, threads, go) for _ in range(processes)]
    go.touch()
    granted = sum(int(printed) for printed in all_printed(started))
    ledger = open_ledger(timeout=60)
    spent = usage.of_scope(ledger, "s", "total")
    assert spent.spent.tokens == granted == limit // 3 * 3
    assert spent.held == Amount()


@pytest.mark.fault(109)
def test_sixteen_processes_open_the_file_for_the_first_time_at_once(
    start_python: Start, open_ledger: Callable[..., Ledger], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    code = f"wait_for({str(go)!r}); new_ledger().record('s', Amount(tokens=1))"
    started = [start_python(code) for _ in range(16)]
    go.touch()
    all_printed(started)
    ledger = open_ledger()
    assert usage.of_scope(ledger, "s", "total").spent == Amount(tokens=16)
    assert not list(tmp_path.glob("*.new*"))


def say_and_wait_for_death(start: Start, code: str) -> list[str]:
    process = start(code + "\nsys.stdout.flush()\ntime.sleep(600)\n")
    assert process.stdout is not None
    said = process.stdout.readline().split()
    process.kill()
    process.wait()
    return said


@pytest.mark.fault(85)
@pytest.mark.fault(86)
def test_what_a_killed_process_left_is_released_or_charged(
    start_python: Start, open_ledger: Callable[..., Ledger], clock: Any
) -> None:
    said = say_and_wait_for_death(
        start_python,
        f"""
ledger = new_ledger(clock=lambda: {clock.now})
grant = ledger.hold("s", Amount(tokens=60))
ledger.send(grant, Amount(tokens=25))
ledger.hold_and_send("s", Amount(tokens=10))
batch = ledger.hold("s", Amount(tokens=5), leased=False)
print("held")
""",
    )
    assert said == ["held"]
    ledger = open_ledger()
    limits = [Limit(scope="s", period="day", unit="tokens", amount=80)]
    with ledger.database.transaction() as connection:
        # As of another machine: what can be seen to have ended is not waited for.
        connection.execute("UPDATE \"grant\" SET owner = 'elsewhere:1'")
        connection.execute("UPDATE attempt SET owner = 'elsewhere:1'")
    assert usage.of_scope(ledger, "s").held == Amount(tokens=75)
    with pytest.raises(TokenBudgetExceeded):
        ledger.hold("s", Amount(tokens=40), limits)
    clock.now += 61
    ledger.close(ledger.hold("s", Amount(tokens=40), limits))
    day = usage.of_scope(ledger, "s")
    assert (day.spent, day.held) == (Amount(), Amount(tokens=40)), "nothing of the grant was sent"
    clock.now += 600
    ledger.hold("t", Amount())
    day = usage.of_scope(ledger, "s")
    assert (day.spent, day.held) == (Amount(tokens=35), Amount(tokens=5)), "the batch waits on"
    unconfirmed = [one.unconfirmed for one in usage.by_model(ledger) if one.period == "day"]
    assert unconfirmed == [Amount(tokens=35)]


@pytest.mark.fault(85)
@pytest.mark.fault(86)
@pytest.mark.parametrize("number", range(4))
def test_killed_at_any_moment_the_ledger_still_balance(
    start_python: Start, open_ledger: Callable[..., Ledger], clock: Any, number: int
) -> None:
    """Nothing is spent that was not sent, and nothing is held that nobody can account for."""
    process = start_python(f"""
ledger = new_ledger(clock=lambda: {clock.now})
print("go", flush=True)
while True:
    grant = ledger.hold("s", Amount(tokens=30))
    for end in (ledger.charge, ledger.give_back, lambda one: ledger.settle(one, Amount(tokens=7))):
        end(ledger.send(grant, Amount(tokens=10)))
    ledger.close(grant)
""")
    assert process.stdout is not None
    process.stdout.readline()
    ledger = open_ledger()
    while not usage.audit(ledger):
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.05 + 0.037 * number)
    process.kill()
    process.wait()
    ledger = open_ledger()
    clock.now += 700
    ledger.hold("t", Amount())
    day = usage.of_scope(ledger, "s")
    rows = usage.audit(ledger)
    ended = [row["actual_tokens"] for row in rows]
    assert (day.spent.tokens, day.held.tokens) == (sum(ended), 0)
    assert {row["state"] for row in rows} <= {"charged", "returned", "settled"}
    assert rows
    with ledger.database.read() as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


DYING = """
real = driver()
steps = 0
class Dying(real.Connection):
    def execute(self, *arguments):
        global steps
        steps -= 1
        if not steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(*arguments)
class Module:
    def __getattr__(self, name):
        return getattr(real, name)
    def connect(self, *arguments, **rest):
        return real.connect(*arguments, factory=Dying, **rest)
databases.driver = Module

def killed_at(step, open_file):
    # True if the child was killed before it came to its end.
    global steps
    pid = os.fork()
    if not pid:
        steps = step
        open_file()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

def kill_at_every_statement(open_file, check):
    step = 1
    while killed_at(step, open_file):
        check()
        step += 1
    print(step)
"""


UPGRADE = """
from embedcore.storage.schema import Schema

NEXT = Schema("embedcore.state")
# Those that are applied already are not applied again.
for migration in STATE._migrations:
    NEXT(migration)

@NEXT
def more(database):
    database.conn.execute("CREATE TABLE more (x INTEGER) STRICT")
    database.conn.execute("ALTER TABLE book ADD COLUMN y INTEGER")
    database.conn.execute("UPDATE window SET tokens_spent = tokens_spent * 2")

def upgrade():
    Database(PATH, NEXT).open()
"""


@pytest.mark.fault(109)
def test_a_migration_is_made_once_by_whoever_comes_first(
    start_python: Start, run_python: Callable[..., str], tmp_path: Path
) -> None:
    run_python("new_ledger().record('s', Amount(tokens=5))")
    go = tmp_path / "go"
    started = [start_python(f"{UPGRADE}\nwait_for({str(go)!r})\nupgrade()") for _ in range(8)]
    go.touch()
    all_printed(started)
    said = run_python("""
with contextlib.closing(driver().connect(PATH)) as connection:
    print(*connection.execute("SELECT max(tokens_spent) FROM window").fetchone())
""")
    assert said == "10"


@needs_fork
@pytest.mark.fault(109)
def test_killed_at_any_statement_of_the_first_opening(run_python: Callable[..., str]) -> None:
    said = run_python(
        DYING
        + """
def check():
    # Whole or not there at all; and whoever comes next can use it.
    if PATH.exists():
        with real.connect(PATH) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (STATE.version,)
        connection.close()
    def use():
        new_ledger().record("s", Amount(tokens=1))
    assert not killed_at(-1, use)
    for file in PATH.parent.iterdir():
        file.unlink()

kill_at_every_statement(lambda: new_ledger().database.open(), check)
"""
    )
    assert int(said) > 15


@needs_fork
@pytest.mark.fault(109)
def test_killed_at_any_statement_of_a_later_migration(run_python: Callable[..., str]) -> None:
    said = run_python(
        UPGRADE
        + DYING
        + """
def spent():
    with contextlib.closing(real.connect(PATH)) as connection:
        row = connection.execute("SELECT max(tokens_spent) FROM window").fetchone()
        return row + connection.execute("PRAGMA user_version").fetchone()

def check():
    assert spent() in [(5, STATE.version), (10, STATE.version + 1)]

assert not killed_at(-1, lambda: new_ledger().record("s", Amount(tokens=5)))
kill_at_every_statement(upgrade, check)
print(*spent())
"""
    )
    steps, spent = said.splitlines()
    assert int(steps) > 8
    assert spent == f"10 {STATE.version + 1}"


def test_threads_share_one_ledger(ledger: Ledger) -> None:
    limits = [Limit(scope="s", period="day", unit="tokens", amount=500)]
    granted: list[int] = []

    def spend() -> None:
        for _ in range(25):
            with contextlib.suppress(TokenBudgetExceeded):
                attempt = ledger.hold_and_send("s", Amount(tokens=7), limits)
                granted.append(7)
                ledger.settle(attempt, Amount(tokens=7), close=True)

    threads = [threading.Thread(target=spend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == usage.of_scope(ledger, "s").spent.tokens == 497
