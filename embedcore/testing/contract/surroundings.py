"""Contract tests of what a provider touches around it: the process, the network, logs, files."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from embedcore.testing import process
from embedcore.testing.contract.base import PROBES, ContractBase, embed, outcome_of

if TYPE_CHECKING:
    from embedcore.provider.protocol import Embedder

CANARY: Final = "The patient in room 217 is called Wilhelmina Oddington."
_ROUNDS: Final = 2
_IMPORT_SECONDS: Final = 60.0


class SurroundingsContract(ContractBase):
    """Nothing around the embedder is changed, told or left behind."""

    def test_import_touches_nothing(self, embedder: Embedder) -> None:
        module = type(embedder).__module__
        touched = _touched_by_importing(module, tuple(filter(None, sys.path)))
        if touched is None:
            pytest.skip(f"the module {module} cannot be imported by its name in another process")
        assert not touched, (
            f"importing {module} changed {touched}: a program's own settings are not a provider's"
        )

    def test_nothing_is_sent_before_the_first_request(self, request: pytest.FixtureRequest) -> None:
        before = self._requests()
        with process.connections_seen() as seen:
            embedder: Embedder = request.getfixturevalue("embedder")
            embedder.tokenizer.count([PROBES[0]])
            embedder.tokenizer.prefix(PROBES[0], 3)
            repr((embedder, embedder.info, embedder.batch))
        assert not seen, (
            f"making an embedder, or counting tokens, made {seen[0]}: leave the network to embed"
        )
        assert self._requests() == before, (
            "making an embedder, or counting tokens, sent a request: leave the network to embed"
        )

    def test_constructor_leaves_the_process_alone(self, request: pytest.FixtureRequest) -> None:
        before = process.state_of_process()
        request.getfixturevalue("embedder")
        found = process.changes(before, process.state_of_process())
        assert not found, (
            f"making an embedder changed {', '.join(found)}: it belongs to the whole program; keep "
            "settings in the embedder"
        )

    def test_request_leaves_the_process_alone(self, embedder: Embedder) -> None:
        embed(embedder, [PROBES[0]])  # what it imports may set up what it likes
        before = process.state_of_process()
        embed(embedder, [PROBES[0]])
        found = process.changes(before, process.state_of_process())
        assert not found, (
            f"a request changed {', '.join(found)}: it belongs to the whole program, and other "
            "threads rely on it"
        )
        seeded = process.seeds(lambda: embed(embedder, [PROBES[0]]))
        assert not seeded, (
            f"a request seeds {' and '.join(seeded)}: a program's random numbers would repeat; use "
            "a generator of your own"
        )

    def test_texts_are_not_logged(
        self, embedder: Embedder, caplog: pytest.LogCaptureFixture
    ) -> None:
        with everything_logged(embedder, caplog):
            embed(embedder, [CANARY])
            embed(embedder, [CANARY, PROBES[0]][: embedder.info.max_texts_per_request])
        _assert_untold(caplog.text, "the log")

    def test_nothing_is_printed(
        self, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
    ) -> None:
        embed(request.getfixturevalue("embedder"), [PROBES[0]])
        printed = capfd.readouterr().out
        assert not printed, (
            f"making an embedder, or a request, printed {printed[:40]!r}: programs write their own "
            "results there; use logging"
        )

    def test_texts_are_not_printed(
        self, embedder: Embedder, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            embed(embedder, [CANARY])
        _assert_untold("".join(capfd.readouterr()), "the output")
        _assert_untold(" ".join(str(each.message) for each in warned), "a warning")

    def test_texts_of_a_failed_request_are_not_told(
        self,
        broken_embedder: Embedder,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        with everything_logged(broken_embedder, caplog):
            outcome_of(broken_embedder, CANARY)
        _assert_untold(caplog.text, "the log")
        _assert_untold("".join(capfd.readouterr()), "the output")

    def test_no_thread_is_left(self) -> None:
        self._leaves_nothing(
            process.live_threads, "threads", "end in close() what the embedder started"
        )

    def test_no_file_or_socket_is_left(self) -> None:
        if not process.open_files():
            pytest.skip("this system does not say which files a process has open")
        self._leaves_nothing(
            process.open_files,
            "open files or sockets",
            "close responses when they are read, and connections in close()",
        )

    def test_no_file_is_written(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        embedder: Embedder = request.getfixturevalue("embedder")
        embed(embedder, [PROBES[0]])  # what it imports may compile what it likes
        for name in ("working", "temporary"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "working")
        monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
        embed(embedder, [CANARY])
        embedder.close()
        found = [path.name for path in tmp_path.rglob("*") if path.is_file()]
        assert not found, (
            f"a request left {', '.join(found)} in the working folder or that for temporary "
            "files: texts are private, and stay in memory"
        )

    def _requests(self) -> int | None:
        try:
            return self.server_requests()
        except AttributeError:  # it reads what only another hook makes
            return None

    def _leaves_nothing(self, there: Callable[[], set[object]], what: str, advice: str) -> None:
        def one_life() -> None:
            embedder = self.fresh()
            for text in PROBES[:3]:
                embed(embedder, [text])
            embedder.close()

        grown = process.left_behind(_ROUNDS, one_life, there)
        assert min(grown) == 0, (
            f"{grown[-1]} more {what} after three requests and close(), each time: {advice}"
        )


@contextmanager
def everything_logged(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every logger writes every line, also those that have a level of their own."""
    package = type(embedder).__module__.partition(".")[0]
    levels: dict[logging.Logger, tuple[int, bool, bool]] = {}
    for name, logger in list(logging.root.manager.loggerDict.items()):
        own = name.partition(".")[0] in (package, "embedcore")
        if isinstance(logger, logging.Logger) and own:
            levels[logger] = (logger.level, logger.disabled, logger.propagate)
            logger.setLevel(1)
            logger.disabled, logger.propagate = False, True
    try:
        with caplog.at_level(1):
            yield
    finally:
        for logger, (level, disabled, propagate) in levels.items():
            logger.setLevel(level)
            logger.disabled, logger.propagate = disabled, propagate


def _assert_untold(told: str, place: str) -> None:
    for part in (CANARY, CANARY[:16], CANARY[-16:], "Wilhelmina"):
        assert part not in told, (
            f"the text that was sent, or a part of it, is in {place}: texts are private; say how "
            "many there are and how long they are"
        )


@cache
def _touched_by_importing(module: str, path: tuple[str, ...]) -> str | None:
    """What importing it changes in a new process, or None where it cannot be imported there.

    Asked once for all the classes that test embedders of one module.
    """
    done = subprocess.run(  # noqa: S603 - this Python
        [sys.executable, "-m", "embedcore.testing.process", module],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=_IMPORT_SECONDS,
        check=False,
    )
    return done.stdout.rpartition("touched:")[2].strip() if done.returncode == 0 else None
