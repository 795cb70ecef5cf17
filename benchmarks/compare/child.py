"""One measurement of one client, in a process of its own, with that client's interpreter.

Told what to do by one line of JSON as its argument, it gets ready (imports, one small request),
writes ``ready``, waits for a line on its input, works, and writes what it used as a line of JSON.
Vectors are checked against their texts afterwards, outside of what is measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from compare import asking, corpus, truth
from compare.clients.contract import Array, Cache, Found, NotThere, Partly, Row, Setting
from compare.profiling import Profile
from compare.used import Stopwatch, Used, as_array, peak, short, start_of_peak

_WARM_UP = [f"warm-up {number}" for number in range(20)]
# Of a cache that is filled, and of what is then put into it: about as many as in one request.
_FILLED_AT_ONCE: Final = 5_000
_PUT_AT_ONCE: Final = 250
_PROBE: Final = 192


def run(order: Mapping[str, Any], said: TextIO, told: TextIO) -> Used:
    """Do what the order says, and say what it took."""
    if order["cores"]:
        os.sched_setaffinity(0, order["cores"])
    row = _row(order["client"], order["row"])
    setting = Setting(
        base_url=order["base_url"],
        folder=Path(order["folder"]),
        purpose=order["purpose"],
        request_texts=order["request_texts"],
    )

    def ready() -> None:
        said.write("ready\n")
        said.flush()
        told.readline()

    try:
        if order.get("profile"):
            ready()
            return _profiled(row, setting, order)
        if setting.purpose in asking.WAYS:
            return asking.WAYS[setting.purpose](row, setting, _texts(order), ready)
        return _WAYS.get(setting.purpose, _call)(row, setting, order, ready)
    except NotThere as reason:
        return Used(missing=str(reason))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the client's result
        return Used(texts=order["texts"], error=short(error))


def _row(client: str, name: str) -> Row:
    rows = import_module(f"compare.clients.{client}").CLIENT.rows
    found: Row = next(row for row in rows if row.name == name)
    return found


def _texts(order: Mapping[str, Any]) -> list[str]:
    first, last = order["first"], order["first"] + order["texts"]
    if order["short"]:
        return corpus.short_texts(last, seed=order["seed"])[first:]
    chosen = corpus.stream(seed=order["seed"], duplicates=order["duplicates"])
    return list(islice(chosen, first, last))


def _call(row: Row, setting: Setting, order: Mapping[str, Any], ready: Callable[[], None]) -> Used:
    embed = row.open(setting)
    texts = _texts(order)
    embed(_WARM_UP)
    ready()
    return _measured(texts, lambda: embed(texts))


def _profiled(row: Row, setting: Setting, order: Mapping[str, Any]) -> Used:
    """Opens the client a second time: its threads are profiled from their start."""
    texts = _texts(order)
    row.open(replace(setting, folder=_elsewhere(setting)))(_WARM_UP)
    with Profile() as profile:
        found = as_array(row.open(setting)(texts))
    return Used(texts=len(texts), delivered=len(found), profile=profile.table())


def _reuse(row: Row, setting: Setting, order: Mapping[str, Any], ready: Callable[[], None]) -> Used:
    """Opening the cache is part of it, unless the order says ``running``; importing is not."""
    if row.reuse is None:
        raise NotThere(row.missing.get("reuse", "has no cache of its own"))
    reopen = row.reuse
    texts = _texts(order)
    reopen(replace(setting, folder=_elsewhere(setting)))(_WARM_UP)
    if order["running"]:
        embed = reopen(setting)
        embed(texts)
        ready()
        return _measured(texts, lambda: embed(texts))
    ready()
    return _measured(texts, lambda: reopen(setting)(texts))


def _measured(texts: list[str], work: Callable[[], Found]) -> Used:
    used = Used(texts=len(texts))
    base = start_of_peak()
    watch = Stopwatch()
    try:
        found: Found | None = work()
    except Partly as partly:
        found, used.error = partly.found, short(partly)
    except NotThere:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the client's result
        found, used.error = None, short(error)
    vectors = None if found is None else as_array(found)
    watch.note(used)
    used.growth = peak() - base
    if vectors is None:
        return used
    if vectors.shape != (len(texts), truth.WIDTH):
        used.error = f"{len(texts)} texts became an array of {vectors.shape}"
        return used
    used.delivered = len(texts) - int(truth.missing(vectors).sum())
    used.wrong = truth.wrong_rows(texts, vectors)
    return used


def _stream(
    row: Row, setting: Setting, order: Mapping[str, Any], ready: Callable[[], None]
) -> Used:
    """Each block is checked as it comes and then let go."""
    if row.stream is None:
        raise NotThere(row.missing.get("stream", "has no stream of vectors with their texts"))
    row.open(setting)(_WARM_UP)
    chosen = corpus.stream(seed=order["seed"], duplicates=0.0)
    sent = _Digest(islice(chosen, order["texts"]))
    used = Used(texts=order["texts"])
    ready()
    base = start_of_peak()
    watch = Stopwatch()
    came = _Digest(iter(()))
    for texts, vectors in row.stream(setting, sent):
        came.add(texts)
        used.delivered += len(texts)
        # Small blocks: what the check needs is in the peak too.
        used.wrong += truth.wrong_rows(texts, vectors, block=50)
    watch.note(used)
    used.growth = peak() - base
    if came.value != sent.value:
        used.error = "the texts that came back are not those that went in, in their order"
    return used


def _short_stream(
    row: Row, setting: Setting, order: Mapping[str, Any], ready: Callable[[], None]
) -> Used:
    """How long it takes: texts are made before, and a few numbers of each vector checked after."""
    if row.stream is None:
        raise NotThere("has no stream of vectors with their texts")
    for _ in row.stream(replace(setting, folder=_elsewhere(setting)), _WARM_UP):
        pass
    texts, came, probes = _texts(order), [], []
    used = Used(texts=len(texts))
    ready()
    watch = Stopwatch()
    for names, vectors in row.stream(setting, texts):
        came += names
        probes.append(vectors[:, ::_PROBE].copy())
    watch.note(used)
    used.delivered = sum(map(len, probes))
    if came != texts:
        used.error = "the texts that came back are not those that went in, in their order"
        return used
    found = np.concatenate(probes)
    for start in range(0, len(texts), 1_000):
        right = truth.vectors(texts[start : start + 1_000])[:, ::_PROBE]
        used.wrong += int((found[start : start + 1_000] != right).any(axis=1).sum())
    return used


def _full_cache(
    row: Row, setting: Setting, order: Mapping[str, Any], ready: Callable[[], None]
) -> Used:
    """A cache of ``rows`` vectors, by itself: the first process fills it and puts texts into it,
    one after that (``running`` is false) only opens it. Laps are CPU: of each put of all texts,
    then of one reading of as many from all over the file."""
    if row.cache is None:
        raise NotThere("has no cache of its own")
    rows, count = order["rows"], order["texts"]
    wanted = random.Random(order["seed"]).sample(range(rows), min(rows, count))
    keys, block = _keys(wanted), _vectors_of_rows()
    used = Used(texts=count, delivered=count)
    if not order["running"]:
        ready()
        watch = Stopwatch()
        found = row.cache(setting).get(keys)
        used.laps = [watch.cpu]
    else:
        cache = row.cache(setting)
        for start in range(0, rows, _FILLED_AT_ONCE):
            there = range(start, min(rows, start + _FILLED_AT_ONCE))
            cache.put(_keys(there), block[: len(there)])
        ready()
        for number in range(order["rounds"]):
            used.laps.append(_put(cache, _keys(range(count), f"round {number}"), block))
        watch = Stopwatch()
        found = cache.get(keys)
        used.laps.append(watch.cpu)
    right = block[np.array(wanted) % _FILLED_AT_ONCE]
    used.wrong = int((found != right).any(axis=1).sum())
    return used


def _put(cache: Cache, keys: list[bytes], block: Array) -> float:
    watch = Stopwatch()
    for start in range(0, len(keys), _PUT_AT_ONCE):
        some = keys[start : start + _PUT_AT_ONCE]
        cache.put(some, block[: len(some)])
    return watch.cpu


def _keys(rows: Any, kind: str = "row") -> list[bytes]:
    return [hashlib.sha256(f"{kind} {number}".encode()).digest() for number in rows]


def _vectors_of_rows() -> Array:
    return truth.vectors([f"row {number}" for number in range(_FILLED_AT_ONCE)])


def _elsewhere(setting: Setting) -> Path:
    folder = setting.folder.with_name(f"{setting.folder.name}-warm-up")
    folder.mkdir(exist_ok=True)
    return folder


class _Digest:
    """Passes texts on and remembers no more of them than one number, in which order counts."""

    def __init__(self, texts: Iterator[str]) -> None:
        self._texts = texts
        self.value = 0

    def add(self, texts: Any) -> None:
        for text in texts:
            self.value = hash((self.value, text))

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.add((text,))
            yield text


_WAYS: Final = {
    "stream": _stream,
    "short-stream": _short_stream,
    "reuse": _reuse,
    "full-cache": _full_cache,
}


def main() -> None:
    # What a client prints must not be taken for a result.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    used = run(json.loads(sys.argv[1]), said, sys.stdin)
    said.write(json.dumps(asdict(used)) + "\n")
    said.flush()
    # Some clients leave threads behind that would keep the process alive.
    os._exit(0)


if __name__ == "__main__":
    main()
