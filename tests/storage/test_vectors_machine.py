"""Do two stores over one folder agree with a dictionary, whatever happens in whatever order?"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from keeping import keep_as_before

from embedcore.errors import StorageFull
from embedcore.storage import vector_index
from embedcore.storage.keys import Keys, Origin
from embedcore.storage.vector_migration import Moved, migrate
from embedcore.storage.vector_upkeep import contents, prune, verify
from embedcore.storage.vectors import DAY_SECONDS, VectorStore
from embedcore.testing import vectors_of

WIDTH, LARGE, CAP = 8, 2**30, 10**9
TEXTS = [f"text {number}" for number in range(12)]
MODELS = ("m", "n")
NOON = 20_000 * DAY_SECONDS + DAY_SECONDS // 2

some_texts = st.lists(st.sampled_from(TEXTS), unique=True, max_size=8)
which = st.integers(0, 1)
models = st.sampled_from(MODELS)


@dataclass
class Row:
    """What the file should hold of one text."""

    salt: str
    day: int
    until: int = 0
    damaged: bool = False
    beyond: bool = False
    is_old: bool = False


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._patch = pytest.MonkeyPatch()
        # Of a few vectors, so that there are several.
        self._patch.setattr(vector_index, "SEGMENT_BYTES", 300)
        self.path = Path(self._folder.name) / "vectors"
        self.now = float(NOON)
        self.stores = [self.open(), self.open()]
        self.rows: dict[tuple[str, str], Row] = {}
        self.hits = self.misses = 0

    def open(self) -> VectorStore:
        return VectorStore(self.path, cap=CAP, busy_timeout=5.0, now=lambda: self.now)

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        self._patch.undo()
        self._folder.cleanup()

    @property
    def today(self) -> int:
        return int(self.now // DAY_SECONDS)

    def keys(self, model: str, texts: list[str]) -> list[bytes]:
        return Keys(provider="p", model=model, fingerprint="f", input_type=None).of(texts)

    @rule(
        who=which,
        model=models,
        texts=some_texts,
        salt=st.sampled_from("ab"),
        days=which,
        to_stay=st.booleans(),
    )
    def put(
        self, who: int, model: str, texts: list[str], salt: str, days: int, to_stay: bool
    ) -> None:
        until = self.now + days * 3 * DAY_SECONDS if days else 0.0
        self.stores[who].put(
            self.keys(model, texts),
            vectors_of(texts, WIDTH, salt=salt),
            Origin(model=f"p:{model}", fingerprint="f"),
            keep_until=until,
            to_stay=to_stay,
        )
        for text in texts:
            self.rows.setdefault(
                (model, text),
                Row(salt, self.today, until=int(until // DAY_SECONDS), beyond=not to_stay),
            )

    @rule(who=which, model=models, texts=some_texts, others=some_texts)
    def let_go(self, who: int, model: str, texts: list[str], others: list[str]) -> None:
        going = [
            (model, text)
            for text in texts
            if text not in others
            and (row := self.rows.get((model, text))) is not None
            and row.beyond
        ]
        needed = set(self.keys(model, others))
        gone = self.stores[who].let_go([self.keys(model, texts)], needed.intersection)
        assert gone == len(going)
        for name in going:
            del self.rows[name]

    @rule(model=models, texts=some_texts, salt=st.sampled_from("ab"), days=which)
    def put_by_an_earlier_version(self, model: str, texts: list[str], salt: str, days: int) -> None:
        """It knows the old file only, and keeps there what it does not find there."""
        new = [text for text in texts if (model, text) not in self.rows]
        until = self.today + days * 3 if days else 0
        keep_as_before(
            self.path,
            new,
            keys=self.keys(model, new),
            salt=salt,
            origin=Origin(model=f"p:{model}", fingerprint="f"),
            day=self.today,
            until=until,
        )
        for text in new:
            self.rows[model, text] = Row(salt, self.today, until=until, is_old=True)

    @rule(who=which)
    def migrate(self, who: int) -> None:
        damaged = [name for name, row in self.rows.items() if row.damaged and row.is_old]
        moving = [name for name, row in self.rows.items() if row.is_old and not row.damaged]
        was_there = self.stores[who].has_old
        # Else the file stays, empty, as the other has it open.
        self.stores[1 - who].close()
        steps = list(migrate(self.stores[who]))
        assert bool(steps) == was_there
        if steps:
            assert steps[-1] == Moved(moved=len(moving), damaged=len(damaged), removed=True)
        for name in damaged:
            del self.rows[name]
        for name in moving:
            self.rows[name].is_old = False

    @rule(who=which, model=models, text=st.sampled_from(TEXTS))
    def drop(self, who: int, model: str, text: str) -> None:
        self.stores[who].drop(self.keys(model, [text])[0])
        self.rows.pop((model, text), None)

    @rule(who=which)
    def killed(self, who: int) -> None:
        """A copy of the folder at this moment, with what is only in the logs, and a torn tail."""
        for store in self.stores:
            store.flush()
        copy = tempfile.TemporaryDirectory()
        subprocess.run(["cp", "-a", f"{self._folder.name}/.", copy.name], check=True)
        for segment in Path(copy.name).glob("vectors/*.seg"):
            with segment.open("ab") as file:
                file.write(b"\xff" * (7 + who))
        for store in self.stores:
            store.close()
        self._folder.cleanup()
        self._folder = copy
        self.path = Path(copy.name) / "vectors"
        self.stores = [self.open(), self.open()]

    @rule(who=which, model=models, texts=some_texts)
    def look(self, who: int, model: str, texts: list[str]) -> None:
        looked = self.stores[who].look(self.keys(model, texts), WIDTH)
        known = [self.rows.get((model, text)) for text in texts]
        assert looked.there == {
            place for place, row in enumerate(known) if row is not None and not row.damaged
        }

    @rule(who=which, model=models, texts=some_texts)
    def get(self, who: int, model: str, texts: list[str]) -> None:
        got: dict[str, bytes] = {}

        def take(places: Any, vectors: Any) -> None:
            got.update({texts[place]: vectors[j].tobytes() for j, place in enumerate(places)})

        damaged = self.stores[who].get(self.keys(model, texts), WIDTH, take)
        there = {text: self.rows[model, text] for text in texts if (model, text) in self.rows}
        assert got == {
            text: vectors_of([text], WIDTH, salt=row.salt).tobytes()
            for text, row in there.items()
            if not row.damaged
        }
        assert damaged == len(there) - len(got)
        for text in there.keys() - got.keys():
            del self.rows[model, text]
        self.hits += len(got)
        self.misses += len(texts) - len(got)

    @rule(who=which, model=models, texts=some_texts, days=st.integers(0, 5))
    def keep(self, who: int, model: str, texts: list[str], days: int) -> None:
        until = self.now + days * DAY_SECONDS
        self.stores[who].keep(self.keys(model, texts), until)
        for text in texts:
            row = self.rows.get((model, text))
            if row is not None:
                row.until = max(row.until, int(until // DAY_SECONDS))

    @rule(who=which, model=st.none() | models, days=st.integers(0, 4), all_of_it=st.booleans())
    def prune(self, who: int, model: str | None, days: int, all_of_it: bool) -> None:
        gone = {
            name
            for name, row in self.rows.items()
            if row.day <= self.today - days
            and row.until < self.today
            and model in (None, name[0])
            and all_of_it
        }
        deleted = prune(
            self.stores[who],
            older_than=days * DAY_SECONDS,
            model=None if model is None else f"p:{model}",
            down_to=None if all_of_it else LARGE,
        )
        assert deleted == len(gone)
        for name in gone:
            del self.rows[name]
        # A damaged one goes where its segment is copied, and no other does.
        for name in [name for name, row in self.rows.items() if row.damaged and not row.is_old]:
            if not self.is_in_index(*name):
                del self.rows[name]

    def is_in_index(self, model: str, text: str) -> bool:
        (key,) = self.keys(model, [text])
        with self.stores[0].database.read() as connection:
            found = connection.execute("SELECT 1 FROM vector WHERE key = ?", (key,)).fetchone()
        return found is not None

    @rule(who=which, model=models, text=st.sampled_from(TEXTS), byte=st.integers(0, 4 * WIDTH - 1))
    def damage(self, who: int, model: str, text: str, byte: int) -> None:
        row = self.rows.get((model, text))
        if row is None or row.damaged:
            return
        row.damaged = True
        (key,) = self.keys(model, [text])
        if row.is_old:
            with self.stores[who].old.database.transaction() as connection:
                connection.execute("UPDATE vector SET checksum = ~checksum WHERE key = ?", (key,))
            return
        with self.stores[who].database.read() as connection:
            number, offset = connection.execute(
                "SELECT segment, offset FROM vector WHERE key = ?", (key,)
            ).fetchone()
        with (self.path / f"{number:08}.seg").open("r+b") as file:
            file.seek(offset + byte)
            (before,) = file.read(1)
            file.seek(offset + byte)
            file.write(bytes([before ^ 0x40]))

    @rule(who=which)
    def verify(self, who: int) -> None:
        bad = [name for name, row in self.rows.items() if row.damaged]
        steps = list(verify(self.stores[who]))
        assert (steps[-1] if steps else (0, 0)) == (len(self.rows), len(bad))
        for name in bad:
            del self.rows[name]

    @rule(who=which, texts=some_texts.filter(len))
    def beyond_the_cap(self, who: int, texts: list[str]) -> None:
        # What is in the old file is not kept again, and needs no room.
        texts = [text for text in texts if ("m", text) not in self.rows]
        if not texts:
            return
        store = self.stores[who]
        store.cap -= store.room
        with pytest.raises(StorageFull):
            self.put(who, "m", texts, "c", 0, to_stay=True)
        store.cap = CAP

    @rule(who=which)
    def reopen(self, who: int) -> None:
        self.stores[who].close()
        if who:
            self.stores[who] = self.open()

    @rule(days=st.integers(0, 3))
    def time_passes(self, days: int) -> None:
        self.now += days * DAY_SECONDS

    @invariant()
    def the_counts_are_right(self) -> None:
        counted = {model: n for model, n in contents(self.stores[0]).vectors.items() if n}
        expected = {
            f"p:{model}": n
            for model in MODELS
            if (n := sum(name[0] == model for name in self.rows))
        }
        assert counted == expected

    @invariant()
    def hits_are_counted(self) -> None:
        contents(self.stores[1])
        known = contents(self.stores[0])
        assert (known.hits, known.misses) == (self.hits, self.misses)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    max_examples=settings.default.max_examples // 2,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestStore.pytestmark = [pytest.mark.fault(119), pytest.mark.fault(116)]


def test_a_damaged_vector_goes_where_its_segment_is_copied() -> None:
    """The torn tails of many kills are most of the segment that it lies in."""
    machine = StoreMachine()
    try:
        machine.put(who=0, model="m", texts=TEXTS[:1], salt="a", days=0, to_stay=True)
        for _ in range(40):
            machine.killed(who=1)
            machine.put(who=0, model="n", texts=TEXTS[:1], salt="a", days=0, to_stay=True)
            machine.drop(who=0, model="n", text=TEXTS[0])
        machine.damage(who=0, model="m", text=TEXTS[0], byte=0)
        machine.prune(who=0, model=None, days=0, all_of_it=False)
        assert machine.rows == {}
        machine.the_counts_are_right()
    finally:
        machine.teardown()
