"""An option that decides no vector any more costs nobody what was paid for while it did."""

from __future__ import annotations

import shutil

import pytest

from embedcore import EmbeddingClient, assembly
from embedcore.cli import main
from embedcore.errors import ConfigurationError
from embedcore.files.formats import output_format
from embedcore.files.run import embed_files
from embedcore.files.search import search
from embedcore.provider.options import former_fingerprints
from embedcore.testing import FakeOpenAI, vectors_of
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

TEXTS = [f"text {number}" for number in range(5)]
OTHERS = [f"another {number}" for number in range(3)]


@pytest.fixture
def server():
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as fake:
        yield fake


@pytest.fixture
def client_of(server, tmp_path):
    """``client_of()``: a client of now; ``client_of(old=True)``: one of the version before."""

    def client_of(*, old=False, **options):
        given = {"base_url": server.base_url, "api_key": server.api_key, "batch": True}
        given |= {"reply_models": ["*"], **options}
        with pytest.MonkeyPatch.context() as patch:
            if old:
                patch.setattr(
                    assembly, "options_fingerprint", lambda *args: former_fingerprints(*args)[0]
                )
                patch.setattr(assembly, "former_fingerprints", lambda *args: ())
            client = EmbeddingClient(
                "text-embedding-3-small", options=given, config={"home": tmp_path / "state"}
            )
            assert client.fingerprint
            return client

    return client_of


def same(vectors, texts):
    return (vectors == vectors_of(texts, 1536)).all()


@pytest.mark.case("E5")
def test_reply_models_are_no_part_of_the_name_any_more(client_of):
    with client_of() as one, client_of(reply_models=["a"]) as other, client_of(old=True) as old:
        assert one.fingerprint == other.fingerprint != old.fingerprint
        assert one.made_before(old.fingerprint)
        assert not other.made_before(old.fingerprint)
    with client_of(reply_models=[]) as plain:
        assert plain.fingerprint == one.fingerprint
        assert not plain.made_before(old.fingerprint)


@pytest.mark.case("E5")
def test_vectors_that_were_billed_under_the_old_name_are_not_billed_again(server, client_of):
    with client_of(old=True) as old:
        old.embed(TEXTS)
    billed = server.meter.billed_tokens
    with client_of() as client:
        plan = client.plan([*TEXTS, *OTHERS])
        assert (plan.cached, plan.to_embed) == (5, 3)
        assert client.plan(TEXTS, batch=True).cached == 5
        result = client.embed([*TEXTS, *OTHERS])
        assert result.reused.tolist() == [True] * 5 + [False] * 3
        assert same(result.vectors, [*TEXTS, *OTHERS])
        job = client.submit_batch(TEXTS)
        assert job.status().state == "done"
        assert same(job.result().vectors, TEXTS)
    assert server.meter.billed_texts.total() == 8
    assert server.meter.billed_tokens > billed
    assert server.batches.jobs == []


@pytest.mark.case("E5")
@pytest.mark.parametrize("ending", ["jsonl", "npy", "parquet"])
def test_an_output_that_was_made_under_the_old_name_is_gone_on_with(
    server, client_of, tmp_path, ending
):
    output = tmp_path / f"v.{ending}"
    with client_of(old=True, dimensions=8) as old:
        embed_files(old, [iter(TEXTS)], output)
    shutil.rmtree(tmp_path / "state")
    with client_of(dimensions=8) as client:
        assert search(client, TEXTS[:1], output)[0][0].text == TEXTS[0]
        report = embed_files(client, [iter([*TEXTS, *OTHERS])], output)
        assert (report.reused, report.embedded) == (5, 3)
        assert output_format(output).origin(output).fingerprint == client.fingerprint
    with client_of(dimensions=9) as other, pytest.raises(ConfigurationError, match="must not mix"):
        embed_files(other, [iter(TEXTS)], output)
    assert server.meter.billed_texts.total() == 9


@pytest.mark.case("E5")
def test_a_batch_that_was_submitted_under_the_old_name_goes_on(server, client_of):
    with client_of(old=True) as old:
        name = old.submit_batch(TEXTS).id
    with client_of() as client:
        assert [job.id for job in client.batch_jobs()] == [name]
        server.batches.finish(server.batches.jobs[0].id)
        assert client.resume_batches() == []
        job = client.batch_job(name)
        assert job.status().state == "done"
        assert same(job.result().vectors, TEXTS)
        assert client.embed(TEXTS).reused.all()
    assert len(server.batches.jobs) == 1
    assert server.batches.meter.billed_texts.total() == 5
    assert server.meter.billed_tokens == 0


@pytest.mark.case("E5")
def test_so_it_does_at_the_command_line(server, client_of, tmp_path, monkeypatch, capsys):
    with client_of(old=True) as old:
        name = old.submit_batch(TEXTS).id
    server.batches.finish(server.batches.jobs[0].id)
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f'[options.openai]\nbase_url = "{server.base_url}"\nbatch = true\nreply_models = ["*"]\n'
    )
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(settings))
    monkeypatch.setenv("EMBEDCORE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OPENAI_API_KEY", str(server.api_key))
    assert main(["batch", "status", name]) == 0, capsys.readouterr().err
    assert main(["batch", "fetch", name, "-o", str(tmp_path / "v.npy")]) == 0
    assert len(server.batches.jobs) == 1
