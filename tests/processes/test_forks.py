"""Programs that fork, as a whole: does the bill agree with the ledger, and does the limit hold?

Each runs in processes of its own, against a server in another.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from embedcore.storage import usage
from embedcore.storage.database import Database
from embedcore.storage.ledger import Ledger
from embedcore.storage.schema import STATE

if TYPE_CHECKING:
    from conftest import Server

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there is no fork"),
    pytest.mark.fault(112),
    pytest.mark.fault(147),
]
c2, c3 = pytest.mark.case("C2"), pytest.mark.case("C3")

PRELUDE = """
import asyncio, atexit, ctypes, itertools, json, os, signal, sys
import threading, time, traceback, warnings
from pathlib import Path
warnings.simplefilter("ignore", DeprecationWarning)
import embedcore
from embedcore import EmbeddingClient, TokenTracker, errors, forksafe
PLACE = json.loads(sys.argv[1])

MODEL = "openai:text-embedding-3-small"

def new_client(**budget):
    return EmbeddingClient(MODEL, options=PLACE, config={"budget": budget})

numbers = itertools.count()
def text():
    # More tokens than a fake that counts bytes bills.
    return f"{os.getpid()}.{next(numbers)}"

def spend(client, most=10**6):
    # How many single texts were embedded until the budget refused one.
    for done in range(most):
        try:
            client.embed([text()])
        except errors.BudgetExceeded:
            return done
    return most

def fork(work, *, how=os.fork):
    # The child ends with 0, 3 for UnsafeStorage, 14 when it hangs.
    pid = how()
    if pid:
        return pid
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(120)
    try:
        work()
    except errors.UnsafeStorage as error:
        assert "spawn" in str(error)
        os._exit(3)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # What became of its requests is written down.
    atexit._run_exitfuncs()
    os._exit(0)

def in_c():
    # With the interpreter's lock: if another thread had it, the child would wait for it for ever.
    return ctypes.PyDLL(None).fork()

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def gone(parent):
    # A pipe of which no process but the parent keeps the other end.
    theirs, mine = parent
    os.close(mine)
    while os.read(theirs, 1):
        pass
"""

Run = Callable[..., list[str]]


@pytest.fixture
def server(open_server: Callable[..., Server]) -> Server:
    return open_server()


@pytest.fixture
def start(forks: Any, server: Server) -> Callable[[str], Any]:
    """Start a program that talks to ``server``, in a process of its own."""

    def start(code: str) -> Any:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return forks(PRELUDE + code, server.options_json, **both)

    return start


@pytest.fixture
def run(start: Callable[[str], Any]) -> Run:
    """Run a program to its end, and that of all processes that inherited its output."""

    def run(code: str) -> list[str]:
        program = start(code)
        said, complaints = program.communicate(timeout=300)
        assert program.returncode == 0, complaints
        assert "Traceback" not in complaints, complaints
        return str(said).split()

    return run


def ledger(home: Path) -> dict[str, int]:
    database = Database(home / "state.db", STATE)
    ledger = Ledger(database)
    try:
        found = usage.of_scope(ledger, "default", "total")
        with database.read() as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    finally:
        database.close()
    return {"spent": found.spent.tokens, "held": found.held.tokens, "requests": found.requests}


def agree(server: Server, home: Path, *, limit: int | None = None) -> int:
    """The bill is what the ledger says, and within the limit; returns the number of requests."""
    bill: dict[str, Any] = server._ask("/_meter")
    assert ledger(home) == {
        "spent": bill["billed_tokens"],
        "held": 0,
        "requests": bill["billed_requests"],
    }
    assert limit is None or bill["billed_tokens"] <= limit
    return int(bill["billed_requests"])


@c2
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param("for _ in range(3): fork(worker)", id="prefork"),
        pytest.param("fork(lambda: (os.setsid(), fork(worker)))", id="daemon"),
        pytest.param(
            "[threading.Thread(target=fork, args=[worker]).start() for _ in '12']", id="threads"
        ),
    ],
)
def test_the_parent_ends_and_its_children_spend_with_a_third(
    start: Callable[[str], Any], run: Run, server: Server, state_home: Path, shape: str
) -> None:
    limit = 300
    code = f"""
client = new_client(daily_token_limit={limit})
client.embed([text()])
parent = os.pipe()
def worker():
    gone(parent)
    print(spend(client))
    sys.stdout.flush()
{shape}
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.daemon or thread.join()
os._exit(0)
"""
    third = f"print(spend(new_client(daily_token_limit={limit})))"
    program = start(third)
    done = [*run(code), *program.communicate(timeout=300)[0].split()]
    assert program.returncode == 0
    assert agree(server, state_home, limit=limit) == 1 + sum(map(int, done))


@c2
def test_a_pool_inside_with(run: Run, server: Server, state_home: Path) -> None:
    limit = 300
    said = run(f"""
import multiprocessing
def work(client):
    # By the client of the parent, which every child has a copy of.
    return spend(CLIENT, 8)
if __name__ == "__main__":
    with new_client(daily_token_limit={limit}) as CLIENT:
        CLIENT.embed([text()])
        with multiprocessing.get_context("fork").Pool(3) as pool:
            done = sum(pool.map(work, range(12), chunksize=1))
        done += spend(CLIENT)
    print(done)
""")
    assert agree(server, state_home, limit=limit) == 1 + int(said[0])


@c3
def test_forks_while_three_threads_embed(run: Run, server: Server, state_home: Path) -> None:
    """Nobody hangs and nobody is refused, whatever the three are doing at that moment."""
    said = run("""
client = new_client(daily_token_limit=10**6)
over = threading.Event()
sent = []
def work():
    while not over.is_set():
        sent.append(spend(client, 1))
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
def child():
    client.embed([text(), text()])
    TokenTracker().get_usage_today()
codes = []
for number in range(10):
    # Between any two forks each of them gets a word in.
    while len(sent) < 3 * number:
        time.sleep(0.001)
    codes.append(end(fork(child)))
over.set()
for thread in threads:
    thread.join()
print(len(sent), *codes)
""")
    sent, *codes = map(int, said)
    assert codes == [0] * 10
    assert agree(server, state_home) == sent + 10


@c3
def test_a_fork_while_the_sdk_is_set_up(run: Run) -> None:
    """What is asked about the platform then may run a program, under a lock of Python's own that
    no child would ever get."""
    codes = run("""
import platform
from embedcore.provider import registry
begun, forked, lock = threading.Event(), threading.Event(), threading.Lock()
ask = platform.platform
def slow(*given):
    with lock:
        begun.set()
        forked.wait(2)
    return ask(*given)
platform.platform = slow
batch = registry.create("openai", "text-embedding-3-small", PLACE).batch
def poll():
    try:
        batch.poll("batch_1")
    except errors.RemoteGone:
        return
    raise AssertionError
thread = threading.Thread(target=poll)
thread.start()
begun.wait()
pid = fork(lambda: (signal.alarm(120), poll()))
forked.set()
print(end(pid))
thread.join()
""")
    assert codes == ["0"]


@c3
def test_a_fork_while_the_first_connection_is_made(
    run: Run, server: Server, state_home: Path
) -> None:
    """The system's resolver has locks of its own, too."""
    codes = run("""
import socket
begun, forked, lock = threading.Event(), threading.Event(), threading.Lock()
ask = socket.getaddrinfo
def slow(*given, **named):
    begun.set()
    forked.wait(2)
    return ask(*given, **named)
socket.getaddrinfo = slow
client = new_client()
thread = threading.Thread(target=spend, args=[client, 1])
thread.start()
begun.wait()
pid = fork(lambda: (signal.alarm(120), client.embed([text()])))
forked.set()
print(end(pid))
thread.join()
""")
    assert codes == ["0"]
    assert agree(server, state_home) == 2


@c3
def test_a_fork_in_c_while_three_threads_embed(run: Run, server: Server, state_home: Path) -> None:
    """The child is told at its first use; the parent goes on. Its threads wait for replies here:
    Python itself does not survive such a fork while another thread runs."""
    said = run("""
from embedcore.testing import FakeEmbedder
go_on, waiting = threading.Event(), threading.Barrier(4)
class Slow(FakeEmbedder):
    def embed(self, request):
        waiting.wait()
        go_on.wait()
        return super().embed(request)
slow = EmbeddingClient(embedder=Slow())
client = new_client()
client.embed([text()])
threads = [threading.Thread(target=slow.embed, args=[[text()]]) for _ in range(3)]
for thread in threads:
    thread.start()
waiting.wait()
deeds = [lambda: slow.embed([text()]), lambda: client.embed([text()]), TokenTracker().reset]
print(*[end(fork(deed, how=in_c)) for deed in deeds for _ in range(3)])
go_on.set()
for thread in threads:
    thread.join()
client.embed([text()])
""")
    assert said == ["3"] * 9
    assert server._ask("/_meter")["billed_requests"] == 2


@c2
def test_whatever_a_child_does_is_its_own(run: Run, server: Server, state_home: Path) -> None:
    """Streams, asyncio, batches, the tracker and the functions, of clients that the parent used."""
    said = run("""
with new_client() as client:
    tracker = TokenTracker(daily_limit=10**6)
    client.embed([text()])
    tracker.get_usage_today()
    stream = client.embed_iter((text() for _ in range(3)), block_size=1)
    next(stream)
    def child():
        assert len(list(client.embed_iter([text()]))) == 1
        assert len(asyncio.run(client.aembed([text()]))) == 1
        assert tracker.get_usage_today()["requests"] >= 2
        with new_client() as other:
            other.embed([text()])
        try:
            next(stream)
        except errors.ConfigurationError as error:
            assert "forked" in str(error)
        else:
            raise AssertionError
        stream.close()
    codes = [end(fork(child)) for _ in range(2)]
    rest = len(list(stream))
print(rest, *codes)
""")
    assert said == ["2", "0", "0"]
    assert agree(server, state_home) == 1 + 3 + 2 * 3


@c2
def test_a_child_without_a_ledger_of_its_parents_needs_none(run: Run, server: Server) -> None:
    """Nothing is refused where nothing was open: a local model, a client that was never used."""
    said = run("""
used = new_client()
unused = [new_client(), EmbeddingClient("hashing:64")]
unused[1].embed([text()])
codes = [end(fork(lambda: one.embed([text()]), how=in_c)) for one in [*unused, used]]
used.embed([text()])
codes.append(end(fork(lambda: used.embed([text()]), how=in_c)))
codes.append(end(fork(lambda: new_client().embed([text()]), how=in_c)))
codes.append(end(fork(lambda: TokenTracker().get_usage_today(), how=in_c)))
print(*codes)
""")
    assert said == ["0", "0", "0", "3", "3", "3"]
    assert server._ask("/_meter")["billed_requests"] == 3


@c2
@pytest.mark.fault(107)
@pytest.mark.parametrize("end", ["-wal", "-shm", ""])
@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_file_that_is_taken_from_under_a_program_sends_nothing(
    run: Run, server: Server, state_home: Path, end: str, how: str
) -> None:
    run(f"""
client = new_client(daily_token_limit=10**6)
client.embed([text()])
path = Path(os.environ["EMBEDCORE_HOME"]) / "state.db{end}"
if not path.exists():
    sys.exit(0)
old = path.rename(f"{{path}}.old")
if {how == "replaced"}:
    path.write_bytes(old.read_bytes())
for _ in range(2):
    try:
        client.embed([text()])
    except errors.StorageCorrupt as error:
        assert path.name in str(error)
    else:
        raise AssertionError
""")
    assert server._ask("/_meter")["billed_requests"] == 1


@pytest.mark.case("C5")
@pytest.mark.parametrize("when", ["before", "while it is open"])
@pytest.mark.parametrize("limit", [None, 10**6])
def test_one_file_in_two_folders_is_refused(
    run: Run, server: Server, state_home: Path, when: str, limit: int | None
) -> None:
    run(f"""
budget = {{"daily_token_limit": {limit}}} if {limit} else {{}}
client = new_client(**budget)
client.embed([text()])
path = Path(os.environ["EMBEDCORE_HOME"]) / "state.db"
if {when == "before"}:
    client.close()
other = path.with_name("other.db")
other.hardlink_to(path)
for one in (client, new_client(**budget)):
    try:
        one.embed([text()])
    except errors.UnsafeStorage as error:
        assert "several names" in str(error)
    else:
        raise AssertionError
other.unlink()
client.embed([text()])
""")
    assert server._ask("/_meter")["billed_requests"] == 2
