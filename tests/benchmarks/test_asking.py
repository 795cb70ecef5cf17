"""Small calls are measured as they happen: late ones count from when they were due, and each vector
is compared with its text's."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from compare import asking, child, corpus, truth
from compare.clients.contract import NotThere, Row, Setting, Vector
from compare.clients.limit_async import Queries

if TYPE_CHECKING:
    from compare.serving import Serving

TEXTS = corpus.short_texts(40)
SETTING = Setting(base_url="", folder=Path(), purpose="arrivals")


def right(text: str) -> Vector:
    return truth.vectors([text])[0]


def row(**ways: object) -> Row:
    return Row(name="row", title="row", open=lambda setting: truth.vectors, **ways)  # type: ignore[arg-type]


def nothing() -> None:
    """Stands for the signal that the harness waits for."""


async def at_once(text: str) -> Vector:
    return right(text)


@pytest.mark.parametrize("way", ["query", "gather", "arrivals", "strict"])
def test_all_vectors_are_the_texts_own(way: str) -> None:
    able = row(query=lambda setting: right, aquery=lambda setting: at_once)
    used = asking.WAYS[way](able, SETTING, TEXTS, nothing)
    assert (used.texts, used.delivered, used.wrong, used.error) == (40, 40, 0, None)
    assert used.wall > 0


@pytest.mark.parametrize("way", ["query", "gather", "arrivals", "strict"])
def test_a_vector_of_another_text_is_seen(way: str) -> None:
    def wrong(text: str) -> Vector:
        return right(TEXTS[1] if text == TEXTS[0] else text)

    async def later(text: str) -> Vector:
        return wrong(text)

    mixed = Row(
        name="row",
        title="row",
        open=lambda setting: lambda texts: [wrong(text) for text in texts],
        query=lambda setting: wrong,
        aquery=lambda setting: later,
    )
    assert asking.WAYS[way](mixed, SETTING, TEXTS, nothing).wrong == 1


def test_who_asks_no_single_questions_has_no_figure() -> None:
    for way in ("query", "gather", "arrivals"):
        with pytest.raises(NotThere):
            asking.WAYS[way](row(), SETTING, TEXTS, nothing)


def test_a_loop_that_stands_still_makes_the_questions_after_it_late() -> None:
    async def slow_at_first(text: str) -> Vector:
        if text == TEXTS[0]:
            time.sleep(0.3)
        return right(text)

    used = asking.WAYS["arrivals"](
        row(aquery=lambda setting: slow_at_first), SETTING, TEXTS, nothing
    )
    # All of them were due within a twentieth of a second, and none could be asked before 0.3.
    assert min(used.laps) >= 0.3 - 39 / asking.RATE
    assert len(used.laps) == 40


def test_calls_of_a_rate_limit_run_side_by_side_and_one_that_fails_fails_alone() -> None:
    meeting = threading.Barrier(2, timeout=30)
    texts = corpus.short_texts(2 * asking.CALL_TEXTS)

    def embed(call: list[str]) -> object:
        if len(call) < asking.CALL_TEXTS:
            return truth.vectors(call)
        meeting.wait()
        if texts[0] in call:
            raise RuntimeError("refused")
        return truth.vectors(call)

    used = asking.WAYS["strict"](
        Row(name="row", title="row", open=lambda setting: embed),  # type: ignore[arg-type,return-value]
        SETTING,
        texts,
        nothing,
    )
    assert (used.delivered, used.wrong) == (asking.CALL_TEXTS, 0)
    assert used.error == "RuntimeError: refused"


def test_the_limit_asks_in_one_request_what_is_asked_at_once(serving: Serving) -> None:
    async def whole() -> list[Vector]:
        queries = Queries(serving.base_url())
        found = await asyncio.gather(*map(queries.ask, TEXTS))
        found.append(await queries.ask(TEXTS[0]))
        await queries.close()
        return found

    found = asyncio.run(whole())
    assert truth.wrong_rows([*TEXTS, TEXTS[0]], child.as_array(found)) == 0
    assert (serving.meter()["requests"], serving.meter()["texts"]) == (2, 41)
