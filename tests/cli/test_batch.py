"""Can files be submitted as a batch, seen by any process, and never at another price than shown?"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from dataclasses import astuple
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from embedcore.cli.batch import group as batch
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

SMALL = "openai:text-embedding-3-small"
OFFERED = "[options.openai]\nbatch = true\n"
COMMANDS = ("status", "fetch", "cancel", "forget", "resume")
BAD_IDS = ["../../x", "/etc/passwd", "a\0b", "x" * 5_000, "..", "a b", "a;b", "", "é"]


@pytest.fixture
def server(monkeypatch):
    """An OpenAI whose batches move only by hand."""
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        Path("embedcore.toml").write_text(OFFERED)
        yield fake


@pytest.fixture
def submitted(cli, server, texts_file):
    """Thirty texts under way; the id of their batch."""
    run = cli("batch", "submit", str(texts_file(30)), "--json")
    assert run.code == 0, run.err
    return run.json["id"]


def finish(server, **how):
    for job in server.batches.jobs:
        if job.status not in ("completed", "failed", "expired", "cancelled"):
            server.batches.finish(job.id, **how)


def arguments(command, name):
    more = {
        "fetch": ["-o", "v.npy"],
        "forget": ["--yes"],
    }
    option = ["--resubmit-lost"] if command == "resume" else []
    return ["batch", command, *option, name, *more.get(command, [])]


# The price


def test_the_price_is_shown_first_and_nothing_sent(cli, server, texts_file):
    run = cli("batch", "submit", str(texts_file(30)), "--dry-run")
    assert run.code == 0
    assert "$0.01 per million tokens); at once it would be $" in run.out
    assert "Nothing was sent." in run.err
    plan = cli("batch", "submit", "texts.jsonl", "--dry-run", "--json").json["plan"]
    at_once = cli("embed", "texts.jsonl", "--dry-run", "--json").json["plan"]
    assert plan["cost_at_once"] == at_once["cost"]
    assert Decimal(at_once["cost"]) == 2 * Decimal(plan["cost"])
    assert plan["tokens"] == at_once["tokens"]
    assert not server.requests


def test_quiet_prints_the_id_of_what_was_submitted_and_nothing_of_what_was_fetched(
    cli, server, texts_file
):
    run = cli("batch", "submit", str(texts_file(3)), "-q")
    assert (run.code, run.err) == (0, "")
    name = run.out.strip()
    finish(server)
    assert cli("batch", "status", name, "-q").out.startswith(f"{name}  ")
    fetch = ("batch", "fetch", name, "-o", "out.npy")
    assert astuple(cli(*fetch, "-q")) == (0, "", "")
    assert "3 vectors" in cli(*fetch).out
    assert astuple(cli("batch", "gc", "-q")) == (0, "", "")


@pytest.mark.case("C9")
@pytest.mark.parametrize("cache", ["true", "false"])
def test_what_is_stored_or_under_way_is_in_no_price(cli, server, texts_file, monkeypatch, cache):
    texts_file(30)
    assert cli("batch", "submit", "texts.jsonl").code == 0
    finish(server)
    assert cli("batch", "resume").code == 0
    assert cli("batch", "submit", str(texts_file(10, "later.jsonl", start=30))).code == 0
    monkeypatch.setenv("EMBEDCORE_TOTAL_COST_LIMIT", "0.0000000001")
    monkeypatch.setenv("EMBEDCORE_CONFIRM_ABOVE", "0")
    monkeypatch.setenv("EMBEDCORE_CACHE", cache)
    both = str(texts_file(40, "both.jsonl"))
    plan = cli("batch", "submit", both, "--dry-run", "--json").json["plan"]
    assert (plan["to_embed"], plan["cached"], plan["in_flight"]) == (0, 30, 10)
    assert (plan["cost"], plan["cost_at_once"], plan["tokens"]) == ("0", "0", 0)
    assert "limit" not in cli("batch", "submit", both, "--dry-run").out
    jobs = len(server.batches.jobs)
    assert cli("batch", "submit", both).code == 0, "a limit does not refuse what costs nothing"
    assert len(server.batches.jobs) == jobs
    assert cli("batch", "submit", str(texts_file(41, "more.jsonl"))).code != 0


@pytest.mark.case("C10")
def test_with_a_deadline_a_limit_refuses_what_fits_in_no_way(cli, server, texts_file, monkeypatch):
    plan = cli("batch", "submit", str(texts_file(30)), "--dry-run", "--json").json["plan"]
    both = Decimal(plan["cost"]) + Decimal(plan["cost_at_once"])
    monkeypatch.setenv("EMBEDCORE_TOTAL_COST_LIMIT", f"{both / 2:f}")
    submit = ("batch", "submit", "texts.jsonl", "--deadline", "1h")
    assert "refuse" not in cli(*submit, "--dry-run").out
    assert cli(*submit).code == 0
    assert len(server.batches.jobs) == 1
    assert server.meter.requests == 0
    monkeypatch.setenv("EMBEDCORE_TOTAL_COST_LIMIT", "0.0000001")
    texts_file(30, start=100)
    assert "will refuse" in cli(*submit, "--dry-run").out
    assert cli(*submit).code == 3


@pytest.mark.case("C9")
def test_what_is_damaged_is_submitted_again(cli, server, submitted, texts_file, flip_vectors):
    finish(server)
    assert cli("batch", "resume").code == 0
    flip_vectors(Path(cli("cache", "where").out.strip()), "id <= 4")
    plan = cli("batch", "submit", "texts.jsonl", "--dry-run", "--json").json["plan"]
    assert (plan["to_embed"], plan["cached"]) == (4, 26)
    again = cli("batch", "submit", "texts.jsonl", "--json").json["id"]
    finish(server)
    assert cli("batch", "fetch", again, "-o", "v.npy").code == 0
    assert server.batches.meter.billed_texts.total() == 34


def test_what_is_charged_is_what_was_shown(cli, server, submitted):
    plan = cli("batch", "submit", "texts.jsonl", "--dry-run", "--json", "-m", SMALL).json["plan"]
    assert plan["joins"] == submitted
    shown = cli("batch", "status", submitted, "--json").json["batches"][0]["reserved_cost"]
    finish(server)
    (done,) = cli("batch", "status", submitted, "--json").json["batches"]
    billed = server.batches.meter
    assert Decimal(done["cost"]) == billed.billed_tokens * Decimal("0.01") / 10**6
    assert done["reserved_cost"] == "0"
    assert Decimal(shown) > 0
    assert (billed.billed_texts.total(), server.meter.billed_texts.total()) == (30, 0)


def test_without_a_terminal_more_than_confirm_above_needs_yes(
    cli, server, texts_file, name_settings
):
    name_settings(f"confirm_above = 0.0000001\n{OFFERED}")
    run = cli("batch", "submit", str(texts_file(30)))
    assert run.code == 2
    assert "say --yes to go on" in run.err
    assert not server.batches.jobs
    assert cli("batch", "list", "--all", "--json").json == {"batches": []}
    assert cli("batch", "submit", "texts.jsonl", "--yes").code == 0
    assert len(server.batches.jobs) == 1


@pytest.mark.parametrize(("answer", "jobs"), [("y", 1), ("n", 0)])
def test_on_a_terminal_it_asks(server, texts_file, terminal, answer, jobs, name_settings):
    name_settings(f"confirm_above = 0.0000001\n{OFFERED}")
    screen = terminal("batch", "submit", str(texts_file(30)))
    screen.wait_for(r"This costs .*Go on\? \[y/N\]")
    screen.send(f"{answer}\r")
    assert screen.close() == (0 if jobs else 2)
    assert len(server.batches.jobs) == jobs


@pytest.mark.parametrize("more", [[], ["--on-budget", "wait"]])
def test_a_limit_refuses_or_is_waited_for(cli, server, texts_file, monkeypatch, more):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "20")
    run = cli("batch", "submit", str(texts_file(30)), *more)
    assert "limit" in run.err
    if not more:
        assert run.code == 3
        assert "--on-budget wait" in run.err
        assert not server.batches.jobs
        assert cli("batch", "list", "--json").json == {"batches": []}
        return
    assert run.code == 0
    name = cli("batch", "list", "--json").json["batches"][0]["id"]
    held_up = cli("batch", "status", name)
    assert held_up.code == 3
    assert "waiting for budget" in held_up.out
    finish(server)
    assert 0 < server.batches.meter.billed_texts.total() <= 5, "what fits is under way"


def test_a_setting_cannot_make_it_dearer_than_was_shown(cli, server, texts_file):
    Path("embedcore.toml").write_text(f'strategy = "immediate"\n{OFFERED}')
    assert cli("batch", "submit", str(texts_file(30))).code == 0
    finish(server)
    assert cli("batch", "status").code == 0
    assert not server.meter.billed_texts


def test_with_a_deadline_the_question_is_about_the_full_price(
    cli, server, texts_file, name_settings
):
    cost = cli("batch", "submit", str(texts_file(30)), "--dry-run", "--json").json["plan"]
    between = Decimal(cost["cost"]) * 3 / 2
    name_settings(f"confirm_above = {between:f}\n{OFFERED}")
    refused = cli("batch", "submit", "texts.jsonl", "--deadline", "6h")
    assert refused.code == 2
    assert "if all is embedded at once, it would be $" in refused.err
    assert not server.requests
    run = cli("batch", "submit", "texts.jsonl", "--deadline", "6h", "--yes")
    assert run.code == 0, run.err
    assert server.meter.billed_texts.total() == 30, "it is not worth a batch"
    assert not server.batches.jobs


@pytest.mark.parametrize("value", ["soon", "0h", "-1h", "h", "5"])
def test_a_deadline_that_is_none(cli, texts_file, value):
    run = cli("batch", "submit", str(texts_file(3)), "--deadline", value)
    assert run.code == 2
    assert "write it like 90m" in run.err


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "one\n\nthree\n", "--on-error keep lists them"),
        ("a.jsonl", '{"txt": "x"}\n', "did you mean 'txt'?"),
        ("a.doc", "x", "says nothing about the format"),
    ],
)
def test_what_cannot_be_read_sends_nothing(cli, server, name, content, said):
    Path(name).write_text(content)
    run = cli("batch", "submit", name)
    assert run.code == 2
    assert said in run.err
    assert not server.requests
    assert cli("batch", "list", "--json").json == {"batches": []}


@pytest.mark.case("F1")
@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", ""), ("a.csv", "text\n"), ("a.jsonl", "\n"), ("a.txt", "\n")]
)
@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--wait",)])
def test_without_a_row_there_is_nothing_to_submit(cli, server, name, content, more):
    Path(name).write_text(content)
    ran = cli("batch", "submit", name, *more)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "There is no row in what was named: nothing was submitted.\n"
    ran = cli("batch", "submit", name, "--json", *more)
    assert (ran.code, ran.json["plan"]["rows"], ran.json["plan"]["cost"]) == (0, 0, "0")
    assert cli("batch", "list", "--json").json["batches"] == []
    assert server.batches.jobs == []
    ran = cli("batch", "submit", "-", *more)
    assert ran.code == 2
    assert "standard input: it ended without a single byte" in ran.err


def test_a_provider_without_batches_says_what_to_do(cli, texts_file):
    run = cli("batch", "submit", str(texts_file(3)), "-m", "hashing:8")
    assert run.code == 2
    assert "no batches here" in run.err
    assert "embedcore embed FILE" in run.err
    assert "batch = true" not in run.err


def test_a_server_that_may_have_batches_says_how_to_tell(cli, server, texts_file):
    Path("embedcore.toml").write_text("[options.openai]\nbatch = false\n")
    run = cli("batch", "submit", str(texts_file(3)), "-m", "openai:text-embedding-3-small")
    assert run.code == 2
    assert "batch = true under [options.openai]" in run.err
    assert server.url.removeprefix("http://") in run.err


def test_a_refusal_by_the_provider_leaves_nothing(cli, server, texts_file):
    server.faults.always("status", status=403, path="POST /v1/files")
    run = cli("batch", "submit", str(texts_file(3)))
    assert run.code == 1, run.err
    assert cli("batch", "list", "--json").json == {"batches": []}
    assert not server.batches.meter.billed_texts


@pytest.mark.fault(135)
@pytest.mark.parametrize("name", BAD_IDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_id_is_checked_before_it_is_part_of_a_path(cli, command, name, state_home):
    run = cli(*arguments(command, name))
    assert run.code == 2, run.err
    assert "not the id of a batch" in run.err
    assert len(run.err) < 500
    assert not state_home.exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_id_that_nobody_has(cli, server, submitted, command):
    run = cli(*arguments(command, "20200101-00000000"))
    assert run.code == 2
    assert "there is no batch '20200101-00000000'" in run.err


# Other processes


def test_each_step_in_a_process_of_its_own(shell, server, texts_file, read_output, tmp_path):
    texts = str(texts_file(30))
    sent = shell("batch", "submit", texts, "--json")
    assert sent.code == 0, sent.err
    name = sent.json["id"]
    assert shell("batch", "status", name).code == 4
    early = shell("batch", "fetch", name, "-o", "early.jsonl")
    assert early.code == 4
    assert f"embedcore batch status {name} --watch" in early.err
    assert not Path("early.jsonl").exists()
    finish(server)
    assert shell("batch", "status", name).code == 0
    done = shell("batch", "fetch", name, "-o", "batch.jsonl", "--json")
    assert done.code == 0, done.err
    assert done.json["written"] == 30
    assert server.batches.meter.billed_texts.total() == 30
    at_once = shell("embed", texts, "-o", "embed.jsonl", EMBEDCORE_HOME=str(tmp_path / "other"))
    assert at_once.code == 0, at_once.err
    assert read_output(Path("batch.jsonl")) == read_output(Path("embed.jsonl"))


def test_the_same_rows_again_join_what_is_under_way(cli, server, submitted, name_settings):
    name_settings(f"confirm_above = 0.0000001\n{OFFERED}")
    again = cli("batch", "submit", "texts.jsonl")
    assert again.code == 0, again.err
    assert f"nothing: batch {submitted} has the same rows under way" in again.err
    finish(server)
    assert cli("batch", "status").code == 0
    assert cli("batch", "list", "--json").json["batches"][1]["stored"] == 30
    assert server.batches.meter.billed_texts.total() == 30


def test_a_lost_answer_leaves_a_batch_that_goes_on(cli, server, texts_file, read_output):
    server.faults.push("reset", path="POST /v1/batches", effect="after")
    run = cli("batch", "submit", str(texts_file(30)))
    assert run.code in (0, 4), run.err
    name = cli("batch", "list", "--json").json["batches"][0]["id"]
    finish(server)
    assert cli("batch", "status", name, "--watch", "--interval", "0.05").code == 0
    assert cli("batch", "fetch", name, "-o", "v.jsonl").code == 0
    assert [row["id"] for row in read_output(Path("v.jsonl"))] == [f"row-{n}" for n in range(30)]
    assert server.batches.meter.billed_texts.total() == 30


def test_submit_can_wait(cli, server, texts_file):
    server.batches.settings.progress = Progress(polls=2)
    run = cli("batch", "submit", str(texts_file(30)), "--wait", "--interval", "0.01")
    assert run.code == 0, run.err
    assert "ended" in run.out
    assert "embedcore batch fetch" in run.err


def test_standard_input(cli, server, read_output):
    run = cli("batch", "submit", "-", "--json", stdin=b"one\ntwo\n")
    assert run.code == 0, run.err
    finish(server)
    done = cli("batch", "fetch", run.json["id"], "-o", "v.jsonl")
    assert done.code == 0
    assert "standard input is not there any more" in done.err
    assert [row["id"] for row in read_output(Path("v.jsonl"))] == ["0", "1"]


# Looking


def test_status_says_how_it_stands(cli, server, submitted):
    job = server.batches.jobs[0].id
    server.batches.step(job)
    server.batches.step(job, done=12)
    run = cli("batch", "status", submitted)
    assert run.code == 4
    assert "12 of 30 texts (40%)" in run.out
    assert f"{job}  in_progress, 12 of 30" in run.out
    assert max(map(len, run.out.splitlines())) <= 80


def test_status_without_an_id_is_about_all_open_ones(cli, server, submitted, texts_file):
    large = cli(
        "batch", "submit", str(texts_file(5)), "-m", "text-embedding-3-large", "--json"
    ).json["id"]
    both = cli("batch", "status", "--json")
    assert [one["id"] for one in both.json["batches"]] == [submitted, large]
    assert both.code == 4
    finish(server)
    assert cli("batch", "status").code == 0
    assert cli("batch", "status", "--json").json == {"batches": []}


def test_a_failed_row_is_told_with_its_reason(cli, server, texts_file):
    server.batches.fail_lines("number 7", code="content_filter", message="not this one")
    name = cli("batch", "submit", str(texts_file(10)), "--json").json["id"]
    finish(server)
    run = cli("batch", "status", name)
    assert run.code == 1
    assert "1 × " in run.out
    assert "not this one" in run.out


def test_watching_from_another_process_ends_with_the_batch(server, submitted, terminal):
    screen = terminal("batch", "status", submitted, "--watch", "--interval", "0.1", columns=200)
    screen.wait_for(r"under way, 0 of 30 texts")
    server.batches.step(server.batches.jobs[0].id)
    server.batches.step(server.batches.jobs[0].id, done=10)
    screen.wait_for(r"under way, 10 of 30 texts")
    finish(server)
    assert screen.close() == 0
    assert screen.plain.count("under way, 10 of 30") == 1, "a line for each change, not each look"
    assert f"embedcore batch fetch {submitted}" in screen.plain


@pytest.mark.fault(142)
def test_ctrl_c_ends_the_watching_and_not_the_batch(cli, server, submitted, terminal):
    screen = terminal("batch", "status", submitted, "--watch", "--interval", "20", columns=200)
    screen.wait_for(r"under way")
    screen.kill(signal.SIGINT)
    assert screen.close() == 130
    assert f"embedcore batch status {submitted} --watch" in screen.plain
    finish(server)
    assert cli("batch", "status", submitted).code == 0
    assert server.batches.jobs[0].status == "completed"


def test_watching_ends_when_nothing_can_go_on(cli, server, submitted, name_settings):
    name_settings(f"{OFFERED}[batch]\ngrace = 0\n")
    server.batches.vanish(server.batches.jobs[0].id)
    run = cli("batch", "status", submitted, "--watch", "--interval", "0.01")
    assert run.code == 1, run.err
    assert "trouble" in run.out


# When the settings have no batches any more


@pytest.mark.parametrize("settings", ["", "[options.openai]\nbatch = false\n"])
def test_what_was_submitted_is_seen_to_whatever_is_said_of_new_ones(
    cli, server, submitted, settings, name_settings
):
    name_settings(settings)
    assert cli("batch", "status", submitted).code == 4
    assert cli("batch", "resume").code == 0
    finish(server)
    assert cli("batch", "resume").code == 0
    assert cli("batch", "status", submitted).code == 0
    run = cli("batch", "fetch", submitted, "-o", "v.npy")
    assert run.code == 0, run.err
    assert np.load("v.npy").shape == (30, 1536)
    refused = cli("batch", "submit", "texts.jsonl")
    assert refused.code == 2
    assert "no batches here" in refused.err
    assert cli("batch", "gc").code == 0


def test_what_was_submitted_can_be_cancelled_then_too(cli, server, submitted, name_settings):
    name_settings("")
    assert cli("batch", "cancel", submitted).code in (0, 4)
    (job,) = server.batches.jobs
    assert job.status == "cancelling"
    server.batches.end_cancel(job.id)
    assert cli("batch", "status", submitted).code == 1
    assert cli("batch", "list", "--all", "--json").json["batches"][0]["state"] == "cancelled"


# The list


def test_list_asks_nobody(cli, server, submitted, monkeypatch):
    finish(server)
    requests = len(server.requests)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.setenv("EMBEDCORE_LOAD_PLUGINS", "none")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    shown = cli("batch", "list")
    assert shown.code == 0, shown.err
    assert submitted in shown.out
    assert "under way" in shown.out
    (one,) = cli("batch", "list", "--json").json["batches"]
    assert (one["id"], one["state"], one["rows"]) == (submitted, "running", 30)
    assert one["created"].endswith("+00:00")
    assert len(server.requests) == requests


def test_list_before_anything_creates_nothing(cli, state_home):
    assert "no batch was submitted" in cli("batch", "list").out
    assert cli("batch", "status").code == 0
    assert cli("batch", "resume").code == 0
    assert not state_home.exists()


def test_what_ended_long_ago_is_left_out(cli, server, submitted, monkeypatch):
    finish(server)
    assert cli("batch", "status", submitted).code == 0
    assert submitted in cli("batch", "list").out
    monkeypatch.setattr("embedcore.cli.batch.status._RECENT", timedelta(days=-1))
    hidden = cli("batch", "list")
    assert submitted not in hidden.out
    assert "--all" in hidden.err
    assert submitted in cli("batch", "list", "--all").out


def test_a_provider_cannot_write_on_the_terminal(cli, server, submitted):
    server.batches.fail_lines(
        "number 3", code="bad", message="\x1b]0;owned\x07\x1b[2Jgone\nsecond line"
    )
    finish(server)
    run = cli("batch", "status", submitted)
    assert run.code == 1
    assert "\x1b" not in run.out + run.err
    assert "gone second line" in run.out


# Keys


@pytest.mark.fault(131)
def test_a_key_is_never_shown_nor_kept(cli, server, texts_file, monkeypatch, canary, state_home):
    server.api_key = canary
    monkeypatch.setenv("OPENAI_API_KEY", canary)
    shown = ""
    name = "none"
    for command in (
        ["submit", str(texts_file(5)), "--json"],
        ["status", "NAME", "-v"],
        ["list", "--json"],
        ["resume", "-v"],
        ["fetch", "NAME", "-o", "v.jsonl", "--partial"],
        ["gc", "-v"],
        ["cancel", "NAME"],
        ["forget", "NAME", "--yes"],
    ):
        run = cli("batch", *(name if word == "NAME" else word for word in command))
        assert run.code in (0, 1, 2, 4), run.err
        shown += run.out + run.err
        if command[0] == "submit":
            name = run.json["id"]
    files = [path for path in state_home.rglob("*") if path.is_file()]
    shown += "".join(path.read_bytes().decode("latin-1") for path in files)
    assert name in shown
    assert canary not in shown
    assert canary[3:] not in shown
    if os.name == "posix":
        assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_json_is_one_object_for_every_command(cli, server, submitted):
    finish(server)
    for command in (
        ["status"],
        ["status", submitted],
        ["list"],
        ["fetch", submitted, "-o", "v.npy"],
        ["resume"],
        ["gc"],
    ):
        assert isinstance(cli("batch", *command, "--json").json, dict), command
    json.loads(cli("batch", "cancel", submitted, "--json").out)


# The page


def test_the_page_knows_every_command_and_option():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "batch-commands.md").read_text()
    table = page[page.index("| Command |") :].partition("\n\n")[0].splitlines()[2:]
    rows = [row.strip("|").split("|") for row in table]
    assert sorted(row[0].split()[0].strip("` ") for row in rows) == sorted(batch.command.commands)
    for name, what in rows:
        options = {
            option
            for parameter in batch.command.commands[name.split()[0].strip("` ")].params
            for option in parameter.opts
        }
        assert set(re.findall(r"`(--[a-z-]+)`", what)) <= options
    known = {
        option
        for each in batch.command.commands.values()
        for parameter in each.params
        for option in parameter.opts
    }
    assert set(re.findall(r"`(--?[a-z-]+)`", page)) <= known
