"""Are a ledger that is wrong, and money that nobody will send, told at the command line?"""

from __future__ import annotations

import signal
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import pytest

from embedcore.storage.database import driver
from embedcore.testing import openai_tokens


@pytest.fixture
def alter(cli, server, state_home):
    """``alter(statement)``: a ledger with something in it, changed by a stranger's hand."""
    assert cli("embed", "-c", "one", "-c", "two").code == 0

    def run(statement):
        with closing(driver().connect(state_home / "state.db", isolation_level=None)) as ledger:
            ledger.execute(statement)

    return run


def ledger(run):
    return [one for one in run.json["findings"] if one["name"] == "counters"]


@pytest.mark.case("C6")
def test_doctor_says_that_the_ledger_are_right(cli, alter):
    run = cli("doctor", "--json")
    assert run.code == 0
    assert [one["value"] for one in ledger(run)] == ["counters and entries agree"]
    assert cli("budget", "recount").out == "every counter is right\n"


@pytest.mark.case("C6")
@pytest.mark.parametrize("counter", ["tokens_spent", "cost_spent", "requests"])
def test_a_counter_of_what_was_spent(cli, server, alter, counter):
    alter(f"UPDATE window SET {counter} = 0 WHERE scope = '*' AND period = 'day'")
    run = cli("doctor", "--json")
    assert run.code == 1
    (found,) = ledger(run)
    assert found["level"] == "problem"
    assert f"{counter.replace('_', ' ')} of all scopes in the day" in found["value"]
    assert "budget recount --repair" in cli("doctor").out
    shown = cli("budget", "recount", "--json")
    assert (shown.code, shown.json["repaired"]) == (1, False)
    (difference,) = shown.json["differences"]
    assert (difference["counter"], int(difference["counted"])) == (counter, 0)
    assert Decimal(difference["entered"]) > 0
    assert cli("embed", "-c", "three").code == 0, "nothing is held wrongly"


@pytest.mark.case("C6")
def test_a_counter_of_what_is_held_stops_everything_that_sends(cli, server, alter):
    alter("UPDATE window SET tokens_held = 5, cost_held = 7")
    asked = server.meter.requests
    run = cli("embed", "-c", "three", "--json")
    assert run.code == 5
    assert run.json["error"]["type"] == "StorageCorrupt"
    assert "the counter says 5, the entries add up to 0" in run.err
    assert "embedcore doctor" in run.err
    assert server.meter.requests == asked
    assert cli("usage").code == 5
    assert len(ledger(cli("doctor", "--json"))) == 12
    assert "tokens reserved of scope" in cli("doctor").out
    assert " held" not in cli("doctor").out
    assert cli("budget", "recount").out.count("the counter says") == 12
    mended = cli("budget", "recount", "--repair")
    assert (mended.code, "12 counters set right" in mended.out) == (0, True)
    assert cli("usage", "--audit").out.count("recount: ") == 12
    assert cli("embed", "-c", "three").code == 0
    assert cli("doctor").code == 0
    usage = cli("usage", "--json").json["scopes"]
    assert {one["reserved_tokens"] for one in usage} == {0}
    assert {one["spent_tokens"] for one in usage} == {server.meter.billed_tokens}


@pytest.mark.case("C6")
def test_an_entry_that_was_altered_has_no_repair(cli, alter):
    alter("UPDATE attempt SET ended = NULL")
    shown = cli("doctor").out
    assert "attempt 1 has ended without an amount" in shown
    assert "restore a copy" in shown
    assert "recount" not in shown


@pytest.mark.case("C7")
@pytest.mark.case("C8")
@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="nothing tells when a process started"
)
def test_after_a_kill_nothing_is_shown_as_held(held_server, texts_file, cli, begun):
    server = held_server(1)
    texts_file(2000)
    run = begun("embed", "texts.jsonl", "-o", "out.jsonl")
    server.wait_for(3)
    before = {one["period"]: one for one in cli("usage", "--json").json["scopes"]}
    assert before["day"]["reserved_tokens"] > 0
    run.send_signal(signal.SIGKILL)
    run.wait(timeout=120)
    run.communicate()
    report = cli("usage", "--json").json
    assert {one["reserved_tokens"] for one in report["scopes"]} == {0}
    (model,) = [one for one in report["models"] if one["period"] == "total"]
    assert 0 < model["unconfirmed_tokens"] <= before["day"]["reserved_tokens"]
    assert cli("doctor").code == 0


@pytest.mark.case("C1")
def test_what_was_free_by_its_status_alone_is_a_column(cli, server):
    server.faults.push("raw", status=429, body="<html>slow down</html>", times=2, bills=False)
    run = cli("embed", "-c", "some words", "--json")
    assert run.code == 0, run.err
    held = len(b"some words")
    assert "free_by_status_requests" in run.out
    for model in cli("usage", "--json").json["models"]:
        assert model["free_by_status_requests"] == 2
        assert model["free_by_status_tokens"] == 2 * held
        assert Decimal(model["free_by_status_cost"]) == 2 * held * Decimal("0.00000002")
        assert model["spent_tokens"] == openai_tokens(["some words"])[0]
    shown = cli("usage").out
    assert "FREE BY STATUS" in shown
    assert f"2 requests, {2 * held} (" in shown


def test_usage_fits_a_terminal_where_every_attempt_has_its_bill(cli, server):
    assert cli("embed", "-c", "some words").code == 0
    shown = cli("usage").out
    assert "openai:text-embedding-3-small" in shown
    assert max(map(len, shown.splitlines())) <= 80
    server.faults.push("reset", bills=True)
    assert cli("embed", "-c", "other words").code == 0
    model = cli("usage", "--json").json["models"][0]
    assert f"{model['unconfirmed_tokens']} ($" in cli("usage").out
    assert "UNCONFIRMED" in cli("usage").out
    assert "ESTIMATED" not in cli("usage").out
