"""What does a fork leave of a file: the limit, the log, the locks, in the parent and in the child?

Every test runs in processes of its own, on each engine and journal that there is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from embedcore.storage import usage
from embedcore.storage.amounts import Amount
from embedcore.storage.ledger import Ledger

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there is no fork"),
    pytest.mark.fault(112),
]
c2, c3 = pytest.mark.case("C2"), pytest.mark.case("C3")

# What sqlite-utils takes where pysqlite3 has no wheel is the standard library's.
ENGINES = {
    "as it comes": "",
    "standard, TRUNCATE": "databases.wal_is_safe = lambda version: False",
    "TRUNCATE": "databases.wal_is_safe = lambda version: False",
    "standard, WAL": "databases.wal_is_safe = lambda version: True",
}

FORKS = """
import ctypes, threading, traceback
from embedcore import forksafe

def fork(work, *, how=os.fork):
    # The child says by its code how it ended: 0, 3 for UnsafeStorage, 14 when it hangs.
    pid = how()
    if pid:
        return pid
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)
    try:
        work()
    except UnsafeStorage as error:
        assert "spawn" in str(error) and error.reason == "fork"
        os._exit(3)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def in_c():
    # No handler of Python's runs.
    return ctypes.PyDLL(None).fork()

def end(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code

def spend(ledger, limit, *, each=7, most=10**6):
    # Spend until the limit refuses it; returns how much.
    spent = 0
    while most:
        most -= 1
        try:
            attempt = ledger.hold_and_send("s", Amount(tokens=each), day_limit(limit))
        except TokenBudgetExceeded:
            break
        spent += each
        ledger.settle(attempt, Amount(tokens=each), close=True)
    return spent

def until_gone(end):
    # Until every process is gone that has the other end of the pipe.
    while os.read(end, 1):
        pass

def say(path, number):
    draft = Path(f"{path}.draft")
    draft.write_text(str(number))
    draft.rename(path)

def has(store, texts):
    found = []
    store.get(keys_of(list(texts)), 8, lambda places, vectors: found.extend(places))
    return len(found)

def sound(path=PATH):
    with contextlib.closing(driver().connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]
"""

Run = Callable[..., str]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.campaign] if place > 1 else [])
        for place, name in enumerate(ENGINES)
    ]
)
def engine(request: pytest.FixtureRequest) -> str:
    """The first lines of every process."""
    expected = "sqlite3" if "standard" in request.param else ""
    check = f"assert driver().__name__ == {expected!r}\n" if expected else ""
    return f"{ENGINES[request.param]}\n{check}{FORKS}"


@pytest.fixture(scope="session")
def standard_forks(
    start_forks: Callable[..., Start], tmp_path_factory: pytest.TempPathFactory
) -> Start:
    """Whose processes have the standard library's SQLite."""
    path = tmp_path_factory.mktemp("path")
    # Found before the real one, and not to be imported.
    (path / "pysqlite3").mkdir()
    (path / "pysqlite3" / "__init__.py").write_text("raise ImportError\n")
    paths = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
    return start_forks({**os.environ, "PYTHONPATH": paths})


@pytest.fixture
def forks(forks: Start, request: pytest.FixtureRequest) -> Start:
    """An engine that is not the one that is imported needs a process that imports it."""
    if "standard" not in request.node.callspec.params["engine"]:
        return forks
    started: Start = request.getfixturevalue("standard_forks")
    return started


def spent_in(path: Path, open_ledger: Callable[..., Ledger]) -> tuple[int, int]:
    """Spent and held, as another process sees it."""
    found = usage.of_scope(open_ledger(path, timeout=60), "s", "total")
    return found.spent.tokens, found.held.tokens


@c2
@pytest.mark.fault(147)
def test_both_sides_open_connections_of_their_own(run_python: Run, engine: str) -> None:
    said = run_python(f"""{engine}
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
def child():
    assert spend(ledger, 10**6, each=1, most=10) == 10
    ledger.database.close()
    assert spend(ledger, 10**6, each=1, most=1) == 1
children = [fork(child) for _ in range(6)]
ledger.record("s", Amount(tokens=1))
assert [end(one) for one in children] == [0] * 6
print(sound(), usage.of_scope(ledger, "s").spent.tokens)
""")
    assert said == "ok 68"


PREFORK = """
limit = int(sys.argv[2])
ledger = new_ledger()
own = spend(ledger, limit, most=1)
theirs, mine = os.pipe()
def work(name):
    os.close(mine)
    until_gone(theirs)
    say(f"{PATH}.{name}", spend(ledger, limit))
"""


@c2
@pytest.mark.parametrize(
    ("fork", "workers", "ends"),
    [
        pytest.param(
            "for name in 'abc': fork(lambda: work(name))", "abc", "os._exit(0)", id="prefork"
        ),
        pytest.param("fork(lambda: (os.setsid(), fork(lambda: work('a'))))", "a", "", id="daemon"),
        pytest.param(
            "fork(lambda: (spend(ledger, 0), fork(lambda: work('a')), work('b')))",
            "ab",
            "ledger.database.close()",
            id="grandchild",
        ),
    ],
)
def test_no_limit_is_passed_once_the_parent_has_ended(
    start_python: Start,
    open_ledger: Callable[..., Ledger],
    state_path: Path,
    engine: str,
    fork: str,
    workers: str,
    ends: str,
) -> None:
    """The last who closes a file in WAL mode deletes its log: not under the hands of others."""
    limit, go = 1500, state_path.with_name("go")
    parent = start_python(
        f"{engine}{PREFORK}\n{fork}\nprint(own, flush=True)\nwait_for({str(go)!r})\n{ends}", limit
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "7\n"
    third = start_python(
        f"{engine}\nledger = new_ledger()\nledger.database.open()\nPath({str(go)!r}).touch()\n"
        f"say(f'{{PATH}}.third', spend(ledger, {limit}))\n"
        f"for name in {workers!r}: wait_for(f'{{PATH}}.{{name}}')\nprint(sound())"
    )
    assert third.communicate(timeout=120)[0].strip() == "ok"
    granted = [
        int(state_path.with_name(f"state.db.{name}").read_text()) for name in [*workers, "third"]
    ]
    assert 7 + sum(granted) == limit // 7 * 7
    assert spent_in(state_path, open_ledger) == (limit // 7 * 7, 0)


@c3
@pytest.mark.parametrize("forks_in", ["the main thread", "each thread"])
def test_forks_while_threads_are_inside(run_python: Run, engine: str, forks_in: str) -> None:
    """Nobody hangs, and nobody is refused: three threads leave the lock in time."""
    said = run_python(f"""{engine}
ledger = new_ledger()
ledger.database.open()
over = threading.Event()
done, codes = [], []
def child():
    assert spend(ledger, 10**6, each=1, most=3) == 3
def work():
    while not over.is_set():
        done.append(spend(ledger, 10**6, each=1, most=1))
        if {forks_in == "each thread"} and len(done) % 3 == 0 and len(codes) < 10:
            codes.append(end(fork(child)))
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
while {forks_in != "each thread"} and len(codes) < 10:
    codes.append(end(fork(child)))
while len(codes) < 10:
    time.sleep(0.001)
over.set()
for thread in threads:
    thread.join()
assert not any(codes), codes
assert usage.of_scope(ledger, "s").spent.tokens == sum(done) + 3 * len(codes)
print(sound())
""")
    assert said == "ok"


INSIDE = """
inside, leave = threading.Event(), threading.Event()
def stay_inside(database):
    with database.transaction() as connection:
        connection.execute("UPDATE window SET requests = requests + 1")
        inside.set()
        leave.wait()
def staying(database):
    thread = threading.Thread(target=stay_inside, args=[database], daemon=True)
    thread.start()
    inside.wait()
    return thread
"""


@c3
@pytest.mark.fault(147)
def test_where_a_lock_is_not_had_the_child_is_refused_and_the_parent_goes_on(
    run_python: Run, engine: str
) -> None:
    said = run_python(f"""{engine}{INSIDE}
forksafe.WAIT_SECONDS = 0.05
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
thread = staying(ledger.database)
def by_the_old_name():
    ledger.record("s", Amount(tokens=100))
def by_a_new_one():
    new_ledger().record("s", Amount(tokens=100))
def through_a_link():
    link = PATH.with_name("link.db")
    link.symlink_to(PATH)
    new_ledger(link).record("s", Amount(tokens=100))
def in_a_grandchild():
    code = end(fork(by_a_new_one))
    assert code == 3
    by_a_new_one()
def reading():
    usage.of_scope(ledger, "s")
deeds = [by_the_old_name, by_a_new_one, through_a_link, in_a_grandchild, reading]
assert [end(fork(deed)) for deed in deeds] == [3] * 5
def elsewhere():
    other = new_ledger(PATH.with_name("other.db"))
    other.record("s", Amount(tokens=1))
    ledger.database.close()
assert end(fork(elsewhere)) == 0
# One that ends as programs do frees nothing of the parent's either.
pid = os.fork()
if not pid:
    sys.exit(0)
assert end(pid) == 0
leave.set()
thread.join()
ledger.record("s", Amount(tokens=1))
print(sound(), usage.of_scope(ledger, "s").spent.tokens, usage.of_scope(ledger, "s").requests)
""")
    assert said == "ok 2 3"


@c2
@pytest.mark.parametrize("where", ["at rest", "inside"])
def test_a_fork_that_no_handler_saw(run_python: Run, engine: str, where: str) -> None:
    """It is the child that is told, at its first use; also one that only ends must free nothing."""
    said = run_python(f"""{engine}{INSIDE}
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
thread = {"staying(ledger.database)" if where == "inside" else "threading.Thread()"}
deeds = [
    lambda: ledger.record("s", Amount(tokens=100)),
    lambda: new_ledger().record("s", Amount(tokens=100)),
    lambda: Database(PATH, STATE, contents=databases.VECTORS).open(),
    lambda: fork(lambda: 0) and new_ledger().record("s", Amount(tokens=100)),
]
assert [end(fork(deed, how=in_c)) for deed in deeds] == [3] * 4
assert end(fork(lambda: new_ledger(PATH.with_name("o.db")).record("s", Amount()), how=in_c)) == 0
pid = in_c()
if not pid:
    sys.exit(0)
assert end(pid) == 0
if {where == "inside"}:
    leave.set()
    thread.join()
ledger.record("s", Amount(tokens=1))
print(sound(), usage.of_scope(ledger, "s").spent.tokens)
""")
    assert said == "ok 2"


@c2
def test_a_file_that_was_closed_before_the_fork_is_safe_however_it_forks(
    run_python: Run, engine: str
) -> None:
    said = run_python(f"""{engine}
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
ledger.database.close()
assert end(fork(lambda: ledger.record("s", Amount(tokens=1)), how=in_c)) == 0
print(usage.of_scope(ledger, "s").spent.tokens)
""")
    assert said == "2"


@c2
@pytest.mark.parametrize("opened", ["by the program", "by a cursor that is left"])
def test_what_else_has_the_file_open_makes_the_child_unsafe(
    run_python: Run, engine: str, opened: str
) -> None:
    """It is in SQLite's table of locks as well, which the child inherits."""
    by_program = """
other = driver().connect(PATH)
other.execute("SELECT * FROM window").fetchall()
"""
    # The standard module keeps a connection open for the sake of a cursor on it.
    by_cursor = """
with ledger.database.read() as connection:
    cursor = connection.execute("SELECT * FROM window")
    cursor.fetchone()
expected = 3 if driver().__name__ == "sqlite3" else 0
"""
    said = run_python(f"""{engine}
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
expected = 3
{by_program if opened == "by the program" else by_cursor}
assert end(fork(lambda: ledger.record("s", Amount(tokens=100)))) == expected
cursor = other = None
print(usage.of_scope(ledger, "s").spent.tokens % 100)
""")
    assert said == "1"


@c2
@pytest.mark.fault(107)
def test_the_file_must_still_be_there_after_the_fork(run_python: Run, engine: str) -> None:
    """Closed for the fork, it is not made anew: the budget would begin again."""
    said = run_python(f"""{engine}
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
def child():
    PATH.rename(PATH.with_suffix(".old"))
    for _ in range(2):
        try:
            ledger.record("s", Amount(tokens=1))
        except StorageCorrupt as error:
            assert "deleted or replaced" in str(error)
        else:
            raise AssertionError
assert end(fork(child)) == 0
try:
    ledger.record("s", Amount(tokens=1))
except StorageCorrupt:
    print("missed", PATH.exists())
""")
    assert said == "missed False"


def test_a_signal_handler_forks_inside_a_transaction(run_python: Run, engine: str) -> None:
    """The child goes on where its parent was: with a transaction that is not its own."""
    said = run_python(f"""{engine}
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
children = []
def handler(number, frame):
    children.append(os.fork())
signal.signal(signal.SIGUSR1, handler)
try:
    with ledger.database.transaction() as connection:
        connection.execute("UPDATE window SET tokens_spent = tokens_spent + 1")
        os.kill(os.getpid(), signal.SIGUSR1)
        connection.execute("UPDATE window SET tokens_spent = tokens_spent + 1")
except UnsafeStorage:
    os._exit(3 if not children[0] else 1)
assert end(children[0]) == 3
print(sound(), usage.of_scope(ledger, "s").spent.tokens)
""")
    assert said == "ok 3"


@pytest.mark.parametrize("path", ["PATH", "None"])
@pytest.mark.parametrize("how", ["os.fork", "in_c"])
@pytest.mark.parametrize("inside", ["transaction", "read"])
def test_the_child_of_a_signal_handler_inside_a_transaction_may_not_use_it(
    run_python: Run, engine: str, inside: str, how: str, path: str
) -> None:
    """Neither in the handler nor, where that returns, after it."""
    said = run_python(f"""{engine}
ledger = new_ledger({path})
ledger.record("s", Amount(tokens=1))
ended = []
def handler(number, frame):
    ended.append(end(fork(lambda: ledger.record("s", Amount(tokens=1)), how={how})))
    ended.append(end(fork(lambda: usage.of_scope(ledger, "s"), how={how})))
signal.signal(signal.SIGUSR1, handler)
with ledger.database.{inside}() as connection:
    os.kill(os.getpid(), signal.SIGUSR1)
    connection.execute("SELECT 1").fetchone()
print(*ended, usage.of_scope(ledger, "s").spent.tokens)
""")
    assert said == "3 3 1"


def test_what_the_child_inherits_is_not_freed_even_when_it_ends(
    run_python: Run, engine: str
) -> None:
    """To close it is to roll back, in the log and the file that the parent is writing."""
    said = run_python(f"""{engine}
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
def handler(number, frame):
    pid = os.fork()
    if not pid:
        sys.exit(3)
    assert end(pid) == 3
signal.signal(signal.SIGUSR1, handler)
insert = "INSERT INTO attempt (scope, windows, state, tokens, cost, note, sent) VALUES "
rows = ", ".join("('s', '', 'recorded', 0, 0, hex(randomblob(500)), 0)" for _ in range(300))
with ledger.database.transaction() as connection:
    # So few pages in memory that the others are in the log, or in the file, before the commit.
    connection.execute("PRAGMA cache_size = 3")
    for number in range(6):
        connection.execute(insert + rows)
        os.kill(os.getpid(), signal.SIGUSR1)
        found = connection.execute("SELECT count(*), sum(length(note)) FROM attempt").fetchone()
        assert found[0] == 1 + 300 * (number + 1), found
print(sound(), len(usage.audit(ledger)))
""")
    assert said == "ok 1801"


def test_a_ledger_in_memory_is_there_on_both_sides(run_python: Run, engine: str) -> None:
    said = run_python(f"""{engine}{INSIDE}
forksafe.WAIT_SECONDS = 0.05
ledger = new_ledger(None)
ledger.record("s", Amount(tokens=1))
def child():
    ledger.record("s", Amount(tokens=1))
    assert usage.of_scope(ledger, "s").spent.tokens == 2
assert end(fork(child)) == 0
thread = staying(ledger.database)
assert end(fork(child)) == 3
leave.set()
thread.join()
print(usage.of_scope(ledger, "s").spent.tokens)
""")
    assert said == "1"


@c2
def test_billed_vectors_too(run_python: Run, vectors_path: Path, engine: str) -> None:
    said = run_python(
        f"""{engine}
store = new_store()
buy(store, ["a", "b"])
def child(name):
    assert has(store, "ab") == 2
    buy(store, [name])
children = [fork(lambda: child(name)) for name in "cde"]
assert [end(one) for one in children] == [0] * 3
assert end(fork(lambda: buy(store, ["z"]), how=in_c)) == 3
assert has(store, "abcdez") == 5
print(sound(PATH / "index.db"))
""",
        path=vectors_path,
    )
    assert said == "ok"


@c2
def test_the_file_of_a_batch_too(run_python: Run, tmp_path: Path, engine: str) -> None:
    said = run_python(
        f"""{engine}
from embedcore.storage.manifest import Manifest, ManifestRow
manifest = Manifest(PATH)
def add(number):
    row = ManifestRow(number, 0, None, 0, None)
    manifest.add([row], [bytes([number] * 32)], [f"text {{number}}"])
add(0)
assert [end(fork(lambda: add(number))) for number in (1, 2)] == [0, 0]
assert end(fork(lambda: add(3), how=in_c)) == 3
add(4)
print(sound(), len(manifest.rows(0, 9)))
""",
        path=tmp_path / "batch.db",
    )
    assert said == "ok 4"


def test_a_child_that_never_looks_keeps_the_parents_ledger_whole(
    run_python: Run, engine: str, state_path: Path, open_ledger: Callable[..., Ledger]
) -> None:
    """As servers fork workers that do something else, and end in whichever way."""
    run_python(f"""{engine}
ledger = new_ledger()
ledger.record("s", Amount(tokens=1))
for number in range(8):
    pid = (os.fork, in_c)[number % 2]()
    if not pid:
        if number < 4:
            sys.exit(0)
        os.execv(sys.executable, [sys.executable, "-c", ""])
    end(pid)
    ledger.record("s", Amount(tokens=1))
""")
    assert spent_in(state_path, open_ledger) == (9, 0)
    assert {one.name for one in state_path.parent.iterdir() if one.name.startswith("state")} <= {
        "state.db",
        "state.db-wal",
        "state.db-shm",
    }
    assert os.access(state_path, os.R_OK)
    assert usage.of_scope(open_ledger(), "s").spent == Amount(tokens=9)
