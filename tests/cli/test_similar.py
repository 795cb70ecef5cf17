"""Does ``embedcore similar`` find the right rows, with the right model, and show them safely?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

OFFLINE = ("-m", "hashing:256")


@pytest.fixture
def colours(cli):
    rows = ["the sky is blue", "grass is green", "roses are red", "snow is white"]
    Path("c.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert cli("embed", "c.jsonl", "-o", "c.npy", *OFFLINE).code == 0
    return "c.npy"


def test_the_nearest_come_first_with_their_text(cli, colours):
    run = cli("similar", "-c", "which roses are red", "-i", colours, "-k", "2")
    assert run.code == 0
    first, text = run.out.splitlines()[:2]
    assert first.startswith(" 1. 0.")
    assert text.strip() == "roses are red"
    answer = cli("similar", "-c", "green grass", "-c", "white snow", "-i", colours, "--json").json
    found = [one["hits"][0]["text"] for one in answer["questions"]]
    assert found == ["grass is green", "snow is white"]
    scores = [hit["score"] for hit in answer["questions"][0]["hits"]]
    assert scores == sorted(scores, reverse=True)


def test_the_model_of_the_file_is_the_default(cli, colours):
    assert cli("similar", "-c", "red", "-i", colours, "--json").json["model"] == "hashing:256"


def test_another_model_is_refused(cli, colours, server):
    for model in ("hashing:512", "openai:text-embedding-3-small"):
        run = cli("similar", "-c", "red", "-i", colours, "-m", model)
        assert run.code == 2
        assert "hashing:256" in run.err
        assert model in run.err
    assert server.meter.requests == 0


def test_a_profile_with_the_options_of_the_file_is_found(cli, server):
    Path("embedcore.toml").write_text(
        '[profiles.small]\nmodel = "openai:text-embedding-3-small"\n'
        "[profiles.small.options]\ndimensions = 64\n"
    )
    assert cli("embed", "-c", "one", "-c", "two", "-o", "o.npy", "-m", "small").code == 0
    run = cli("similar", "-c", "one", "-i", "o.npy", "--json")
    assert run.code == 0, run.err
    assert run.json["questions"][0]["hits"][0]["text"] == "one"


def test_same_name_and_other_options_are_refused(cli, server, monkeypatch):
    assert cli("embed", "-c", "one", "-o", "o.npy").code == 0
    Path("embedcore.toml").write_text("[options.openai]\ndimensions = 64\n")
    requests = server.meter.requests
    run = cli("similar", "-c", "one", "-i", "o.npy")
    assert run.code == 2
    assert run.err.count("fingerprint") == 2
    assert server.meter.requests == requests


def test_the_question_is_embedded_as_a_query(cli, server, monkeypatch):
    """Queries have a share of the budget that bulk work leaves to them."""
    assert cli("embed", "-c", "one", "-o", "o.npy").code == 0
    spent = server.meter.billed_tokens
    Path("embedcore.toml").write_text(
        f"[budget]\ndaily_token_limit = {spent + 20}\nquery_share = 1.0\n"
    )
    assert cli("embed", "-c", "two", "--yes").code == 3
    assert cli("similar", "-c", "two", "-i", "o.npy").code == 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.npy", None, "no such file"),
        ("text.jsonl", '{"text": "x"}\n', "cannot be read as vectors"),
        ("text.npy", "hello", "not beside it"),
        ("text.pdf", "hello", "must end in"),
    ],
)
def test_what_is_not_an_output_is_exit_2(cli, name, content, said):
    if content is not None:
        Path(name).write_text(content)
    run = cli("similar", "-c", "x", "-i", name)
    assert run.code == 2
    assert said in run.err
    for advice in ("the model is the one", "hoose another name"):
        assert advice not in run.err, "it is read here, not written, and names no model"


@pytest.mark.fault(140)
@pytest.mark.case("F7")
@pytest.mark.parametrize("ending", ["jsonl", "npy", "parquet"])
def test_without_rows_it_says_so_before_it_pays(cli, server, ending):
    Path("in.jsonl").write_text('{"text": ""}\n')
    output = f"v.{ending}"
    assert cli("embed", "in.jsonl", "-o", output, "--on-error", "keep").code == 1
    ran = cli("similar", "-c", "a question", "-i", output)
    assert (ran.code, ran.out) == (0, "the file has no rows\n")
    assert server.meter.requests == 0


@pytest.mark.case("F2")
def test_a_model_that_nobody_has_is_said_to_be_the_one_of_the_file(cli, colours):
    rows = Path("c.npy.rows.jsonl")
    rows.write_text(rows.read_text().replace("hashing:", "hashinj:"))
    ran = cli("similar", "-c", "a question", "-i", colours)
    assert ran.code == 2
    assert "'hashinj' is not installed" in ran.err
    assert "the model is the one that c.npy names" in ran.err


@pytest.mark.case("F2")
def test_damaged_rows_are_left_out_and_counted(cli, server, texts_file):
    cli("embed", str(texts_file(3)), "-o", "v.jsonl")
    lines = Path("v.jsonl").read_text().splitlines(keepends=True)
    Path("v.jsonl").write_text("".join([lines[0], lines[1].replace("row-1", "row-7"), lines[2]]))
    ran = cli("similar", "-c", "text number 1", "-i", "v.jsonl", "--json")
    assert ran.code == 0
    assert "warning: 1 row of v.jsonl damaged and left out" in ran.err
    assert ran.json["damaged"] == 1
    assert {hit["id"] for hit in ran.json["questions"][0]["hits"]} == {"row-0", "row-2"}
    before = server.meter.billed_texts
    ran = cli("embed", str(texts_file(3)), "-o", "v.jsonl", "--json")
    assert (ran.code, ran.json["damaged"], ran.json["plan"]["damaged"]) == (0, 1, 1)
    assert ran.json["output"] == str(Path("v.jsonl").resolve())
    assert server.meter.billed_texts - before == {}
    assert "damaged" not in cli("embed", str(texts_file(3)), "-o", "v.jsonl").out


def test_what_a_text_would_do_to_a_terminal_is_left_out(cli):
    rows = [{"id": "\x1b[2Jid", "text": "\x1b]0;owned\x07blue \x1b[8msky\x9b31m \u202e!"}]
    Path("h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli("embed", "h.jsonl", "-o", "h.npy", *OFFLINE).code == 0
    run = cli("similar", "-c", "sky", "-i", "h.npy")
    assert run.code == 0
    assert run.out.splitlines()[0].endswith("  id")
    assert run.out.splitlines()[1] == "    blue sky !"
    raw = cli("similar", "-c", "sky", "-i", "h.npy", "--json")
    assert "\x1b" not in raw.out
    assert raw.json["questions"][0]["hits"][0]["text"] == rows[0]["text"], "a machine gets it all"


def test_an_output_without_texts(cli):
    assert cli("embed", "-c", "one", "-o", "o.npy", "--no-text", *OFFLINE).code == 0
    assert cli("similar", "-c", "one", "-i", "o.npy").out.split() == ["1.", "1.0000", "0"]


def test_a_long_text_is_cut(cli):
    assert cli("embed", "-c", "word " * 500, "-o", "o.npy", *OFFLINE).code == 0
    shown = cli("similar", "-c", "word", "-i", "o.npy").out
    assert len(shown.splitlines()) <= 4
    assert shown.rstrip().endswith("…")


def test_a_file_that_is_no_output_names_no_model(cli):
    Path("t.txt").write_text("one\n")
    run = cli("similar", "-c", "one", "-i", "t.txt")
    assert run.code == 2
    assert "the model is the one" not in run.err


def test_a_question_that_cannot_be_asked_is_called_one(cli, server, texts_file, monkeypatch):
    assert cli("embed", str(texts_file(3)), "-o", "o.npy").code == 0
    paid = server.meter.requests
    monkeypatch.setenv("EMBEDCORE_ON_EMPTY", "keep")
    empty = cli("similar", "-c", "", "-i", "o.npy")
    assert (empty.code, empty.out) == (2, "")
    assert empty.err == "Error: the question is empty: no row is near to it. Nothing was sent\n"
    assert "question 2 is empty" in cli("similar", "-c", "a", "-c", "", "-i", "o.npy").err
    assert server.meter.requests == paid
    server.faults.when(marker="BAD", mode="bad_text")
    refused = cli("similar", "-c", "a", "-c", "BAD", "-i", "o.npy")
    assert refused.err.startswith("Error: question 2: ")
    assert "row" not in refused.err
