"""Are the vectors of a batch written as ``embed`` would, and is what is missing named?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcore import EmbeddingClient
from embedcore.files.formats import output_format
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

OFFERED = "[options.openai]\nbatch = true\n"
FORMATS = ["parquet", "jsonl", "npy"]


@pytest.fixture
def server(monkeypatch):
    """An OpenAI whose batches are complete when they are first looked at."""
    with FakeOpenAI(batch=BatchSettings(progress=Progress(polls=1))) as fake:
        monkeypatch.setenv("OPENAI_BASE_URL", fake.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", str(fake.api_key))
        Path("embedcore.toml").write_text(OFFERED)
        yield fake


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """A batch of more than one block, without thousands of rows."""
    monkeypatch.setattr("embedcore.cli.batch.fetch._BLOCK_ROWS", 3)


@pytest.fixture
def corpus():
    """Rows with columns of each kind, a duplicate, and one text that is cut to fit the model."""
    rows = [
        {"id": "a", "text": "the first", "page": 1, "tags": ["x"]},
        {"id": "b", "text": "the second", "page": 2, "tags": None},
        {"id": "c", "text": "the first", "page": 3, "tags": {"y": 1}},
        {"id": "d", "text": "a" + " a" * 9_000, "page": None, "tags": "=1+1"},
    ]
    path = Path("corpus.jsonl")
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def submit(cli, *files, more=()):
    run = cli("batch", "submit", *map(str, files), "--json", "--yes", *more)
    assert run.code == 0, run.err
    return run.json["id"]


def content(path):
    """Everything that an output says, whatever its format."""
    found = output_format(path)
    rows = []
    for block in found.blocks(path):
        assert block.sound.all()
        for place in range(len(block.cuts)):
            stored = block.row(place)
            rows.append(
                (
                    stored.id,
                    stored.text,
                    dict(stored.kept),
                    block.digests[place : place + 1].tobytes(),
                    int(block.cuts[place]),
                    block.vectors[place].tobytes(),
                )
            )
    return found.origin(path), rows


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("more", [[], ["--no-text"]], ids=["text", "no text"])
def test_the_output_is_that_of_embed(cli, server, corpus, kind, more, monkeypatch, tmp_path):
    kept = ["--keep", "page", "--keep", "tags", "--input-type", "document"]
    name = submit(cli, corpus, more=kept)
    run = cli("batch", "fetch", name, "-o", f"batch.{kind}", *more)
    assert run.code == 0, run.err
    monkeypatch.setenv("EMBEDCORE_HOME", str(tmp_path / "other"))
    at_once = cli("embed", str(corpus), "-o", f"embed.{kind}", *kept, *more)
    assert at_once.code == 0, at_once.err
    assert content(Path(f"batch.{kind}")) == content(Path(f"embed.{kind}"))
    assert not Path(f"batch.{kind}.failed.jsonl").exists()
    assert not Path(f"batch.{kind}.lock").exists()


def test_embed_goes_on_with_what_was_fetched(cli, server, texts_file):
    name = submit(cli, texts_file(20))
    assert cli("batch", "fetch", name, "-o", "v.parquet").code == 0
    more = cli("embed", str(texts_file(25)), "-o", "v.parquet", "--json")
    assert more.code == 0, more.err
    assert (more.json["reused"], more.json["embedded"]) == (20, 5)


def test_several_files_and_csv(cli, server, read_output):
    Path("a.csv").write_text('key,body\n1,"one, and more"\n2,two\n')
    Path("b.csv").write_text("key,body\n3,three\n")
    name = submit(cli, "a.csv", "b.csv", more=["--id", "key", "--text", "body"])
    assert cli("batch", "fetch", name, "-o", "v.jsonl").code == 0
    rows = read_output(Path("v.jsonl"))
    assert [(row["id"], row["text"]) for row in rows] == [
        ("1", "one, and more"),
        ("2", "two"),
        ("3", "three"),
    ]


def test_a_batch_of_a_program_has_its_keys(cli, server, read_output):
    with EmbeddingClient() as client:
        job = client.submit_batch([("x", "one"), (7, "two"), (["y", 1], "three")])
    run = cli("batch", "fetch", job.id, "-o", "v.jsonl")
    assert run.code == 0, run.err
    assert "was not remembered" in run.err
    assert [row["id"] for row in read_output(Path("v.jsonl"))] == ["x", "7", '["y", 1]']


# Sources that are not as they were


def changed_text(path):
    path.write_text(path.read_text().replace("number 3", "number three"))


def changed_id(path):
    path.write_text(path.read_text().replace("row-3", "row-three"))


def shorter(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def not_json(path):
    path.write_text("{\n")


@pytest.mark.parametrize("change", [changed_text, changed_id, shorter, not_json, Path.unlink])
def test_a_source_that_is_not_as_it_was_is_not_mixed_in(
    cli, server, texts_file, read_output, change
):
    path = texts_file(10)
    name = submit(cli, path)
    change(path)
    run = cli("batch", "fetch", name, "-o", "v.jsonl")
    assert run.code == 0, run.err
    assert "ids and vectors only" in run.err
    rows = read_output(Path("v.jsonl"))
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(10)]
    assert all("text" not in row for row in rows)
    assert len({row["text_sha256"] for row in rows}) == 10, "they are known nevertheless"


def test_a_source_that_was_moved(cli, server, texts_file, read_output):
    path = texts_file(10)
    name = submit(cli, path)
    path.rename("elsewhere.jsonl")
    assert "--source" in cli("batch", "fetch", name, "-o", "v.jsonl").err
    assert cli("batch", "fetch", name, "-o", "v.jsonl", "--source", "elsewhere.jsonl").code == 0
    assert [row["text"] for row in read_output(Path("v.jsonl"))] == [
        f"text number {n}" for n in range(10)
    ]


def test_from_another_folder(cli, server, texts_file, read_output, monkeypatch, tmp_path):
    name = submit(cli, texts_file(10))
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(Path("embedcore.toml").absolute()))
    monkeypatch.chdir(tmp_path)
    assert cli("batch", "fetch", name, "-o", "v.jsonl").code == 0
    assert len(read_output(Path("v.jsonl"))) == 10


def test_a_damaged_note_costs_only_the_columns(cli, server, texts_file, state_home):
    name = submit(cli, texts_file(10))
    for damage in ("", "[]", "{}", '{"files": 1}', "\udcff"):
        note = state_home / "batches" / f"{name}.json"
        note.write_bytes(damage.encode("utf-8", "surrogatepass"))
        run = cli("batch", "fetch", name, "-o", "v.jsonl")
        assert run.code == 0, run.err
        assert "cannot be used" in run.err
    (state_home / "batches" / f"{name}.digests").write_bytes(b"x")
    assert cli("batch", "fetch", name, "-o", "v.npy").code == 0
    assert np.load("v.npy").shape == (10, 1536)


# What is missing


@pytest.mark.parametrize("kind", FORMATS)
def test_failed_rows_are_left_out_and_listed(cli, server, texts_file, read_output, kind):
    server.batches.fail_lines("number 7", code="content_filter", message="not this one")
    server.batches.fail_lines("number 3", code="content_filter", message="nor this one")
    name = submit(cli, texts_file(10))
    out = Path(f"v.{kind}")
    run = cli("batch", "fetch", name, "-o", str(out), "--json")
    assert run.code == 1, run.err
    assert (run.json["written"], run.json["failed_rows"], run.json["pending_rows"]) == (8, 2, 0)
    listed = read_output(Path(f"v.{kind}.failed.jsonl"))
    assert [(one["id"], one["position"]) for one in listed] == [("row-3", 3), ("row-7", 7)]
    assert "nor this one" in listed[0]["reason"]
    assert listed[1]["where"].endswith("texts.jsonl:8")
    assert [row[0] for row in content(out)[1]] == [f"row-{n}" for n in range(10) if n not in (3, 7)]
    shown = cli("batch", "fetch", name, "-o", str(out))
    assert "1 × " in shown.out
    assert "not this one" in shown.out


def test_a_list_of_failed_rows_goes_when_none_fails(cli, server, texts_file):
    fields = ("id", "position", "where", "text_sha256", "reason")
    Path("v.npy.failed.jsonl").write_text(json.dumps(dict.fromkeys(fields)) + "\n")
    assert cli("batch", "fetch", submit(cli, texts_file(3)), "-o", "v.npy").code == 0
    assert not Path("v.npy.failed.jsonl").exists()


@pytest.mark.case("D4")
@pytest.mark.parametrize("name", ["v.npy.lock", "v.npy.failed.jsonl", "v.npy.rows.jsonl"])
def test_what_is_not_ours_beside_an_output_is_found_before_anything_is_billed(
    cli, server, texts_file, name
):
    """A batch whose deadline is near buys what is missing when it is looked after."""
    batch = submit(cli, texts_file(3))
    before = len(server.requests)
    Path("precious").write_text("{}\n")
    if name.endswith(".lock"):
        Path(name).symlink_to("precious")
    else:
        Path(name).write_text("{}\n")
    run = cli("batch", "fetch", batch, "-o", "v.npy")
    assert run.code == 2, run.err
    assert name in run.err
    assert len(server.requests) == before
    assert Path("precious").read_text() == Path(name).read_text() == "{}\n"
    assert not Path("v.npy").exists()


def test_empty_texts_are_listed(cli, server, read_output):
    Path("t.txt").write_text("one\n\nthree\n")
    name = submit(cli, "t.txt", more=["--on-error", "keep"])
    run = cli("batch", "fetch", name, "-o", "v.jsonl")
    assert run.code == 1, run.err
    assert [row["id"] for row in read_output(Path("v.jsonl"))] == ["0", "2"]
    (listed,) = read_output(Path("v.jsonl.failed.jsonl"))
    assert listed["position"] == 1
    assert "empty" in listed["reason"]


def test_what_is_not_cached_goes_once_every_row_is_written(
    cli, server, texts_file, name_settings, state_home
):
    name_settings(f"cache_cap = 0\n{OFFERED}")
    server.batches.settings.progress = Progress()
    name = submit(cli, texts_file(7))
    assert cli("batch", "fetch", name, "-o", "v.npy", "--partial").code == 4
    server.batches.settings.progress = Progress(polls=1)
    run = cli("batch", "fetch", name, "-o", "v.npy")
    assert run.code == 0, run.err
    assert (
        "  not cached  7 vectors, only in this output (cache_cap, cache off, or free)\n" in run.out
    )
    assert list((state_home / "vectors").glob("*.seg")) == []
    _, rows = content(Path("v.npy"))
    assert len(rows) == 7
    run = cli("batch", "fetch", name, "-o", "w.jsonl", "--json")
    assert (run.code, run.json["only_in_output"], run.json["failed_rows"]) == (1, 0, 7)
    assert "written to an output before" in next(iter(run.json["reasons"]))


def test_where_a_row_failed_the_others_are_not_billed_again(cli, server, name_settings):
    name_settings(f"cache_cap = 0\n{OFFERED}")
    Path("t.txt").write_text("one\n\nthree\n")
    name = submit(cli, "t.txt", more=["--on-error", "keep"])
    assert cli("batch", "fetch", name, "-o", "v.jsonl", "--json").json["only_in_output"] == 0
    billed = server.meter.billed_tokens
    submit(cli, "t.txt", more=["--on-error", "keep"])
    assert server.meter.billed_tokens == billed


@pytest.mark.case("F1")
@pytest.mark.parametrize("kind", ["jsonl", "npy", "parquet"])
def test_without_a_vector_an_output_stays_as_it_is(cli, server, texts_file, kind):
    output = Path(f"v.{kind}")
    assert cli("batch", "fetch", submit(cli, texts_file(3)), "-o", str(output)).code == 0
    before = content(output)
    server.batches.settings.progress = Progress()
    name = submit(cli, texts_file(3, start=50))
    run = cli("batch", "fetch", name, "-o", str(output), "--partial")
    assert run.code == 4, run.err
    assert f"{output} unchanged\n" in run.out
    run = cli("batch", "fetch", name, "-o", str(output), "--partial", "--json")
    assert (run.json["unchanged"], run.json["written"], run.json["pending_rows"]) == (True, 0, 3)
    assert content(output) == before
    assert len(Path(f"{output}.failed.jsonl").read_text().splitlines()) == 3


def test_partial_writes_what_is_there(cli, server, texts_file, read_output, name_settings):
    name_settings(f"{OFFERED}[batch]\npart_texts = 5\n")
    server.batches.settings.progress = Progress()
    name = submit(cli, texts_file(10))
    server.batches.finish(server.batches.jobs[0].id)
    refused = cli("batch", "fetch", name, "-o", "v.npy")
    assert refused.code == 4
    assert "5 of 10 texts" in refused.err
    assert not Path("v.npy").exists()
    run = cli("batch", "fetch", name, "-o", "v.npy", "--partial", "--json")
    assert run.code == 4, run.err
    assert (run.json["written"], run.json["pending_rows"], run.json["failed_rows"]) == (5, 5, 0)
    assert np.load("v.npy").shape == (5, 1536)
    assert len(read_output(Path("v.npy.failed.jsonl"))) == 5
    server.batches.finish(server.batches.jobs[1].id)
    assert cli("batch", "fetch", name, "-o", "v.npy").code == 0
    assert np.load("v.npy").shape == (10, 1536)
    assert not Path("v.npy.failed.jsonl").exists()


def test_vectors_that_were_pruned_are_named(cli, server, texts_file, read_output, state_home):
    name = submit(cli, texts_file(3))
    assert cli("batch", "status", name).code == 0
    shutil.rmtree(state_home / "vectors")
    run = cli("batch", "fetch", name, "-o", "v.jsonl")
    assert run.code == 1, run.err
    assert "submit it again" in read_output(Path("v.jsonl.failed.jsonl"))[0]["reason"]


# The output


def test_an_output_of_another_model_is_kept(cli, server, texts_file):
    other = submit(cli, texts_file(3), more=["-m", "text-embedding-3-large"])
    mine = submit(cli, "texts.jsonl")
    assert cli("batch", "fetch", other, "-o", "v.npy").code == 0
    before = Path("v.npy").read_bytes()
    run = cli("batch", "fetch", mine, "-o", "v.npy")
    assert run.code == 2
    assert "must not mix" in run.err
    assert Path("v.npy").read_bytes() == before
    assert cli("batch", "fetch", mine, "-o", "v.npy", "--overwrite").code == 0
    assert np.load("v.npy").shape == (3, 1536)


def test_a_file_that_is_not_ours_is_kept(cli, server, texts_file):
    Path("v.npy").write_text("precious")
    run = cli("batch", "fetch", submit(cli, texts_file(3)), "-o", "v.npy")
    assert run.code == 2
    assert Path("v.npy").read_text() == "precious"


@pytest.mark.parametrize("change", [None, changed_text, not_json])
def test_the_source_is_not_overwritten(cli, server, texts_file, change):
    path = texts_file(5)
    name = submit(cli, path)
    if change is not None:
        change(path)
    before = path.read_bytes()
    run = cli("batch", "fetch", name, "-o", str(path), "--overwrite")
    assert run.code == 2
    assert "would be overwritten" in run.err
    assert path.read_bytes() == before


@pytest.mark.parametrize("output", ["v.txt", "nowhere/v.npy", "."])
def test_an_output_that_cannot_be_is_refused_before_anything(cli, server, output):
    run = cli("batch", "fetch", "20200101-00000000", "-o", output)
    assert run.code == 2


def test_a_write_that_fails_leaves_what_there_was(cli, server, texts_file, monkeypatch):
    name = submit(cli, texts_file(3))
    assert cli("batch", "fetch", name, "-o", "v.npy").code == 0
    before = Path("v.npy").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    run = cli("batch", "fetch", name, "-o", "v.npy", "--no-text")
    assert run.code == 5, run.err
    assert Path("v.npy").read_bytes() == before
    assert not list(Path().glob("*.partial"))


# Read again


def ended_without(server, cli, path, name_settings):
    """A batch whose results were not to be had; its id."""
    name_settings(f"{OFFERED}[batch]\noutput_wait = 0\n")
    server.batches.settings.quirks.late = "missing"
    server.batches.settings.quirks.late_looks = None
    name = submit(cli, path)
    assert cli("batch", "status", name).code == 1
    return name


@pytest.mark.case("E3")
@pytest.mark.parametrize("again", [[], ["--again"]])
def test_fetch_reads_results_that_were_not_to_be_had(
    cli, server, texts_file, read_output, name_settings, again
):
    name = ended_without(server, cli, texts_file(5), name_settings)
    run = cli("batch", "fetch", name, "-o", "v.jsonl", *again)
    assert run.code == 1
    assert "cannot be read again" in run.err
    assert "output_gone" in Path("v.jsonl.failed.jsonl").read_text()
    server.batches.settings.quirks.late = None
    run = cli("batch", "fetch", name, "-o", "v.jsonl", *again)
    assert run.code == 0, run.err
    assert "5 texts found in the results" in run.err
    assert len(read_output(Path("v.jsonl"))) == 5
    assert cli("batch", "status", name).code == 0
    assert len(server.batches.jobs) == 1


@pytest.mark.case("E5")
def test_fetch_again_believes_what_the_settings_believe_now(
    cli, server, texts_file, read_output, monkeypatch
):
    server.batches.settings.quirks.reply_model = "the-same-model-2026"
    name = submit(cli, texts_file(5))
    first = cli("batch", "fetch", name, "-o", "v.jsonl")
    assert first.code == 1
    assert "reply_models" in Path("v.jsonl.failed.jsonl").read_text()
    assert "fetch --again" in Path("v.jsonl.failed.jsonl").read_text()
    nothing = cli("batch", "fetch", name, "-o", "v.jsonl", "--again")
    assert nothing.code == 1
    assert "nothing more was found" in nothing.err

    names = '[options.openai]\nbatch = true\nreply_models = ["the-same-model-2026"]\n'
    Path("user.toml").write_text(names)
    Path("embedcore.toml").unlink()
    monkeypatch.setenv("EMBEDCORE_CONFIG", "user.toml")
    assert cli("batch", "status", name).code == 1, "only when it is asked for"
    run = cli("batch", "fetch", name, "-o", "v.jsonl", "--again")
    assert run.code == 0, run.err
    assert len(read_output(Path("v.jsonl"))) == 5
    again = cli("batch", "submit", "texts.jsonl", "--yes", "--json")
    assert again.json["reused"] == 5
    assert len(server.batches.jobs) == 1
