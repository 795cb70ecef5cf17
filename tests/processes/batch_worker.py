"""Processes that work on batches and may be killed.

``batch_worker.py`` reads lines of JSON: for ``{"deed": …, "said": FILE}`` it forks a worker and
prints its id; for ``{"wait": ID}`` it prints how that one ended. What a worker found is the last
line of its file, as JSON; its first is "ready". To import everything once, and not once for every
worker, is what this is for.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from embedcore import BatchEmbeddingFailed, EmbeddingClient, EmbeddingError
from embedcore.policy.batch import (
    advance as batch,
    collect as collecting,
    context as batchoffice,
    part as asking,
    part as parts,
)
from embedcore.storage import grants as entries
from embedcore.storage.database import Database
from embedcore.storage.parts import Parts
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

SETTINGS: dict[str, Any] = {}
REMOTE = [
    f"embedcore_openai.batch:OpenAIBatch.{name}"
    for name in ("upload", "create", "find", "discard", "poll", "results", "cancel")
]


def hurry() -> None:
    """Waits that are minutes for a real provider, in hundredths of a second."""
    batchoffice._FIRST_BACKOFF, batchoffice._LONGEST_BACKOFF = 0.03, 0.2
    for module in (asking, parts):
        for name in ("_QUEUE_SECONDS", "_LONGEST_QUEUE_SECONDS"):
            if hasattr(module, name):
                setattr(module, name, 0.1)
    batch._BUDGET_SECONDS = 0.2
    if lease := SETTINGS.get("lease"):
        Parts.__init__.__kwdefaults__["lease"] = lease
    if host := SETTINGS.get("host"):
        # Another machine: nobody there can see whether a process of ours is alive.
        entries.socket.gethostname = lambda: host
    if ahead := SETTINGS.get("ahead"):
        now = time.time
        time.time = lambda: now() + ahead
    if chunk := SETTINGS.get("chunk"):
        collecting._OUTCOMES_PER_CHUNK = chunk


def die_at_statement(number: int) -> None:
    """Be killed before SQLite begins with so many statements, wherever that is."""
    counter = itertools.count(1)
    connect = Database._connect

    def trace(_: str) -> None:
        if next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def traced(self: Database) -> Any:
        connection = connect(self)
        connection.set_trace_callback(trace)
        return connection

    Database._connect = traced


def die_at_call(number: int, *, after: bool, of: Sequence[str]) -> None:
    """Be killed before or after so many calls of methods, each "module:Class.name"."""
    counter = itertools.count(1)

    def dies() -> None:
        if next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if not after:
                dies()
            found = method(*arguments, **named)
            if after:
                dies()
            return found

        return call

    for place in of:
        module, _, path = place.partition(":")
        owner, name = path.split(".")
        holder = getattr(importlib.import_module(module), owner)
        setattr(holder, name, wrapped(getattr(holder, name)))


def texts() -> list[str]:
    prefix, first, end, repeats = SETTINGS["texts"]
    chosen = [f"{prefix} {number}" for number in range(first, end)]
    return chosen + chosen[:repeats]


def connect() -> EmbeddingClient:
    return EmbeddingClient(
        "text-embedding-3-small",
        options={"batch": True, "dimensions": 8, **SETTINGS["options"]},
        config={"home": SETTINGS["home"], "batch": SETTINGS.get("batch", {})},
    )


def embed(client: EmbeddingClient) -> object:
    """The digest of the vectors, and whether each is that of its text."""
    vectors = client.batch_embed_texts(texts(), poll_interval=SETTINGS.get("poll", 0.05))
    return _right(vectors)


def _right(vectors: Any) -> dict[str, object]:
    import numpy as np

    from embedcore.testing import vectors_of

    wanted = vectors_of(texts(), 8)
    got = np.asarray(vectors, dtype=np.float32)
    return {
        "rows": len(got),
        "right": got.shape == wanted.shape and bool((got == wanted).all()),
        "digest": hashlib.sha256(got.tobytes()).hexdigest(),
    }


def submit(client: EmbeddingClient) -> object:
    """Submit and stay to look after it, as a program would that is killed some time."""
    job = client.submit_batch(iter(texts()))
    print(json.dumps({"submitted": job.id}), flush=True)
    return {"submitted": job.id, **_right(job.result(poll_interval=0.05).vectors)}


def leave(client: EmbeddingClient) -> object:
    """Submit and go."""
    return {"submitted": client.submit_batch(iter(texts())).id}


def resume(client: EmbeddingClient) -> object:
    """What cron does, until nothing is open."""
    looks = 0
    while client.batch_jobs(ended=False):
        with contextlib.suppress(BatchEmbeddingFailed):
            client.resume_batches()
        looks += 1
        time.sleep(SETTINGS.get("poll", 0.05))
    # What was lost and found may have no batch any more, and yet it has an end.
    client.resume_batches()
    return {"looks": looks}


def look(client: EmbeddingClient) -> object:
    """One look at everything."""
    return {"problems": [str(problem) for problem in client.resume_batches()]}


def fetch(client: EmbeddingClient) -> object:
    job = client.batch_job(SETTINGS["job"])
    return _right(job.result(poll_interval=0.05).vectors)


def main() -> None:
    hurry()
    if number := SETTINGS.get("statement"):
        die_at_statement(number)
    if number := SETTINGS.get("call"):
        die_at_call(number, after=SETTINGS["after"], of=SETTINGS.get("of", REMOTE))
    deeds = {
        "embed": embed,
        "submit": submit,
        "leave": leave,
        "resume": resume,
        "look": look,
        "fetch": fetch,
    }
    client = connect()
    print("ready", flush=True)
    try:
        found = deeds[SETTINGS["deed"]](client)
    except EmbeddingError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(found), flush=True)


def fork() -> int:
    worker = os.fork()
    if worker:
        return worker
    with Path(SETTINGS["said"]).open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    status = 1
    os.environ["EMBEDCORE_HOME"] = SETTINGS["home"]
    try:
        main()
        status = 0
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 130
    except BaseException:  # noqa: BLE001 - its parent reads what it was
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def warm_up() -> None:
    """Do once what every worker does, so that none has to import anything."""
    settings = BatchSettings(progress=Progress(polls=1))
    with FakeOpenAI(batch=settings) as server, TemporaryDirectory() as home:
        options = {"base_url": server.base_url, "api_key": server.api_key}
        SETTINGS.update(options=options, home=home, texts=("warm", 0, 1, 0))
        with connect() as client:
            embed(client)


def serve() -> None:
    warm_up()
    for line in sys.stdin:
        SETTINGS.clear()
        SETTINGS.update(json.loads(line))
        if "wait" in SETTINGS:
            answer = os.waitstatus_to_exitcode(os.waitpid(SETTINGS["wait"], 0)[1])
        else:
            answer = fork()
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
