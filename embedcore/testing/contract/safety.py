"""Contract tests of failures, secrets and concurrent callers."""

from __future__ import annotations

import base64
import logging
import math
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

import numpy as np
import pytest

from embedcore.errors import EmbeddingError, TransientProviderError
from embedcore.provider.types import BatchLimits, EmbedRequest
from embedcore.testing.contract.base import PROBES, ContractBase, distance, embed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from _typeshed import TraceFunction

    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import Vectors


_THREADS = 8
_ROUNDS = 4
_CANARY = "The patient in room 217 is called Wilhelmina Oddington."


class SafetyContract(ContractBase):
    """Errors, secrets, threads, and what is left behind."""

    def test_errors_are_typed(self, broken_embedder: Embedder) -> None:
        error = _failure(broken_embedder)
        assert isinstance(error, EmbeddingError), (
            f"a failing request raised {type(error).__module__}.{type(error).__qualname__}: "
            f"translate it into TransientProviderError, PermanentProviderError or a subclass"
        )
        assert str(error).strip(), "the error says nothing: say what happened and what to do next"
        assert error.billed in ("no", "yes", "unknown"), f"error.billed is {error.billed!r}"
        assert isinstance(error.retryable, bool), f"error.retryable is {error.retryable!r}"
        if isinstance(error, TransientProviderError) and error.retry_after is not None:
            wait = error.retry_after
            assert math.isfinite(wait), f"error.retry_after is {wait}"
            assert wait >= 0, f"error.retry_after is {wait}: no caller can wait for that"

    def test_secret_is_not_shown(
        self,
        embedder: Embedder,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        marks = self._marks()
        with caplog.at_level(logging.DEBUG):
            embed(embedder, PROBES[:1])
        places: dict[str, object] = {
            "embedder": embedder,
            "embedder.info": embedder.info,
            "embedder.tokenizer": embedder.tokenizer,
            "embedder.batch": embedder.batch,
        }
        shown = {f"repr({name})": repr(value) for name, value in places.items()}
        shown |= {f"str({name})": str(value) for name, value in places.items()}
        shown |= {"the log": caplog.text, "the output": "".join(capfd.readouterr())}
        _assert_hidden(marks, shown)

    def test_secret_is_not_in_errors(
        self,
        broken_embedder: Embedder,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        marks = self._marks()
        with caplog.at_level(logging.DEBUG):
            error = _failure(broken_embedder)
        shown = {
            "the error's text": str(error),
            "repr(error)": repr(error),
            "the error's attributes": repr(vars(error)),
            "the traceback, with what caused it": "".join(traceback.format_exception(error)),
            "the log": caplog.text,
            "the output": "".join(capfd.readouterr()),
        }
        _assert_hidden(marks, shown)

    def test_secret_is_not_in_plain_attributes(self, embedder: Embedder) -> None:
        embed(embedder, PROBES[:1])
        _assert_hidden(self._marks(), {f"embedder.{k}": v for k, v in _attributes(embedder, 2)})

    def test_texts_are_not_in_errors(self, broken_embedder: Embedder) -> None:
        error = _failure(broken_embedder, _CANARY)
        shown = {
            "the error's text": str(error),
            "its attributes": repr(vars(error)),
            "its traceback, with what caused it": "".join(traceback.format_exception(error)),
        }
        for place, text in shown.items():
            assert _CANARY not in text, (
                f"the text that was sent is in {place}: texts are private, and errors are logged; "
                f"leave out what the server sends back, and errors that repeat their input"
            )

    def test_failed_request_is_sent_once(self, broken_embedder: Embedder) -> None:
        before = self.server_requests()
        _failure(broken_embedder)
        after = self.server_requests()
        if before is None or after is None:
            pytest.skip("define server_requests() to have it seen that nothing is tried again")
        assert after - before <= 1, (
            f"one call of embed sent {after - before} requests: do not retry in a provider (SDKs "
            f"have a setting for it); embedcore does, within the budget and the rate limits"
        )

    def test_texts_are_not_changed(self, embedder: Embedder) -> None:
        texts = list(PROBES[: embedder.info.max_texts_per_request])
        request = EmbedRequest(texts=texts)
        embedder.embed(request)
        assert request.texts is texts, "embed replaced the request's texts"
        assert texts == list(PROBES[: len(texts)]), (
            "embed changed the caller's list of texts: work on a copy"
        )

    def test_reply_stays_as_it_was(self, embedder: Embedder) -> None:
        first = embed(embedder, [PROBES[0]])
        kept = first.copy()
        embed(embedder, [PROBES[1]])
        assert np.array_equal(first, kept), (
            "a reply's vectors changed by the next request: give every reply an array of its own"
        )
        if first.flags.writeable:
            first[:] = 0
        self.assert_same(
            embed(embedder, [PROBES[0]])[0], kept[0], "a caller that wrote to a reply spoilt others"
        )

    def test_several_threads_at_once(self, embedder: Embedder) -> None:
        alone = {text: embed(embedder, [text])[0] for text in PROBES}
        counts = dict(zip(PROBES, embedder.tokenizer.count(PROBES), strict=True))
        start = threading.Barrier(_THREADS)
        wrong: list[str] = []

        def work(number: int) -> None:
            try:
                start.wait()
                for turn in range(_ROUNDS):
                    texts = _share(embedder, number + turn)
                    wrong.extend(self._wrong_rows(embedder, texts, alone))
                    if embedder.tokenizer.count(texts) != [counts[text] for text in texts]:
                        wrong.append("tokenizer.count gave another count")
            except Exception as error:  # noqa: BLE001 - told to the author below
                wrong.append(f"a thread raised {type(error).__name__}: {error}")

        _run_in_threads(work, package=type(embedder).__module__.partition(".")[0])
        assert not wrong, (
            f"{_THREADS} threads at once, and {wrong[0]}: an embedder is called from several "
            f"threads, so keep what belongs to one request out of self"
        )

    def test_close_may_be_called_twice(self, embedder: Embedder) -> None:
        embed(embedder, PROBES[:1])
        embedder.close()
        embedder.close()

    def test_batch_is_none_or_has_limits(self, embedder: Embedder) -> None:
        batch = embedder.batch
        if batch is None:
            return
        limits = batch.limits
        assert isinstance(limits, BatchLimits), f"batch.limits must be a BatchLimits: {limits!r}"
        for name in ("max_items", "max_bytes", "max_enqueued_tokens", "window"):
            value = getattr(limits, name)
            assert value is None or value > 0, f"batch.limits.{name} is {value!r}"

    def _marks(self) -> list[str]:
        """What would betray the secret: itself, each half of a long one, and its base64 form."""
        if not self.secret:
            pytest.skip("set secret to the key that the embedder is given, to have it looked for")
        half = len(self.secret) // 2
        halves = [self.secret[:half], self.secret[half:]] if half >= 8 else []
        return [self.secret, *halves, base64.b64encode(self.secret.encode()).decode().rstrip("=")]

    def _wrong_rows(
        self, embedder: Embedder, texts: Sequence[str], alone: dict[str, Vectors]
    ) -> list[str]:
        return [
            f"row {place} is not the vector of its text"
            for place, (text, row) in enumerate(zip(texts, embed(embedder, texts), strict=True))
            if distance(row, alone[text]) > self.tolerance
        ]


def _share(embedder: Embedder, number: int) -> list[str]:
    """Another choice of texts, of another length, for each number."""
    start = number % len(PROBES)
    turned = PROBES[start:] + PROBES[:start]
    return list(turned[: min(1 + number % 3, embedder.info.max_texts_per_request)])


def _run_in_threads(work: Callable[[int], None], *, package: str) -> None:
    """Run it in all threads at once; they take turns at every line of this package.

    Left alone, the interpreter changes threads so seldom, and never between some lines, that most
    races are never seen.
    """

    def take_turns(frame: FrameType, event: str, _: object) -> TraceFunction | None:
        if frame.f_globals.get("__name__", "").partition(".")[0] != package:
            return None
        if event == "line":
            time.sleep(0)
        return take_turns

    def traced(number: int) -> None:
        before = sys.gettrace()
        sys.settrace(take_turns)
        try:
            work(number)
        finally:
            sys.settrace(before)

    threads = [threading.Thread(target=traced, args=(number,)) for number in range(_THREADS)]
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)


def _attributes(value: object, depth: int) -> Iterator[tuple[str, str]]:
    """Name and repr of every attribute, and of every attribute of those, so many levels deep."""
    for name, held in list(getattr(value, "__dict__", {}).items()):
        if hasattr(held, "get_secret_value"):
            continue  # a SecretStr, which hides what it holds unless it is asked
        yield name, repr(held)
        if depth > 1:
            yield from ((f"{name}.{inner}", shown) for inner, shown in _attributes(held, depth - 1))


def _failure(broken: Embedder, text: str = PROBES[0]) -> Exception:
    """What a request to a broken embedder raises."""
    try:
        broken.embed(EmbedRequest(texts=[text]))
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        return error
    raise AssertionError(
        "make_broken_embedder() gave an embedder that works, or one that hides its failure: an "
        "error must be raised, never answered with vectors"
    )


def _assert_hidden(marks: Sequence[str], shown: dict[str, str]) -> None:
    for place, text in shown.items():
        for mark in marks:
            assert mark not in text, (
                f"the secret, or half of it, is in {place}: keep keys in a SecretStr until a "
                f"request is sent, and out of __repr__; scrub what a server sends back"
            )
