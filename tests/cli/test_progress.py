"""What is drawn of a run: lines in a log, and nothing once it is over?"""

from __future__ import annotations

import threading

import pytest

from embedcore.cli.progress import LINE_SECONDS, Lines, Shown
from embedcore.cli.screen import Screen
from embedcore.cli.summary import RunTotals
from embedcore.events import RequestSent, Settled
from embedcore.files.types import FileProgress
from embedcore.money import in_dollars
from embedcore.provider.types import ModelInfo


def told(done: int, stage: str = "embedding", total: int = 1000) -> FileProgress:
    return FileProgress(
        stage=stage, done=done, total=total, tokens=done * 10, cost=in_dollars(done * 200_000)
    )


@pytest.fixture
def screen(monkeypatch):
    made = Screen()
    made.lines = []
    monkeypatch.setattr(made, "info", made.lines.append)
    return made


def test_a_line_now_and_then_with_the_time_that_is_left(screen):
    now = [0.0]
    lines = Lines(screen, monotonic=lambda: now[0])
    for second in range(41):
        now[0] = float(second)
        lines.draw(told(second * 10))
    assert len(screen.lines) == 40 // LINE_SECONDS
    assert screen.lines[1] == (
        "Embedding: 200 of 1,000, 2,000 tokens, $0.000040, about 1 min 20 s left"
    )
    now[0] = 60.0
    lines.draw(told(12_345, "reading", total=0))
    assert screen.lines[-1] == "Reading and counting: 12,345 rows"


def test_a_request_that_was_given_up_draws_nothing_afterwards(screen, monkeypatch):
    monkeypatch.setattr("embedcore.cli.progress.LINE_SECONDS", 0.0)
    with Shown(screen) as shown:
        shown.draw(told(1))
    before = list(screen.lines)
    shown.draw(told(2))
    assert screen.lines == before


def test_quiet_draws_nothing(screen):
    screen.quiet = True
    with Shown(screen) as shown:
        shown.draw(told(1))
    assert not screen.lines


def test_the_tally_adds_up_from_any_thread():
    tally = RunTotals()
    assert tally.text(ModelInfo()) is None
    settled = Settled(scope="s", tokens=3, cost=in_dollars(5), unconfirmed=False)
    lost = Settled(scope="s", tokens=1, cost=in_dollars(2), unconfirmed=True)

    def work() -> None:
        for _ in range(500):
            tally(settled)
            tally(lost)
            tally(RequestSent(provider="p", model="m", inputs=1, tokens=9, attempt=1))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tally.tokens, tally.cost) == (16_000, in_dollars(28_000))
    assert (tally.unconfirmed_tokens, tally.unconfirmed_cost) == (4_000, in_dollars(8_000))
    assert "16,000 tokens" in str(tally.text(ModelInfo()))
    assert "4,000 tokens" in str(tally.text(ModelInfo()))
