"""What commit 9454e67 left on disk opens, means the same, and is finished without paying twice.

``record.py`` says how it was made. Nothing here may be changed to make a change of the code pass:
whoever has such a folder has paid for what is in it. Public names and the command line are used,
so that names inside may change; what is known of them is in ``conftest.py``.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedcore import BatchEmbeddingFailed, BudgetExceeded, Config, EmbeddingClient, TokenTracker
from embedcore.cli import main
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo
from embedcore.testing import FakeOpenAI, vectors_of

if TYPE_CHECKING:
    from tests.compat.conftest import Past

RECORDED = Path(__file__).parent / "9454e67"
BASE_URL = "http://recorded.internal/v1"
COLOURS = ("red", "blue", "green", "black", "white", "yellow")
TOKENS = 5

STATE = json.loads((RECORDED / "state.json").read_text())
FINGERPRINTS = json.loads((RECORDED / "fingerprints.json").read_text())


def right(vectors: Any, texts: list[str]) -> bool:
    return bool((np.asarray(vectors, dtype=np.float32) == vectors_of(texts, 8)).all())


# Fingerprints and keys


class Recorded(BaseEmbedder):
    """Its name is part of what is hashed."""

    __module__, __qualname__ = "recorded", "Recorded"

    def __init__(self, variant: str | None) -> None:
        known = {} if variant is None else {"variant": variant}
        self.info = ModelInfo(
            provider="house", model="own", dimensions=4, endpoint="http://house/v1", **known
        )

    def embed(self, request: EmbedRequest) -> EmbedReply:
        raise NotImplementedError


@pytest.mark.parametrize(
    "given",
    FINGERPRINTS["configurations"],
    ids=[one["name"] for one in FINGERPRINTS["configurations"]],
)
def test_fingerprints_and_keys_are_for_ever(
    given: dict[str, Any], keys_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    config = {"home": tmp_path, **given.get("config", {})}
    if "embedder" in given:
        client = EmbeddingClient(embedder=Recorded(given["embedder"]), config=config)
    else:
        client = EmbeddingClient(given["model"], options=given.get("options", {}), config=config)
    with client:
        if "reply_models" in given.get("options", {}):
            # What replies are believed counts no more: it has the name that it would have without.
            assert client.fingerprint == without_reply_models(given, config)
            assert client.made_before(given["fingerprint"])
            return
        assert client.fingerprint == given["fingerprint"]
        assert not client._engine.former
        for input_type in (None, "query", "document"):
            found = keys_of(client, input_type, FINGERPRINTS["texts"])
            assert found == given["keys"][str(input_type)]


def without_reply_models(given: dict[str, Any], config: dict[str, Any]) -> str:
    options = {name: one for name, one in given["options"].items() if name != "reply_models"}
    with EmbeddingClient(given["model"], options=options, config=config) as client:
        return client.fingerprint


def test_no_two_configurations_share_a_fingerprint_but_those_that_did() -> None:
    """What keeps vectors is hashed as if it were not set; the rest tells vectors apart."""
    names: dict[str, set[str]] = {}
    for one in FINGERPRINTS["configurations"]:
        names.setdefault(one["fingerprint"], set()).add(one["name"])
    assert sorted(map(sorted, filter(lambda found: len(found) > 1, names.values()))) == [
        ["a server", "a slash at the end", "what keeps vectors"],
        ["cut when too long", "refused when too long", "the defaults"],
    ]


# Settings files


def leaves(table: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(table, dict):
        return {path: table}
    return {
        name: value for key in table for name, value in leaves(table[key], f"{path}/{key}").items()
    }


@pytest.fixture
def config_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECORDED_KEY", "sk-recorded-0123456789abcdef")
    monkeypatch.setenv("RECORDED_TEAM", "search")
    monkeypatch.delenv("EMBEDCORE_HOME")
    folder = tmp_path / "config"
    shutil.copytree(RECORDED / "config", folder)
    return folder


def test_a_settings_file_means_the_same(
    config_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = json.loads((config_folder / "meaning.json").read_text())
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(config_folder / "embedcore.toml"))
    config = Config.load()
    settings = json.loads(json.dumps(config.model_dump(mode="json"), default=str))
    for name in ("home", "cache_dir"):
        settings[name] = str(Path(settings[name]).relative_to(config_folder))
    found = leaves(settings)
    assert {path: found.get(path) for path in leaves(wanted["settings"])} == leaves(
        wanted["settings"]
    )
    for scope, limits in wanted["limits"].items():
        assert limits == sorted(
            [one.scope, one.period, one.unit, one.amount, one.reserved]
            for one in config.limits(config.profile(None), scope)
        )
    client = EmbeddingClient()
    assert (client.provider, client.model, client.scope) == (
        "openai",
        "text-embedding-3-small",
        "search",
    )
    other = EmbeddingClient("other")
    assert (other.model, other.scope) == ("text-embedding-3-large", "another")


def test_a_table_of_a_project_the_users_file_and_the_policy_hold_together(
    config_folder: Path, users_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(config_folder / "pyproject.toml", project)
    monkeypatch.chdir(project)
    alone = Config.load()
    assert (alone.model, alone.overlong) == ("small", "reject")
    assert alone.budget.daily_token_limit == 1000
    assert alone.profile(None).options == {"dimensions": 8}
    users_file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(config_folder / "user.toml", users_file)
    monkeypatch.setenv("EMBEDCORE_POLICY", str(config_folder / "policy.toml"))
    together = Config.load()
    assert (together.model, together.scope) == ("small", "default")
    budget = together.budget
    assert (budget.daily_token_limit, budget.monthly_cost_limit) == (700, 3)
    assert (budget.total_cost_limit, budget.all_scopes.monthly_token_limit) == (50, 100_000)
    monkeypatch.chdir(tmp_path)
    mine = Config.load()
    assert (mine.model, mine.scope, mine.budget.daily_token_limit) == (
        "text-embedding-3-large",
        "mine",
        700,
    )


# Outputs of the command line

ENDINGS = ("jsonl", "npy", "parquet")


def text_of(colour: str) -> str:
    return f"voice of the {colour} world"


def rows_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Id → vector."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(path).to_pylist()
        return {row["id"]: np.array(row["vector"], dtype=np.float32) for row in rows}
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return {row["id"]: np.array(row["vector"], dtype=np.float32) for row in rows if "id" in row}
    listed = path.with_name(f"{path.name}.rows.jsonl").read_text().splitlines()
    ids = [row["id"] for row in map(json.loads, listed) if "id" in row]
    return dict(zip(ids, np.load(path), strict=True))


@pytest.fixture
def embed(
    outputs: Path,
    recorded_server: FakeOpenAI,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Counter[str]]:
    """Run ``embedcore embed`` into an output; returns what the provider billed for it."""
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f'[options.openai]\nbase_url = "{BASE_URL}"\napi_key = "$RECORDED_KEY"\ndimensions = 8\n'
    )
    monkeypatch.setenv("RECORDED_KEY", "sk-recorded-0123456789abcdef")
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(settings))
    # What was billed is known from the output alone.
    monkeypatch.setenv("EMBEDCORE_CACHE", "false")
    monkeypatch.chdir(outputs)

    def run(rows: dict[str, str], output: str, *more: str) -> Counter[str]:
        lines = [json.dumps({"id": name, "text": text}) for name, text in rows.items()]
        Path("now.jsonl").write_text("".join(f"{line}\n" for line in lines))
        before = recorded_server.meter.billed_texts
        code = main(["embed", "now.jsonl", "-o", output, "--id", "id", "--yes", "--json", *more])
        assert code == 0, capsys.readouterr().err
        assert rows_of(outputs / output).keys() == rows.keys()
        for name, vector in rows_of(outputs / output).items():
            assert right([vector], [rows[name]])
        return recorded_server.meter.billed_texts - before

    return run


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", ["vectors", "no-text"])
def test_an_output_is_carried_on(embed: Callable[..., Any], ending: str, kind: str) -> None:
    """As it is nothing is billed; then a row is new, and one has another text."""
    more = ["--no-text"] if kind == "no-text" else []
    rows = {f"row-{number}": text_of(colour) for number, colour in enumerate(COLOURS[:4])}
    output = f"{kind}.{ending}"
    assert embed(rows, output, *more) == {}
    rows = {**rows, "row-1": "another text than before", "row-4": text_of("white")}
    assert embed(rows, output, *more) == {"another text than before": 1, text_of("white"): 1}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_row_that_failed_is_billed_when_it_is_mended(
    embed: Callable[..., Any], outputs: Path, ending: str
) -> None:
    rows = {f"row-{number}": text_of(colour) for number, colour in enumerate(COLOURS[:3])}
    listed = outputs / f"faulty.{ending}.failed.jsonl"
    assert listed.exists()
    assert embed(rows, f"faulty.{ending}") == {text_of("green"): 1}
    assert not listed.exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_that_was_killed_is_resumed(
    embed: Callable[..., Any], outputs: Path, ending: str
) -> None:
    rows = {f"row-{number}": text_of(colour) for number, colour in enumerate(COLOURS[:4])}
    left = [outputs / f"unfinished.{ending}.{name}" for name in ("journal", "lock")]
    assert all(path.exists() for path in left)
    billed = {text_of("green"): 1, text_of("black"): 1}
    assert embed(rows, f"unfinished.{ending}") == billed
    assert not any(path.exists() for path in left)


# Money


def test_the_ledger_open_with_every_amount_in_it(past: Past) -> None:
    for scope, used in (("web", 143), ("docs", 7)):
        tracker = TokenTracker(200, scope=scope, config={"home": past.home})
        today = tracker.get_usage_today()
        tracker.close()
        assert (today["tokens_used"], today["remaining"]) == (used, 200 - used)
    assert past.windows() == past.state["window"]
    attempts = past.rows(
        "SELECT scope, state, tokens, cost, actual_tokens, actual_cost, inputs FROM attempt "
        "ORDER BY id"
    )
    assert attempts == past.state["attempt"]


@pytest.mark.case("C6")
def test_nothing_is_found_wrong_in_them(
    past: Past, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMBEDCORE_HOME", str(past.home))
    assert main(["budget", "recount"]) == 0
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out.split("\n", 1)[1])["findings"]
    assert [one["value"] for one in found if one["name"] == "counters"] == [
        "counters and entries agree"
    ]


def test_what_was_spent_before_counts_against_a_limit(past: Past) -> None:
    text = "a new text for today"
    with pytest.raises(BudgetExceeded):
        past.client("web", budget={"daily_token_limit": 147}).embed_text(text)
    with pytest.raises(BudgetExceeded):
        past.client("web", budget={"total_token_limit": 147}).embed_text(text)
    with pytest.raises(BudgetExceeded):
        # What the killed process holds is not there for others either.
        past.client("killed", budget={"daily_token_limit": 111, "wait": 0}).embed_text(text)
    assert past.billed_now == {}
    assert right(
        past.client("web", budget={"daily_token_limit": 148}).embed([text]).vectors, [text]
    )
    past.clock.shift(86_400)
    assert past.client("web", budget={"daily_token_limit": 10}).embed(["one more text"]).ok.all()


def test_what_a_killed_process_left_open_is_charged_and_released(past: Past) -> None:
    """A request was under way, whose answer nobody had; the rest of its money is free again."""
    assert past.total("killed") == (10, 97)
    past.clock.shift(700)
    texts = past.state["money_texts"]["killed"]
    result = past.client("killed").embed(texts)
    assert right(result.vectors, texts)
    # The first request was answered, and stored; the others are billed.
    assert past.billed_now == Counter(texts[2:])
    assert past.total("killed") == (10 + 48 + 4 * TOKENS, 0)


def test_vectors_that_were_billed_are_not_billed_again(past: Past) -> None:
    texts, web = STATE["money_texts"], past.client("web")
    assert right(web.embed(texts["web"][:3]).vectors, texts["web"][:3])
    assert right(web.embed(texts["web"][4:5], input_type="query").vectors, texts["web"][4:5])
    documents = texts["docs"][:3]
    assert right(past.client("docs").embed(documents, input_type="document").vectors, documents)
    # Those of batches, in another scope.
    for scope in ("done", "stored"):
        some = STATE["texts"][scope][:2]
        assert right(web.embed(some).vectors, some)
    assert past.billed_now == {}
    # One was never answered.
    assert web.embed([texts["web"][3]]).ok.all()
    assert past.billed_now == Counter(texts["web"][3:4])


def test_a_year_later_totals_and_vectors_are_still_there(past: Past) -> None:
    past.clock.shift(400 * 86_400)
    texts = past.state["money_texts"]["docs"][:3]
    client = past.client("docs", budget={"total_token_limit": 22})
    assert right(client.embed(texts).vectors, texts)
    with pytest.raises(BudgetExceeded):
        client.embed(["more than is left"])
    assert past.billed_now == {}
    assert past.total("docs") == (22, 0)


# Batches

# Scopes whose batches are open and need nothing but somebody who looks after them.
GOES_ON = [
    "planned",
    "refused",
    "creating-unsent",
    "creating-sent",
    "fenced",
    "lost",
    "stray",
    "submitted",
    "running",
    "completed",
    "expired",
    "collecting",
    "stored",
    "queue",
    "draining",
]


def bill(past: Past, scope: str) -> Counter[str]:
    word = past.state["texts"][scope][0].split()[0]
    return Counter({text: n for text, n in past.billed.items() if text.split()[0] == word})


@pytest.mark.parametrize("scope", GOES_ON)
def test_an_open_batch_is_carried_to_its_end(past: Past, scope: str) -> None:
    """Every text has its vector, none was billed twice, and the ledger says what the bill says."""
    texts, client = past.state["texts"][scope], past.client(scope)
    past.look(client)
    job = client.batch_job(past.state["batches"][scope])
    assert job.status(poll=False).state == "done"
    assert right(job.result().vectors, texts)
    assert bill(past, scope) == Counter(texts)
    # What nobody can say any more is charged, and corrected when no such job ever appeared.
    spent, held = past.total(scope)
    assert held == 0
    assert spent >= len(texts) * TOKENS
    past.clock.shift(100_000)
    client.resume_batches()
    spent, held = past.total(scope)
    # Of a job that was cancelled before it ran, OpenAI does not say that it cost nothing.
    uncertain = 2 * TOKENS if scope == "stray" else 0
    assert len(texts) * TOKENS <= spent <= len(texts) * TOKENS + uncertain
    assert held == 0
    # Whoever asks again buys nothing.
    again = client.submit_batch(texts)
    assert right(again.result(poll_interval=0.01).vectors, texts)
    assert bill(past, scope) == Counter(texts)


def test_a_batch_that_waits_for_its_budget_waits_on(past: Past) -> None:
    texts = past.state["texts"]["budget"]
    limit = {"scopes": {"budget": {"daily_token_limit": 12}}, "wait": 0}
    client = past.client("budget", budget=limit)
    past.look(client, times=5)
    job = client.batch_job(past.state["batches"]["budget"])
    assert not job.status(poll=False).has_ended
    assert bill(past, "budget") == Counter(texts[:2])
    past.clock.shift(86_400)
    past.look(client)
    assert right(job.result().vectors, texts)
    assert bill(past, "budget") == Counter(texts)
    assert past.total("budget") == (len(texts) * TOKENS, 0)


def test_a_call_that_waited_and_was_killed_is_taken_over(past: Past) -> None:
    past.clock.shift(4_000)
    texts, jobs = past.state["texts"]["waiting"], len(past.server.batches.jobs)
    vectors = past.client("waiting").batch_embed_texts(texts, poll_interval=0.01)
    assert right(vectors, texts)
    assert bill(past, "waiting") == Counter(texts)
    assert len(past.server.batches.jobs) == jobs
    assert past.total("waiting") == (len(texts) * TOKENS, 0)


def test_a_batch_that_is_being_cancelled_ends(past: Past) -> None:
    client = past.client("cancelling")
    past.look(client)
    job = client.batch_job(past.state["batches"]["cancelling"])
    assert job.status(poll=False).state == "cancelled"
    assert bill(past, "cancelling") == {}
    assert past.total("cancelling") == (0, 0)


@pytest.mark.parametrize(
    ("scope", "state", "ok", "spent"),
    [
        ("done", "done", [True, True, True, True], 20),
        ("failed", "done", [True, False, True, True], 15),
        ("gone", "done", [False, False, False, False], 20),
        ("cancelled", "cancelled", [True, False, True, False], 10),
        ("abandoned", "abandoned", [False, False, False, False], 20),
    ],
)
def test_a_batch_that_had_ended_stays_as_it_was(
    past: Past, scope: str, state: str, ok: list[bool], spent: int
) -> None:
    texts, client = past.state["texts"][scope], past.client(scope)
    client.resume_batches()
    job = client.batch_job(past.state["batches"][scope])
    assert job.status().state == state
    result = job.result(on_error="keep")
    assert result.ok.tolist() == ok
    have = [text for text, there in zip(texts, ok, strict=True) if there]
    assert right(result.vectors[result.ok], have)
    if not all(ok):
        with pytest.raises(BatchEmbeddingFailed):
            job.result()
    before = past.provider["billed"]["batches"]
    assert bill(past, scope) == Counter({text: before[text] for text in texts if text in before})
    assert past.total(scope) == (spent, 0)


def test_what_was_paid_for_and_lost_is_billed_again_only_if_asked(past: Past) -> None:
    texts, client = past.state["texts"]["gone"], past.client("gone")
    with pytest.raises(BatchEmbeddingFailed):
        client.submit_batch(texts).result(poll_interval=0.01)
    assert bill(past, "gone") == Counter(texts)
    again = client.submit_batch(texts, resubmit_lost=True)
    assert right(again.result(poll_interval=0.01).vectors, texts)
    assert bill(past, "gone") == Counter(texts * 2)


def test_what_was_never_written_to_its_end_is_swept_away(past: Past) -> None:
    past.clock.shift(2 * 86_400)
    name = past.state["batches"]["preparing"]
    assert list((past.home / "batches").glob(f"{name}*"))
    past.client("preparing").submit_batch(["a new text of today"])
    assert not list((past.home / "batches").glob(f"{name}*"))
    assert past.rows("SELECT 1 FROM batch WHERE name = ?", name) == []
    assert bill(past, "preparing") == {}


def test_the_command_line_fetches_what_it_had_submitted(
    past: Past, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, texts = tmp_path / "work", past.state["texts"]["cli"]
    folder.mkdir()
    monkeypatch.chdir(folder)
    rows = {f"row-{number}": text for number, text in enumerate(texts)}
    lines = [json.dumps({"id": name, "text": text}) for name, text in rows.items()]
    Path("texts.jsonl").write_text("".join(f"{line}\n" for line in lines))
    Path("settings.toml").write_text(
        f'[options.openai]\nbase_url = "{BASE_URL}"\napi_key = "$RECORDED_KEY"\n'
        "dimensions = 8\nbatch = true\n"
    )
    monkeypatch.setenv("RECORDED_KEY", "sk-recorded-0123456789abcdef")
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(folder / "settings.toml"))
    monkeypatch.setenv("EMBEDCORE_HOME", str(past.home))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    name = past.state["batches"]["cli"]
    for _ in range(20):
        if main(["batch", "status", name]) == 0:
            break
        past.clock.shift(420)
    fetch = ["batch", "fetch", name, "-o", "out.jsonl", "--source", "texts.jsonl"]
    assert main(fetch) == 0, capsys.readouterr().err
    found = rows_of(folder / "out.jsonl")
    assert right([found[name] for name in rows], texts)
    assert bill(past, "cli") == Counter(texts)
    assert past.total("cli") == (len(texts) * TOKENS, 0)
