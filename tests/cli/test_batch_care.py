"""Is every open batch looked after, stopped and cleared away from any process, whatever is open?"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from embedcore import EmbeddingClient
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

OFFERED = "[options.openai]\nbatch = true\n"
DAY = 86_400


@pytest.fixture
def server(monkeypatch):
    """An OpenAI whose batches move only by hand."""
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        Path("embedcore.toml").write_text(OFFERED)
        yield fake


@pytest.fixture
def submit(cli, server, texts_file):
    """``submit(n, "-m", …)``: n texts of their own under way; the id of their batch."""
    start = 0

    def send(count, *more):
        nonlocal start
        path = texts_file(count, f"texts{start}.jsonl", start)
        start += count
        run = cli("batch", "submit", str(path), "--json", *more)
        assert run.code == 0, run.err
        return run.json["id"]

    return send


def finish(server):
    for job in server.batches.jobs:
        if not job.gone and job.status not in ("completed", "failed", "expired", "cancelled"):
            server.batches.finish(job.id)


def states(cli):
    found = cli("batch", "list", "--all", "--json").json["batches"]
    return {one["id"]: one["state"] for one in found}


# Stopping


def test_cancel_stops_and_keeps_what_was_done(cli, server, submit):
    name = submit(10)
    (job,) = server.batches.jobs
    server.batches.step(job.id)
    server.batches.step(job.id, done=4)
    run = cli("batch", "cancel", name)
    assert run.code == 0, run.err
    assert f"embedcore batch status {name} --watch" in run.err
    cli("batch", "status", name)
    assert server.batches.job(job.id).status == "cancelling"
    server.batches.end_cancel(job.id)
    ended = cli("batch", "status", name)
    assert ended.code == 1
    assert states(cli) == {name: "cancelled"}
    fetched = cli("batch", "fetch", name, "-o", "v.npy", "--json")
    assert fetched.code == 1
    assert (fetched.json["written"], fetched.json["failed_rows"]) == (4, 6)
    again = cli("batch", "cancel", name)
    assert again.code == 2
    assert "has ended already (cancelled)" in again.err


def test_forget_asks(cli, server, submit, terminal):
    name = submit(10)
    refused = cli("batch", "forget", name)
    assert refused.code == 2
    assert "10 texts without a vector" in refused.err
    assert "--yes" in refused.err
    for answer, state in (("n", "running"), ("y", "abandoned")):
        screen = terminal("batch", "forget", name)
        screen.wait_for(r"Go on\? \[y/N\]")
        screen.send(f"{answer}\r")
        assert screen.close() == (0 if answer == "y" else 2)
        assert states(cli) == {name: state}


def test_forget_works_while_the_provider_is_gone(cli, server, submit):
    name = submit(10)
    requests = len(server.requests)
    server.faults.always("status", status=500, path="/v1/batches")
    assert cli("batch", "forget", name, "--yes").code == 0
    assert len(server.requests) == requests
    spent = cli("usage", "--json").json["scopes"][0]
    assert (spent["reserved_tokens"], spent["spent_tokens"]) == (0, 40), "it may have been billed"


# Resuming


def test_resume_is_quiet_until_something_changes(cli, server, submit):
    name = submit(10)
    first = cli("batch", "resume")
    assert (first.code, first.out) == (0, "")
    assert cli("batch", "resume").err == ""
    finish(server)
    changed = cli("batch", "resume")
    assert changed.code == 0
    assert f"{name}: ended, 10 of 10 texts" in changed.err
    assert cli("batch", "resume").err == ""
    assert states(cli) == {name: "done"}


def test_resume_serves_every_model_scope_and_profile(cli, server, submit, shell):
    Path("embedcore.toml").write_text(
        f"{OFFERED}[profiles.short]\nmodel = 'openai:text-embedding-3-small'\n"
        "options = { dimensions = 256 }\n"
    )
    names = [
        submit(3),
        submit(3, "-m", "text-embedding-3-large"),
        submit(3, "-m", "short"),
        submit(3, "--scope", "other"),
    ]
    finish(server)
    run = shell("batch", "resume", "--json")
    assert run.code == 0, run.err
    assert states(cli) == dict.fromkeys(names, "done")
    assert [one["stored"] for one in run.json["batches"]] == [3, 3, 3, 3]


def test_a_batch_of_a_profile_is_found_without_its_note(cli, server, submit, state_home):
    Path("embedcore.toml").write_text(
        f"{OFFERED}[profiles.short]\nmodel = 'openai:text-embedding-3-small'\n"
        "options = { dimensions = 256 }\n"
    )
    name = submit(3, "-m", "short")
    (state_home / "batches" / f"{name}.json").unlink()
    finish(server)
    assert cli("batch", "status", name).code == 0


def test_one_that_the_settings_do_not_fit_does_not_stop_the_others(cli, server, submit):
    Path("embedcore.toml").write_text(
        f"{OFFERED}[profiles.short]\nmodel = 'openai:text-embedding-3-small'\n"
        "options = { dimensions = 256 }\n"
    )
    lost, kept = submit(3, "-m", "short"), submit(3)
    finish(server)
    Path("embedcore.toml").write_text(OFFERED)
    run = cli("batch", "resume")
    assert run.code == 2
    assert f"batch {lost} was submitted with" in run.err
    assert str(Path.cwd()) in run.err
    assert states(cli) == {lost: "running", kept: "done"}
    shown = cli("batch", "status")
    assert shown.code == 2
    assert lost in shown.out, "what is written down is shown nevertheless"


def test_the_endpoint_is_named_if_it_is_another(cli, server, submit, monkeypatch):
    name = submit(3)
    with FakeOpenAI() as other:
        monkeypatch.setenv("OPENAI_BASE_URL", other.base_url)
        run = cli("batch", "status", name)
        assert run.code == 2
        assert "endpoint" in run.err
        assert not other.requests


def test_a_provider_that_is_gone_is_said_and_changes_nothing(cli, server, submit):
    name = submit(3)
    server.faults.always("status", status=401, path="/v1/batches/{id}")
    run = cli("batch", "resume")
    assert run.code == 1
    assert run.err.count("Error: ") == 1
    assert states(cli) == {name: "running"}
    status = cli("batch", "status", name)
    assert status.code in (1, 4)
    assert "trouble" in status.out
    assert "does not accept the API key" in status.out


def test_what_was_lost_is_billed_again_only_when_asked(cli, server, submit, name_settings):
    name_settings(f"{OFFERED}[batch]\ngrace = 0\n")
    name = submit(5)
    server.batches.vanish(server.batches.jobs[0].id)
    assert cli("batch", "resume").code == 0, "one look proves nothing"
    assert cli("batch", "resume").code == 1
    run = cli("batch", "resume", "--resubmit-lost", name)
    assert run.code == 0, run.err
    end = time.monotonic() + 120
    while len(server.batches.jobs) < 2 and time.monotonic() < end:
        time.sleep(0.1)
        assert cli("batch", "resume").code == 0
    finish(server)
    assert cli("batch", "status", name).code == 0
    assert states(cli) == {name: "done"}
    assert server.batches.meter.billed_texts.total() == 5


def test_lost_texts_of_a_batch_that_ended_are_submitted_anew(cli, server, submit, name_settings):
    name_settings(f"{OFFERED}[batch]\noutput_wait = 0\n")
    name = submit(5)
    (job,) = server.batches.jobs
    server.batches.finish(job.id)
    server.batches.vanish_output(job.id)
    assert cli("batch", "status", name).code == 1
    refused = cli("batch", "resume", "--resubmit-lost", name)
    assert refused.code == 2
    assert "texts0.jsonl --resubmit-lost" in refused.err
    again = cli("batch", "submit", "texts0.jsonl", "--resubmit-lost", "--json")
    assert again.code == 0, again.err
    finish(server)
    assert cli("batch", "status", again.json["id"]).code == 0


def later(seconds=3_600):
    """Nothing is due for so long, as after many looks in vain; no test waits that long."""
    path = Path(os.environ["EMBEDCORE_HOME"]) / "state.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE part SET next = (SELECT clock FROM book) + ?", (seconds * 1_000_000,)
        )


ASKING = {
    "status": ["status", "ID"],
    "status of all": ["status"],
    "watch": ["status", "ID", "--watch", "--interval", "0.1"],
    "fetch": ["fetch", "ID", "-o", "v.jsonl"],
}


@pytest.mark.case("E2")
@pytest.mark.parametrize("command", ASKING.values(), ids=ASKING)
def test_whoever_asks_has_late_results_looked_for_at_once(cli, server, submit, command):
    name = submit(5)
    (job,) = server.batches.jobs
    server.batches.settings.quirks.late = "first line"
    server.batches.settings.quirks.late_looks = None
    server.batches.finish(job.id)
    assert cli("batch", "status", name).code == 4
    later()
    server.batches.settings.quirks.late = None
    assert cli("batch", "resume", "--json").json["batches"][0]["state"] == "running"
    run = cli("batch", *[name if word == "ID" else word for word in command])
    assert run.code == 0, run.err
    assert states(cli) == {name: "done"}
    assert server.batches.meter.billed_texts.total() == 5


@pytest.mark.case("E4")
@pytest.mark.parametrize("command", ASKING.values(), ids=ASKING)
def test_whoever_asks_has_a_refused_job_asked_for_at_once(cli, server, submit, command):
    server.batches.settings.not_ready_seconds = 1e9
    name = submit(5)
    assert server.batches.jobs == []
    later()
    assert cli("batch", "resume").code == 0
    assert server.batches.jobs == []
    server.batches.settings.not_ready_seconds = 0.0
    server.batches.settings.progress = Progress(polls=1)
    cli("batch", *[name if word == "ID" else word for word in command])
    assert len(server.batches.jobs) == 1


@pytest.mark.case("E6")
def test_what_somebody_cancelled_waits_until_a_person_says_so(cli, server, submit):
    name = submit(5)
    (job,) = server.batches.jobs
    server.batches.step(job.id)
    server.batches.cancel(job.id)
    server.batches.end_cancel(job.id, done=2)
    for _ in range(2):
        run = cli("batch", "resume")
        assert run.code == 1
        assert f"--resubmit-cancelled {name}" in run.err
    status = cli("batch", "status", name)
    assert status.code == 1
    assert "stopped    3 texts of a job that was cancelled at the provider" in status.out
    assert f"--resubmit-cancelled {name}" in status.out
    assert cli("batch", "status", name, "--json").json["batches"][0]["stopped"] == 3
    fetched = cli("batch", "fetch", name, "-o", "v.jsonl")
    assert fetched.code == 4
    assert f"--resubmit-cancelled {name}" in fetched.err
    assert len(server.batches.jobs) == 1
    run = cli("batch", "resume", "--resubmit-cancelled", name)
    assert run.code == 0, run.err
    assert "3 texts whose job was cancelled will be sent again" in run.err
    assert len(server.batches.jobs) == 2
    finish(server)
    assert cli("batch", "status", name).code == 0
    ended = cli("batch", "resume", "--resubmit-cancelled", name)
    assert ended.code == 2
    assert "texts0.jsonl" in ended.err


def test_parts_that_nobody_waits_for_are_still_ended(cli, server, submit):
    name = submit(5)
    server.batches.step(server.batches.jobs[0].id)
    assert cli("batch", "cancel", name).code == 0
    server.batches.end_cancel(server.batches.jobs[0].id)
    assert cli("batch", "resume").code == 0
    assert states(cli) == {name: "cancelled"}
    assert cli("usage", "--json").json["scopes"][0]["reserved_tokens"] == 0


# Clearing away


def orphan(server, *, days):
    """An input of ours at the provider that no job uses, uploaded so many days ago."""
    server.batches.clock.advance(-days * DAY)
    with EmbeddingClient() as client:
        strategy = client.batch_jobs()[0].open_context().strategy
        from embedcore.provider.types import BatchItem

        found = strategy.upload([BatchItem(id="0", text="x")], key="0" * 32)
    server.batches.clock.advance(days * DAY)
    return found


def remote_files(server):
    return {one["id"] for one in server.batches.files(limit=100)["data"]}


def test_gc_deletes_only_old_inputs_that_nobody_uses(cli, server, submit):
    submit(3)
    used = server.batches.jobs[0].input_file_id
    old, young = orphan(server, days=3), orphan(server, days=1)
    dry = cli("batch", "gc", "--dry-run")
    assert dry.code == 0, dry.err
    assert old in dry.out
    assert young not in dry.out
    assert remote_files(server) == {used, old, young}
    assert cli("batch", "gc", "--json").json["remote_files"] == [old]
    assert remote_files(server) == {used, young}
    assert "nothing to delete" in cli("batch", "gc").out


def test_gc_leaves_an_input_whose_job_may_still_be_created(cli, server, submit):
    server.faults.push("reset", path="POST /v1/batches", effect="before")
    server.batches.clock.advance(-3 * DAY)
    submit(3)
    server.batches.clock.advance(3 * DAY)
    before = remote_files(server)
    assert len(before) == 1
    assert cli("batch", "gc", "--json").json["remote_files"] == []
    assert remote_files(server) == before


def test_gc_forgets_old_batches_with_their_files(cli, server, submit, state_home, name_settings):
    ended, open_one = submit(3), submit(2)
    server.batches.finish(server.batches.jobs[0].id)
    assert cli("batch", "status", ended).code == 0
    assert cli("batch", "gc", "--json").json["batches"] == []
    time.sleep(0.2)
    name_settings(f"{OFFERED}[batch]\nkeep_days = 0.000001\n")
    assert cli("batch", "gc", "--dry-run", "--json").json["batches"] == [ended]
    assert set(states(cli)) == {ended, open_one}
    assert cli("batch", "gc", "--json").json["batches"] == [ended]
    assert set(states(cli)) == {open_one}
    left = {path.name.partition(".")[0] for path in (state_home / "batches").iterdir()}
    assert left == {open_one}
    assert cli("batch", "fetch", ended, "-o", "v.npy").code == 2
    finish(server)
    assert cli("batch", "status", open_one).code == 0


def test_gc_leaves_no_vector_beyond_the_cap(cli, server, submit, state_home, name_settings):
    """What is not to be cached goes with the batch, as where a program forgets it."""
    name_settings(f"cache = false\n{OFFERED}")
    ended = submit(3)
    lines = Path("texts0.jsonl").read_text().splitlines(keepends=True)
    Path("two.jsonl").write_text("".join(lines[:2]))
    shared = cli("batch", "submit", "two.jsonl", "--json").json["id"]
    finish(server)
    for name in (ended, shared):
        assert cli("batch", "status", name).code == 0
    index, state = state_home / "vectors" / "index.db", state_home / "state.db"
    assert asked(index, "SELECT count(*) FROM vector") == [(3,)]
    asked(state, "UPDATE batch SET ended = 1 WHERE name = ?", ended)
    assert cli("batch", "gc", "--json").json["batches"] == [ended]
    left = asked(index, "SELECT count(*) FROM vector")
    assert left == [(2,)], "the other batch counts on two of them"
    assert cli("batch", "fetch", shared, "-o", "v.npy").code == 0
    asked(state, "UPDATE batch SET ended = 1 WHERE name = ?", shared)
    assert cli("batch", "gc", "--json").json["batches"] == [shared]
    assert asked(index, "SELECT count(*) FROM vector") == [(0,)]
    assert list((state_home / "vectors").glob("*.seg")) == []
    for table in ("batch", "wish", "item"):
        assert asked(state, f"SELECT count(*) FROM {table}") == [(0,)], table
    assert list((state_home / "batches").iterdir()) == []


def asked(file, statement, *values):
    """Rows, from a connection that is closed before a command opens the file."""
    with contextlib.closing(sqlite3.connect(file)) as connection, connection:
        return connection.execute(statement, values).fetchall()


def test_gc_deletes_files_that_no_batch_has(cli, server, submit, state_home):
    name = submit(3)
    folder = state_home / "batches"
    old = time.time() - 3 * DAY
    for stray in ("20260101-deadbeef.db", "20260101-deadbeef.json", "notes.txt"):
        (folder / stray).write_text("x")
        os.utime(folder / stray, (old, old))
    (folder / "20260102-deadbeef.db").write_text("being prepared")
    (folder / "20260103-deadbeef.db").write_text("in use")
    os.utime(folder / "20260103-deadbeef.db", (old, old))
    (folder / "20260103-deadbeef.db-wal").write_text("just now")
    for path in folder.glob(f"{name}*"):
        os.utime(path, (old, old))
    run = cli("batch", "gc", "--json")
    assert sorted(Path(path).name for path in run.json["local_files"]) == [
        "20260101-deadbeef.db",
        "20260101-deadbeef.json",
    ]
    left = {path.name for path in folder.iterdir()}
    assert {"notes.txt", "20260102-deadbeef.db", "20260103-deadbeef.db"} < left
    assert f"{name}.db" in left
    finish(server)
    assert cli("batch", "fetch", name, "-o", "v.npy").code == 0


def test_gc_of_an_account_that_cannot_be_reached_goes_on(cli, server, submit, state_home):
    submit(3)
    stray = state_home / "batches" / "20260101-deadbeef.db"
    stray.write_text("x")
    os.utime(stray, (0, 0))
    server.faults.always("status", status=401, path="/v1/files")
    run = cli("batch", "gc")
    assert run.code == 1
    assert "Error: " in run.err
    assert not stray.exists()


def test_gc_without_any_batch(cli, server, state_home):
    assert cli("batch", "gc").code == 0
    assert not state_home.exists()


# The doctor


def test_the_doctor_tells_of_open_batches(cli, server, submit):
    assert "open, $" not in cli("doctor").out
    name = submit(10)
    run = cli("doctor")
    assert run.code == 0, run.out
    assert "1 open, $0.00000040 reserved for them" in run.out
    server.faults.always("status", status=401, path="/v1/batches/{id}")
    cli("batch", "resume")
    assert name in cli("doctor").out
    finish(server)
    server.faults.clear()
    assert cli("batch", "status", name, "--watch", "--interval", "0.1").code == 0
    assert "open, $" not in cli("doctor").out
