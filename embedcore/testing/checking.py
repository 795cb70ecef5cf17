"""Runs the kit for an installed provider, without a test file of its own.

``run`` collects ``ProviderContract`` and ``EmbedderContract`` in this process, with no plugin,
configuration or conftest of the user's.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import ConfigurationError
from embedcore.provider.base import WrapperEmbedder

if TYPE_CHECKING:
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import EmbedReply, EmbedRequest

_OUTCOMES: Final = ("passed", "failed", "known", "not run")
_UNSENT: Final = "not sent: "
_LONGEST: Final = 600
_NAME: Final = "test_kit.py"
_FILE: Final = """
from embedcore.testing import checking

globals().update(checking.classes())
"""
_OF_PYTEST: Final = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD")
_classes: dict[str, type] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tested:
    """One test. ``outcome``: "passed", "failed", "known" (to fail) or "not run"; ``why``: of the
    last three."""

    name: str
    outcome: str
    why: str = ""

    def as_json(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the kit found."""

    tests: Sequence[Tested]

    @property
    def passed(self) -> bool:
        return bool(self.tests) and not any(one.outcome == "failed" for one in self.tests)

    @property
    def unsent(self) -> int:
        """Tests that were not run since they would have sent more than they may."""
        return sum(one.why.startswith(_UNSENT) for one in self.tests)

    def counts(self) -> dict[str, int]:
        return {name: sum(one.outcome == name for one in self.tests) for name in _OUTCOMES}


class Meter:
    """Lets embedders send so many tokens together. What would send more is a test that is not run.

    ``sent``: the tokens so far, as the service billed them, else as they were bounded.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.sent = 0
        self._lock = Lock()

    def over(self, embedder: Embedder) -> Embedder:
        """The same embedder, on this meter."""
        return _Metered(embedder, self)

    def take(self, tokens: int) -> None:
        import pytest

        with self._lock:
            if self.sent + tokens > self.most:
                pytest.skip(f"{_UNSENT}{tokens} tokens are more than may be sent")
            self.sent += tokens

    def correct(self, taken: int, billed: int | None) -> None:
        with self._lock:
            self.sent += 0 if billed is None else billed - taken


class _Metered(WrapperEmbedder):
    def __init__(self, inner: Embedder, meter: Meter) -> None:
        super().__init__(inner)
        self._meter = meter

    def embed(self, request: EmbedRequest) -> EmbedReply:
        info = self.info
        texts = list(request.texts)
        if not texts:
            return self.inner.embed(request)
        tokens = sum(self.tokenizer.count(texts)) + info.overhead_tokens_per_text * len(texts)
        self._meter.take(tokens)
        reply = self.inner.embed(request)
        self._meter.correct(tokens, reply.tokens)
        return reply


def classes() -> Mapping[str, type]:
    """The test classes of the run that is under way."""
    return _classes


def run(
    provider: str,
    model: str,
    make_embedder: Callable[[], Embedder] | None,
    *,
    examples: int | None = None,
) -> Verdict:
    """Run the tests. ``make_embedder``: None tests the declaration alone; ``examples``: how many
    texts each property is tried with.

    Raises ``ConfigurationError`` where pytest and hypothesis are not installed.
    """
    try:
        import pytest

        from embedcore.provider import registry
        from embedcore.testing import EmbedderContract, ProviderContract
    except ImportError as error:
        raise ConfigurationError(
            f"the kit needs the packages pytest and hypothesis ({error}): pip install pytest "
            "hypothesis"
        ) from None
    declared = registry.load(provider)
    body: dict[str, Any] = {"provider": declared, "model": model}
    _classes["TestProvider"] = type("TestProvider", (ProviderContract,), body)
    if make_embedder is not None:
        make = make_embedder
        body = {
            "make_embedder": lambda self: make(),  # noqa: ARG005
            "known_failures": declared.known_failures,
        }
        if examples is not None:
            body["examples"] = examples
        _classes["TestEmbedder"] = type("TestEmbedder", (EmbedderContract,), body)
    collected = _Collected()
    before = {name: os.environ.pop(name, None) for name in _OF_PYTEST}
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    try:
        with tempfile.TemporaryDirectory(prefix="embedcore-check-") as folder:
            file = Path(folder) / _NAME
            file.write_text(_FILE, encoding="utf-8")
            (Path(folder) / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
            options = [
                *("-c", f"{folder}/pytest.ini", f"--rootdir={folder}", "--noconftest"),
                *("--import-mode=importlib", "-q", "--tb=short", "-p", "no:cacheprovider"),
            ]
            with contextlib.redirect_stdout(io.StringIO()):
                pytest.main([*options, str(file)], plugins=[collected])
    finally:
        del os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
        _classes.clear()
        # Else the next run in this process would find the classes of this one in it.
        sys.modules.pop(Path(_NAME).stem, None)
    return Verdict(tests=tuple(collected.tests))


class _Collected:
    """A plugin of pytest that keeps what became of each test."""

    def __init__(self) -> None:
        self.tests: list[Tested] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.rpartition("::")[2]
        known = getattr(report, "wasxfail", None)
        if known is not None and report.when == "call":
            outcome = "passed" if report.outcome == "passed" else "known"
            self.tests.append(Tested(name=name, outcome=outcome, why=known))
        elif report.failed:
            self.tests.append(Tested(name=name, outcome="failed", why=_why(report)))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            why = str(reason).removeprefix("Skipped: ")
            self.tests.append(Tested(name=name, outcome="not run", why=why))
        elif report.when == "call":
            self.tests.append(Tested(name=name, outcome="passed"))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.tests.append(Tested(name="the kit", outcome="failed", why=_why(report)))


def _why(report: Any) -> str:
    """The message of a failure on one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    said = str(report.longrepr) if crash is None else str(crash.message)
    first = said.removeprefix("AssertionError: ").partition("\nassert ")[0]
    line = " ".join(first.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
