"""Is a limit never passed and never refused too early, in any number of threads and processes?

The server's bill is the truth; the ledger is what is judged.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading

import pytest

from embedcore.errors import TokenBudgetExceeded
from embedcore.storage.amounts import Amount

PROGRAM = """
import json, sys
from embedcore import EmbeddingClient, TokenBudgetExceeded

settings = json.loads(sys.argv[1])
refused = sent = 0
with EmbeddingClient(options=settings["options"], config=settings["config"]) as client:
    print("ready", flush=True)
    sys.stdin.readline()
    for number in range(settings["calls"]):
        try:
            client.embed_texts([settings["text"]] if number % 2 else (settings["text"],))
            sent += 1
        except TokenBudgetExceeded:
            refused += 1
print(json.dumps({"sent": sent, "refused": refused}))
"""
WORD = "word "


@pytest.fixture
def settings_of(server, home):
    def settings_of(daily, **config):
        return {
            "options": {"base_url": server.base_url, "api_key": server.api_key, "dimensions": 8},
            "config": {
                "home": str(home),
                "budget": {"daily_token_limit": daily},
                # What counts here are requests, and the store would save all but the first.
                "cache": False,
                **config,
            },
        }

    return settings_of


@pytest.fixture
def processes(forks):
    with contextlib.ExitStack() as started:

        def start(count, settings):
            """``count`` programs, all of them ready to begin."""
            running = []
            for _ in range(count):
                streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
                process = forks(PROGRAM, json.dumps(settings), **streams)
                started.callback(end, process)
                running.append(process)
            for process in running:
                assert process.stdout.readline() == "ready\n"
            return running

        yield start


def end(process):
    process.kill()
    process.communicate()


def begin(running):
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()


def reports(running):
    return [json.loads(process.communicate(timeout=300)[0]) for process in running]


def cost_of(text):
    from embedcore_openai.tokenizer import Cl100kTokenizer

    return sum(Cl100kTokenizer().count([text]))


@pytest.mark.fault(84)
@pytest.mark.parametrize(
    ("clients", "text"),
    # Many clients meet in the ledger, whatever they send; one of them meets itself.
    [
        pytest.param(32, WORD * 40, id="words-32"),
        pytest.param(32, "x", id="one-32"),
        pytest.param(1, "字" * 40, id="wide-1"),
        pytest.param(32, "字" * 40, id="wide-32", marks=pytest.mark.campaign(short=True)),
        pytest.param(1, WORD * 40, id="words-1", marks=pytest.mark.campaign(short=True)),
        pytest.param(1, "x", id="one-1", marks=pytest.mark.campaign(short=True)),
    ],
)
def test_32_threads_and_a_budget_of_50_calls(server, connect, ledger, clients, text):
    cost = cost_of(text)
    shared = [connect(daily=50 * cost) for _ in range(clients)]
    sent, wrong = [], []

    def go(number):
        for _ in range(6):
            try:
                sent.append(shared[number % clients].embed([text]))
            except TokenBudgetExceeded:
                pass
            except BaseException as error:  # noqa: BLE001
                wrong.append(error)

    threads = [threading.Thread(target=go, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert wrong == []
    # Several of them may have shared a request.
    assert len(sent) == server.meter.billed_texts.total() <= 50
    # Not refused far too early either: no bound that is held is loose enough for that.
    assert len(sent) >= 49
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens == server.meter.billed_tokens <= 50 * cost


@pytest.mark.fault(84)
@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.campaign(short=True))])
def test_processes_and_a_budget_of_50_calls(server, processes, settings_of, ledger, count):
    text = WORD * 40
    cost = cost_of(text)
    calls = 120 // count
    running = processes(count, {**settings_of(50 * cost), "text": text, "calls": calls})
    begin(running)
    said = reports(running)
    sent = sum(one["sent"] for one in said)
    assert sent == server.meter.billed_requests <= 50
    assert sent >= 49
    assert sum(one["refused"] for one in said) == 120 - sent
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(29)
def test_lost_answers_never_lead_beyond_the_budget(server, connect, ledger):
    text = WORD * 40
    cost = cost_of(text)
    client = connect(daily=50 * cost, retry={"quota": 1000})
    server.faults.when(mode="reset_billed", probability=0.4)

    def go():
        for _ in range(10):
            with contextlib.suppress(Exception):
                client.embed([text])

    threads = [threading.Thread(target=go) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    # A lost answer is charged as it was held, which may be by its bytes: five times the tokens.
    assert 20 <= server.meter.billed_requests <= 50
    used = ledger()
    assert used.held == Amount()
    assert server.meter.billed_tokens <= used.spent.tokens <= 50 * cost


@pytest.mark.fault(92)
@pytest.mark.fault(95)
def test_a_large_call_fits_a_limit_just_above_it(server, connect, ledger):
    texts = million()
    client = connect(daily=1_050_000)
    result = client.embed(texts)
    assert result.ok.all()
    assert result.usage.tokens == server.meter.billed_tokens == 1_000_000
    with pytest.raises(TokenBudgetExceeded) as caught:
        client.embed([WORD * 8000] * 2 + [f"{number} " + WORD * 7000 for number in range(8)])
    assert caught.value.spent == 1_000_000
    assert ledger().held == Amount()


def million():
    """A thousand texts of exactly a thousand tokens, no two the same."""
    from embedcore_openai.tokenizer import Cl100kTokenizer

    texts = [f"{number:03}" + " word" * 999 for number in range(1000)]
    assert Cl100kTokenizer().count(texts) == [1000] * 1000
    return texts


def test_a_large_call_fits_while_four_processes_keep_making_small_ones(
    server, connect, processes, settings_of, ledger
):
    """What they need is exactly what the limit allows: whoever is refused was refused wrongly."""
    texts, small = million(), WORD * 249 + "end"
    assert cost_of(small) == 250
    running = processes(4, {**settings_of(1_050_000), "text": small, "calls": 50})
    client = connect(daily=1_050_000)
    begin(running)
    result = client.embed(texts)
    assert result.ok.all()
    assert reports(running) == [{"sent": 50, "refused": 0}] * 4
    used = ledger()
    assert used.held == Amount()
    assert used.spent.tokens == server.meter.billed_tokens == 1_050_000


def test_bulk_work_leaves_queries_their_share(server, connect, ledger):
    text = WORD * 9 + "end"
    cost = cost_of(text)
    client = connect(daily=10 * cost, budget={"query_share": 0.3})
    for _ in range(7):
        client.embed([text], input_type="document")
    with pytest.raises(TokenBudgetExceeded, match="kept for queries"):
        client.embed([text])
    for _ in range(3):
        client.embed_query(text)
    with pytest.raises(TokenBudgetExceeded):
        client.embed_query(text)
    assert server.meter.billed_requests == 10
    assert ledger().spent.tokens == server.meter.billed_tokens


@pytest.mark.fault(92)
def test_a_limit_of_nothing_and_no_limit_at_all(server, connect, ledger):
    client = connect(daily=0)
    for rows in (["a"], ["a", "b"] * 50):
        with pytest.raises(TokenBudgetExceeded) as caught:
            client.embed_texts(rows)
        assert caught.value.never_fits
    assert server.meter.requests == 0
    assert client.embed_texts([]) == []
    client.embed_texts(["a"], check_budget=False)
    assert ledger().spent.tokens == server.meter.billed_tokens == 1


def test_what_is_computed_here_needs_no_budget(home):
    from embedcore import EmbeddingClient

    config = {"home": home, "budget": {"daily_token_limit": 0, "daily_cost_limit": 0}}
    with EmbeddingClient("hashing:64", config=config) as client:
        assert len(client.embed_text("free of charge")) == 64


@pytest.mark.fault(96)
def test_scopes_have_budgets_of_their_own(server, connect, ledger):
    text = WORD * 9 + "end"
    cost = cost_of(text)
    budget = {"scopes": {"one": {"daily_token_limit": cost}}}
    one, other = (connect(scope=scope, budget=budget) for scope in ("one", "other"))
    one.embed([text])
    with pytest.raises(TokenBudgetExceeded, match="'one'"):
        one.embed([text])
    for _ in range(3):
        other.embed([text])
    assert (ledger("one").spent.tokens, ledger("other").spent.tokens) == (cost, 3 * cost)
