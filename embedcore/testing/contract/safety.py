"""Contract tests of secrets, of what belongs to the caller, and of concurrent callers."""

from __future__ import annotations

import base64
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

import numpy as np
import pytest

from embedcore.provider.types import BatchLimits, EmbedRequest
from embedcore.testing.contract.base import PROBES, ContractBase, distance, embed, in_pieces
from embedcore.testing.contract.failures import failure_of
from embedcore.testing.contract.surroundings import CANARY, everything_logged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from _typeshed import TraceFunction

    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import Vectors


_THREADS = 8
_ROUNDS = 4


class SafetyContract(ContractBase):
    """Secrets, threads, and what belongs to the caller."""

    def test_secret_is_not_shown(
        self,
        embedder: Embedder,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        marks = self._marks()
        with everything_logged(embedder, caplog):
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
        with everything_logged(broken_embedder, caplog):
            error = failure_of(broken_embedder)
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
        error = failure_of(broken_embedder, CANARY)
        shown = {
            "the error's text": str(error),
            "its attributes": repr(vars(error)),
            "its traceback, with what caused it": "".join(traceback.format_exception(error)),
        }
        for place, text in shown.items():
            assert CANARY not in text, (
                f"the text that was sent is in {place}: texts are private, and errors are logged; "
                f"leave out what the server sends back, and errors that repeat their input"
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
        alone = dict(zip(PROBES, in_pieces(embedder, PROBES), strict=True))
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
                wrong.append(f"a thread raised {type(error).__name__}: {_first_line(error)}")

        _run_in_threads(work, package=type(embedder).__module__.partition(".")[0])
        assert not wrong, (
            f"{_THREADS} threads at once, and {wrong[0]}: an embedder is called from several "
            f"threads, so keep what belongs to one request out of self"
        )

    def test_tokenizer_in_several_threads(self, embedder: Embedder) -> None:
        tokenizer = embedder.tokenizer
        counts = dict(zip(PROBES, tokenizer.count(PROBES), strict=True))
        prefixes = {text: tokenizer.prefix(text, 5) for text in PROBES}
        start = threading.Barrier(_THREADS)
        wrong: list[str] = []

        def work(number: int) -> None:
            try:
                start.wait()
                for turn in range(_ROUNDS):
                    texts = PROBES[: 1 + (number + turn) % len(PROBES)]
                    if list(tokenizer.count(texts)) != [counts[text] for text in texts]:
                        wrong.append("count gave another number")
                    if tokenizer.prefix(texts[-1], 5) != prefixes[texts[-1]]:
                        wrong.append("prefix gave another text")
            except Exception as error:  # noqa: BLE001 - told to the author below
                wrong.append(f"a thread raised {type(error).__name__}: {_first_line(error)}")

        _run_in_threads(work, package=type(tokenizer).__module__.partition(".")[0])
        assert not wrong, (
            f"{_THREADS} threads counted tokens at once, and {wrong[0]}: keep what belongs to one "
            "call out of self"
        )

    def test_array_to_write_into_is_not_kept(self, embedder: Embedder) -> None:
        width = embed(embedder, [PROBES[0]]).shape[1]
        into = np.zeros((1, width), dtype=np.float32)
        embedder.embed(EmbedRequest(texts=[PROBES[0]], into=into))
        kept = into.copy()
        for text in PROBES[1:3]:
            embed(embedder, [text])
        assert np.array_equal(into, kept), (
            "a later request wrote into EmbedRequest.into of an earlier one: never keep it"
        )

    def test_secret_is_not_in_a_reply(self, embedder: Embedder) -> None:
        marks = self._marks()
        reply = embedder.embed(EmbedRequest(texts=[PROBES[0]]))
        _assert_hidden(marks, {"EmbedReply": f"{reply.model} {reply.request_id} {reply.limits}"})

    def test_close_may_be_called_twice(self, embedder: Embedder) -> None:
        embed(embedder, PROBES[:1])
        embedder.close()
        embedder.close()

    def test_close_without_a_request(self) -> None:
        unused = self.fresh()
        try:
            unused.close()
        except Exception as error:
            raise AssertionError(
                f"close() before the first request raised {type(error).__name__}"
            ) from error

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
        plain = self.secret.encode()
        # Three letters of base64 hold four bytes: the key after a user's name looks otherwise.
        encoded = [base64.b64encode(b" " * before + plain).decode() for before in range(3)]
        return [self.secret, *halves, plain.hex(), *(each[4:-4] for each in encoded)]

    def _wrong_rows(
        self, embedder: Embedder, texts: Sequence[str], alone: dict[str, Vectors]
    ) -> list[str]:
        return [
            f"row {place} is not the vector of its text"
            for place, (text, row) in enumerate(zip(texts, embed(embedder, texts), strict=True))
            if distance(row, alone[text]) > self.tolerance
        ]


def _first_line(error: Exception) -> str:
    """What an assertion says, without the arrays that it compares."""
    return str(error).partition("\n")[0]


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
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    named = {name: getattr(value, name, None) for name in slots if not name.startswith("__")}
    for name, held in {**named, **getattr(value, "__dict__", {})}.items():
        if hasattr(held, "get_secret_value"):
            continue  # a SecretStr, which hides what it holds unless it is asked
        yield name, repr(held)
        if depth > 1:
            yield from ((f"{name}.{inner}", shown) for inner, shown in _attributes(held, depth - 1))


def _assert_hidden(marks: Sequence[str], shown: dict[str, str]) -> None:
    for place, text in shown.items():
        for mark in marks:
            assert mark not in text, (
                f"the secret, or half of it, is in {place}: keep keys in a SecretStr until a "
                f"request is sent, and out of __repr__; scrub what a server sends back"
            )
