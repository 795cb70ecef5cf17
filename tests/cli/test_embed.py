"""What does ``embedcore embed`` send, write and say?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import astuple
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from embedcore.testing import vector_of

OFFLINE = ("-m", "hashing:16")


def test_estimate_run_and_rerun(cli, server, texts_file, read_output):
    texts_file(50)
    run = cli("embed", "texts.jsonl", "-o", "out.jsonl")
    assert run.code == 0, run.err
    assert "50 texts" in run.err
    assert "$0.0" in run.err
    assert "embedcore similar -c 'your question' -i out.jsonl" in run.err
    for row in read_output(Path("out.jsonl")):
        wanted = vector_of(row["text"], 1536)
        assert np.array_equal(np.asarray(row["vector"], np.float32), wanted)
    bill = server.meter.snapshot()
    again = cli("embed", "texts.jsonl", "-o", "out.jsonl")
    assert again.code == 0
    assert "nothing" in again.err
    assert "50 texts embedded before, not paid for again" in again.out
    assert server.meter.snapshot() == bill


def test_dry_run_sends_and_writes_nothing(cli, server, texts_file):
    texts_file(20)
    run = cli("embed", "texts.jsonl", "-o", "out.jsonl", "--dry-run")
    assert run.code == 0
    assert "20 texts" in run.out
    assert "Nothing was sent" in run.err
    assert server.meter.requests == 0
    assert [path.name for path in Path().iterdir()] == ["texts.jsonl"]
    assert cli("embed", "texts.jsonl", "--dry-run", "--json").json["plan"]["to_embed"] == 20
    assert server.meter.requests == 0


def test_only_what_changed_is_billed(cli, server, texts_file):
    texts_file(20)
    cli("embed", "texts.jsonl", "-o", "out.npy", "--quiet")
    texts_file(25, start=5)
    report = cli("embed", "texts.jsonl", "-o", "out.npy", "--json").json
    assert (report["rows"], report["embedded"], report["reused"]) == (25, 10, 15)
    assert report["plan"]["to_embed"] == 10
    assert server.meter.billed_twice == {}


@pytest.mark.fault(12)
def test_json_report_counts_everything(cli, server):
    rows = [{"text": "a"}, {"text": "a"}, {"text": ""}, {"text": "word " * 9000}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = cli("embed", "in.jsonl", "-o", "out.jsonl", "--on-error", "keep", "--json")
    assert run.code == 1
    report = run.json
    assert report["rows"] == 4
    assert report["embedded"] == 2
    assert report["duplicates"] == 1
    assert report["failed"] == 1
    assert report["truncated"] == 1
    assert report["tokens_cut"] >= 800
    assert report["failed_path"].endswith("out.jsonl.failed.jsonl")
    assert Decimal(report["cost"]) == server.meter.billed_tokens * Decimal("0.00000002")
    shown = cli("embed", "in.jsonl", "-o", "other.jsonl", "--on-error", "keep").out
    assert "1 row cut to fit the model, by " in shown
    assert "1 row, listed in " in shown


def test_missing_file_is_never_a_text(cli, server):
    run = cli("embed", "hello world", "-o", "out.npy")
    assert run.code == 2
    assert "'hello world': there is no such file" in run.err
    assert "-c" in run.err
    assert server.meter.requests == 0
    assert list(Path().iterdir()) == []


def test_a_server_that_cannot_be_reached_is_no_fault_of_a_row(cli, server, monkeypatch):
    with socket.socket() as silent:  # bound, and nobody listens
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        for number in (1, 3):
            Path("t.txt").write_text("".join(f"text {one}\n" for one in range(number)))
            run = cli("embed", "t.txt", "-o", "o.npy")
            assert run.code == 4
            assert "cannot be reached" in run.err
            assert "row" not in run.err.partition("Error")[2]


def test_what_was_said_before_stands_before():
    command = [sys.executable, "-m", "embedcore", "embed", "-c", "one", "-o", "o.npy", "--dry-run"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    said = subprocess.run(command, **both, text=True, check=True, timeout=120).stdout
    assert said.index("cost ") < said.index("Nothing was sent.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Name files, or texts with -c"),
        (["t.txt", "-c", "x"], "do not go together"),
        (["t.txt"], "-o vectors.npy"),
        (["t.txt", "-o", "out.pdf"], "an output must end in"),
        (["t.txt", "-o", "no/such/out.npy"], "no such folder"),
        (["t.txt", "-o", "out.npy", "--text", "body"], "no columns"),
        (["t.txt", "-o", "out.npy", "--on-error", "ignore"], "--on-error"),
        (["t.txt", "-o", "out.npy", "-m", "nosuch:model"], "If you have its package, install it"),
        (["t.txt", "-o", "out.npy", "--input-type", "song"], "no --input-type 'song'"),
        (["t.txt", "-o", "out.npy", "--scope", "a b"], "scope"),
        (["t.dat", "-o", "out.npy"], "or name the format with --format"),
    ],
)
def test_what_is_wrong_is_exit_2_before_anything_is_sent(cli, server, arguments, said):
    Path("t.txt").write_text("a\nb\n")
    Path("t.dat").write_text("a\nb\n")
    run = cli("embed", *arguments)
    assert (run.code, run.out) == (2, "")
    assert said in run.err
    assert "Traceback" not in run.err
    assert server.meter.requests == 0


def test_formats_and_columns(cli, read_output):
    Path("a.csv").write_text("key,body,lang\n1,uno,es\n2,one,en\n")
    run = cli(
        "embed",
        "a.csv",
        "-o",
        "a.jsonl",
        "--text",
        "body",
        "--id",
        "key",
        "--keep",
        "lang",
        *OFFLINE,
    )
    assert run.code == 0, run.err
    rows = read_output(Path("a.jsonl"))
    assert [(row["id"], row["text"], row["lang"]) for row in rows] == [
        ("1", "uno", "es"),
        ("2", "one", "en"),
    ]
    Path("b.txt").write_text("uno\ndos\n")
    run = cli("embed", "b.txt", "-o", "b.jsonl", "--no-text", *OFFLINE)
    assert run.code == 0
    assert all("text" not in row for row in read_output(Path("b.jsonl")))
    run = cli("embed", "-", "-o", "c.jsonl", "--format", "jsonl", *OFFLINE, stdin=b'{"text":"x"}\n')
    assert run.code == 0
    assert [row["text"] for row in read_output(Path("c.jsonl"))] == ["x"]


@pytest.mark.parametrize("suffix", ["npy", "jsonl", "parquet"])
def test_several_files_into_one_output_of_each_format(cli, texts_file, suffix):
    texts_file(3, "a.jsonl")
    texts_file(3, "b.jsonl", start=2)
    run = cli("embed", "a.jsonl", "b.jsonl", "-o", f"out.{suffix}", "--json", *OFFLINE)
    assert (run.json["rows"], run.json["embedded"], run.json["duplicates"]) == (6, 5, 1)
    found = cli("similar", "-c", "text number 4", "-i", f"out.{suffix}", "-k", "1", "--json").json
    assert found["questions"][0]["hits"][0]["id"] == "row-4"


def test_literal_texts_go_to_standard_output_as_vectors(cli, server):
    run = cli("embed", "-c", "one", "-c", "two")
    assert run.code == 0
    rows = [json.loads(line) for line in run.out.splitlines()]
    for text, row in zip(["one", "two"], rows, strict=True):
        assert np.array_equal(np.asarray(row, np.float32), vector_of(text, 1536))
    answer = cli("embed", "-c", "one", "--json").json
    assert answer["model"] == "openai:text-embedding-3-small"
    assert np.array_equal(np.asarray(answer["vectors"][0], np.float32), vector_of("one", 1536))
    plan = cli("embed", "-c", "one", "-c", "new", "-c", "new", "--dry-run", "--json").json["plan"]
    assert (plan["cached"], plan["to_embed"], plan["duplicates"]) == (1, 1, 1)
    before = server.meter.requests
    assert cli("embed", "-c", "one", "--dry-run").code == 0
    assert server.meter.requests == before


def test_literal_texts_into_a_file(cli, read_output):
    assert cli("embed", "-c", "one", "-c", "two", "-o", "o.jsonl", *OFFLINE).code == 0
    assert [row["text"] for row in read_output(Path("o.jsonl"))] == ["one", "two"]


def test_failed_literal_text_is_null_and_exit_1(cli):
    run = cli("embed", "-c", "one", "-c", "", "--on-error", "keep", *OFFLINE)
    assert run.code == 1
    assert json.loads(run.out.splitlines()[1]) is None
    assert "empty" in run.err


def test_another_model_is_refused_and_overwrite_replaces(cli, texts_file):
    texts_file(3)
    assert cli("embed", "texts.jsonl", "-o", "out.npy", "-m", "hashing:8").code == 0
    run = cli("embed", "texts.jsonl", "-o", "out.npy", "-m", "hashing:16")
    assert run.code == 2
    assert "hashing:8" in run.err
    assert "hashing:16" in run.err
    replaced = cli("embed", "texts.jsonl", "-o", "out.npy", "-m", "hashing:16", "--overwrite")
    assert replaced.code == 0


def test_quiet_says_nothing_but_the_result(cli, texts_file):
    texts_file(3)
    embed = ("embed", "texts.jsonl", "-o", "out.npy", *OFFLINE)
    assert astuple(cli(*embed, "--quiet")) == (0, "", "")
    assert cli(*embed, "-q", "--dry-run").out.startswith("model ")
    assert cli(*embed, "-q", "--json").json["rows"] == 3
    assert cli("embed", "-c", "a", "-q", *OFFLINE).out.startswith("[")
    assert "similar" in cli(*embed).err
    with Path("texts.jsonl").open("a") as file:
        file.write('{"text": ""}\n')
    kept = cli(*embed, "-q", "--on-error", "keep")
    assert (kept.code, kept.err) == (1, "")
    assert "1 row, listed in " in kept.out


@pytest.mark.fault(149)
@pytest.mark.parametrize(
    "name", ["a b?#.jsonl", "-rf.jsonl", "ä\u202e\x1b[31m.jsonl", "it's.jsonl"]
)
def test_hostile_file_names(cli, texts_file, name):
    texts_file(2, name)
    run = cli("embed", *OFFLINE, "-o", f"out-{name}", "--", name)
    assert run.code == 0, run.err
    assert Path(f"out-{name}").exists()
    assert "\x1b" not in run.out + run.err
    assert "\u202e" not in run.out + run.err


@pytest.mark.fault(149)
@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf8(shell):
    name = os.fsdecode(b"caf\xe9.txt")
    Path(name).write_text("a\nb\n")
    run = shell("embed", name, "-o", os.fsdecode(b"\xff.npy"), *OFFLINE)
    assert run.code == 0, run.err
    assert Path(os.fsdecode(b"\xff.npy")).exists()
    assert "$'\\377.npy'" in run.err


def test_unknown_columns_name_the_nearest(cli, texts_file):
    texts_file(2)
    run = cli("embed", "texts.jsonl", "-o", "o.npy", "--text", "txt", *OFFLINE)
    assert run.code == 2
    assert "texts.jsonl:1" in run.err
    assert "'text'" in run.err


@pytest.mark.case("F1")
@pytest.mark.parametrize("ending", ["jsonl", "npy", "parquet"])
def test_without_a_row_the_output_is_unchanged(cli, server, texts_file, ending):
    output = f"out.{ending}"
    assert cli("embed", str(texts_file(50)), "-o", output).code == 0
    before = {path.name: path.read_bytes() for path in Path().glob(f"{output}*")}
    bill = server.meter.snapshot()
    Path("none.csv").write_text("id,text\n")
    for arguments in (["none.csv"], ["none.csv", "--overwrite"], ["-", "--format", "csv"]):
        ran = cli("embed", *arguments, "-o", output, stdin=b"id,text\n")
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"{output} unchanged\n")
        assert "none in the input" in ran.out
        ran = cli("embed", *arguments, "-o", output, "--json", stdin=b"text\n")
        assert (ran.code, ran.json["unchanged"], ran.json["rows"]) == (0, True, 0)
        ran = cli("embed", *arguments, "-o", output, "--dry-run", stdin=b"text\n")
        assert (ran.code, "nothing: there are no rows" in ran.out) == (0, True)
    for more in ([], ["--format", "jsonl"], ["--on-error", "keep"], ["--dry-run"]):
        ran = cli("embed", "-", *more, "-o", output, stdin=b"")
        assert ran.code == 2
        assert "standard input: it ended without a single byte" in ran.err
    assert {path.name: path.read_bytes() for path in Path().glob(f"{output}*")} == before
    assert server.meter.snapshot() == bill


def test_empty_text_says_which_option_keeps_the_rest(cli):
    Path("t.txt").write_text("a\n\nb\n")
    run = cli("embed", "t.txt", "-o", "o.npy", *OFFLINE)
    assert run.code == 2
    assert "t.txt:2" in run.err
    assert "--on-error keep" in run.err


@pytest.mark.case("H8")
def test_a_closed_standard_input_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from embedcore.cli import main

    monkeypatch.setattr("sys.stdin", None)
    assert main(["embed", "-", "-m", "hashing:8", "-o", str(tmp_path / "o.npy")]) == 2
    assert "standard input is closed" in capsys.readouterr().err


def test_a_network_that_is_away_is_said_once_where_rows_are_kept(cli, texts_file, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nothing-listens-there")
    Path("embedcore.toml").write_text("[retry]\nattempts = 1\n")
    command = ["embed", str(texts_file(5)), "-o", "out.npy", "--on-error", "keep"]
    run = cli(*command)
    assert run.code == 4
    assert cli("embed", "-c", "a", "--on-error", "keep").code == 4
    assert (run.out + run.err).count("cannot be reached") == 1
    assert "Ask it" not in run.out + run.err
    assert "cannot be reached" in cli(*command, "--json").json["reason"]
    with Path("texts.jsonl").open("a") as file:
        file.write('{"text": ""}\n')
    mixed = cli(*command, "--json")
    assert (mixed.code, mixed.json["failed"], mixed.json["retryable"]) == (4, 6, 5)
    shown = cli(*command).out
    assert "run the same again for 5 rows" in shown
    assert shown.count("cannot be reached") == 1
    listed = [json.loads(line) for line in Path("out.npy.failed.jsonl").read_text().splitlines()]
    assert not [one for one in listed if one["reason"].startswith("row")]


@pytest.mark.case("A3")
def test_a_row_that_the_server_cannot_embed_is_no_reason_to_try_again(cli, server, texts_file):
    texts_file(64)
    server.faults.when(marker="text number 7", mode="status", status=500)
    keep = cli("embed", "texts.jsonl", "-o", "o.npy", "--on-error", "keep", "--json")
    assert keep.code == 1
    assert (keep.json["failed"], keep.json["retryable"], keep.json["embedded"]) == (1, 0, 63)
