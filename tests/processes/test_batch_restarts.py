"""One crash, one lost answer, one long absence at a time: does the next process just go on?"""

from __future__ import annotations

import os

import pytest

from embedcore import EmbeddingClient
from embedcore.errors import AuthenticationFailed
from embedcore.testing import FakeOpenAI, vectors_of
from embedcore.testing.openai.batch_settings import BatchSettings, Progress

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

ALL = ("text", 0, 60, 0)
NOBODY = ("", 0, 0, 0)
DAYS = 3 * 86_400
CREATE = "embedcore_openai.batch:OpenAIBatch.create"
CONTENT = "/v1/files/{id}/content"


@pytest.mark.fault(59)
@pytest.mark.parametrize("after", [False, True], ids=["unsent", "unsaved"])
def test_a_crash_around_create_is_told_apart_by_looking(open_scene, tokens_of_texts, after):
    """Killed after the job was created its job is adopted; killed before, it is written off."""
    scene = open_scene("--batch-polls", 1)
    assert scene.start("leave", ALL, call=2, after=after, of=[CREATE]).end() is None
    assert len(scene.server.jobs) == 1 + after
    scene.do("embed", ALL)
    scene.do("resume", NOBODY)
    assert len(scene.server.jobs) == 3
    _, unconfirmed, _ = scene.amounts()
    # What was held is charged: our count of tokens, which is an upper bound of theirs.
    assert unconfirmed == 0 if after else unconfirmed >= tokens_of_texts("text", 20, 40)
    scene.check(60, tokens_of_texts("text", 0, 60))


@pytest.mark.fault(57)
@pytest.mark.parametrize(
    "fault",
    [
        {"mode": "reset", "effect": "after"},
        {"mode": "status", "status": 502, "effect": "after"},
        {"mode": "status", "status": 504, "body": "html", "effect": "after"},
        {"mode": "hang", "seconds": 3600, "effect": "after"},
        {"mode": "reset", "effect": "late", "after_seconds": 0.2},
        {"mode": "cut_json", "effect": "after"},
    ],
    ids=str,
)
def test_a_job_whose_creation_was_not_answered_is_found_again(open_scene, tokens_of_texts, fault):
    # What is only slow is found as well, within this time.
    scene = open_scene("--batch-polls", 1, grace=60.0)
    scene.more = {"options": {"timeout": 1.0}}
    scene.server.faults(push=[{**fault, "path": "POST /v1/batches"}])
    assert scene.do("embed", ALL)["right"]
    assert len(scene.server.jobs) == 3
    scene.check(60, tokens_of_texts("text", 0, 60))
    assert scene.amounts()[1] == 0


@pytest.mark.fault(58)
def test_a_create_that_lands_after_the_fence_finds_no_input(open_scene, tokens_of_texts):
    """It was given up and its texts were submitted again: it must not become a second job."""
    scene = open_scene("--batch-seconds", 0.1)
    late = {"mode": "reset", "effect": "late", "after_seconds": 3600, "path": "POST /v1/batches"}
    scene.server.faults(push=[late])
    assert scene.do("embed", ALL)["right"]
    assert len(scene.server.jobs) == 3
    scene.server.drive(advance=3601)
    scene.until_landed()
    assert scene.server.drive()["landed"] != []
    assert len(scene.server.jobs) == 3
    scene.check(60, tokens_of_texts("text", 0, 60))
    assert scene.amounts()[1] >= tokens_of_texts("text", 0, 20)


@pytest.mark.fault(61)
def test_errors_of_polls_change_nothing(open_scene, tokens_of_texts):
    scene = open_scene("--batch-by-hand")
    scene.do("leave", ALL)
    before = scene.rows("SELECT state, job FROM part")
    polls = "GET /v1/batches/{id}"
    for fault in ({"mode": "status", "status": 503}, {"mode": "reset"}, {"mode": "html"}):
        scene.server.faults(clear=True, always={**fault, "path": polls})
        scene.do("look", NOBODY)
        assert scene.rows("SELECT state, job FROM part") == before
    scene.server.faults(clear=True, always=None)
    scene.server.drive(set={"progress": {"polls": 1}})
    assert scene.do("embed", ALL)["right"]
    scene.do("resume", NOBODY)
    assert len(scene.server.jobs) == 3
    scene.check(60, tokens_of_texts("text", 0, 60))


@pytest.mark.fault(76)
@pytest.mark.parametrize("how", ["finish", "expire"])
def test_after_three_days_another_process_goes_on(open_scene, tokens_of_texts, how):
    """What was done is collected, what expired is submitted again, and nothing else."""
    scene = open_scene("--batch-by-hand")
    job = scene.do("leave", ALL)["submitted"]
    for number, one in enumerate(scene.server.jobs):
        more = {"done": 5 * number} if how == "expire" else {}
        scene.server.drive(jobs=[{"id": one["id"], "do": how, **more}])
    scene.server.drive(advance=DAYS, set={"progress": {"polls": 1}})
    assert scene.do("fetch", ALL, job=job, ahead=DAYS)["right"]
    scene.do("resume", NOBODY, ahead=DAYS)
    if how == "finish":
        assert len(scene.server.jobs) == 3
    scene.check(60, tokens_of_texts("text", 0, 60))


@pytest.mark.fault(76)
def test_who_waits_for_a_planned_part_of_another_is_served(open_scene, tokens_of_texts):
    """Its jobs are full of texts that only somebody who is gone waited for."""
    scene = open_scene("--batch-polls", 3, parts=1)
    scene.do("leave", ALL)
    assert [*scene.rows("SELECT state FROM part ORDER BY id")][:2] == [("submitted",), ("planned",)]
    assert scene.do("submit", ("text", 50, 60, 0))["right"]
    scene.do("resume", NOBODY)
    scene.check(60, tokens_of_texts("text", 0, 60))


@pytest.mark.fault(79)
@pytest.mark.parametrize(
    "share",
    [0.5, 0.999, *(pytest.param(one, marks=pytest.mark.campaign) for one in (0.001, 0.3, 0.77))],
)
@pytest.mark.parametrize("mode", ["truncated", "short_chunk"])
def test_a_download_that_breaks_off_is_read_again(open_scene, tokens_of_texts, mode, share):
    scene = open_scene("--batch-polls", 1)
    fault = {"mode": mode, "share": share, "path": CONTENT}
    scene.server.faults(push=[fault, fault, fault, fault])
    assert scene.do("embed", ALL, chunk=4)["right"]
    assert len(scene.server.jobs) == 3
    scene.check(60, tokens_of_texts("text", 0, 60))


@pytest.mark.fault(80)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "number", [2, *(pytest.param(more, marks=pytest.mark.campaign) for more in (1, 3, 5, 6))]
)
@pytest.mark.parametrize(
    "seam",
    [
        "embedcore.storage.vectors:VectorStore.put",
        "embedcore.storage.parts:Parts.store",
        "embedcore.storage.part_money:PartMoney.end",
    ],
)
def test_a_kill_while_results_are_stored_costs_nothing(
    open_scene, tokens_of_texts, seam, number, after
):
    scene = open_scene("--batch-polls", 1)
    worker = scene.start("embed", ALL, chunk=10, call=number, after=after, of=[seam])
    died = worker.end() is None
    assert died == (number <= 3 or "end" not in seam)
    assert scene.do("embed", ALL)["right"]
    assert len(scene.server.jobs) == 3
    scene.check(60, tokens_of_texts("text", 0, 60))
    assert scene.amounts()[1] == 0


@pytest.mark.fault(82)
def test_a_key_may_change_between_submitting_and_collecting(tmp_path):
    """The old key is refused with an error that says so, and nothing is given up for that."""
    texts = [f"text {number}" for number in range(30)]
    with FakeOpenAI(batch=BatchSettings(progress=Progress())) as server:

        def connect(key: str) -> EmbeddingClient:
            options = {"base_url": server.base_url, "batch": True, "dimensions": 8}
            return EmbeddingClient(
                "text-embedding-3-small", key, options=options, config={"home": tmp_path}
            )

        with connect(server.api_key) as client:
            name = client.submit_batch(texts).id
            old, server.api_key = server.api_key, "sk-the-new-one-0123456789"
            (job,) = server.batches.jobs
            server.batches.finish(job.id)
            (problem,) = client.batch_job(name).advance()
            assert isinstance(problem, AuthenticationFailed)
            assert client.batch_job(name).status(poll=False).state != "done"
        assert old != server.api_key
        with connect(server.api_key) as client:
            result = client.batch_job(name).result(timeout=120, poll_interval=0.05)
            assert (result.vectors == vectors_of(texts, 8)).all()
        assert len(server.batches.jobs) == 1
