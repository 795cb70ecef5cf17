"""What is particular to the two: rows that are gone, a folder in use, indices, no copy."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

TEXTS = {key: f"text number {key}" for key in range(300)}


def test_qdrant_prune_removes_what_the_source_no_longer_has(qdrant):
    from qdrant_client import QdrantClient

    qdrant.put({key: f"text {key}" for key in range(2500)})
    qdrant.check(["recipe.py"])
    store = QdrantClient(path="qdrant")
    qdrant.module().prune(store, {f"k'{key}" for key in range(0, 2500, 7)})
    store.close()
    assert qdrant.rows().keys() == set(range(0, 2500, 7))


def test_qdrant_a_second_run_is_refused_in_local_mode(qdrant, server):
    from qdrant_client import QdrantClient

    qdrant.put(TEXTS)
    store = QdrantClient(path="qdrant")
    done = subprocess.run([sys.executable, "recipe.py"], capture_output=True, text=True)
    store.close()
    assert done.returncode == 1
    assert "already accessed by another instance" in done.stderr
    assert server.requests == []


def test_qdrant_keeps_the_fingerprint(qdrant):
    from qdrant_client import QdrantClient

    from embedcore import EmbeddingClient

    qdrant.put(TEXTS)
    qdrant.run()
    store = QdrantClient(path="qdrant")
    metadata = store.get_collection("documents").config.metadata
    store.close()
    with EmbeddingClient() as client:
        assert metadata == {"fingerprint": client.fingerprint}


def test_lancedb_prune_removes_what_the_source_no_longer_has(lance):
    import lancedb

    lance.put({key: f"text {key}" for key in range(2500)})
    lance.check(["recipe.py"])
    lance.module().prune(lancedb.connect("lancedb"), {f"k'{key}" for key in range(0, 2500, 7)})
    assert lance.rows().keys() == set(range(0, 2500, 7))


def test_lancedb_looks_up_by_an_index_and_has_few_fragments_in_the_end(lance):
    import lancedb

    lance.put(TEXTS)
    lance.run()
    table = lancedb.connect("lancedb").open_table("documents")
    (index,) = table.list_indices()
    assert index.columns == ["id"]
    assert table.index_stats(index.name).num_unindexed_rows == 0
    assert table.stats()["fragment_stats"]["num_fragments"] == 1


def test_lancedb_an_index_for_the_search_takes_later_rows(lance):
    import lancedb

    lance.put(TEXTS)
    lance.run()
    db = lancedb.connect("lancedb")
    lance.module().index(db)
    assert lance.nearest(TEXTS[123])[0] == 123
    lance.put({**TEXTS, 5000: "a later row"})
    lance.run()
    assert lance.nearest("a later row")[0] == 5000
    table = db.open_table("documents")
    for index in table.list_indices():
        assert table.index_stats(index.name).num_unindexed_rows == 0


def test_arrow_takes_the_vectors_of_a_block_without_a_copy():
    pa = pytest.importorskip("pyarrow")
    vectors = np.random.default_rng(1).random((7, 5), dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    data = column.values.buffers()[1]
    assert data.address == vectors.ctypes.data
    assert np.array_equal(np.stack(column.to_numpy(zero_copy_only=False)), vectors)
