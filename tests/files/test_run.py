"""Whatever happens between runs on one output: every vector is right, and none is billed twice."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from embedcore.errors import (
    ConfigurationError,
    InputRejected,
    InvalidResponse,
    ProviderUnavailable,
    StorageBusy,
    TokenBudgetExceeded,
)
from embedcore.files.journal import read_journal
from embedcore.files.run import embed_files, plan_files
from embedcore.files.types import FilePlan, FileProgress, Origin, RunReport, content_digest

POOL = [f"text {i}" for i in range(12)] + ['é\n"', 'e\u0301\n"', "\0", " ", "=1+1"]
RECORD = 32 + 4 + 6 * 4 + 4
ERRORS = [ProviderUnavailable, TokenBudgetExceeded, KeyboardInterrupt, MemoryError]


@dataclass(frozen=True)
class Step:
    """One run over these texts, stopped in call ``call`` (0: never) after ``sent`` of its texts.

    ``tear``: bytes that the journal then loses at its end.
    """

    texts: list[str]
    block: int
    bad: frozenset[str]
    call: int
    sent: int
    error: type[BaseException]
    on_error: str
    tear: int


STEPS = st.lists(
    st.builds(
        Step,
        texts=st.lists(st.sampled_from(POOL), max_size=20),
        block=st.integers(1, 7),
        bad=st.frozensets(st.sampled_from(POOL), max_size=2),
        call=st.integers(0, 4),
        sent=st.integers(0, 7),
        error=st.sampled_from(ERRORS),
        on_error=st.sampled_from(["raise", "keep"]),
        tear=st.one_of(st.just(0), st.integers(0, 100)),
    ),
    min_size=1,
    max_size=6,
)


class World:
    """One output over several runs, and what is known to have been billed for it."""

    def __init__(self, folder: Path, suffix: str, new_client: Any, check_rows: Any) -> None:
        self.output = folder / f"v.{suffix}"
        self.journal = folder / f"v.{suffix}.journal"
        self.failed = folder / f"v.{suffix}.failed.jsonl"
        self.retained: set[str] = set()
        self.written: list[str] | None = None
        self.new_client, self.check_rows = new_client, check_rows

    def take(self, step: Step) -> None:
        stop = (step.sent, step.error("stopped"))
        client = self.new_client(
            bad=step.bad, stop_after=lambda call: stop if call == step.call else None
        )
        failing = [text for text in step.texts if text in step.bad - self.retained]
        before = self.journaled()
        try:
            report = embed_files(
                client, [iter(step.texts)], self.output, block=step.block, on_error=step.on_error
            )
        except (*ERRORS, InputRejected) as error:
            self.stopped(step, client, getattr(error, "__notes__", []))
        else:
            self.finished(step, client, failing, report, before)

    def stopped(self, step: Step, client: Any, notes: list[str]) -> None:
        assert not set(client.billed) & self.retained
        self.retained |= set(client.billed)
        if client.billed:
            assert any("are kept in" in note for note in notes)
        if self.written is not None:
            self.check_rows(self.output, self.written)
        if step.tear and self.journal.exists():
            self.tear(step.tear)

    def tear(self, size: int) -> None:
        """Lose the journal's end: what is left of it, and the output, is what is retained."""
        content = self.journal.read_bytes()
        self.journal.write_bytes(content[: max(len(content) - size, 0)])
        kept = self.journaled()
        lost = self.retained - set(self.written or []) - kept
        assert len(lost) <= -(-size // RECORD)
        self.retained = set(self.written or []) | kept

    def journaled(self) -> set[str]:
        """The texts whose vectors are in the journal."""
        found = read_journal(self.journal, Origin(model="fake:fake", fingerprint="f" * 32))
        left = set() if found is None else {one.hex() for one in found.intact.tolist()}
        return {text for text in POOL if content_digest(text).rstrip(b"\0").hex() in left}

    def finished(
        self,
        step: Step,
        client: Any,
        failing: list[str],
        report: RunReport,
        before: set[str],
    ) -> None:
        assert not set(client.billed) & self.retained
        written = [text for text in step.texts if text not in failing]
        unchanged = not written and (self.written is not None or not step.texts)
        assert report.unchanged == unchanged
        if not unchanged:
            self.written = written
        # What was paid for and is in no output stays.
        assert self.journaled() == before - set(step.texts)
        self.retained = set(self.written or []) | self.journaled()
        if self.written is None:
            assert not self.output.exists()
            return
        self.check_rows(self.output, self.written)
        assert report.rows == len(step.texts)
        assert report.embedded == len(client.billed) == len(set(client.billed))
        assert report.embedded + report.reused + len(set(failing)) == len(set(step.texts))
        assert report.duplicates == len(step.texts) - len(set(step.texts))
        assert report.failed == len(failing)
        assert report.usage.tokens == sum(map(len, client.billed))
        if not step.texts:
            # Nothing is touched: not even what an earlier run has listed.
            return
        assert report.journaled == len(self.journaled())
        lines = self.failed.read_bytes().splitlines() if failing else []
        assert [json.loads(line)["position"] for line in lines] == [
            i for i, text in enumerate(step.texts) if text in failing
        ]
        left = {self.output.name, f"{self.output.name}.rows.jsonl"}
        left |= {self.failed.name} if failing else set()
        left |= {self.journal.name} if self.journaled() else set()
        assert {path.name for path in self.output.parent.iterdir()} <= left


@pytest.mark.fault(12)
@pytest.mark.fault(142)
@given(steps=STEPS, suffix=st.sampled_from(["jsonl", "npy", "parquet"]))
def test_any_sequence_of_crashes_edits_and_reruns(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[Step],
    suffix: str,
    new_client: Any,
    check_rows: Callable[..., None],
) -> None:
    world = World(tmp_path_factory.mktemp("run"), suffix, new_client, check_rows)
    for step in steps:
        world.take(step)


def test_only_what_changed_is_billed(
    output: Path, new_client: Any, check_rows: Callable[..., None]
) -> None:
    embed_files(new_client(), [iter(["a", "b", "c", "b"])], output)
    client = new_client()
    report = embed_files(client, [iter(["c", "x", "b", "b", "a"])], output)
    assert client.billed == ["x"]
    assert (report.reused, report.embedded, report.duplicates) == (3, 1, 1)
    check_rows(output, ["c", "x", "b", "b", "a"])
    client = new_client()
    report = embed_files(client, [iter(["c", "x", "b", "b", "a"])], output)
    assert not client.calls
    assert report.usage.cost == Decimal(0)


def test_failed_rows_are_listed_and_tried_again(
    output: Path, new_client: Any, check_rows: Callable[..., None]
) -> None:
    texts = ["a", "bad", "", "b", "bad"]
    report = embed_files(
        new_client(bad=frozenset(["bad"])), [iter(texts)], output, on_error="keep", on_empty="keep"
    )
    check_rows(output, ["a", "b"])
    assert (report.failed, report.empty, report.embedded) == (3, 1, 2)
    assert report.failed_path is not None
    listed = [json.loads(line) for line in report.failed_path.read_bytes().splitlines()]
    assert [(row["position"], row["where"], row["reason"]) for row in listed] == [
        (1, "<rows>:2", "it is bad"),
        (2, "<rows>:3", "empty text"),
        (4, "<rows>:5", "it is bad"),
    ]
    client = new_client()
    report = embed_files(client, [iter(["a", "bad", "b"])], output)
    assert client.billed == ["bad"]
    assert report.failed_path is None
    assert not output.with_name(output.name + ".failed.jsonl").exists()


def test_a_failed_row_ends_the_run_and_is_named(output: Path, new_client: Any) -> None:
    texts = [f"t{i}" for i in range(10)]
    with pytest.raises(InputRejected) as caught:
        embed_files(new_client(bad=frozenset(["t7"])), [iter(texts)], output, block=5)
    assert caught.value.position == 7
    assert any("row 7 of the input, <rows>:8" in note for note in caught.value.__notes__)
    assert any("9 vectors are kept in" in note for note in caught.value.__notes__)
    assert not output.exists()


@pytest.mark.fault(1)
def test_empty_texts_are_refused_before_anything_is_sent(output: Path, client: Any) -> None:
    with pytest.raises(InputRejected) as caught:
        embed_files(client, [iter(["a", "", "b", ""])], output)
    assert caught.value.position == 1
    assert "2 texts are empty: <rows>:2, <rows>:4" in str(caught.value)
    assert not client.calls
    assert not output.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.fault(18)
@pytest.mark.case("F1")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        (None, b""),
        ("a.jsonl", b""),
        ("a.jsonl", b"\n \n\t\r\n"),
        ("a.jsonl", b"\xef\xbb\xbf"),
        ("a.csv", b""),
        ("a.csv", b"\n\n"),
        ("a.csv", b"id,text\n"),
        ("a.csv", b"\xef\xbb\xbftext"),
        ("a.txt", b""),
        ("a.txt", b"\n\r\n\n"),
        ("a.ndjson", b"\n"),
    ],
)
def test_without_a_row_nothing_is_touched(
    output: Path, new_client: Any, name: str | None, content: bytes
) -> None:
    """Neither where nothing is there, nor an output of another model, its rows and its journal."""
    folder, client = output.parent, new_client()
    source = folder.parent / f"{folder.name}-{name}"
    source.write_bytes(content)
    inputs = [iter(())] if name is None else [source, source]
    assert embed_files(client, inputs, output).unchanged
    assert contents(folder) == {}
    embed_files(new_client(), [iter([f"t{i}" for i in range(50)])], output)
    stopped = new_client(stop_after=lambda call: (7, ProviderUnavailable("down")))
    with pytest.raises(ProviderUnavailable):
        embed_files(stopped, [iter([f"u{i}" for i in range(9)])], output)
    before = contents(folder)
    assert f"{output.name}.journal" in before
    for options in ({}, {"overwrite": True}, {"on_empty": "keep", "on_error": "keep"}):
        for one in (client, new_client(model="other")):
            inputs = [iter(())] if name is None else [source]
            report = embed_files(one, inputs, output, on_plan=lambda _: False, **options)
            assert (report.rows, report.embedded, report.unchanged) == (0, 0, True)
            assert contents(folder) == before
            assert not one.calls
    inputs = [iter(())] if name is None else [source]
    assert plan_files(client, inputs, output) == FilePlan()


@pytest.mark.case("F1")
def test_an_output_is_never_replaced_by_one_without_rows(output: Path, new_client: Any) -> None:
    embed_files(new_client(), [iter(["a", "b"])], output)
    before = contents(output.parent)
    client = new_client(bad=frozenset(["x"]))
    report = embed_files(client, [iter(["x", ""])], output, on_error="keep", on_empty="keep")
    assert (report.unchanged, report.failed, report.rows) == (True, 2, 2)
    after = contents(output.parent)
    assert len(after.pop(f"{output.name}.failed.jsonl").splitlines()) == 2
    assert after == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_journal_with_a_damaged_header_goes_on_or_stays(
    output: Path, new_client: Any, check_rows: Callable[..., None], overwrite: bool
) -> None:
    journal = output.with_name(f"{output.name}.journal")
    stopped = new_client(stop_after=lambda call: (2, ProviderUnavailable("down")))
    with pytest.raises(ProviderUnavailable):
        embed_files(stopped, [iter(["a", "b", "c"])], output)
    journal.write_bytes(bytes(64) + journal.read_bytes()[64:])
    damaged, client = journal.read_bytes(), new_client(model="other")
    with pytest.raises(ConfigurationError, match="move it away"):
        embed_files(client, [iter(["a", "b", "c"])], output, overwrite=overwrite)
    assert (client.calls, journal.read_bytes()) == ([], damaged)
    assert plan_files(new_client(), [iter(["a", "b", "c"])], output).to_embed == 1
    client = new_client()
    embed_files(client, [iter(["a", "b", "c"])], output, overwrite=overwrite)
    assert client.billed == ["c"]
    assert not journal.exists()
    check_rows(output, ["a", "b", "c"])


@pytest.mark.case("F1")
def test_what_was_paid_for_stays_in_the_journal_until_an_output_has_it(
    output: Path, new_client: Any, check_rows: Callable[..., None]
) -> None:
    one, two = [f"t{i}" for i in range(30)], [f"u{i}" for i in range(30)]
    stopped = new_client(stop_after=lambda call: (20, ProviderUnavailable("down")))
    with pytest.raises(ProviderUnavailable):
        embed_files(stopped, [iter(one)], output)
    report = embed_files(new_client(), [iter([*two, "t3"])], output)
    assert (report.embedded, report.reused, report.journaled) == (30, 1, 19)
    check_rows(output, [*two, "t3"])
    # Nor by a run into which nothing of it goes, nor by one that fails.
    assert embed_files(new_client(), [iter(two)], output).journaled == 19
    broken = new_client(stop_after=lambda call: (0, ProviderUnavailable("down")))
    with pytest.raises(ProviderUnavailable):
        embed_files(broken, [iter(["v"])], output)
    client = new_client()
    report = embed_files(client, [iter(one)], output)
    assert sorted(client.billed) == sorted({"t3", *one[20:]})
    assert report.journaled == 0
    check_rows(output, one)
    assert not output.with_name(f"{output.name}.journal").exists()


@pytest.mark.case("F1")
def test_standard_input_without_a_byte_is_a_program_before_us_that_failed(
    output: Path, client: Any
) -> None:
    with pytest.raises(InputRejected, match="standard input: it ended without a single byte"):
        embed_files(client, ["-"], output, stdin=io.BytesIO(b""))
    assert embed_files(client, ["-"], output, stdin=io.BytesIO(b"\n")).unchanged
    assert contents(output.parent) == {}


@pytest.mark.case("F1")
@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_so_is_a_pipe_with_a_name(tmp_path: Path, client: Any) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    feeder = threading.Thread(target=pipe.write_bytes, args=(b"",))
    feeder.start()
    with pytest.raises(InputRejected, match=r"pipe.jsonl: it ended without a single byte"):
        embed_files(client, [pipe], tmp_path / "v.jsonl")
    feeder.join()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"fingerprint": "e" * 32},
        {"dimensions": 7, "width": 7},
        {"provider": "p"},
    ],
)
@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.fault(115)
def test_vectors_of_two_models_never_meet(
    output: Path, new_client: Any, change: dict[str, Any], unfinished: bool, load: Any
) -> None:
    if unfinished:
        stopped = new_client(stop_after=lambda call: (2, ProviderUnavailable("down")))
        with pytest.raises(ProviderUnavailable):
            embed_files(stopped, [iter(["a", "b", "c"])], output)
    else:
        embed_files(new_client(), [iter(["a", "b"])], output)
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    other = new_client(**change)
    with pytest.raises(ConfigurationError, match=r"fake:fake .*overwrite=True"):
        embed_files(other, [iter(["a", "b"])], output)
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before
    assert not other.calls
    report = embed_files(other, [iter(["a", "b"])], output, overwrite=True)
    assert report.embedded == 2
    assert {len(row["vector"]) for row in load(output)} == {other.width}


def test_input_types_never_meet(output: Path, client: Any) -> None:
    embed_files(client, [iter(["a"])], output, input_type="query")
    with pytest.raises(ConfigurationError, match="input type query"):
        embed_files(client, [iter(["a"])], output, input_type="document")
    assert client.input_types == {"query"}


def test_overwrite_still_reuses_what_fits(output: Path, new_client: Any) -> None:
    embed_files(new_client(), [iter(["a"])], output)
    again = new_client()
    embed_files(again, [iter(["a", "b"])], output, overwrite=True)
    assert again.billed == ["b"]


def test_an_input_is_never_overwritten(tmp_path: Path, client: Any, jsonl: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "link.jsonl").symlink_to(path)
    for output in (path, tmp_path / "link.jsonl"):
        with pytest.raises(ConfigurationError, match="would be overwritten"):
            embed_files(client, [path], output, overwrite=True)
    assert json.loads(path.read_text()) == {"text": "a"}


def test_a_link_stays_a_link(tmp_path: Path, client: Any, check_rows: Callable[..., None]) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "a.jsonl"
    link.symlink_to(tmp_path / "real" / "b.jsonl")
    embed_files(client, [iter(["a"])], link)
    assert link.is_symlink()
    check_rows(tmp_path / "real" / "b.jsonl", ["a"])


def test_a_missing_folder_is_named(tmp_path: Path, client: Any) -> None:
    with pytest.raises(ConfigurationError, match="nowhere: there is no such folder"):
        embed_files(client, [iter(["a"])], tmp_path / "nowhere" / "a.jsonl")


def test_an_input_that_changes_during_the_run_is_found_out(tmp_path: Path, new_client: Any) -> None:
    path, output = tmp_path / "a.txt", tmp_path / "a.jsonl"
    for change in ("a\nB\nc\n", "a\n", "a\nb\nc\nd\n"):
        path.write_text("a\nb\nc\n")

        def replace(call: int, change: str = change) -> None:
            path.write_text(change)

        client = new_client(stop_after=replace)
        with pytest.raises(InputRejected, match=r"chang|ends before"):
            embed_files(client, [path], output, block=1 if change == "a\n" else 9)
        assert not output.exists()
        output.with_name("a.jsonl.journal").unlink()


def test_the_plan_is_asked_first_and_may_decline(output: Path, client: Any) -> None:
    plans: list[FilePlan] = []

    def decline(plan: FilePlan) -> bool:
        plans.append(plan)
        return False

    report = embed_files(client, [iter(["a", "bb", "a"])], output, on_plan=decline)
    assert report.declined
    assert not client.calls
    assert list(output.parent.iterdir()) == []
    (plan,) = plans
    assert (plan.rows, plan.texts, plan.duplicates, plan.to_embed, plan.tokens) == (3, 2, 1, 2, 3)


def test_progress_reaches_its_end(output: Path, client: Any) -> None:
    told: list[FileProgress] = []
    embed_files(client, [iter(map(str, range(25)))], output, block=10, on_progress=told.append)
    embedding = [(one.done, one.total) for one in told if one.stage == "embedding"]
    assert embedding == [(0, 25), (10, 25), (10, 25), (20, 25), (20, 25), (25, 25), (25, 25)]
    assert (told[-1].stage, told[-1].done, told[-1].total) == ("writing", 25, 25)
    assert told[-1].tokens == sum(len(str(i)) for i in range(25))


@pytest.mark.fault(15)
def test_cut_texts_are_counted_also_when_reused(output: Path, new_client: Any, load: Any) -> None:
    stopped = new_client(longest=2, stop_after=lambda call: (1, ProviderUnavailable("down")))
    with pytest.raises(ProviderUnavailable):
        embed_files(stopped, [iter(["abcde", "ab"])], output)
    for _ in range(2):
        report = embed_files(new_client(longest=2), [iter(["abcde", "ab", "abcde"])], output)
        assert report.truncated == 2
        assert [row["tokens_cut"] for row in load(output)] == [3, 0, 3]


def test_the_second_of_two_runs_is_refused(output: Path, new_client: Any) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait(call: int) -> None:
        inside.set()
        go_on.wait(30)

    first = threading.Thread(
        target=embed_files, args=(new_client(stop_after=wait), [iter(["a"])], output)
    )
    first.start()
    assert inside.wait(30)
    second = new_client()
    with pytest.raises(StorageBusy, match=r"process \d+ on .* is writing"):
        embed_files(second, [iter(["a"])], output)
    assert not second.calls
    go_on.set()
    first.join()
    embed_files(second, [iter(["a"])], output)
    assert not second.calls


@pytest.mark.parametrize("flaw", ["shape", "infinite", "short"])
def test_a_result_that_cannot_be_right_is_not_kept(
    output: Path, client: Any, flaw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    honest = client._result

    def flawed(texts: Any, reached: int) -> Any:
        result = honest(texts, reached)
        vectors = result.vectors
        if flaw == "infinite":
            vectors[0, 0] = np.inf
        return replace(
            result,
            vectors=vectors[:-1] if flaw == "shape" else vectors,
            ok=result.ok[:-1] if flaw == "short" else result.ok,
        )

    monkeypatch.setattr(client, "_result", flawed)
    with pytest.raises(InvalidResponse):
        embed_files(client, [iter(["a", "b"])], output)
    assert not output.exists()


@pytest.mark.fault(142)
def test_an_interrupt_while_the_journal_is_written_loses_nothing(
    output: Path, new_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def interrupted(file: Any, data: Any) -> None:
        written.append(len(data))
        if len(written) == 2:
            file.write(bytes(data)[:50])
            raise KeyboardInterrupt
        assert file.write(data) == len(data)

    with monkeypatch.context() as patch:
        patch.setattr("embedcore.files.journal._write_all", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            embed_files(new_client(), [iter(["a", "b", "c"])], output)
    assert any("3 vectors are kept" in note for note in caught.value.__notes__)
    client = new_client()
    embed_files(client, [iter(["a", "b", "c"])], output)
    assert not client.calls
