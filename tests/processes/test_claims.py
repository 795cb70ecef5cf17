"""Are texts that several processes embed at once billed once, also where processes die, stand still
or fail?"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from embedcore.storage.claims import LEASE_SECONDS
from embedcore.storage.database import driver
from embedcore.testing import FakeOpenAI
from embedcore.testing.openai.embeddings import json_reply

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
    pytest.mark.case("G5"),
]

SECONDS = 120.0
WIDTH = 8
PER_REQUEST = 20
REFUSED = "sk-refused"
TEXTS = [f"text {number}" for number in range(300)]

PROCESS = f"""
import json, sys, time
from pathlib import Path
from embedcore import EmbeddingClient, EmbeddingError
from embedcore.storage import claims
from embedcore.testing import vectors_of

told = json.loads(sys.argv[1])
ahead = Path(told["ahead"])
clock = time.time
# For whom the clock is ahead, a lease has ended.
time.time = lambda: clock() + (claims.LEASE_SECONDS if ahead.exists() else 0)
options = {{"dimensions": {WIDTH}, "max_texts_per_request": {PER_REQUEST}, **told["options"]}}
settings = {{
    "home": told["home"], "cache": True, "concurrency": 4,
    "retry": {{"attempts": 1, "first_wait": 0.01, "longest_wait": 0.02}},
}}
with EmbeddingClient("text-embedding-3-small", options=options, config=settings) as client:
    store = client._engine.cache.store
    store.claims._now = time.time
    store.claims.lease = told["lease"]
    # However long another process takes: a cache that is busy for long is left alone, and then
    # nothing is claimed.
    assert store.database._connection is None
    store.database._timeout = {SECONDS}
    try:
        result = client.embed(told["texts"])
    except EmbeddingError as error:
        print(type(error).__name__, flush=True)
    else:
        assert result.vectors.tobytes() == vectors_of(told["texts"], {WIDTH}).tobytes()
        print("right", int(result.reused.sum()), flush=True)
"""


class Office:
    """Processes that share a home, and a server that may keep its replies back."""

    def __init__(self, home: Path, forks: Any, server: FakeOpenAI) -> None:
        self.home, self.server = home, server
        self._forks = forks
        self._running: list[Any] = []
        self.replies: list[object] = []
        self.lease = LEASE_SECONDS
        # The status of what is sent with the key REFUSED.
        self.refuses: int | None = None
        self.go = threading.Event()
        self.go.set()
        self.ahead = home / "ahead"

    def start(self, texts: Sequence[str] = TEXTS, *, is_ahead: bool = True, **options: Any) -> Any:
        place = {"base_url": self.server.base_url, "api_key": "sk-test"}
        told = {
            "home": str(self.home),
            "ahead": str(self.ahead if is_ahead else self.home / "never"),
            "lease": self.lease,
            "texts": list(texts),
            "options": {**place, **options},
        }
        self._running.append(self._forks(PROCESS, json.dumps(told), stdout=subprocess.PIPE))
        return self._running[-1]

    def until_claimants(self, count: int) -> None:
        """Until so many processes have asked for their texts: what they do not have they wait
        for."""
        connection = driver().connect(self.home / "vectors" / "index.db", isolation_level=None)
        with contextlib.closing(connection):
            until(
                lambda: connection.execute("SELECT count(*) FROM claimant").fetchone()[0] == count
            )

    def until_in_flight(self, requests: int) -> None:
        until(lambda: len(self.replies) == requests)

    @property
    def billed(self) -> Counter[str]:
        return self.server.meter.billed_texts

    def close(self) -> None:
        self.go.set()
        for process in self._running:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.communicate()


def said(process: Any) -> str:
    return str(process.communicate(timeout=SECONDS)[0]).strip()


def reused(*processes: Any) -> list[int]:
    """How many rows each had from others, once it has ended with the right vectors."""
    words = [said(process).split() for process in processes]
    assert [word[0] for word in words] == ["right"] * len(words)
    return [int(word[1]) for word in words]


@pytest.fixture
def office(tmp_path: Path, forks: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Office]:
    with FakeOpenAI(api_key=None) as server:
        made = Office(tmp_path, forks, server)
        answer = server.answer

        def held(request: Any) -> Any:
            if made.refuses and request.headers["authorization"] == f"Bearer {REFUSED}":
                reply = json_reply({"error": {"message": "refused"}}, status=made.refuses)
            else:
                reply = answer(request)
            # It is billed by now, if it is.
            made.replies.append(reply)
            assert made.go.wait(SECONDS)
            made.replies.remove(reply)
            return reply

        monkeypatch.setattr(server, "answer", held)
        yield made
        made.close()


def test_four_processes_are_billed_for_300_texts_once(office: Office) -> None:
    processes = [office.start() for _ in range(4)]
    assert sum(reused(*processes)) == 900
    assert office.billed == Counter(TEXTS)
    assert reused(office.start()) == [300]
    assert office.billed == Counter(TEXTS)


def test_all_wait_for_the_first_and_none_needs_a_request(office: Office) -> None:
    office.go.clear()
    first = office.start()
    office.until_in_flight(4)
    others = [office.start() for _ in range(3)]
    office.until_claimants(4)
    office.go.set()
    assert reused(first, *others) == [0, 300, 300, 300]
    assert office.billed == Counter(TEXTS)


@pytest.mark.parametrize("moment", ["while the others wait", "before they come"])
def test_where_the_first_is_killed_the_next_takes_over(office: Office, moment: str) -> None:
    # It is seen to have ended: no lease has to.
    office.lease = 3600.0
    office.go.clear()
    first = office.start()
    office.until_in_flight(4)
    in_flight = set(office.billed)
    assert len(in_flight) == 4 * PER_REQUEST
    others = []
    if moment == "while the others wait":
        others = [office.start() for _ in range(3)]
        office.until_claimants(4)
    first.kill()
    first.wait(SECONDS)
    others = others or [office.start() for _ in range(3)]
    office.go.set()
    assert sum(reused(*others)) == 600
    # What the first one had in flight was billed to no avail.
    assert office.billed == Counter(TEXTS) + Counter(in_flight)


def test_where_the_first_dies_midway_what_it_kept_is_not_paid_for_again(office: Office) -> None:
    first = office.start()
    until(lambda: len(office.billed) >= 6 * PER_REQUEST)
    office.go.clear()
    others = [office.start() for _ in range(3)]
    first.kill()
    first.wait(SECONDS)
    office.go.set()
    reused(*others)
    twice = sum((office.billed - Counter(TEXTS)).values())
    assert set(office.billed) == set(TEXTS)
    assert twice <= 4 * PER_REQUEST


def test_a_process_that_stands_still_is_waited_for_until_its_lease_ends(office: Office) -> None:
    office.go.clear()
    first = office.start(is_ahead=False)
    office.until_in_flight(4)
    in_flight = set(office.billed)
    others = [office.start() for _ in range(3)]
    office.until_claimants(4)
    first.stop()
    office.go.set()
    # What it has asked for is answered, and not read. Nothing is billed before its lease ends.
    office.until_in_flight(0)
    assert office.billed == Counter(in_flight)
    office.ahead.touch()
    assert sum(reused(*others)) == 600
    assert office.billed == Counter(TEXTS) + Counter(in_flight)
    first.send_signal(signal.SIGCONT)
    said(first)
    assert max(office.billed.values()) <= 3
    assert reused(office.start()) == [300], "it did no harm"


def test_of_sets_that_overlap_each_text_is_billed_once(office: Office) -> None:
    texts = [f"text {number}" for number in range(450)]
    processes = [office.start(texts[start : start + 200]) for start in (0, 80, 160, 250)]
    assert sum(reused(*processes)) == 4 * 200 - 450
    assert office.billed == Counter(texts)


@pytest.mark.parametrize("status", [401, 500])
def test_where_the_first_fails_the_others_do_not_hang(office: Office, status: int) -> None:
    # It gives up what it claimed: no lease has to end, however slow a process is.
    office.lease = 3600.0
    office.go.clear()
    office.refuses = status
    first = office.start(api_key=REFUSED)
    office.until_in_flight(4)
    others = [office.start() for _ in range(3)]
    office.until_claimants(4)
    office.go.set()
    assert said(first) == ("AuthenticationFailed" if status == 401 else "ProviderUnavailable")
    assert sum(reused(*others)) == 600
    assert office.billed == Counter(TEXTS)
