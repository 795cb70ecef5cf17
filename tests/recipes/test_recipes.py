"""What every recipe promises: each row once with its own vector, nothing billed twice."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from embedcore.testing import openai_tokens, vectors_of

ROOT = Path(__file__).parents[2]
ROWS = 200


def corpus(size=ROWS, *, repeated=10):
    """Key → text; the last ``repeated`` texts are those of the first ones."""
    texts = {key: f"row {key}: " + "words " * (key % 7) for key in range(size)}
    return {**texts, **{size - 1 - at: texts[at] for at in range(repeated)}}


def assert_complete(recipe, *, tolerance=1e-6, but=()):
    """Every text of the source is there once, with its own hash and its own vector."""
    rows = recipe.rows()
    wanted = {key: text for key, text in recipe.texts.items() if key not in but}
    assert rows.keys() == wanted.keys()
    if not wanted:
        return
    vectors = np.stack([rows[key][1] for key in wanted])
    expected = vectors_of(list(wanted.values()), vectors.shape[1])
    np.testing.assert_allclose(vectors, expected, atol=tolerance)
    digests = [hashlib.sha256(text.encode()).digest() for text in wanted.values()]
    assert [rows[key][0] for key in wanted] == digests


def sent_after(server, number):
    return [text for request in server.requests[number:] for text in request.texts]


def assert_unique_texts_were_billed(server, texts):
    assert server.meter.billed_twice == {}
    assert server.meter.billed_tokens == sum(openai_tokens([*set(texts)]))


def test_a_run_embeds_every_row_once(recipe, server):
    recipe.put(corpus())
    recipe.run()
    assert_complete(recipe)
    assert_unique_texts_were_billed(server, recipe.texts.values())


def test_a_second_run_sends_nothing(recipe, server, configure):
    configure(cache=False)
    recipe.put(corpus())
    recipe.run()
    number = len(server.requests)
    assert recipe.run() == "None 0\n"
    assert len(server.requests) == number
    assert_complete(recipe)


@pytest.mark.case("H8")
def test_what_fails_is_named_by_its_key_and_not_among_the_missing(recipe, server):
    texts = corpus()
    recipe.put(texts)
    recipe.run()
    recipe.put({**texts, 7_001: ""})
    done = subprocess.run(
        [sys.executable, "-c", recipe.code()], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^row with key \S*7001\W* is an empty text", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("where", ["between two blocks", "in the middle of a write"])
def test_killed_and_run_again_it_buys_each_text_once(recipe, server, where):
    recipe.put(corpus())
    imports, inner, calls = recipe.inner
    if where == "between two blocks":
        recipe.die("recipe.write", 4)
    else:
        recipe.die(inner, calls, imports)
    written = recipe.rows()
    assert 0 < len(written) < ROWS
    recipe.run()
    assert_complete(recipe)
    assert_unique_texts_were_billed(server, recipe.texts.values())


def test_killed_and_run_again_only_what_is_not_there_is_sent(recipe, server, configure):
    # Without the store, nothing but the recipe itself knows what was billed.
    configure(cache=False)
    recipe.put(corpus(repeated=0))
    recipe.die("recipe.write", 4)
    written, number = recipe.rows(), len(server.requests)
    assert 0 < len(written) < ROWS
    recipe.run()
    assert_complete(recipe)
    missing = [text for key, text in recipe.texts.items() if key not in written]
    assert sorted(sent_after(server, number)) == sorted(missing)


@pytest.mark.fault(144)
def test_killed_at_any_moment_every_row_is_there_once_in_the_end(recipe, server, configure):
    # A request at a time, so that writing and reading go on between them.
    configure(concurrency=1)
    server.faults.when(probability=1.0, mode="late", seconds=0.05)
    recipe.put(corpus())
    written = []
    for requests in (3, 5, 8):
        child = recipe.start()
        give_up_at = time.monotonic() + 60
        while server.meter.requests < requests and child.poll() is None:
            assert time.monotonic() < give_up_at
            time.sleep(0.002)
        child.kill()
        child.wait()
        written.append(len(recipe.rows()))
    assert 0 < written[-1] < ROWS
    recipe.run()
    assert_complete(recipe)


def test_a_changed_text_is_embedded_again_and_nothing_else(recipe, server):
    recipe.put(corpus())
    recipe.run()
    number = len(server.requests)
    recipe.put({**recipe.texts, 17: "another text", 1000: "a new row"})
    recipe.run()
    assert sorted(sent_after(server, number)) == ["a new row", "another text"]
    assert_complete(recipe)


def test_the_search_of_the_page_finds_the_row(recipe, server):
    recipe.put(corpus(repeated=0))
    recipe.run()
    for key in (0, 77, ROWS - 1):
        assert recipe.nearest(recipe.texts[key])[0] == key


def test_a_text_that_cannot_be_embedded_is_named_and_the_others_are_written(recipe, server):
    recipe.put({**corpus(repeated=0), 30: ""})
    done = subprocess.run(
        [sys.executable, "-c", recipe.code()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("row "))
    assert re.match(r"row (30|with key \"k'30\") ", line)
    assert_complete(recipe, but=[30])
    recipe.put({**recipe.texts, 30: "no longer empty"})
    recipe.run()
    assert_complete(recipe)


def test_it_stops_at_the_limit_and_goes_on_when_there_is_more(recipe, server, configure):
    recipe.put(corpus(repeated=0))
    whole = sum(openai_tokens([*recipe.texts.values()]))
    configure(limit=whole // 2)
    stopped, tokens = recipe.run().split()
    rows = recipe.rows()
    first_missing = min(set(recipe.texts) - set(rows))
    assert stopped.removeprefix("k'") == str(first_missing)
    assert set(rows) == set(range(first_missing))
    assert 0 < int(tokens) == server.meter.billed_tokens <= whole // 2
    configure(limit=whole * 4)  # what is held may be more than what is billed
    recipe.run()
    assert_complete(recipe)
    assert_unique_texts_were_billed(server, recipe.texts.values())


def test_the_vectors_of_another_model_are_refused(recipe, server):
    recipe.put(corpus())
    recipe.run()
    number, rows = len(server.requests), recipe.rows()
    recipe.put({**recipe.texts, 1000: "a new row"})
    text = Path("embedcore.toml").read_text()
    Path("embedcore.toml").write_text(text.replace("embedding-3-small", "embedding-3-large"))
    done = subprocess.run(
        [sys.executable, "-c", recipe.code()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert re.match(r"document(_vector)?s holds vectors of .+, not of \w+", done.stderr)
    assert len(server.requests) == number
    assert recipe.rows().keys() == rows.keys()


def test_the_page_runs_as_a_user_runs_it(recipe, server):
    recipe.put(corpus(1500, repeated=0))
    tokens = sum(openai_tokens([*recipe.texts.values()]))
    printed = re.fullmatch(rf"{tokens} tokens, \$(0\.\d+)\n", recipe.check(["recipe.py"]))
    assert float(printed[1]) == pytest.approx(tokens * 0.02e-6)
    assert_complete(recipe)
    assert recipe.check(["recipe.py"]) == "0 tokens, $0\n"


def test_the_program_of_the_page_says_where_the_budget_ended(recipe, server, configure):
    configure(limit=500)
    recipe.put(corpus(repeated=0))
    _, stopped = recipe.check(["recipe.py"]).splitlines()
    missing = min(set(recipe.texts) - set(recipe.rows()))
    assert re.match(rf"the budget ended at row (k')?{missing}: ", stopped)


@pytest.mark.parametrize("name", ["postgresql", "qdrant", "lancedb"])
def test_links_and_extras_of_the_page_are_right(name, pages):
    assert len(re.findall(r"pip install \. \./providers/openai \S", pages[name])) == 1
    links = re.findall(r"\]\((?!https://)([^)]*)\)", pages[name])
    assert links
    for target in links:
        path, _, anchor = target.partition("#")
        text = (ROOT / "docs" / "how-to" / path).read_text() if path else pages[name]
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["postgresql", "qdrant", "lancedb"])
def test_every_block_of_the_page_is_valid_and_formatted(name, pages):
    from embedcore import EmbeddingClient

    blocks = re.findall(r"^```python\n(.*?)^```$", pages[name], re.MULTILINE | re.DOTALL)
    assert blocks
    for code in blocks:
        compile(code, name, "exec")
        assert max(map(len, code.splitlines())) <= 100
    assert EmbeddingClient.embed_iter.__name__ in pages[name]
