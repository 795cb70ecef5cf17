"""How far does one text travel through the code? Files entered, and changes from file to file.

Counted with a profile function over every call and every thread: a file counts once it runs code,
a change whenever a call runs in another file than the call before it in the same thread. Only files
of ``embedcore/`` and ``providers/`` count; imports do not. Each trip starts with a fresh client and
an empty state folder, so that what a first call sets up is part of it. A text, a row of a stream
and an item of a batch go to the fakes of ``embedcore.testing`` in this process, whose files count
as well; a row of a file goes from the command line to a fake OpenAI server in another process.
Write transactions of all SQLite files are counted too.

    python benchmarks/walk.py              # all trips
    python benchmarks/walk.py text --list  # one of them, and where it goes
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import embedcore
from embedcore import EmbeddingClient
from embedcore.provider.protocol import Embedder
from embedcore.storage.database import Database
from embedcore.testing import FakeEmbedder
from embedcore.testing.fakes.batch import batch_embedder
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

ROOT = Path(embedcore.__file__).parents[1]
COUNTED = tuple(str(ROOT / part) + os.sep for part in ("embedcore", "providers"))


class Trip:
    """What ran: files by the number of calls in them, and changes from file to file."""

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.changes = 0
        self.writes = 0
        self._at: dict[int, str] = {}
        self._ours: dict[CodeType, bool] = {}

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        ours = self._ours.get(code)
        if ours is None:
            # The bodies of modules and of classes run while they are imported.
            is_function = bool(code.co_flags & inspect.CO_OPTIMIZED)
            ours = is_function and code.co_filename.startswith(COUNTED)
            self._ours[code] = ours
        if not ours:
            return
        self.files[code.co_filename] += 1
        thread = threading.get_ident()
        if self._at.get(thread) != code.co_filename:
            self._at[thread] = code.co_filename
            self.changes += 1

    @contextmanager
    def recorded(self) -> Iterator[None]:
        transaction = Database.transaction

        def counted(database: Database, *args: Any, **more: Any) -> Any:
            self.writes += 1
            return transaction(database, *args, **more)

        Database.transaction = counted  # type: ignore[method-assign, assignment]
        threading.setprofile(self._event)
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            Database.transaction = transaction  # type: ignore[method-assign]


def client_in(home: Path, embedder: Embedder) -> EmbeddingClient:
    return EmbeddingClient(embedder=embedder, config={"home": str(home)})


def text(home: Path, trip: Trip) -> None:
    with client_in(home, FakeEmbedder()) as client, trip.recorded():
        client.embed_texts(["one text"])


def stream(home: Path, trip: Trip) -> None:
    with client_in(home, FakeEmbedder()) as client, trip.recorded():
        for _ in client.embed_iter(["one text"]):
            pass


def batch(home: Path, trip: Trip) -> None:
    """Complete at the third look."""
    embedder = batch_embedder(settings=BatchSettings(progress=Progress(polls=3)))
    with client_in(home, embedder) as client, trip.recorded():
        client.submit_batch(["one text"]).result(poll_interval=0.01)


def file(home: Path, trip: Trip) -> None:
    from embedcore.cli import main

    (home / "in.jsonl").write_text('{"id": 1, "text": "one text"}\n', encoding="utf-8")
    command = ["embed", str(home / "in.jsonl"), "-o", str(home / "out.jsonl"), "--quiet"]
    with served() as place, redirect_stdout(StringIO()):
        os.environ["OPENAI_API_KEY"], os.environ["OPENAI_BASE_URL"] = place
        os.environ["EMBEDCORE_HOME"] = str(home)
        with trip.recorded():
            code = main([*command, "-m", "openai:text-embedding-3-small"])
        assert not code, code


@contextmanager
def served() -> Iterator[tuple[str, str]]:
    """Key and address of a fake server that ends with the block."""
    command = [sys.executable, "-m", "embedcore.testing.openai.server", "--until-eof"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        place = json.loads(server.stdout.readline())
        yield place["api_key"], place["base_url"]
        server.stdin.close()


TRIPS: dict[str, Callable[[Path, Trip], None]] = {
    "text": text,
    "stream": stream,
    "batch": batch,
    "file": file,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "trips", nargs="*", choices=[[], *TRIPS], help="all of them if none is named"
    )
    parser.add_argument("--list", action="store_true", help="the files too, with their calls")
    options = parser.parse_args()
    for name in options.trips or TRIPS:
        trip = Trip()
        with tempfile.TemporaryDirectory() as home:
            TRIPS[name](Path(home), trip)
        print(
            f"{name:6} {len(trip.files):3} files, {trip.changes:5,} changes of file, "
            f"{trip.writes:3} write transactions"
        )
        if options.list:
            for path, calls in trip.files.most_common():
                print(f"  {calls:6,}  {Path(path).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
