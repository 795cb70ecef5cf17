"""``make live`` against the fakes: its limit, its verdicts, its bill, and no key in its report."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fake_cohere import FakeCohere
from fake_voyage import FakeVoyage
from hypothesis import given, strategies as st

from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress
from embedcore.testing.service import FakeService, Refused
from live import __main__ as live, report as reports
from live.assumptions import TESTS, named
from live.steps import Bill

ROOT = Path(__file__).parents[2]
KEY = "canary-0123456789abcdefXYZ"
REPORT = Path("report.json")
STATE = Path("report.state")

Open = Callable[[FakeService], FakeService]


def run(provider: str, url: str, *more: str) -> tuple[int, Any]:
    """The exit code and the report."""
    told = [provider, "--option", f"base_url={url}", "--report", str(REPORT), "--poll", "0.1"]
    code = live.main([*told, *more])
    found = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else None
    return code, found


def verdicts(report: Any, verdict: str) -> set[str]:
    return {name for name, each in report["assumptions"].items() if each["verdict"] == verdict}


@pytest.fixture
def openai(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOpenAI]:
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as server:
        monkeypatch.setenv("OPENAI_API_KEY", str(server.api_key))
        yield server


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a fake, and sets its key for the providers."""
    running: list[AbstractContextManager[Any]] = []

    def opened(fake: FakeService) -> FakeService:
        fake.key = KEY
        running.append(fake)
        for variable in ("CO_API_KEY", "VOYAGE_API_KEY"):
            monkeypatch.setenv(variable, KEY)
        return fake.__enter__()

    yield opened
    for each in running:
        each.__exit__(None, None, None)


def test_openai_and_its_batch_later(openai: FakeOpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run("openai", openai.base_url, "--option", "batch=true", "--minutes", "0")
    assert code == live.NOT_ENDED
    assert (report["batch_state"], STATE.is_dir()) == ("running", True)
    assert f"RESUME={REPORT}" in capsys.readouterr().out
    requests = openai.meter.billed_requests
    openai.batches.finish(openai.batches.jobs[0].id)
    told = ["openai", "--resume", str(REPORT), "--poll", "0.1"]
    code = live.main([*told, "--option", f"base_url={openai.base_url}", "--option", "batch=true"])
    shown, text = capsys.readouterr().out, REPORT.read_text(encoding="utf-8")
    report = json.loads(text)
    assert code == live.OK, shown
    assert verdicts(report, "contradicted") == set()
    assert verdicts(report, "confirmed") >= {
        f"openai-{name}"
        for name in (
            *("tokenizer", "text-tokens", "reply-model", "batch-listed", "batch-lists"),
            *("batch-deleted-file", "batch-counts", "batch-results-whole", "batch-output-expiry"),
        )
    }
    # What was done in the first run is not done again.
    assert openai.meter.billed_requests == requests + 1
    bill = report["bill"]
    assert bill["agrees"] is True
    assert bill["immediate"] == openai.meter.billed_tokens
    assert bill["batch"] == openai.batches.meter.billed_tokens > 0
    assert Decimal(bill["ledger_cost"]) <= Decimal("0.05")
    assert str(openai.api_key) not in text + shown
    assert not STATE.exists()
    assert max(map(len, shown.splitlines())) <= 80


def test_voyage_with_a_batch(opened: Open) -> None:
    fake = opened(FakeVoyage())
    assert isinstance(fake, FakeVoyage)
    fake.ends_after = 1
    code, report = run("voyage", f"{fake.url}/v1")
    assert (code, report["problems"]) == (live.OK, {})
    assert verdicts(report, "confirmed") >= {"voyage-batch-params", "voyage-batch-deleted-file"}
    assert report["bill"]["ledger_tokens"] == fake.meter.billed_tokens
    assert all(report["checks"].values())


def test_cohere_has_none(opened: Open) -> None:
    fake = opened(FakeCohere())
    code, report = run("cohere", fake.url)
    assert (code, report["batch"], report["problems"]) == (live.OK, None, {})
    assert verdicts(report, "confirmed") == {"cohere-usage", "cohere-long-refused"}
    assert "embed-english-v3.0" in report["tokens_by_model"]
    assert report["bill"]["ledger_tokens"] == fake.meter.billed_tokens
    # Every assumption about it is in the report, tested or not.
    assert list(report["assumptions"]) == [each for each in named() if each.startswith("cohere-")]


def test_the_limit_holds_before_anything_is_sent(opened: Open) -> None:
    fake = opened(FakeCohere())
    code, report = run("cohere", fake.url, "--option", "price=100000")
    assert code == live.BUDGET
    assert fake.meter.requests == 0
    assert "0.05" in report["stopped"]
    assert not STATE.exists()


def test_the_limit_is_over_all_steps(openai: FakeOpenAI) -> None:
    """A price with which some requests are within the limit and all of them are not."""
    told = ("--option", "price=300", "--option", "batch=true", "--minutes", "0")
    code, report = run("openai", openai.base_url, *told)
    assert code == live.BUDGET
    assert 0 < Decimal(report["bill"]["ledger_cost"]) <= Decimal("0.05")
    assert openai.meter.billed_tokens == report["bill"]["ledger_tokens"]


class Cuts(FakeCohere):
    """It cuts long texts, and says nothing."""

    def reply(self, question: dict[str, Any]) -> object:
        return super().reply({**question, "truncate": "END"})

    def vectors(self, texts: Any, width: int, *, salt: str = "") -> list[list[float]]:
        return super().vectors([text[:2_000] for text in texts], width, salt=salt)


class Twists(FakeCohere):
    """What a text's vector is depends on the texts beside it; it bills more than bytes."""

    def vectors(self, texts: Any, width: int, *, salt: str = "") -> list[list[float]]:
        return super().vectors(texts, width, salt=f"{salt} {len(texts)}")

    def bill(self, texts: Any) -> int:
        return 100 * super().bill(texts)


@pytest.mark.parametrize(
    ("fake", "name"), [(Cuts, "cohere-long-refused"), (Twists, "cohere-usage")]
)
def test_what_is_contradicted_is_shown(
    opened: Open, fake: type[FakeCohere], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = run("cohere", opened(fake()).url)
    assert code == live.CONTRADICTED
    assert verdicts(report, "contradicted") == {name}
    told = report["assumptions"]["cohere-long-refused"]["seen"]
    assert ("the same vector: it was cut" in told) == (fake is Cuts)
    shown = capsys.readouterr().out
    assert f"contradicted: 1\n  {name}\n" in shown
    broken = {check for check, kept in report["checks"].items() if not kept}
    assert broken == ({"a text has the same vector alone"} if fake is Twists else set())
    assert all(f"NOT KEPT: {check}\n" in shown for check in broken)


class Resurrects(FakeVoyage):
    """It makes jobs of files that were deleted."""

    def deletes(self, name: str) -> object:
        return {"id": self.file(name).id, "object": "file", "deleted": True}


def test_a_job_of_a_deleted_file_is_found_and_counted(opened: Open) -> None:
    fake = opened(Resurrects())
    assert isinstance(fake, FakeVoyage)
    fake.ends_after = 1
    code, report = run("voyage", f"{fake.url}/v1")
    assert code == live.CONTRADICTED
    assert verdicts(report, "contradicted") == {"voyage-batch-deleted-file"}
    assert [job.state for job in fake.jobs.values()] == ["completed", "cancelling"]
    assert report["bill"]["ledger_tokens"] > fake.meter.billed_tokens


def test_a_service_that_repeats_the_key(opened: Open, capsys: pytest.CaptureFixture[str]) -> None:
    fake = opened(FakeCohere())
    said = {"message": f"no such thing for {KEY}, Bearer {KEY}"}
    fake.next_refusals = [Refused(400, said)] * 2
    code, report = run("cohere", fake.url)
    assert code == live.CONTRADICTED
    assert "[hidden]" in report["problems"]["texts together, and each alone"]
    assert KEY not in REPORT.read_text(encoding="utf-8") + "".join(capsys.readouterr())


def test_a_report_with_a_key_is_not_written(opened: Open) -> None:
    told = ("--model", KEY[:12], "--option", "price=1")
    code, report = run("cohere", opened(FakeCohere()).url, *told)
    assert (code, report) == (live.HAD_KEY, None)
    assert not list(Path().glob("report*"))


@given(st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=16), st.data())
def test_pieces_of_a_key_are_found(key: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(key) - 10))
    piece = key[start : start + data.draw(st.integers(10, len(key) - start))]
    packed = base64.b64encode(key.encode()).decode()
    for form in (piece, piece.upper(), packed):
        assert reports.has_secret(json.dumps({"said": f"…{form}…"}), [key]), form
    assert not reports.has_secret(json.dumps({"said": "…"}), [key])


def test_a_wrong_call_sends_nothing(opened: Open, capsys: pytest.CaptureFixture[str]) -> None:
    fake = opened(FakeVoyage())
    assert live.main(["no-such-provider"]) == live.USAGE
    assert live.main(["voyage", "--resume", "no-such-report.json"]) == live.USAGE
    assert run("voyage", f"{fake.url}/v1", "--option", "dimensions") == (live.USAGE, None)
    STATE.mkdir()
    assert run("voyage", f"{fake.url}/v1") == (live.USAGE, None)
    assert f"RESUME={REPORT}" in capsys.readouterr().err
    assert fake.meter.requests == 0


def test_without_a_key_there_is_no_report(
    opened: Open, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = opened(FakeVoyage())
    monkeypatch.delenv("VOYAGE_API_KEY")
    assert run("voyage", f"{fake.url}/v1") == (live.USAGE, None)
    assert "VOYAGE_API_KEY" in capsys.readouterr().err
    assert fake.meter.billed_requests == 0
    assert not STATE.exists()


@pytest.mark.parametrize(
    ("batch", "ledger", "agrees"), [(5, 15, True), (5, 16, False), (None, 15, None)]
)
def test_bill_and_ledger_are_compared(batch: int | None, ledger: int, agrees: bool | None) -> None:
    cost = Decimal("0.000015")
    bill = Bill(immediate=10, batch=batch, cost=cost, ledger_tokens=ledger, ledger_cost=cost)
    assert bill.agrees is agrees


def test_every_test_is_of_an_assumption_of_the_page() -> None:
    names = named()
    assert len(set(names)) == len(names) > 70
    providers = {each.name for each in ROOT.glob("providers/*")}
    assert {name.partition("-")[0] for name in names} <= providers
    short = {name.partition("-")[2] for name in names}
    assert set(TESTS) <= short | set(names)


def test_the_page_says_what_can_be_called_and_how_it_ends() -> None:
    page = (ROOT / "docs" / "how-to" / "test-with-a-key.md").read_text(encoding="utf-8")
    commands = re.findall(r"^make live (.+)$", page, re.MULTILINE)
    assert len(commands) >= 3
    for told in commands:
        dry = ["make", "-n", "live", *shlex.split(told, comments=True)]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
        # Within another make it says as well where it is.
        (line,) = [one for one in done.stdout.splitlines() if " -m live " in one]
        arguments = shlex.split(line.partition(" -m live ")[2])
        given = vars(live._parser().parse_args(arguments))
        for name, value in (each.split("=", 1) for each in shlex.split(told, comments=True)):
            wanted = {"MINUTES": float, "REPORT": Path, "RESUME": Path}.get(name, str)(value)
            found = given["option" if name == "OPTIONS" else name.lower()]
            assert found == (value.split() if name == "OPTIONS" else wanted), told
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    names = ("OK", "CONTRADICTED", "USAGE", "BUDGET", "NOT_ENDED", "HAD_KEY", "INTERRUPTED")
    assert codes == {getattr(live, name) for name in names}
