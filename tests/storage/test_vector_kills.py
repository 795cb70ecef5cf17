"""Processes that write, prune, move and read one cache, and are killed while they do: what is left?

Every vector is a function of its text, so that a wrong one is seen at once.
"""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keeping import ORIGIN, keep_as_before, keys_of

from embedcore.storage.vector_upkeep import contents, verify
from embedcore.storage.vectors import VectorStore
from embedcore.testing import vectors_of

WIDTH = 64

WORK = """
import itertools, random, sys
from pathlib import Path
import numpy as np
from embedcore.errors import StorageError
from embedcore.storage import vector_index
from embedcore.storage.keys import Keys, Origin
from embedcore.storage.vector_migration import migrate
from embedcore.storage.vector_upkeep import prune, verify
from embedcore.storage.vectors import VectorStore
from embedcore.testing import vectors_of

folder, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
vector_index.SEGMENT_BYTES = 50_000
chance = random.Random(seed)
store = VectorStore(folder, cap=10**9, busy_timeout=60.0)
origin = Origin(model="p:m", fingerprint="f")
def keys_of(texts):
    return Keys(provider="p", model="m", fingerprint="f", input_type=None).of(texts)
def right(texts):
    def take(places, vectors):
        expected = vectors_of([texts[place] for place in places], 64)
        assert vectors.tobytes() == expected.tobytes(), "a wrong vector"
    assert store.get(keys_of(texts), 64, take) == 0, "a damaged one"
for number in itertools.count():
    texts = [f"text {chance.randrange(3000)}" for _ in range(20)]
    if name == "prune" and number % 5 == 0:
        chance.choice([
            lambda: prune(store, down_to=200_000), lambda: prune(store),
            lambda: list(verify(store)), lambda: [store.drop(key) for key in keys_of(texts)],
        ])()
    elif name == "move":
        list(migrate(store))
    else:
        texts = list(dict.fromkeys(texts))
        claimed = store.claims.take(keys_of(texts))
        texts = [text for text in texts if keys_of([text])[0] not in claimed.elsewhere]
        store.put(keys_of(texts), vectors_of(texts, 64), origin)
    right(texts)
    if number == 2:
        print("going", flush=True)
"""


@pytest.mark.fault(118)
@pytest.mark.fault(116)
@pytest.mark.parametrize(
    "kills",
    [
        3,
        pytest.param(40, marks=pytest.mark.campaign(short=True)),
        pytest.param(500, marks=pytest.mark.campaign),
    ],
)
def test_killed_at_random_moments(tmp_path: Path, forks: Callable[..., Any], kills: int) -> None:
    folder, chance = tmp_path / "vectors", random.Random(kills)
    texts = [f"text {number}" for number in range(3000)]
    keep_as_before(folder, texts[::7], width=WIDTH)
    names = ["put", "put", "prune", "move"]
    running = {place: started(forks, folder, name, place) for place, name in enumerate(names)}
    try:
        for number in range(kills):
            place = chance.randrange(len(names))
            time.sleep(chance.random() * 0.05)
            assert running[place].poll() is None, f"{names[place]} found something wrong"
            running[place].kill()
            running[place].communicate()
            running[place] = started(forks, folder, names[place], 100 + number)
    finally:
        for process in running.values():
            assert process.poll() is None, "it found something wrong"
            process.kill()
            process.communicate()
    store = VectorStore(folder, cap=10**9)
    assert not store.claims.take(keys_of(texts)).elsewhere, "the dead have claims"
    there = sorted(store.look(keys_of(texts), WIDTH).there)
    *_, (seen, damaged) = [(0, 0), *verify(store)]
    assert (seen, damaged) == (len(there), 0)
    assert sum(contents(store).vectors.values()) == seen
    store.put(keys_of(texts), vectors_of(texts, WIDTH), ORIGIN)
    got = np.zeros((len(texts), WIDTH), dtype=np.float32)

    def take(places: Any, vectors: Any) -> None:
        got[places] = vectors

    store.get(keys_of(texts), WIDTH, take)
    assert got.tobytes() == vectors_of(texts, WIDTH).tobytes()
    store.close()


def started(forks: Any, folder: Path, name: str, seed: int) -> Any:
    process = forks(WORK, folder, name, seed, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "going\n"
    return process
