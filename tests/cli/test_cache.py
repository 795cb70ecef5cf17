"""Is it clear what is kept of what was billed, and does room come without a surprise?"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from dataclasses import astuple
from decimal import Decimal
from pathlib import Path

import pytest

from embedcore.assembly import vector_store
from embedcore.cli.doctor import chosen
from embedcore.cli.text import size
from embedcore.storage import filesystem
from embedcore.storage.old_vectors import OldVectors
from embedcore.testing import FakeOpenAI

SMALL = "openai:text-embedding-3-small"
LARGE = "openai:text-embedding-3-large"


@pytest.fixture
def billed(cli, server, texts_file, state_home):
    """Thirty texts of one model and ten of another; the folder they are kept in."""
    assert cli("embed", str(texts_file(30)), "-o", "a.npy").code == 0
    assert (
        cli("embed", str(texts_file(10)), "-o", "b.npy", "-m", "text-embedding-3-large").code == 0
    )
    return state_home / "vectors"


def damage(path, which):
    choice = chosen(None)
    store = vector_store(choice.config, choice.settings)
    assert store.path == path
    with store.database.transaction() as connection:
        connection.execute(f"UPDATE vector SET checksum = checksum + 1 WHERE {which}")
    store.close()


def test_before_anything_is_billed(cli, state_home):
    run = cli("cache")
    assert run.code == 0
    assert f"{state_home / 'vectors'} (not there yet)" in run.out
    assert "0 B of at most 10.0 GB" in run.out
    assert f"kept for {SMALL}: they cost money" in run.out
    for command in ("prune", "verify"):
        more = ["--all"] if command == "prune" else []
        done = cli("cache", command, *more)
        assert done.code == 0
        assert "nothing is kept yet" in done.out
        assert cli("cache", command, *more, "--json").json["exists"] is False
    assert not state_home.exists(), "looking creates nothing"


def test_what_is_in_it(cli, server, billed):
    assert cli("embed", "-c", "text number 3", "-c", "something else").code == 0
    shown = cli("cache")
    assert shown.code == 0
    assert max(map(len, shown.out.replace(str(billed), "PATH").splitlines())) <= 80
    found = cli("cache", "--json").json
    assert found["vectors"] == {LARGE: 10, SMALL: 31}
    assert (found["hits"], found["misses"]) == (1, 41)
    assert found["path"] == str(billed)
    assert found["used"] < found["cap"] == 10**10
    assert f"{SMALL}       31" in shown.out
    assert "2.4% of 42 texts were found and not paid for again" in shown.out


def test_where_it_is(cli, state_home, tmp_path, name_settings):
    assert cli("cache", "where").out == f"{state_home / 'vectors'}\n"
    name_settings(
        f'cache_dir = "near"\n[profiles.far]\nmodel = "{LARGE}"\ncache_dir = "{tmp_path}"\n'
    )
    assert cli("cache", "where", "--json").json == {"path": str(Path("near/vectors").absolute())}
    assert cli("cache", "where", "-m", "far").out == f"{tmp_path / 'vectors'}\n"


@pytest.mark.parametrize(
    ("settings", "model", "said"),
    [
        ("", SMALL, f"kept for {SMALL}: they cost money"),
        ("cache = false", SMALL, f"not kept for {SMALL}: cache = false"),
        ("cache = true", "hashing:8", "kept for hashing:8: cache = true"),
        ("", "hashing:8", "not kept for hashing:8: it is computed here (cache = true keeps them)"),
        ("", "openai:my-own", "not kept for openai:my-own: its price is not known"),
        ("", "nosuch:m", "not known for nosuch:m: "),
    ],
)
def test_whether_it_is_on_and_why(cli, settings, model, said, name_settings):
    name_settings(settings)
    run = cli("cache", "-m", model)
    assert run.code == 0
    assert f"vectors  {said}" in run.out


# Room


def test_nothing_is_pruned_without_saying_which(cli, billed):
    run = cli("cache", "prune", "--yes")
    assert run.code == 2
    assert "--older-than" in run.err


def test_without_a_terminal_pruning_needs_yes_and_says_what_it_costs(cli, billed):
    run = cli("cache", "prune", "--all")
    assert run.code == 2
    assert "40 vectors would be deleted; to embed them again would cost about $0.0" in run.err
    assert "--yes" in run.err
    assert sum(cli("cache", "--json").json["vectors"].values()) == 40
    done = cli("cache", "prune", "--all", "--yes")
    assert done.code == 0
    assert done.out.startswith("40 vectors deleted; ")
    assert sum(cli("cache", "--json").json["vectors"].values()) == 0


@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("n", 40)])
def test_on_a_terminal_it_asks(cli, terminal, billed, answer, left):
    screen = terminal("cache", "prune", "--all")
    screen.wait_for(r"would cost\s+about \$0\.\d+\. Go on\? \[y/N\]")
    screen.send(f"{answer}\r")
    assert screen.close() == (0 if answer == "y" else 2)
    assert sum(cli("cache", "--json").json["vectors"].values()) == left


def test_the_cost_of_buying_again_is_that_of_the_ledger(cli, server, billed):
    spent = {
        one["model"]: Decimal(one["spent_cost"])
        for one in cli("usage", "--json").json["models"]
        if one["period"] == "total"
    }
    answer = cli("cache", "prune", "--dry-run", "--all", "--json").json
    assert answer["prunable"] == {LARGE: 10, SMALL: 30}
    assert answer["deleted"] == 0
    expected = sum(spent.values())
    assert expected * Decimal("0.95") <= Decimal(answer["cost_to_embed_again"]) <= expected
    (billed.parent / "state.db").unlink()
    shown = cli("cache", "prune", "--dry-run", "--all")
    assert "what they would cost again is not known" in shown.out


@pytest.mark.parametrize("name", [SMALL, "text-embedding-3-small", "docs"])
def test_only_those_of_one_model(cli, billed, name):
    Path("embedcore.toml").write_text(f'[profiles.docs]\nmodel = "{SMALL}"\n')
    run = cli("cache", "prune", "--model", name, "--yes", "--json")
    assert run.json["deleted"] == 30
    assert cli("cache", "--json").json["vectors"] == {LARGE: 10, SMALL: 0}


def test_those_of_a_provider_that_is_gone(cli, billed, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_LOAD_PLUGINS", "hashing")
    assert cli("cache", "prune", "--model", SMALL, "--yes", "--json").json["deleted"] == 30


@pytest.mark.parametrize(
    ("age", "deleted"), [("0d", 40), ("0", 40), ("1d", 0), ("2w", 0), ("400D", 0)]
)
def test_only_those_that_are_old(cli, billed, age, deleted):
    run = cli("cache", "prune", "--older-than", age, "--yes", "--json")
    assert run.code == 0
    assert run.json["deleted"] == deleted
    assert run.json["prunable"] == ({LARGE: 10, SMALL: 30} if deleted else {})


def test_down_to_a_size_the_oldest_go(cli, server, texts_file):
    for start in range(0, 1000, 250):
        file = str(texts_file(250, start=start))
        assert cli("embed", file, "-o", f"{start}.npy", "--yes").code == 0
    before = cli("cache", "--json").json["used"]
    shown = cli("cache", "prune", "--down-to", f"{before // 2}", "--dry-run")
    assert shown.out.startswith("about ")
    said = int(shown.out.split()[1].replace(",", ""))
    answer = cli("cache", "prune", "--down-to", f"{before // 2}B", "--yes", "--json").json
    assert answer["used"] <= before // 2
    assert abs(answer["deleted"] - said) <= 200
    bill = server.meter.billed_tokens
    last = [json.loads(line)["text"] for line in Path("texts.jsonl").read_text().splitlines()][-50:]
    assert cli("embed", *(word for text in last for word in ("-c", text)), "--yes").code == 0
    assert server.meter.billed_tokens == bill, "the newest are still there"


@pytest.mark.parametrize(
    ("option", "value"), [("--older-than", "soon"), ("--older-than", "-1d"), ("--down-to", "much")]
)
def test_what_cannot_be_understood_deletes_nothing(cli, billed, option, value):
    run = cli("cache", "prune", option, value, "--yes")
    assert run.code == 2
    assert "write it" in run.err
    assert sum(cli("cache", "--json").json["vectors"].values()) == 40


# Damage


@pytest.mark.fault(116)
def test_verify_says_what_was_damaged(cli, server, billed, monkeypatch):
    sound = cli("cache", "verify")
    assert sound.code == 0
    assert sound.out == "40 vectors read: none is damaged\n"
    damage(billed, "id IN (2, 33)")
    monkeypatch.setattr("embedcore.cli.cache.LINE_SECONDS", 0.0)
    found = cli("cache", "verify", "--json")
    assert found.code == 1
    assert found.json == {"read": 40, "damaged": 2}
    assert "40 of 40 vectors read, 2 damaged" in found.err
    assert astuple(cli("cache", "verify", "--quiet")) == (0, "", "")
    assert sum(cli("cache", "--json").json["vectors"].values()) == 38


@pytest.mark.fault(120)
def test_a_file_that_is_broken_is_exit_5_and_stops_no_embedding(cli, server, billed):
    (billed / "index.db").write_bytes(b"not a database at all" * 1000)
    for name in ("cache", "verify", "prune"):
        arguments = {"cache": ["cache"], "prune": ["cache", "prune", "--all", "--yes"]}
        run = cli(*arguments.get(name, ["cache", name]))
        assert run.code == 5
        assert "embedded again" in run.err
    run = cli("embed", "-c", "text number 1", "--yes")
    assert run.code == 0
    assert "cache: " in run.err
    assert cli("doctor").code == 1


# Another model behind a name


@pytest.mark.fault(117)
def test_probing_notices_another_model_behind_the_name(cli, monkeypatch):
    with FakeOpenAI() as server:
        port = int(server.url.rpartition(":")[2])
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", server.api_key)
        first = cli("cache", "probe")
        assert first.code == 0
        assert "the next probe compares with it" in first.out
        assert server.meter.billed_requests == 1
        again = cli("cache", "probe", "text-embedding-3-small", "--json")
        assert again.code == 0
        assert again.json == {"model": SMALL, "cosine": pytest.approx(1.0), "changed": False}
        assert server.meter.billed_requests == 2, "it is asked anew each time"
    assert cli("cache", "--json").json["vectors"] == {SMALL: 1}
    with FakeOpenAI(salt="another model", port=port):
        changed = cli("cache", "probe")
        assert changed.code == 1
        assert f"embedcore cache prune --model {SMALL}" in changed.out
        assert abs(cli("cache", "probe", "--json").json["cosine"]) < 0.9
        assert cli("cache", "prune", "--model", SMALL, "--yes").code == 0
        assert "the next probe" in cli("cache", "probe").out
        assert cli("cache", "probe").code == 0


def test_probing_keeps_the_budget(cli, server, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "0")
    assert cli("cache", "probe").code == 3
    assert server.meter.requests == 0


def test_probing_a_model_on_this_machine(cli):
    for _ in range(2):
        assert cli("cache", "probe", "hashing:8").code == 0


# Doctor


def findings(run):
    return [
        (one["name"], one["value"], one["level"])
        for one in run.json["findings"]
        if one["section"] == "cache"
    ]


def test_doctor_tells_of_it(cli, server, billed):
    found = findings(cli("doctor", "--json"))
    assert found[:3] == [
        ("vectors", f"kept for {SMALL}: they cost money", "ok"),
        ("place", str(billed), "ok"),
        ("cap", "10.0 GB; a million vectors take about 6.3 GB", "ok"),
    ]
    ((name, value, level),) = found[3:]
    assert (name, level) == ("file", "ok")
    assert value.startswith("40 vectors, ")


def test_doctor_says_when_it_is_nearly_full(cli, server, billed, name_settings):
    name_settings("cache_cap = 300000\n")
    (found,) = [one for one in findings(cli("doctor", "--json")) if one[0] == "file"]
    assert found[2] == "note"
    assert "embedcore cache prune" in found[1]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.fault(137)
def test_doctor_says_when_others_can_read_it(cli, server, billed):
    index = billed / "index.db"
    index.chmod(0o644)
    run = cli("doctor")
    assert run.code == 1
    assert f"chmod 600 {index}" in run.out


@pytest.mark.fault(110)
def test_doctor_says_when_it_is_on_a_network_file_system(
    cli, monkeypatch, state_home, name_settings
):
    state_home.mkdir()
    monkeypatch.setattr(filesystem, "network_filesystem", lambda _: "nfs4")
    monkeypatch.setattr("embedcore.cli.doctor.network_filesystem", lambda _: "nfs4")
    problems = [one for one in findings(cli("doctor", "--json")) if one[2] == "problem"]
    ((_, value, _),) = problems
    assert "nfs4" in value
    assert "cache_dir" in value
    name_settings("allow_network_filesystem = true\n")
    assert not [one for one in findings(cli("doctor", "--json")) if one[2] == "problem"]


@pytest.mark.parametrize(
    ("in_bytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (6_790_000_000, "6.8 GB"), (2e15, "2,000.0 TB")],
)
def test_sizes_are_in_thousands(in_bytes, shown):
    assert size(int(in_bytes)) == shown


def test_a_probe_says_first_what_it_costs_and_asks(cli, server, monkeypatch):
    shown = cli("cache", "probe")
    assert shown.code == 0
    assert "1 text" in shown.err
    assert "cost" in shown.err
    sent = server.meter.requests
    monkeypatch.setenv("EMBEDCORE_CONFIRM_ABOVE", "0")
    asked = cli("cache", "probe")
    assert asked.code == 2
    assert "say --yes" in asked.err
    unknown = cli("cache", "probe", "a-model-of-my-own")
    assert "price" in unknown.err
    assert unknown.code == 2
    assert server.meter.requests == sent
    assert cli("cache", "probe", "--yes").code == 0
    assert server.meter.requests == sent + 1


# What earlier versions kept


@pytest.fixture
def kept_before(cli, server, billed):
    """The vectors of ``billed`` as an earlier version of embedcore kept them: in one file."""
    index = sqlite3.connect(billed / "index.db")
    origins = index.execute("SELECT * FROM origin").fetchall()
    rows = index.execute(
        "SELECT id, key, origin, stored, keep_until, width, checksum, segment, offset, itemsize "
        "FROM vector"
    ).fetchall()
    index.close()
    old = OldVectors(billed.with_name("vectors.db"), busy_timeout=1.0)
    old.database._creates = True
    with old.database.transaction() as connection:
        connection.executemany("INSERT INTO origin VALUES (?, ?, ?, ?, ?, ?)", origins)
        for *values, segment, offset, itemsize in rows:
            with (billed / f"{segment:08}.seg").open("rb") as file:
                file.seek(offset)
                data = file.read(values[5] * itemsize)
            connection.execute(
                "INSERT INTO vector VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*values, data)
            )
    old.database.close()
    shutil.rmtree(billed)
    return old.path


def test_what_was_kept_before_is_used_and_told_of(cli, server, kept_before, texts_file):
    bill = server.meter.billed_tokens
    assert cli("embed", str(texts_file(30)), "-o", "again.npy").code == 0
    assert server.meter.billed_tokens == bill
    assert cli("cache", "--json").json["not_moved"] == 40
    shown = cli("cache").out
    assert "40 vectors in" in shown
    assert "embedcore cache migrate moves them" in " ".join(shown.split())
    assert ("old file", "note") in [
        (name, level) for name, _, level in findings(cli("doctor", "--json"))
    ]
    kept_before.chmod(0o644)
    assert f"chmod 600 {kept_before}" in cli("doctor").out


def test_moving_says_what_it_did_and_ends_with_one_place(
    cli, server, kept_before, texts_file, state_home, monkeypatch
):
    dry = cli("cache", "migrate", "--dry-run")
    assert dry.code == 0
    assert dry.out.startswith("40 vectors would be moved from ")
    assert cli("cache", "migrate", "--dry-run", "--json").json == {"to_move": 40, "moved": 0}
    assert kept_before.exists()
    monkeypatch.setattr("embedcore.cli.cache.LINE_SECONDS", 0.0)
    done = cli("cache", "migrate")
    assert done.code == 0
    assert "40 of 40 vectors moved" in done.err
    assert done.out.startswith("40 vectors moved; ")
    assert done.out.endswith("vectors.db is removed\n")
    assert list(state_home.glob("vectors.db*")) == []
    again = cli("cache", "migrate")
    assert again.code == 0
    assert again.out.startswith("nothing is to be moved")
    assert cli("cache", "--json").json["vectors"] == {LARGE: 10, SMALL: 30}
    bill = server.meter.billed_tokens
    assert cli("embed", str(texts_file(30)), "-o", "again.npy").code == 0
    assert server.meter.billed_tokens == bill


def test_moving_while_another_program_has_the_file_open(cli, server, kept_before):
    choice = chosen(None)
    other = vector_store(choice.config, choice.settings)
    other.old.database.open()
    run = cli("cache", "migrate", "--json")
    assert run.json == {"moved": 40, "there": 0, "damaged": 0, "removed": False}
    assert "open in another program" in cli("cache", "migrate").out
    other.close()
    assert cli("cache", "migrate", "--json").json["removed"] is True
    assert not kept_before.exists()


@pytest.mark.fault(120)
def test_an_old_file_that_is_broken_is_exit_5(cli, server, billed):
    billed.with_name("vectors.db").write_bytes(b"not a database at all" * 1000)
    run = cli("cache", "migrate")
    assert run.code == 5
    assert "embedded again" in run.err
