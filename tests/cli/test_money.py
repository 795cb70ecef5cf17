"""Is nobody surprised by a bill: asked, refused, limited, and told what it cost?"""

from __future__ import annotations

import itertools
import json
from decimal import Decimal
from pathlib import Path

import pytest

from embedcore.assembly import open_ledger
from embedcore.config import Config
from embedcore.testing import openai_tokens

PAID = "text-embedding-3-small"


@pytest.fixture
def dear(texts_file, monkeypatch):
    """Texts that cost more than may be spent without a question."""
    monkeypatch.setenv("EMBEDCORE_CONFIRM_ABOVE", "0.000001")
    return str(texts_file(100))


def test_without_a_terminal_a_high_price_needs_yes(cli, server, dear):
    run = cli("embed", dear, "-o", "out.npy")
    assert run.code == 2
    assert "--yes" in run.err
    assert server.meter.requests == 0
    assert not Path("out.npy").exists()
    assert cli("embed", dear, "-o", "out.npy", "--yes").code == 0
    assert server.meter.snapshot()["billed_texts"] == 100
    again = cli("embed", dear, "-o", "out.npy")
    assert again.code == 0, "what costs nothing needs no answer"


def test_literal_texts_ask_as_well(cli, server, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_CONFIRM_ABOVE", "0")
    assert cli("embed", "-c", "some text").code == 2
    assert server.meter.requests == 0
    assert cli("embed", "-c", "some text", "--yes").code == 0


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("\r", 2)])
def test_on_a_terminal_it_asks(terminal, server, dear, answer, code):
    screen = terminal("embed", dear, "-o", "out.npy")
    screen.wait_for(r"This costs \$0\.0000\d+\. Go on\? \[y/N\]")
    assert server.meter.requests == 0
    screen.send(f"{answer}\r")
    assert screen.close() == code
    assert server.meter.snapshot()["billed_texts"] == (100 if code == 0 else 0)


def test_ctrl_c_at_the_question_sends_nothing(terminal, server, dear):
    screen = terminal("embed", dear, "-o", "out.npy")
    screen.wait_for(r"Go on\?")
    # The question is on the screen a moment before Python waits for the answer: a signal in between
    # is only seen with the next key, which then answers nothing.
    screen.send("\x03")
    screen.send("\r")
    assert screen.close() == 130
    assert "nothing was sent" in screen.plain
    assert server.meter.requests == 0


def test_an_unknown_price_is_asked_about(cli, server, texts_file):
    run = cli("embed", str(texts_file(2)), "-o", "out.npy", "-m", "a-model-of-my-own")
    assert run.code == 2
    assert "price of openai:a-model-of-my-own is not known" in run.err
    assert "price" in run.err
    assert server.meter.requests == 0


def test_a_price_nobody_knows_is_not_shown_as_nothing():
    from embedcore import Spending
    from embedcore.cli.summary import RunTotals, _lines
    from embedcore.events import Settled
    from embedcore.files.types import RunReport
    from embedcore.provider.types import ModelInfo, Price

    usage = Spending(tokens=119, requests=1, unconfirmed_tokens=19)
    report = RunReport(
        output=Path("out.npy"), rows=5, empty=0, duplicates=0, reused=0, embedded=5, usage=usage
    )
    billed = dict(_lines(report, ModelInfo(price=None)))["billed"]
    assert billed.endswith("1 request, at a price that is not known")
    assert dict(_lines(report, ModelInfo(price=Price())))["billed"].endswith("$0")
    totals = RunTotals()
    totals(Settled(scope="s", tokens=19, cost=Decimal(0), unconfirmed=True))
    for said in (dict(_lines(report, ModelInfo()))["unconfirmed"], str(totals.text(ModelInfo()))):
        assert "19 tokens" in said
        assert "$" not in said
    assert "$0" in str(totals.text(ModelInfo(price=Price())))


@pytest.mark.fault(95)
def test_a_limit_in_the_way_is_shown_and_refused_before_anything_is_sent(
    cli, server, texts_file, monkeypatch
):
    file = str(texts_file(200))
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "300")
    shown = cli("embed", file, "--dry-run")
    assert shown.code == 0
    assert "will refuse" in shown.out
    run = cli("embed", file, "-o", "out.npy", "--json")
    assert run.code == 3
    assert run.json["error"]["type"] == "TokenBudgetExceeded"
    assert "300 tokens per day" in run.err
    assert server.meter.requests == 0


@pytest.mark.fault(95)
@pytest.mark.parametrize("given", [[], ["--yes"], ["--json"]])
@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("EMBEDCORE_DAILY_TOKEN_LIMIT", "300", "300 tokens per day for scope 'default'"),
        ("EMBEDCORE_ALL_SCOPES_TOTAL_COST_LIMIT", "0.000001", "$0.0000010 in total for all scopes"),
    ],
)
def test_a_limit_is_explained_once(cli, server, texts_file, monkeypatch, given, name, value, limit):
    monkeypatch.setenv(name, value)
    run = cli("embed", str(texts_file(200)), "-o", "out.npy", *given)
    assert run.code == 3
    assert f"limit     will refuse: {limit}\n" in run.err
    assert run.err.count("would be needed") == 1


@pytest.mark.case("C11")
def test_a_run_that_nothing_was_left_for_lists_its_rows_as_well(
    cli, server, texts_file, monkeypatch
):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "30")
    command = ["embed", str(texts_file(40)), "-o", "out.npy", "--on-budget", "stop", "--json"]
    first = cli(*command)
    assert first.code == 3
    listed = Path("out.npy.failed.jsonl")
    before = listed.read_bytes()
    listed.unlink()
    for again in (cli(*command), cli(*command)):
        assert again.code == 3
        assert again.json["unchanged"]
        assert again.json["failed_path"] == first.json["failed_path"]
        assert again.json["not_done"] == first.json["not_done"]
        lines = [json.loads(line) for line in listed.read_bytes().splitlines()]
        former = [json.loads(line) for line in before.splitlines()]
        assert [one["position"] for one in lines] == [one["position"] for one in former]
        assert all("not done: " in one["reason"] for one in lines)


@pytest.mark.case("D3")
@pytest.mark.parametrize("where", ["options.openai", "profiles.docs.options"])
@pytest.mark.parametrize("command", [["embed", "-o", "out.npy"], ["batch", "submit"]])
def test_a_found_file_cannot_keep_the_question_about_money_from_being_asked(
    cli, server, texts_file, monkeypatch, where, command
):
    """It may say what its own server costs; the provider's table asks all the same."""
    file = str(texts_file(50))
    monkeypatch.setenv("EMBEDCORE_CONFIRM_ABOVE", "0.000001")
    Path("embedcore.toml").write_text(
        f'[profiles.docs]\nmodel = "text-embedding-3-small"\n[{where}]\nprice = 0\nbatch = true\n'
    )
    run = cli(*command, file, "-m", "docs")
    assert run.code == 2
    assert "by the provider's own price" in run.err
    assert "embedcore trust" in run.err
    assert server.meter.requests == 0
    assert cli("trust", "embedcore.toml", "--yes").code == 0
    assert cli(*command, file, "-m", "docs").code == 0


def test_with_yes_the_ledger_still_refuses(cli, server, texts_file, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "300")
    run = cli("embed", str(texts_file(200)), "-o", "out.npy", "--yes")
    assert run.code == 3
    assert server.meter.billed_tokens <= 300


@pytest.mark.case("C9")
def test_what_is_cached_costs_nothing_in_any_question(cli, server, dear, monkeypatch):
    """Another output, the limit used up, every price asked about: the vectors are there."""
    assert cli("embed", dear, "-o", "out.npy", "--yes").code == 0
    billed = server.meter.billed_tokens
    monkeypatch.setenv("EMBEDCORE_CONFIRM_ABOVE", "0")
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "1")
    monkeypatch.setenv("EMBEDCORE_TOTAL_COST_LIMIT", "0.0000000001")
    plan = cli("embed", dear, "--dry-run", "--json").json["plan"]
    assert (plan["to_embed"], plan["cached"], plan["tokens"], plan["cost"]) == (0, 100, 0, "0")
    assert plan["limits_in_the_way"] == []
    shown = cli("embed", dear, "-o", "another.jsonl", "--dry-run").out
    assert "100 cached" in shown
    assert "cost      $0" in shown
    assert cli("embed", dear, "-o", "another.jsonl").code == 0
    assert cli("embed", "-c", "text number 7", "-c", "text number 8").code == 0
    assert server.meter.billed_tokens == billed
    run = cli("embed", "-c", "text number 7", "-c", "a new text")
    assert run.code == 3, "what must be paid for is still refused"
    assert server.meter.billed_tokens == billed


@pytest.mark.case("C9")
def test_what_is_damaged_in_the_cache_is_in_the_price(cli, server, texts_file, flip_vectors):
    file = str(texts_file(10))
    assert cli("embed", file, "-o", "out.npy").code == 0
    flip_vectors(Path(cli("cache", "where").out.strip()), "id <= 3")
    plan = cli("embed", file, "--dry-run", "--json").json["plan"]
    assert (plan["to_embed"], plan["cached"]) == (3, 7)
    before = server.meter.snapshot()["billed_texts"]
    assert cli("embed", file, "-o", "another.npy").code == 0
    assert server.meter.snapshot()["billed_texts"] - before == 3


@pytest.mark.case("C11")
@pytest.mark.parametrize(
    ("suffix", "on_error"),
    [
        ("jsonl", "raise"),
        pytest.param("npy", "raise", marks=pytest.mark.campaign(short=True)),
        pytest.param("parquet", "raise", marks=pytest.mark.campaign(short=True)),
        ("jsonl", "keep"),
    ],
)
def test_on_budget_stop_embeds_what_the_limit_allows_and_a_later_run_the_rest(
    cli, server, texts_file, monkeypatch, suffix, on_error
):
    texts_file(200)
    texts = [json.loads(line)["text"] for line in Path("texts.jsonl").read_text().splitlines()]
    tokens = list(itertools.accumulate(openai_tokens(texts)))
    most = 123
    output = f"out.{suffix}"
    command = ["embed", "texts.jsonl", "-o", output, "--on-budget", "stop", "--on-error", on_error]
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", str(tokens[most - 1]))
    assert "will end it early" in cli(*command, "--dry-run").out
    run = cli(*command, "--json")
    assert run.code == 3, run.err
    assert server.meter.billed_tokens == tokens[most - 1]
    report = run.json
    assert (report["embedded"], report["not_done"], report["failed"]) == (most, 200 - most, 0)
    assert report["stopped_at"]["id"] == f"row-{most}"
    assert report["stopped_at"]["where"] == f"texts.jsonl:{most + 1}"
    assert report["stopped_at"]["resets_at"]
    failed = [json.loads(line) for line in Path(f"{output}.failed.jsonl").read_text().splitlines()]
    assert [one["id"] for one in failed] == [f"row-{number}" for number in range(most, 200)]
    assert failed[0]["reason"].startswith("not done: ")
    assert not Path(f"{output}.journal").exists()
    before = Path(output).read_bytes()
    again = cli(*command)
    assert again.code == 3, "nothing more fits"
    assert f"{output} unchanged" in again.out
    assert Path(output).read_bytes() == before
    monkeypatch.delenv("EMBEDCORE_DAILY_TOKEN_LIMIT")
    assert cli(*command).code == 0
    assert server.meter.billed_tokens == tokens[-1]
    assert server.meter.billed_twice == {}
    assert not Path(f"{output}.failed.jsonl").exists()
    whole = cli("embed", "texts.jsonl", "-o", f"whole.{suffix}")
    assert whole.code == 0
    if suffix != "parquet":
        assert Path(output).read_bytes() == Path(f"whole.{suffix}").read_bytes()


@pytest.mark.case("C11")
def test_literal_texts_stop_as_well(cli, server, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "1")
    run = cli("embed", "-c", "one", "-c", "two", "-c", "three", "--on-budget", "stop")
    assert run.code == 3
    rows = [json.loads(line) for line in run.out.splitlines()]
    assert [row is not None for row in rows] == [True, False, False]
    assert run.err.count("limit") <= 2
    assert server.meter.billed_tokens == 1


def test_a_cost_limit_is_kept(cli, server, texts_file, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_TOTAL_COST_LIMIT", "0.00001")
    run = cli("embed", str(texts_file(500)), "-o", "out.npy", "--yes")
    assert run.code == 3
    assert server.meter.billed_tokens * 20_000 <= 10**7


def test_a_local_model_needs_no_budget(cli, texts_file, monkeypatch):
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "0")
    run = cli("embed", str(texts_file(10)), "-o", "out.npy", "-m", "hashing:8")
    assert run.code == 0, run.err


def test_usage_says_what_the_meter_says(cli, server, texts_file):
    cli("embed", str(texts_file(30)), "-o", "out.npy", "--scope", "ledger")
    cli("embed", "-c", "a question", "--scope", "web")
    report = cli("usage", "--json").json
    day = {one["scope"]: one for one in report["scopes"] if one["period"] == "day"}
    assert day["*"]["spent_tokens"] == server.meter.billed_tokens
    assert Decimal(day["*"]["spent_cost"]) == server.meter.billed_tokens * Decimal("0.00000002")
    assert day["*"]["requests"] == 2
    assert day["ledger"]["spent_tokens"] + day["web"]["spent_tokens"] == day["*"]["spent_tokens"]
    (model,) = [one for one in report["models"] if one["period"] == "day"]
    assert model["model"] == f"openai:{PAID}"
    assert model["spent_tokens"] == server.meter.billed_tokens
    only = cli("usage", "--scope", "web", "--json").json["scopes"]
    assert {one["scope"] for one in only} == {"web"}
    shown = cli("usage").out
    assert f"{server.meter.billed_tokens:,}" in shown
    assert "all scopes" in shown


def test_audit_lists_every_attempt(cli, server):
    server.faults.push("status", status=500)
    assert cli("embed", "-c", "one", "-v").code == 0
    attempts = cli("usage", "--audit", "--json").json["attempts"]
    assert len(attempts) == server.meter.requests == 2
    assert sum(one["actual_tokens"] for one in attempts) == server.meter.billed_tokens
    shown = cli("usage", "--audit").out
    assert shown.count("openai:") == 2
    assert cli("usage", "--audit", "--last", "1").out.count("openai:") == 1
    assert cli("usage", "--last", "1").code == 2


@pytest.mark.fault(29)
def test_unconfirmed_money_is_named(cli, server, texts_file):
    server.faults.push("reset_billed")
    run = cli("embed", str(texts_file(5)), "-o", "out.npy")
    assert run.code == 0, run.err
    assert "may have been billed" in run.out
    usage = cli("usage", "--json").json
    assert usage["models"][0]["unconfirmed_tokens"] > 0
    assert "unconfirmed" in cli("usage").out.lower()


def test_budget_shows_limits_with_their_layers(cli, server, monkeypatch):
    Path("embedcore.toml").write_text(
        "[budget]\ndaily_token_limit = 5000\ntotal_cost_limit = 1.5\n"
        "[budget.all_scopes]\nmonthly_token_limit = 9000\n"
        "[budget.scopes.web]\ntotal_token_limit = 70\n"
    )
    monkeypatch.setenv("EMBEDCORE_DAILY_TOKEN_LIMIT", "4000")
    cli("embed", "-c", "some words to pay for")
    limits = cli("budget", "--json").json["limits"]
    found = {(one["scope"], one["period"], one["unit"]): one for one in limits}
    day = found["default", "day", "tokens"]
    assert day["limit"] == 4000
    assert day["set_by"] == "environment EMBEDCORE_DAILY_TOKEN_LIMIT"
    assert day["spent"] == server.meter.billed_tokens
    assert day["left"] == 4000 - server.meter.billed_tokens
    assert day["resets_at"]
    total = found["default", "total", "cost"]
    assert total["set_by"].endswith("embedcore.toml")
    assert total["resets_at"] is None
    assert found["*", "month", "tokens"]["limit"] == 9000
    assert "never" in cli("budget").out
    web = cli("budget", "--scope", "web", "--json").json["limits"]
    assert ("web", 70) in [(one["scope"], one["limit"]) for one in web]


def test_budget_without_limits_says_how_to_set_one(cli):
    run = cli("budget")
    assert run.code == 0
    assert "EMBEDCORE_DAILY_TOKEN_LIMIT" in run.out


@pytest.mark.fault(91)
def test_clock_of_the_ledger_is_shown_and_repaired(cli):
    assert cli("embed", "-c", "x", "-m", "hashing:8").code == 0
    ledger = open_ledger(Config.load(), ())
    with ledger.database.transaction() as connection:
        ledger.moment_in(connection)
        connection.execute("UPDATE book SET clock = clock + 86400000000 * 40")
    ledger.database.close()
    assert cli("budget", "clock", "--json").json["ahead_seconds"] > 39 * 86400
    assert "--repair" in cli("budget", "clock").out
    doctor = cli("doctor")
    assert doctor.code == 1
    assert "budget clock --repair" in doctor.out
    assert cli("budget", "clock", "--repair").code == 0
    assert cli("budget", "clock", "--json").json["ahead_seconds"] < 1


@pytest.mark.case("F9")
@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("3-small", "openai:text-embedding-3-small"),
        ("openai/text-embedding-3-small", "openai:text-embedding-3-small"),
        ("openai:text-embedding-3-smal", "openai:text-embedding-3-small"),
        ("hashing/256", "hashing:256"),
    ],
)
def test_a_model_without_a_price_that_is_nearly_another_is_asked_about(cli, server, model, meant):
    run = cli("embed", "-c", "one", "-m", model)
    assert run.code == 2
    assert f"is not known: did you mean {meant}?" in run.err
    planned = cli("embed", "-c", "one", "-m", model, "--dry-run")
    assert (planned.code, f"did you mean {meant}?" in planned.out) == (0, True)
    assert server.meter.requests == 0


@pytest.mark.case("F9")
def test_a_slip_in_a_model_of_openais_own_is_refused_before_anything_else(cli, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-no-server-is-asked")
    for model in ("3-small", "openai/text-embedding-3-small", "text-embedding-3-smal"):
        run = cli("embed", "-c", "one", "-m", model, "--dry-run")
        assert run.code == 2
        assert "did you mean openai:text-embedding-3-small?" in run.err
