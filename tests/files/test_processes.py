"""Real processes that are killed, that meet each other, or whose disk is full."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedcore.errors import StorageBusy
from embedcore.files.run import embed_files

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and resource limits of POSIX")

# Arguments: conftest, meter, output, number of texts, block, pause; then SCENE runs before the run.
PROGRAM = """
import importlib.util, os, signal, sys
from pathlib import Path

conftest, meter, output, count, block, pause = sys.argv[1:]
spec = importlib.util.spec_from_file_location("files_conftest", conftest)
fakes = importlib.util.module_from_spec(spec)
sys.modules["files_conftest"] = fakes
spec.loader.exec_module(fakes)
from embedcore.errors import EmbeddingError
from embedcore.files.run import embed_files

client = fakes.FakeClient(meter=Path(meter), pause=float(pause))
#SCENE
texts = (f"text {i}" for i in range(int(count)))
try:
    embed_files(client, [texts], output, block=int(block))
except EmbeddingError as error:
    kept = 0 if error.partial is None else int(error.partial.ok.sum())
    print(type(error).__name__, kept, len(client.billed))
else:
    print("done", len(client.billed))
"""


class Runs:
    """Starts the program on one output and reads what it paid for."""

    def __init__(self, forks: Callable[..., Any], folder: Path, suffix: str) -> None:
        self._forks = forks
        self.output = folder / f"v.{suffix}"
        self.meter = folder.parent / f"{folder.name}.meter"
        self.meter.touch()

    def start(
        self, count: int, block: int, *, pause: float = 0.0, scene: str = ""
    ) -> subprocess.Popen[str]:
        program = PROGRAM.replace("#SCENE", scene)
        conftest = Path(__file__).with_name("conftest.py")
        arguments = [conftest, self.meter, self.output, count, block, pause]
        process: subprocess.Popen[str] = self._forks(program, *arguments, stdout=subprocess.PIPE)
        return process

    def run(self, count: int, block: int, *, scene: str = "") -> tuple[int, str]:
        process = self.start(count, block, scene=scene)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said.strip()

    @property
    def paid(self) -> list[bytes]:
        return self.meter.read_bytes().splitlines()


@pytest.fixture
def runs(tmp_path: Path, forks: Callable[..., Any]) -> Callable[[str], Runs]:
    def build(suffix: str) -> Runs:
        folder = tmp_path / "out put?#é"
        folder.mkdir()
        return Runs(forks, folder, suffix)

    return build


@pytest.mark.fault(144)
@pytest.mark.fault(149)
@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
def test_killed_again_and_again_it_pays_for_the_block_in_flight_at_most(
    runs: Callable[[str], Runs], suffix: str, check_rows: Callable[..., None]
) -> None:
    count, block, kills = 150, 10, 0
    case = runs(suffix)
    chance = random.Random(suffix)
    for _ in range(100):
        code, _ = case.run(count, block, scene=DIES.format(after=chance.randrange(1, 60)))
        kills += code != 0
        if code == 0:
            break
    assert kills >= 2
    check_paid(case, count, kills * block, check_rows)


# Killed when it has paid for so many texts.
DIES = """
left, pay = [{after}], fakes.FakeClient._pay
def paying(self, text):
    pay(self, text)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
fakes.FakeClient._pay = paying
"""


def check_paid(case: Runs, count: int, most: int, check_rows: Callable[..., None]) -> None:
    check_rows(case.output, [f"text {i}" for i in range(count)])
    assert len(set(case.paid)) == count
    assert len(case.paid) - count <= most
    assert [path.name for path in case.output.parent.iterdir() if "journal" in path.name] == []


@pytest.mark.campaign(short=True)
@pytest.mark.fault(144)
@pytest.mark.fault(149)
@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
def test_killed_at_any_time_it_pays_for_the_block_in_flight_at_most(
    runs: Callable[[str], Runs], suffix: str, check_rows: Callable[..., None]
) -> None:
    count, block, kills = 150, 10, 0
    case = runs(suffix)
    chance = random.Random(suffix)
    for _ in range(100):
        process = case.start(count, block, pause=0.004)
        before = len(case.paid)
        stop_at = before + chance.randrange(1, 60)
        while process.poll() is None and len(case.paid) < stop_at:
            time.sleep(0.001)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.communicate(timeout=120)
        if process.returncode == 0:
            break
    check_paid(case, count, kills * block, check_rows)


# Killed when it has written a part of the output.
HALFWAY = """
import embedcore.files.output as writes

writes._ROWS_AT_ONCE = 200
write = writes._write_block
def writing(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
writes._write_block = writing
"""


@pytest.mark.case("D7")
@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="no files without a name")
@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
def test_killed_while_it_writes_it_leaves_no_text(
    runs: Callable[[str], Runs], suffix: str, check_rows: Callable[..., None]
) -> None:
    case = runs(suffix)
    code, _ = case.run(500, 500, scene=HALFWAY)
    assert code != 0
    left = {path.name: path.read_bytes() for path in case.output.parent.iterdir()}
    assert left.keys() == {f"{case.output.name}.journal", f"{case.output.name}.lock"}
    assert not any(b"text 1" in content for content in left.values())
    assert case.run(500, 500) == (0, "done 0")
    check_rows(case.output, [f"text {i}" for i in range(500)])


# Forks one child for each step that touches the disk, kills it there, and runs to the end after it.
SEAMS = """
import hashlib, itertools, pathlib
import embedcore.files.journal as journal

output = Path(output)
left = [0]

def dying(function):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

def torn(file, data, write_all=journal._write_all):
    half = len(data) // 2
    write_all(file, data[:half])
    dying(lambda: None)()
    write_all(file, data[half:])

def run(count, **options):
    client = fakes.FakeClient(meter=Path(meter))
    embed_files(client, [(f"text {i}" for i in range(count))], output, block=1, **options)

for at in itertools.count(1):
    for path in output.parent.iterdir():
        path.unlink()
    run(4)
    Path(meter).write_bytes(b"")
    child = os.fork()
    if child == 0:
        left[0] = at
        for name in ("replace", "unlink"):
            setattr(pathlib.Path, name, dying(getattr(pathlib.Path, name)))
        for name in ("fsync", "open"):
            setattr(os, name, dying(getattr(os, name)))
        journal._write_all = torn
        run(6)
        os._exit(0)
    killed = os.waitpid(child, 0)[1] != 0
    rows = len(fakes.load_output(output)) if output.suffix == ".jsonl" else 4
    assert rows in (4, 6), rows
    run(6)
    found = fakes.load_output(output)
    assert [row["text"] for row in found] == [f"text {i}" for i in range(6)]
    for row in found:
        assert row["vector"] == fakes.vector_of(row["text"]).tolist()
    assert len(Path(meter).read_bytes().splitlines()) <= 2 + killed
    if not killed:
        break
print("killed at", at - 1)
sys.exit()
"""


@pytest.mark.fault(144)
@pytest.mark.parametrize("suffix", ["jsonl", "npy"])
def test_killed_at_every_step_that_touches_the_disk(
    runs: Callable[[str], Runs], suffix: str
) -> None:
    """An output of 4 texts grows to 6: killed at step 1, 2, … until a run gets through."""
    code, said = runs(suffix).run(0, 1, scene=SEAMS)
    assert code == 0
    assert int(said.removeprefix("killed at ")) > 10


# It has paid for so many texts, and is at the next for ever.
STOPS = """
left, pay = [{after}], fakes.FakeClient._pay
def paying(self, text):
    if left[0] == 0:
        signal.pause()
    pay(self, text)
    left[0] -= 1
fakes.FakeClient._pay = paying
"""


def test_two_processes_on_one_output(
    runs: Callable[[str], Runs], new_client: Any, check_rows: Callable[..., None]
) -> None:
    case = runs("jsonl")
    first = case.start(100, 5, scene=STOPS.format(after=7))
    while len(case.paid) < 7:
        time.sleep(0.005)
    with pytest.raises(StorageBusy, match=f"process {first.pid} on"):
        embed_files(new_client(), [iter(["a"])], case.output)
    first.kill()
    first.communicate(timeout=120)
    # Its death releases the lock.
    client = new_client()
    embed_files(client, [(f"text {i}" for i in range(100))], case.output)
    assert len(client.billed) == 95
    check_rows(case.output, [f"text {i}" for i in range(100)])


LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


@pytest.mark.fault(102)
@pytest.mark.fault(104)
@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
def test_a_full_disk_keeps_the_old_output_and_all_that_was_paid_for(
    runs: Callable[[str], Runs], suffix: str, new_client: Any, check_rows: Callable[..., None]
) -> None:
    case = runs(suffix)
    old = [f"text {i}" for i in range(10)]
    embed_files(new_client(), [iter(old)], case.output)
    # 110 records of 64 bytes fit into the limit; the output of as many rows does not.
    code, said = case.run(110, 20, scene=LIMIT.format(size=7600))
    assert (code, said) == (0, "StorageFull 0 100")
    check_rows(case.output, old)
    assert not list(case.output.parent.glob("*.partial"))
    # Here the journal itself does not fit: the vectors in hand come with the error.
    code, said = case.run(150, 20, scene=LIMIT.format(size=7600))
    assert (code, said) == (0, "StorageFull 20 20")
    check_rows(case.output, old)
    code, said = case.run(150, 20)
    # Records of the torn block that are whole count as billed.
    assert code == 0
    assert 20 < int(said.removeprefix("done ")) <= 40
    check_rows(case.output, [f"text {i}" for i in range(150)])


@pytest.mark.fault(101)
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_found_before_anything_is_sent(
    tmp_path: Path, client: Any
) -> None:
    from embedcore.errors import StorageReadOnly

    tmp_path.chmod(0o500)
    with pytest.raises(StorageReadOnly):
        embed_files(client, [iter(["a"])], tmp_path / "a.jsonl")
    assert not client.calls
    tmp_path.chmod(0o700)
