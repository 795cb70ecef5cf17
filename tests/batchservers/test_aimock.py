"""Is a vector that aimock makes up, three zeros, taken for one? No job fails there by itself."""

from __future__ import annotations

import numpy as np
import pytest

from embedcore.errors import BatchEmbeddingFailed

pytestmark = pytest.mark.batch_servers


def test_a_vector_of_another_width_is_an_error_of_its_row(aimock, clients):
    with pytest.raises(BatchEmbeddingFailed) as why:
        clients.make(aimock).batch_embed_texts(["one", "two", "one"], poll_interval=0.2)
    assert sorted(why.value.failures) == [0, 1, 2]
    assert all("width 3, not 1536" in reason for reason in why.value.failures.values())
    assert np.isnan(why.value.result.vectors).all()
    assert why.value.jobs[0].startswith("batch-")


def test_zeros_of_the_right_width_are_warned_of(aimock, clients, caplog):
    vectors = clients.make(aimock, dimensions=3).batch_embed_texts(["one"], poll_interval=0.2)
    assert vectors == [[0.0, 0.0, 0.0]]
    assert "zero" in caplog.text


def test_zeros_of_the_right_width_can_be_refused(aimock, clients):
    settings = clients.settings(aimock)
    settings["options"] |= {"dimensions": 3}
    settings["config"] |= {"on_zero": "reject"}
    with pytest.raises(BatchEmbeddingFailed) as why:
        clients.of(settings).batch_embed_texts(["one", "two"], poll_interval=0.2)
    assert sorted(why.value.failures) == [0, 1]
    assert all("zero" in reason for reason in why.value.failures.values())


@pytest.mark.fault(57)
def test_jobs_and_files_are_found(aimock, clients, hour_ago, in_an_hour):
    strategy = clients.strategy(aimock)
    ref = aimock.upload(["{}"])
    job = aimock.create(ref)["id"]
    found = strategy.find(key="another", input_ref=ref, since=hour_ago)
    assert [one.id for one in found] == [job]
    clients.die(aimock, "client.submit_batch(['an orphan file'])", at="upload")
    (file,) = strategy.orphans(before=in_an_hour)
    strategy.discard(file)
    assert list(strategy.orphans(before=in_an_hour)) == []
