"""One measurement of many small calls: questions one by one, at once, on a schedule, and from
threads under a rate limit that counts refused requests too.

Each takes the texts, gets ready, and says what it used; vectors are checked after the clock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeAlias

from compare import truth
from compare.clients.contract import AskAsync, NotThere, Partly, Row, Setting, Vector
from compare.used import Stopwatch, Used, as_array, short

RATE: Final = 800.0
CALL_TEXTS: Final = 100
_CALL_THREADS: Final = 8
_WARM_UP: Final = [f"warm-up {number}" for number in range(5)]
Ready: TypeAlias = Callable[[], None]


def _query(row: Row, setting: Setting, texts: list[str], ready: Ready) -> Used:
    """One after another in one thread: CPU is what counts."""
    if row.query is None:
        raise NotThere("asks no single questions")
    ask = row.query(setting)
    for text in _WARM_UP:
        ask(text)
    used = Used(texts=len(texts))
    ready()
    watch = Stopwatch()
    found = [ask(text) for text in texts]
    watch.note(used)
    return _checked(used, texts, found)


def _gather(row: Row, setting: Setting, texts: list[str], ready: Ready) -> Used:
    """All in one ``asyncio.gather``: wall is what counts."""

    async def work(ask: AskAsync, used: Used) -> list[Vector]:
        watch = Stopwatch()
        found = await asyncio.gather(*map(ask, texts))
        watch.note(used)
        return found

    return _in_loop(row, setting, texts, ready, work)


def _arrivals(row: Row, setting: Setting, texts: list[str], ready: Ready) -> Used:
    """Evenly ``RATE`` a second, whether the answers come or not. Laps are the seconds from the time
    that a question was due to its answer, so that a loop that falls behind is seen."""

    async def work(ask: AskAsync, used: Used) -> list[Vector]:
        used.laps = [0.0] * len(texts)
        watch, start = Stopwatch(), time.perf_counter()

        async def one(number: int, due: float) -> Vector:
            vector = await ask(texts[number])
            used.laps[number] = time.perf_counter() - due
            return vector

        under_way = []
        for number in range(len(texts)):
            due = start + number / RATE
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            under_way.append(asyncio.ensure_future(one(number, due)))
        found = await asyncio.gather(*under_way)
        watch.note(used)
        return found

    return _in_loop(row, setting, texts, ready, work)


def _in_loop(
    row: Row,
    setting: Setting,
    texts: list[str],
    ready: Ready,
    work: Callable[[AskAsync, Used], Coroutine[Any, Any, list[Vector]]],
) -> Used:
    if row.aquery is None:
        raise NotThere("asks no questions in an event loop")
    open_ask, used = row.aquery, Used(texts=len(texts))

    async def whole() -> list[Vector]:
        ask = open_ask(setting)
        for text in _WARM_UP:
            await ask(text)
        ready()
        return await work(ask, used)

    return _checked(used, texts, asyncio.run(whole()))


def _strict(row: Row, setting: Setting, texts: list[str], ready: Ready) -> Used:
    """Calls of 100 texts, which everybody sends as one request, from eight threads."""
    embed = row.open(setting)
    embed(_WARM_UP)
    calls = [texts[start : start + CALL_TEXTS] for start in range(0, len(texts), CALL_TEXTS)]
    used = Used(texts=len(texts))

    def one(call: list[str]) -> Sequence[Vector | None]:
        try:
            return embed(call)
        except NotThere:
            raise
        except Partly as partly:
            used.error = short(partly)
            return partly.found
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the client's result
            used.error = short(error)
            return [None] * len(call)

    ready()
    watch = Stopwatch()
    with ThreadPoolExecutor(_CALL_THREADS) as executor:
        found = list(executor.map(one, calls))
    watch.note(used)
    return _checked(used, texts, [vector for part in found for vector in part])


def _checked(used: Used, texts: list[str], found: Sequence[Vector | None]) -> Used:
    vectors = as_array(found)
    if vectors.shape != (len(texts), truth.WIDTH):
        used.error = f"{len(texts)} texts became an array of {vectors.shape}"
        return used
    used.delivered = len(texts) - int(truth.missing(vectors).sum())
    used.wrong = truth.wrong_rows(texts, vectors)
    return used


WAYS: Final = {"query": _query, "gather": _gather, "arrivals": _arrivals, "strict": _strict}
