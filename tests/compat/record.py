"""Makes the folder ``9454e67``: what embedcore had on disk at that commit, before issue "reality".

Run once, at that commit and no other, from an empty folder::

    git worktree add --detach ../old 9454e67
    cd ../old && make .venv/.installed-dev && .venv/bin/pip install time-machine
    .venv/bin/python PATH/TO/tests/compat/record.py PATH/TO/tests/compat/9454e67

Nothing reads it but people: what it made is what counts, and is not made again. Each deed below is
a process of its own, on the host ``recorded`` at a time of its own, and most of them are killed
somewhere; the fake OpenAI of that commit stands behind the name ``recorded.internal``. Texts are of
words that are one token each, so that the fake counts what the client counts.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

BASE_URL = "http://recorded.internal/v1"
MODEL = "text-embedding-3-small"
WIDTH = 8
START = 1_768_471_200.0  # 2026-01-15 10:00 UTC
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
# The scope of a state, and the word that its texts begin with.
STATES = {
    "planned": "north",
    "refused": "south",
    "creating-unsent": "east",
    "creating-sent": "west",
    "fenced": "river",
    "lost": "lake",
    "stray": "sea",
    "submitted": "house",
    "running": "street",
    "completed": "door",
    "expired": "window",
    "collecting": "table",
    "stored": "chair",
    "budget": "bread",
    "queue": "water",
    "draining": "stone",
    "waiting": "paper",
    "cancelling": "book",
    "cancelled": "letter",
    "abandoned": "music",
    "done": "summer",
    "failed": "winter",
    "gone": "year",
    "cli": "road",
    "preparing": "night",
}
MONEY = {"web": "hand", "docs": "head", "killed": "heart"}
RULES = {
    "part_texts": 2,
    "parts": 100,
    "grace": 600,
    "look_again": 60,
    "watch": 90_000,
    "small_texts": 0,
}
KEY = "sk-recorded-0123456789abcdef"


def texts_of(scope: str, count: int = 4) -> list[str]:
    word = {**STATES, **MONEY}[scope]
    return [f"{word} of the {colour} world" for colour in COLOURS[:count]]


def model_of(scope: str) -> str:
    # A full queue is one of all scopes with the same model.
    return "text-embedding-3-large" if scope == "queue" else MODEL


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


# In the process of a deed


def stand_in(deed: dict[str, Any]) -> None:
    """Another host, another time, and the fake where the name ``recorded.internal`` leads."""
    import time_machine

    time_machine.travel(deed["now"], tick=True).start()
    plain = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        if host in ("recorded.internal", b"recorded.internal"):
            host, port = "127.0.0.1", deed["port"]
        return plain(host, port, *rest, **more)

    socket.getaddrinfo = getaddrinfo
    socket.gethostname = lambda: "recorded"
    for place, when, number in deed.get("die", []):
        die(place, when, number)


def die(place: str, when: str, number: int) -> None:
    """Be killed before or after the so-manieth call of "module:Class.name"."""
    module, _, path = place.partition(":")
    holder_name, name = path.split(".")
    holder = getattr(importlib.import_module(module), holder_name)
    plain, counter = getattr(holder, name), itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        mine = next(counter) == number
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = plain(*arguments, **named)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(holder, name, call)


def client_of(deed: dict[str, Any]) -> Any:
    from embedcore import EmbeddingClient

    options = {"base_url": BASE_URL, "api_key": KEY, "dimensions": WIDTH, "batch": True}
    return EmbeddingClient(
        model_of(deed["scope"]),
        scope=deed["scope"],
        options={**options, **deed.get("options", {})},
        config={"home": deed["home"], "batch": RULES, **deed.get("config", {})},
    )


def do(deed: dict[str, Any]) -> object:
    from embedcore import BatchEmbeddingFailed, EmbeddingError, TokenTracker

    stand_in(deed)
    what, texts = deed["do"], deed.get("texts")
    if what == "cli":
        from embedcore.cli import main

        os.chdir(deed["folder"])
        if "stdin" in deed:
            sys.stdin = io.TextIOWrapper(io.BytesIO(deed["stdin"].encode()))
        return {"code": main(deed["arguments"])}
    if what == "record_usage":
        tracker = TokenTracker(scope=deed["scope"], config={"home": deed["home"]})
        if deed.get("reset"):
            tracker.reset()
        tracker.record_usage(deed["tokens"])
        return tracker.get_usage_today()
    client = client_of(deed)
    with suppress(BatchEmbeddingFailed):
        if what == "embed":
            with suppress(EmbeddingError):
                client.embed(texts, on_error="keep", input_type=deed.get("input_type"))
            return {}
        if what == "submit":
            return {"id": client.submit_batch(texts, **deed.get("how", {})).id}
        if what == "wait":
            client.batch_embed_texts(texts, poll_interval=0.1)
        if what == "look":
            return {"problems": [str(one) for one in client.resume_batches()]}
        if what in ("cancel", "abandon"):
            getattr(client.batch_job(deed["id"]), what)()
    return {}


# In the process that has the server


class Recorder:
    def __init__(self, target: Path, work: Path) -> None:
        import time_machine

        self.target, self.work = target, work
        self.home = work / "home"
        self.traveller = time_machine.travel(START, tick=True)
        self.clock = self.traveller.start()
        from embedcore.testing import FakeOpenAI
        from embedcore.testing.openai.batch_settings import BatchSettings, Progress

        self.server = FakeOpenAI(
            api_key=None, count=count_words, batch=BatchSettings(progress=Progress())
        )
        self.service = self.server.batches
        self.at = START
        self.names: dict[str, str] = {}

    def move_to(self, seconds: float) -> None:
        self.at = START + seconds
        self.clock.move_to(self.at, tick=True)

    def start(self, what: str, scope: str = "default", **more: Any) -> subprocess.Popen[str]:
        deed = {"do": what, "scope": scope, "home": str(self.home), "now": time.time(), **more}
        deed["port"] = int(self.server.url.rpartition(":")[2])
        environment = {
            name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "TMPDIR")
        }
        environment |= {"HOME": str(self.work), "EMBEDCORE_HOME": str(self.home)}
        environment["RECORDED_KEY"] = KEY
        environment |= more.get("environment", {})
        process = subprocess.Popen(
            [sys.executable, __file__, "--deed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(deed))
        process.stdin.close()
        process.stdin = None
        return process

    def do(self, what: str, scope: str = "default", **more: Any) -> dict[str, Any]:
        process = self.start(what, scope, **more)
        out, _ = process.communicate(timeout=60)
        killed = process.returncode == -signal.SIGKILL
        assert killed == bool(more.get("die")), (scope, what, process.returncode, out)
        assert killed or process.returncode == 0, out
        found: dict[str, Any] = {} if killed else json.loads(out.splitlines()[-1])
        print(scope, what, found, flush=True)
        return found

    def submit(self, scope: str, **more: Any) -> dict[str, Any]:
        found = self.do("submit", scope, texts=texts_of(scope), **more)
        if "id" in found:
            self.names[scope] = found["id"]
        else:
            (row,) = self.rows(
                "SELECT name FROM batch b JOIN pool p ON p.id = b.pool WHERE p.scope = ?", scope
            )
            self.names[scope] = row[0]
        return found

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.home / "state.db")
        try:
            return connection.execute(statement, values).fetchall()
        finally:
            connection.close()

    def jobs(self, scope: str) -> list[Any]:
        """The jobs of a scope at the provider, oldest first."""
        found = []
        for job in self.service.jobs:
            lines = self.service.input_lines(job.input_file_id)
            texts = [json.loads(line)["body"]["input"] for line in lines]
            if any(STATES[scope] in str(text).split() for text in texts):
                found.append(job)
        return found

    # What is recorded

    def batches(self) -> None:
        at = "embedcore_openai.batch:OpenAIBatch"
        # First what takes time. The fence is at 600 s and two looks that are 60 s apart.
        for scope in ("fenced", "lost", "stray"):
            self.submit(scope, die=[(f"{at}.create", "before", 1)])
        for seconds in (700, 800):
            self.move_to(seconds)
            for scope in ("fenced", "lost", "stray"):
                if scope == "fenced" and seconds == 800:
                    self.server.faults.always("status", status=503, path="DELETE /v1/files/{id}")
                self.do("look", scope)
                self.server.faults.always(None)
        # A call that was on its way all the time creates a job after all.
        (lost,) = self.rows(
            "SELECT p.key, p.input FROM part p JOIN pool q ON q.id = p.pool "
            "WHERE q.scope = 'stray' AND p.state = 'lost'"
        )
        (mark,) = [
            name
            for job in self.jobs("lost")
            for name in (job.metadata or {})
            if "embedcore" in name
        ][:1]
        self.service.settings.accepts_deleted_input = True
        late = self.service.create(lost[1], metadata={mark: lost[0]})
        self.move_to(4_600)
        self.do("look", "stray")
        self.service.settings.accepts_deleted_input = False
        print("stray:", self.service.job(str(late["id"])).status)
        self.move_to(5_000)
        config = {"batch": {**RULES, "drain_before": 1_800}}
        how = {"strategy": "auto", "deadline": 7_200}
        self.submit("draining", how=how, config=config)
        self.move_to(10_800)
        self.do("look", "draining", config=config)

        # The rest is at 13:00.
        self.submit("planned", die=[(f"{at}.upload", "before", 1)])
        self.server.faults.always("rate_limited", retry_after=30, path="POST /v1/batches")
        self.submit("refused")
        self.server.faults.always(None)
        self.submit("creating-unsent", die=[(f"{at}.create", "before", 1)])
        self.submit("creating-sent", die=[(f"{at}.create", "after", 1)])
        self.submit("submitted")
        self.submit("running")
        for job in self.jobs("running"):
            self.service.step(job.id)
            self.service.step(job.id, done=1)
        self.do("look", "running")
        self.submit("completed")
        for job in self.jobs("completed"):
            self.service.finish(job.id)
        self.submit("expired")
        for job in self.jobs("expired"):
            self.service.expire(job.id, done=1)
        self.submit("collecting")
        for job in self.jobs("collecting"):
            self.service.finish(job.id)
        self.server.faults.always("status", status=503, path="/v1/files/{id}/content")
        self.do("look", "collecting")
        self.server.faults.always(None)
        self.submit("stored")
        for job in self.jobs("stored"):
            self.service.finish(job.id)
        self.do("look", "stored", die=[("embedcore.storage.parts:Jobs.store", "before", 1)])
        limit = {"budget": {"scopes": {"budget": {"daily_token_limit": 12}}}}
        self.submit("budget", how={"on_budget": "wait"}, config=limit)
        self.service.settings.enqueued_token_limit = 12
        self.submit("queue")
        self.service.step(self.jobs("queue")[0].id)
        self.service.step(self.jobs("queue")[1].id)
        self.do("look", "queue")
        self.service.settings.enqueued_token_limit = None
        self.do("wait", "waiting", texts=texts_of("waiting"), die=[(f"{at}.poll", "before", 4)])
        self.submit("cancelling")
        self.do("cancel", "cancelling", id=self.names["cancelling"])
        self.submit("cancelled")
        self.do("cancel", "cancelled", id=self.names["cancelled"])
        for job in self.jobs("cancelled"):
            self.service.end_cancel(job.id, done=1)
        self.do("look", "cancelled")
        self.submit("abandoned")
        for job in self.jobs("abandoned"):
            self.service.step(job.id)
            self.service.step(job.id, done=1)
        self.do("abandon", "abandoned", id=self.names["abandoned"])
        for scope in ("done", "failed", "gone"):
            if scope == "failed":
                self.service.fail_lines(f"{STATES[scope]} of the blue", message="not this one")
            self.submit(scope)
            for job in self.jobs(scope):
                self.service.finish(job.id)
                if scope == "gone":
                    self.service.vanish_output(job.id)
            self.do("look", scope)
        folder = self.work / "cli"
        folder.mkdir()
        lines = [{"id": f"row-{n}", "text": one} for n, one in enumerate(texts_of("cli"))]
        (folder / "texts.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
        self.do(
            "cli",
            folder=str(folder),
            arguments=["batch", "submit", "texts.jsonl", "--scope", "cli", "--yes", "--json"],
            environment={"EMBEDCORE_CONFIG": str(self.settings())},
        )
        ((name,),) = self.rows(
            "SELECT name FROM batch b JOIN pool p ON p.id = b.pool WHERE p.scope = 'cli'"
        )
        self.names["cli"] = name

    def settings(self) -> Path:
        path = self.work / "settings.toml"
        path.write_text(
            f'[options.openai]\nbase_url = "{BASE_URL}"\napi_key = "$RECORDED_KEY"\n'
            f"dimensions = {WIDTH}\nbatch = true\nmax_texts_per_request = 2\nmax_concurrency = 1\n"
            f"[batch]\nparts = {RULES['parts']}\npart_texts = {RULES['part_texts']}\n"
        )
        return path

    def money(self) -> None:
        """Settled, given back, charged, recorded by hand, reset; and a process that was killed."""
        one = {"retry": {"attempts": 1}}
        small = {"max_texts_per_request": 2, "max_concurrency": 1}
        texts = texts_of("web", 6)
        self.do("embed", "web", texts=texts[:2])
        self.server.faults.push("rate_limited", retry_after=0)
        self.do("embed", "web", texts=texts[2:3])
        self.server.faults.push("reset", bills=True)
        self.do("embed", "web", texts=texts[3:4], config=one)
        self.do("embed", "web", texts=texts[4:5], input_type="query")
        self.do("record_usage", "web", tokens=100)
        self.do("embed", "docs", texts=texts_of("docs", 3), input_type="document")
        self.do("record_usage", "docs", tokens=7, reset=True)
        self.server.faults.push("ok", "hang", seconds=30, bills=True)
        before = len(self.server.requests)
        process = self.start("embed", "killed", texts=texts_of("killed", 6), options=small)
        self.until(lambda: len(self.server.requests) == before + 2)
        process.kill()
        process.wait()

    def until(self, what: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not what():
            assert time.monotonic() < end
            time.sleep(0.02)

    def preparing(self) -> None:
        """Last: whoever submits after it sweeps it away."""
        self.submit("preparing", die=[("embedcore.storage.batches:Batches.want", "after", 1)])

    def outputs(self) -> None:
        """Runs of the command line. Their state folder is another one, without billed vectors."""
        folder = self.target / "outputs"
        folder.mkdir(parents=True)
        words = [f"voice of the {colour} world" for colour in COLOURS]
        lines = [{"id": f"row-{n}", "text": text} for n, text in enumerate(words)]
        write = lambda name, rows: (folder / name).write_text(  # noqa: E731
            "".join(f"{json.dumps(one)}\n" for one in rows)
        )
        write("input.jsonl", lines[:4])
        write("faulty-input.jsonl", [*lines[:2], {"id": "row-2", "text": ""}])
        environment = {
            "EMBEDCORE_CONFIG": str(self.settings()),
            "EMBEDCORE_HOME": str(self.work / "other"),
            "EMBEDCORE_CACHE": "false",
        }

        def run(source: str, output: str, *more: str) -> subprocess.Popen[str]:
            arguments = ["embed", source, "-o", output, "--id", "id", "--yes", "--json", *more]
            return self.start(
                "cli", folder=str(folder), arguments=arguments, environment=environment
            )

        for ending, more in itertools.product(("jsonl", "npy", "parquet"), ("", "--no-text")):
            name = f"no-text.{ending}" if more else f"vectors.{ending}"
            process = run("input.jsonl", name, *([more] if more else []))
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0, out
        for ending in ("jsonl", "npy", "parquet"):
            process = run("faulty-input.jsonl", f"faulty.{ending}", "--on-error", "keep")
            out, _ = process.communicate(timeout=60)
            assert '"code": 1' in out, out
        for ending in ("jsonl", "npy", "parquet"):
            self.server.faults.push("ok", "hang", seconds=30, bills=False)
            before = len(self.server.requests)
            process = run("input.jsonl", f"unfinished.{ending}")
            journal = folder / f"unfinished.{ending}.journal"
            self.until(
                lambda before=before, journal=journal: (
                    len(self.server.requests) == before + 2
                    and journal.exists()
                    and journal.stat().st_size == 336
                )
            )
            process.kill()
            process.wait()
        (folder / "billed.json").write_text(json.dumps(self.server.meter.billed_texts, indent=1))

    def state(self) -> None:
        """The state folder as it was left: with logs that nobody folded in."""
        with tarfile.open(self.target / "state.tar.xz", "w:xz", preset=9) as archive:
            for path in sorted(self.home.rglob("*")):
                # The index of a log belongs to one machine, and is made anew.
                if path.is_file() and not path.name.endswith("-shm"):
                    entry = archive.gettarinfo(path, str(path.relative_to(self.home)))
                    entry.uid = entry.gid = 0
                    entry.uname = entry.gname = ""
                    entry.mtime = int(time.time())
                    with path.open("rb") as file:
                        archive.addfile(entry, file)
        windows = self.rows(
            "SELECT scope, lane, period, start, tokens_spent, tokens_held, cost_spent, cost_held, "
            "requests FROM window ORDER BY scope, lane, period, start"
        )
        parts = self.rows(
            "SELECT q.scope, p.state, p.tokens, p.cost FROM part p JOIN pool q ON q.id = p.pool "
            "ORDER BY p.id"
        )
        batches = self.rows(
            "SELECT q.scope, b.name, b.state, b.draining, b.blocked FROM batch b "
            "JOIN pool q ON q.id = b.pool ORDER BY b.id"
        )
        attempts = self.rows(
            "SELECT scope, state, tokens, cost, actual_tokens, actual_cost, inputs FROM attempt "
            "ORDER BY id"
        )
        found = {
            "recorded_at": time.time(),
            "batches": self.names,
            "models": {scope: model_of(scope) for scope in (*STATES, *MONEY)},
            "texts": {scope: texts_of(scope) for scope in STATES},
            "money_texts": {scope: texts_of(scope, 6) for scope in MONEY},
            "window": windows,
            "part": parts,
            "batch": batches,
            "attempt": attempts,
        }
        self.write("state.json", found)
        self.write(
            "provider.json",
            {
                "files": [
                    {
                        "id": file.id,
                        "filename": file.filename,
                        "purpose": file.purpose,
                        "created_at": file.created_at,
                        "expires_at": file.expires_at,
                        "gone": file.gone,
                        "content": b"".join(file.content.blocks()).decode(),
                    }
                    for file in self.service._files._files.values()
                ],
                "jobs": [self.job(job) for job in self.service.jobs],
                "billed": {
                    "immediate": self.server.meter.billed_texts,
                    "batches": self.service.meter.billed_texts,
                },
            },
        )

    def job(self, job: Any) -> dict[str, Any]:
        names = (
            "id endpoint input_file_id completion_window metadata output_expires_after created_at "
            "times status model billed_tokens output_file_id error_file_id polls "
            "polls_when_cancelled listings gone"
        )
        plain = {name: getattr(job, name) for name in names.split()}
        results = [
            {
                "line": one.line.number,
                "custom_id": one.custom_id,
                "failure": one.failure and asdict(one.failure),
            }
            for one in job.results
        ]
        return {**plain, "errors": [asdict(one) for one in job.errors], "results": results}

    def write(self, name: str, found: object) -> None:
        (self.target / name).write_text(json.dumps(found, indent=1) + "\n")


# What needs neither server nor state

BY_HAND = {"plain": None, "another variant": "prefix 2"}


def configurations() -> Iterator[dict[str, Any]]:
    """What is given to a client, by name; ``embedder``: its variant, for one built by hand."""
    ours = {"base_url": BASE_URL}
    yield {"name": "the defaults", "model": None, "options": {}}
    yield {"name": "a model", "model": "openai:text-embedding-3-large", "options": {}}
    yield {"name": "fixed width", "model": "text-embedding-ada-002", "options": {}}
    yield {"name": "dimensions", "model": MODEL, "options": {"dimensions": 512}}
    yield {"name": "a server", "model": MODEL, "options": ours}
    yield {
        "name": "what keeps vectors",
        "model": MODEL,
        "options": {
            **ours,
            "encoding": "float",
            "organization": "org-1",
            "project": "proj_1",
            "headers": {"X-Team": "search", "api-key": "0123456789"},
            "timeout": 7.5,
            "connect_timeout": 1.5,
            "transfer_timeout": 60,
            "max_texts_per_request": 7,
            "max_tokens_per_request": 70_000,
            "max_concurrency": 3,
            "price": "0.5",
            "batch_price": "0.25",
            "server_errors_billed": "unknown",
            "batch": True,
            "batch_encoding": "base64",
            "batch_errors_billed": "unknown",
            "batch_output_expiry": False,
            "max_enqueued_tokens": 1_000_000,
            "allow_plaintext": True,
        },
    }
    yield {
        "name": "an unknown model",
        "model": "openai:BAAI/bge-m3",
        "options": {"base_url": "http://localhost:8080/v1"},
    }
    yield {
        "name": "a length of its own",
        "model": "openai:bge-m3",
        "options": {"base_url": "http://localhost:8080/v1", "max_input_tokens": 512},
    }
    yield {
        "name": "other names in replies",
        "model": "openai:bge-m3",
        "options": {
            "base_url": "http://localhost:8080/v1",
            "reply_models": ["BAAI/bge-m3", "bge"],
            "dimensions": 1024,
        },
    }
    yield {"name": "any name in replies", "model": MODEL, "options": {"reply_models": ["*"]}}
    yield {
        "name": "as at Azure",
        "model": "openai:my-deployment",
        "options": {
            "base_url": "https://example.openai.azure.com/openai/v1",
            "base_model": "text-embedding-3-large",
            "dimensions": 256,
        },
    }
    yield {"name": "a slash at the end", "model": MODEL, "options": {"base_url": f"{BASE_URL}/"}}
    for name, overlong in (("cut", "truncate"), ("refused", "reject")):
        yield {"name": f"{name} when too long", "model": MODEL, "config": {"overlong": overlong}}
    yield {
        "name": "a profile",
        "model": "docs",
        "config": {
            "profiles": {"docs": {"model": f"openai:{MODEL}", "options": {"dimensions": 64}}},
            "options": {"openai": {"base_url": BASE_URL}},
        },
    }
    yield {"name": "hashing", "model": "hashing:256"}
    yield {"name": "hashing, another width", "model": "hashing:1024"}
    for name, variant in BY_HAND.items():
        yield {"name": f"by hand, {name}", "embedder": variant}


INPUT_TYPES = (None, "query", "document")
KEY_TEXTS = ["the red house", "das gr\u00fcne Haus \U0001f3e0"]


def by_hand(variant: str | None) -> Any:
    from embedcore.provider.base import BaseEmbedder
    from embedcore.provider.types import ModelInfo

    class Recorded(BaseEmbedder):
        def embed(self, request: Any) -> Any:
            raise NotImplementedError

    Recorded.__module__, Recorded.__qualname__ = "recorded", "Recorded"
    made = Recorded()
    known = {} if variant is None else {"variant": variant}
    made.info = ModelInfo(
        provider="house", model="own", dimensions=4, endpoint="http://house/v1", **known
    )
    return made


def client_with(given: dict[str, Any], home: Path) -> Any:
    from embedcore import EmbeddingClient

    config = {"home": home, **given.get("config", {})}
    if "embedder" in given:
        return EmbeddingClient(embedder=by_hand(given["embedder"]), config=config)
    return EmbeddingClient(given["model"], options=given.get("options", {}), config=config)


def fingerprints(target: Path, home: Path) -> None:
    from embedcore.storage.keys import Keys

    found = []
    for given in configurations():
        client = client_with(given, home)
        info = client.info
        keys = {
            str(input_type): [
                key.hex()
                for key in Keys(
                    provider=info.provider,
                    model=info.model,
                    fingerprint=client.fingerprint,
                    input_type=input_type,
                ).of(KEY_TEXTS)
            ]
            for input_type in INPUT_TYPES
        }
        found.append({**given, "fingerprint": client.fingerprint, "keys": keys})
        client.close()
    text = json.dumps({"texts": KEY_TEXTS, "configurations": found}, indent=1)
    (target / "fingerprints.json").write_text(text + "\n")


CONFIGS = {
    "embedcore.toml": """\
model = "docs"
provider = "openai"
scope = "search"
timezone = "Europe/Berlin"
home = "state"
confirm_above = 2.5
overlong = "reject"
on_empty = "keep"
on_zero = "reject"
concurrency = 4
requests_per_minute = 100
tokens_per_minute = 100000
cache = true
cache_dir = "vectors"
cache_cap = "1 GB"
strategy = "auto"
deadline = 7200

[options.openai]
base_url = "http://recorded.internal/v1"
api_key = "$RECORDED_KEY"
headers = { X-Team = "$RECORDED_TEAM" }
timeout = 12.5

[profiles.docs]
model = "openai:text-embedding-3-small"
options = { dimensions = 16 }
overlong = "truncate"
batch = { parts = 2 }
retry = { attempts = 5 }

[profiles.other]
model = "text-embedding-3-large"
scope = "another"
budget = { daily_token_limit = 500 }

[budget]
daily_token_limit = 5_000_000
monthly_cost_limit = 20
query_share = 0.1
wait = 5

[budget.all_scopes]
total_cost_limit = "99.5"

[budget.scopes.another]
monthly_token_limit = 1_000

[retry]
attempts = 2
first_wait = 0.25
longest_wait = 9
longest_named_wait = 60
request_timeout = 30
deadline = 90
quota = 10
quota_ratio = 0.5

[batch]
parts = 3
part_texts = 1000
enqueued_tokens = 5000
attempts = 2
grace = 300
look_again = 30
watch = 80000
keep_days = 7
small_texts = 10
worth = 0.5
quickest = 600
drain_before = 900
""",
    "pyproject.toml": """\
[project]
name = "someone"
version = "1"

[tool.embedcore]
model = "small"
overlong = "reject"

[tool.embedcore.profiles.small]
model = "openai:text-embedding-3-small"
options = { dimensions = 8 }

[tool.embedcore.budget]
daily_token_limit = 1000
monthly_cost_limit = 3
""",
    "user.toml": """\
model = "text-embedding-3-large"
scope = "mine"

[budget]
daily_token_limit = 700
""",
    "policy.toml": """\
[budget]
daily_token_limit = 900
total_cost_limit = 50

[budget.all_scopes]
monthly_token_limit = 100000
""",
}


def settings_files(target: Path) -> None:
    """The files, and all that was set by the first of them."""
    from embedcore import Config

    folder = target / "config"
    folder.mkdir()
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    config = Config.load(folder / "embedcore.toml")
    dumped = config.model_dump(mode="json", exclude_unset=True)
    for name in ("home", "cache_dir"):
        dumped[name] = str(Path(dumped[name]).relative_to(folder))
    limits = {
        scope: sorted(
            [one.scope, one.period, one.unit, one.amount, one.reserved]
            for one in config.limits(config.profile(None), scope)
        )
        for scope in ("search", "another")
    }
    found = {"settings": dumped, "limits": limits}
    (folder / "meaning.json").write_text(json.dumps(found, indent=1, default=str) + "\n")


def main() -> None:
    if sys.argv[1:] == ["--deed"]:
        print(json.dumps(do(json.load(sys.stdin))))
        return
    target = Path(sys.argv[1]).absolute()
    work = Path("/tmp/recorded")
    for folder in (target, work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    os.environ["HOME"] = str(work)
    os.environ["RECORDED_KEY"] = KEY
    fingerprints(target, work / "none")
    os.environ["RECORDED_TEAM"] = "search"
    settings_files(target)
    recorder = Recorder(target, work)
    recorder.outputs()
    recorder.server.close()
    recorder = Recorder(target, work)
    recorder.batches()
    recorder.move_to(11_400)
    recorder.money()
    recorder.preparing()
    recorder.state()
    recorder.server.close()


if __name__ == "__main__":
    main()
