"""PostgreSQL: each type of the page, rows that vanish or change meanwhile, two runs at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from embedcore.testing import vectors_of

TYPES = {"vector": 0, "halfvec": 1e-3, "float4[]": 0, "bytea": 0}
TEXTS = {key: f"text number {key}" for key in range(-5, 55)}


@pytest.mark.parametrize("variant", TYPES)
def test_each_type_of_the_page_holds_the_vectors(variant, make_postgresql):
    recipe = make_postgresql(variant)
    recipe.put(TEXTS)
    recipe.run()
    rows = recipe.rows()
    assert rows.keys() == TEXTS.keys()
    for key, (_, vector) in rows.items():
        expected = vectors_of([TEXTS[key]], len(vector))[0]
        np.testing.assert_allclose(vector, expected, atol=TYPES[variant], rtol=0)
    if variant != "bytea":
        assert recipe.nearest(TEXTS[-3])[0] == -3


@pytest.mark.parametrize("variant", ["vector", "halfvec"])
def test_the_index_of_the_page_is_used(variant, make_postgresql):
    recipe = make_postgresql(variant)
    if variant == "halfvec":
        recipe.write_program(recipe.source().replace("vector_cosine_ops", "halfvec_cosine_ops"))
    recipe.put(TEXTS)
    recipe.run()
    with recipe.database() as db:
        recipe.module().index(db)
        recipe.module().index(db)
        db.execute("SET enable_seqscan = off")
        zeros = "[" + ",".join(["1"] * 24) + "]"
        plan = db.execute(
            f"EXPLAIN SELECT id FROM document_vectors ORDER BY vector <=> '{zeros}' LIMIT 3"
        ).fetchall()
    assert "document_vectors_nearest" in str(plan)
    assert recipe.nearest(TEXTS[7])[0] == 7


def ingesting(recipe, meanwhile, block_size=10):
    """The page's program in this process; ``meanwhile`` is done before each of its writes."""
    from embedcore import EmbeddingClient

    module = recipe.module()
    write = module.write

    def write_later(*arguments):
        meanwhile()
        write(*arguments)

    module.write = write_later
    with EmbeddingClient() as client:
        embed_iter = client.embed_iter
        client.embed_iter = lambda *rows, **how: embed_iter(*rows, **how, block_size=block_size)
        return module.ingest(client)


def test_a_row_deleted_meanwhile_leaves_no_vector(make_postgresql):
    recipe = make_postgresql("float4[]")
    recipe.put(TEXTS)

    def delete():
        with recipe.database() as db:
            db.execute("DELETE FROM documents WHERE id IN (3, 54)")

    ingesting(recipe, delete)
    assert recipe.rows().keys() == TEXTS.keys() - {3, 54}
    recipe.put({key: TEXTS[key] for key in range(10, 20)})
    assert recipe.rows().keys() == set(range(10, 20))


def test_a_text_changed_meanwhile_is_embedded_by_the_next_run(make_postgresql, server):
    recipe = make_postgresql("float4[]")
    recipe.put(TEXTS)

    def change():
        with recipe.database() as db:
            db.execute("UPDATE documents SET body = 'changed' WHERE id IN (3, 54)")

    ingesting(recipe, change)
    number = len(server.requests)
    recipe.run()
    assert [request.texts for request in server.requests[number:]] == [["changed"]]
    vector = recipe.rows()[54][1]
    assert np.array_equal(vector, vectors_of(["changed"], len(vector))[0])


def test_a_second_run_waits_and_finds_nothing_to_do(make_postgresql, server, configure):
    recipe = make_postgresql("float4[]")
    configure(cache=False)
    recipe.put(TEXTS)
    began, output = threading.Event(), []
    second = threading.Thread(target=lambda: (began.wait(60), output.append(recipe.run())))
    second.start()

    def linger():
        began.set()
        with recipe.database() as db:
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            while second.is_alive() and db.execute(waiting).fetchone() == (0,):
                second.join(0.05)

    ingesting(recipe, linger)
    second.join(60)
    assert output == ["None 0\n"]
    assert server.meter.billed_twice == {}


def test_the_text_is_hashed_alike_on_both_sides(make_postgresql):
    recipe = make_postgresql("bytea")
    texts = {1: "été 🍏", 2: "a\nb\t\\N", 3: "x" * 20_000, 4: "日本語", -(2**63): "least"}
    recipe.put(texts)
    recipe.run()
    assert recipe.run() == "None 0\n"
    assert recipe.rows().keys() == texts.keys()


def test_reading_with_hold_works_as_the_page_says(make_postgresql, pages):
    recipe = make_postgresql("float4[]")
    (cursor, commit) = (
        'source.cursor("missing", withhold=True, row_factory=dict_row)',
        "source.commit()",
    )
    assert f"`{cursor}`" in pages["postgresql"]
    assert f"`{commit}`" in pages["postgresql"]
    source = recipe.source().replace('source.cursor("missing", row_factory=dict_row)', cursor)
    execute = "            rows.execute(MISSING)\n"
    assert execute in source
    recipe.write_program(source.replace(execute, f"{execute}            {commit}\n"))
    recipe.put(TEXTS)
    open_transactions = []

    def look():
        with recipe.database() as db:
            seen = db.execute(
                """SELECT count(*) FROM pg_stat_activity
                WHERE datname = current_database() AND state = 'idle in transaction'"""
            ).fetchone()
            open_transactions.append(seen[0])

    ingesting(recipe, look)
    assert recipe.rows().keys() == TEXTS.keys()
    assert set(open_transactions) == {0}
