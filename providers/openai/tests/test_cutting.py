"""Over a real socket: what nobody counts is sent whole, and cut only when the server refuses it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from embedcore import EmbeddingClient
from embedcore.errors import EmbeddingError
from embedcore.testing import vector_of

WORDS = "words of a document that is long, and goes on. "
LIMIT = 8192

# How servers refuse: with numbers or without, true or not, in words that nobody has listed.
REFUSALS: list[Any] = [
    lambda n, most: (
        400,
        {
            "error": {
                "message": f"maximum context length is {most} tokens, "
                f"however you requested {n} tokens"
            }
        },
    ),
    lambda n, most: (
        413,
        {
            "error": f"Input validation error: `inputs` must have less than {most + 1}"
            f" tokens. Given: {n}",
            "error_type": "Validation",
        },
    ),
    lambda n, most: (
        400,
        {
            "object": "error",
            "message": f"This model's maximum context length is {most} tokens.",
            "code": 400,
        },
    ),
    lambda n, most: (400, {"error": {"message": "Range of input length should be [1, 8192]"}}),
    lambda n, most: (400, {"error": {"message": "el texto no cabe"}}),
    lambda n, most: (422, {"detail": "unprocessable"}),
    lambda n, most: (400, {"errors": ["sequence overflow at layer 3"]}),
    lambda n, most: (400, {"error": {"message": f"max 17 tokens, you have {n * 3} tokens"}}),
    lambda n, most: (413, {"message": "no"}),
]


class Server:
    """Counts by itself, takes ``most``, and knows its bill. ``refusal(units, most)``: how it says
    no; None: it cuts, and says nothing."""

    def __init__(self, most: int = LIMIT, *, refusal: Any = None, per_token: float = 3.8) -> None:
        self.most, self.refusal, self.per_token = most, refusal, per_token
        self.billed = 0
        self.asked: list[list[str]] = []

    def count(self, text: str) -> int:
        return -(-len(text.encode()) * 10 // int(self.per_token * 10))

    def __call__(self, asked: Any) -> Any:
        texts = asked.json()["input"]
        self.asked.append(texts)
        sizes = [self.count(text) for text in texts]
        if max(sizes) > self.most and self.refusal is not None:
            return self.refusal(max(sizes), self.most)
        self.billed += sum(min(size, self.most) for size in sizes)
        data = [
            {"index": place, "embedding": vector_of(text, 4).tolist()}
            for place, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": sum(min(size, self.most) for size in sizes)}
        return {"data": data, "model": "bge-m3", "usage": usage}


@pytest.fixture
def connect(api: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``connect(server, **options)``: a client of ``openai:bge-m3`` at that server."""
    monkeypatch.chdir(tmp_path)

    def connect(server: Server, *, overlong: str = "truncate", **options: Any) -> EmbeddingClient:
        api.routes["POST /v1/embeddings"] = server
        given = {"base_url": api.base_url, "max_input_tokens": LIMIT, "price": 0, **options}
        return EmbeddingClient(
            config={
                "model": "openai:bge-m3",
                "cache": False,
                "home": ":memory:",
                "overlong": overlong,
                "retry": {"first_wait": 0.001, "longest_wait": 0.002},
                "options": {"openai": given},
            }
        )

    return connect


def right(result: Any, texts: list[str]) -> None:
    for row, text in enumerate(texts):
        assert result.ok[row], result.errors.get(row)
        assert result.vectors[row].tobytes() == vector_of(text, 4).tobytes()


@pytest.mark.case("A9")
def test_23_000_characters_of_6_000_tokens_go_whole(connect: Any) -> None:
    text = (WORDS * 500)[:23_000]
    for refusal in (REFUSALS[0], None):
        server = Server(refusal=refusal)
        assert 6_000 < server.count(text) < 6_200
        with connect(server) as client:
            plan = client.plan([text, "short"])
            assert (plan.truncated, plan.perhaps_long) == (0, 1)
            result = client.embed([text, "short"])
        assert server.asked == [[text, "short"]]
        right(result, [text, "short"])
        assert result.tokens_cut == {}
        assert [row.cut for row in result.outcomes] == ["unknown", "no"]
        assert result.usage.tokens == server.billed


@pytest.mark.case("A9")
@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_whatever_the_server_says_four_fifths_of_what_fits_are_kept(
    connect: Any, number: int
) -> None:
    long = WORDS * 2_000
    rows = ["short", long, WORDS * 100, "another"]
    server = Server(refusal=REFUSALS[number])
    with connect(server) as client:
        client.embed(["warm up"])
        result = client.embed(rows)
    characters = result.characters_cut[1]
    kept = long[:-characters]
    assert 0.8 * LIMIT <= server.count(kept) <= LIMIT
    right(result, [rows[0], kept, *rows[2:]])
    assert result.tokens_cut == {1: None}
    assert result.usage.tokens == server.billed - server.count("warm up")
    assert len(server.asked) <= 14


@pytest.mark.case("A9")
def test_numbers_make_it_quicker(connect: Any) -> None:
    long = WORDS * 2_000
    for number in (0, 1):
        server = Server(refusal=REFUSALS[number])
        with connect(server) as client:
            result = client.embed([long])
        assert len(server.asked) == 2
        kept = long[: -result.characters_cut[0]]
        assert 0.97 * LIMIT <= server.count(kept) <= LIMIT


@pytest.mark.case("A9")
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, len(REFUSALS) - 1),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.floats(1.0, 9.0),
    st.integers(0, 99),
)
def test_texts_of_any_length_and_density(
    connect: Any, number: int, tenths: list[int], per_token: float, seed: int
) -> None:
    rng = random.Random(seed)
    pieces = rng.sample(["日本語の文章。", WORDS, "ü", "0123 ", "👩‍👩‍👧"], 2)
    rows = [
        f"{row} " + "".join(rng.choice(pieces) * 40 for _ in range(times * 30))
        for row, times in enumerate(tenths)
    ]
    server = Server(refusal=REFUSALS[number], per_token=per_token)
    with connect(server) as client:
        client.embed(["warm up"])
        result = client.embed(rows, on_error="keep")
    sent = list(rows)
    for row, text in enumerate(rows):
        assert result.ok[row], result.errors
        if server.count(text) > LIMIT:
            sent[row] = text[: -result.characters_cut[row]]
            assert 0.8 * LIMIT <= server.count(sent[row]) <= LIMIT
        else:
            assert result.outcomes[row].cut != "yes"
    right(result, sent)
    assert result.usage.tokens + server.count("warm up") == server.billed
    assert len(server.asked) <= 4 + 16 * len(rows)


@pytest.mark.case("A9")
def test_with_reject_the_server_has_the_last_word(connect: Any) -> None:
    rows = [WORDS * 2_000, (WORDS * 500)[:23_000]]
    server = Server(refusal=REFUSALS[0])
    with connect(server, overlong="reject") as client:
        result = client.embed(rows, on_error="keep")
    assert result.ok.tolist() == [False, True]
    assert {len(text) for texts in server.asked for text in texts} == set(map(len, rows))


@pytest.mark.case("A8")
@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_a_count_that_is_one_too_low_costs_little(connect: Any, number: int) -> None:
    """OpenAI's own tokenizer, and a server that finds one token more."""
    from embedcore_openai.tokenizer import Cl100kTokenizer

    tokenizer = Cl100kTokenizer()
    limit = 300

    class OneMore(Server):
        def count(self, text: str) -> int:
            return tokenizer.count([text])[0] + 1

    server = OneMore(limit, refusal=REFUSALS[number])
    rows = ["short", WORDS * 200, "another"]
    options = {"base_model": "text-embedding-3-small", "reply_models": ["*"], "dimensions": 4}
    with connect(server, max_input_tokens=limit, **options) as client:
        client.embed(["warm up"])
        result = client.embed(rows)
    assert result.characters_cut == {}
    whole = tokenizer.count([rows[1]])[0]
    left = whole - result.tokens_cut[1]
    assert 0.95 * limit <= left < limit
    kept = tokenizer.prefix(rows[1], left)
    right(result, [rows[0], kept, rows[2]])


@pytest.mark.case("A8")
def test_a_text_that_is_refused_for_another_reason_fails_with_that(connect: Any) -> None:
    rows = ["fine", "BAD " + WORDS * 500, "good"]

    class Picky(Server):
        def __call__(self, asked: Any) -> Any:
            if any(text.startswith("BAD") for text in asked.json()["input"]):
                self.asked.append(asked.json()["input"])
                return 400, {"error": {"message": "this is not polite"}}
            return super().__call__(asked)

    server = Picky()
    with connect(server) as client:
        client.embed(["warm up"])
        result = client.embed(rows, on_error="keep")
    assert result.ok.tolist() == [True, False, True]
    assert isinstance(result.errors[1], EmbeddingError)
    assert "this is not polite" in str(result.errors[1])
    assert len(server.asked) <= 8
