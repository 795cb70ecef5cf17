"""Contract tests of what is sent: the texts as they are, and one request for each call."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import pytest

from embedcore.errors import EmbeddingError
from embedcore.provider.types import EmbedRequest
from embedcore.testing.contract.base import (
    PROBES,
    ContractBase,
    embed,
    equal,
    in_pieces,
    outcome_of,
    several,
    shown,
)

if TYPE_CHECKING:
    from embedcore.provider.protocol import Embedder

_LONG: Final = 60_000  # characters
_SHORTEST: Final = 200
_OF_THE_LIMIT: Final = 0.9  # a word may take more tokens than the one that it replaces

DIFFERENCES: Final = {
    "letter case": (
        "Send THE Report to anna",
        "send the report to anna",
        "SEND THE REPORT TO ANNA",
    ),
    "white space at the edges": (
        "a line",
        " a line",
        "a line ",
        "\ta line",
        "a line\n",
        "\na line",
    ),
    "white space inside": (
        "one two",
        "one  two",
        "one   two",
        "one\ttwo",
        "one\u00a0two",
        "onetwo",
    ),
    "line breaks": ("one\ntwo", "one\r\ntwo", "one\rtwo", "one two", "onetwo", "one\n\ntwo"),
    "letters beyond ASCII": ("Zürich", "Zrich", "Zurich", "Z?rich", "Zu\ufffdrich", "Zuerich"),
    "other scripts": ("東京", "大阪", "Москва", "??", "\ufffd\ufffd"),
    "emoji": ("well done 👍", "well done", "well done ", "well done 👎", "well done ?"),
    "composed characters (NFC)": ("caf\u00e9", "cafe\u0301", "cafe"),
    "compatibility characters (NFKC)": ("ﬁle x² №5", "file x2 No5", "file x² №5"),
    "invisible characters": ("ab", "a\u200bb", "\ufeffab", "a\u00adb", "a\u200db"),
    "control characters": ("ab", "a\x00b", "a\x01b", "a\x1bb", "a\x7fb", "a b"),
    "punctuation": ("Stop! Now.", "Stop Now", "Stop! Now", "Stop, now?", "“Stop!” Now."),
    "quotes": ('it\'s "so"', "it’s “so”", "its so", 'it"s "so"'),
    "digits": ("room 217", "room 000", "room ", "room 218", "room"),
    "accents": ("resume", "résumé", "resumé"),
    "markup": ("a &amp; b", "a & b", "<b>a</b> & b", "a  b"),
    "escapes": ("a\\nb", "a\nb", "a%20b", "a b", "a\\u0020b"),
    "special tokens": ("a<|endoftext|>b", "ab", "a b", "a[SEP]b", "a</s>b"),
    "addresses": ("see https://a.example/x", "see ", "see", "see https://b.example/y"),
    "function words": ("the cat is on a mat", "cat mat", "cat on mat"),
    "repeated words": ("very very good", "very good", "very very very good"),
    "repeated lines": ("a\nb\na", "a\nb", "a\nb\nb\na"),
    "order of words": ("dog bites man", "man bites dog"),
    "what follows the first line": ("title\nbody", "title\nother", "title"),
    "what follows the first sentence": ("One. Two.", "One. Three.", "One."),
}
"""Texts that a provider may take for one another, by what makes the difference."""


class TextsContract(ContractBase):
    """Each text reaches the server as it is, all of a call in one request."""

    @pytest.mark.parametrize("difference", DIFFERENCES)
    def test_text_is_sent_as_it_is(self, embedder: Embedder, difference: str) -> None:
        if difference in self.alike:
            pytest.skip(f"the class says that its model takes them for the same: {difference}")
        self._check_sent(embedder, DIFFERENCES[difference], difference)

    def test_long_text_is_not_cut(self, embedder: Embedder) -> None:
        text = _long_text(embedder)
        others = [_changed(text, place) for place in (0.0, 0.3, 0.5, 1.0)]
        where = ("at its beginning", "before its middle", "in its middle", "at its end")
        before = self._texts_so_far()
        vector = embed(embedder, [text])[0]
        self._check_received(before, [text], "a long text")
        for other, place in zip(others, where, strict=True):
            assert not equal(embed(embedder, [other])[0], vector), (
                f"two texts of {len(text)} characters that differ {place} have the same vector: "
                "send texts whole. embedcore cuts, by info.max_input_tokens, and says so"
            )

    def test_one_call_is_one_request(self, embedder: Embedder) -> None:
        self.requests_so_far()
        embed(embedder, ["a first request, which may have to connect"])
        most = min(embedder.info.max_texts_per_request, 5000)
        self._counted(embedder, ["a text that was not sent before"], "a text")
        for count in sorted({most, min(most, 2), min(most, 17)}):
            texts = _that_fit(embedder, [f"text {n} of {count}" for n in range(count)])
            self._counted(embedder, texts, f"{len(texts)} texts")
        self._counted(embedder, [_long_text(embedder)], "a long text")

    def test_every_call_reaches_the_server(self, embedder: Embedder) -> None:
        self.requests_so_far()
        for _ in range(2):
            self._counted(embedder, [PROBES[0]], "a text that was sent before")

    def test_tokens_are_those_of_the_whole_request(self, embedder: Embedder) -> None:
        texts = several(embedder)
        most = sum(embedder.tokenizer.count(texts))
        most += embedder.info.overhead_tokens_per_text * len(texts)
        before = self.server_bill()
        reported = embedder.embed(EmbedRequest(texts=texts)).tokens
        after = self.server_bill()
        billed = None if before is None or after is None else after - before
        if reported is None and billed is None:
            pytest.skip("neither EmbedReply.tokens nor server_bill() says what was billed")
        if reported is not None and billed is not None:
            assert reported == billed, (
                f"EmbedReply.tokens is {reported} for {len(texts)} texts in one request, and the "
                f"server billed {billed}"
            )
        tokens = billed if billed is not None else reported
        assert tokens is not None
        assert tokens <= most, (
            f"{len(texts)} texts in one request cost {tokens} tokens, and the tokenizer counts "
            f"{most} for them (overhead included)"
        )
        assert tokens == most or not embedder.tokenizer.exact, (
            f"{len(texts)} texts in one request cost {tokens} tokens, and the tokenizer, which "
            f"calls itself exact, counts {most} for them"
        )

    def _check_sent(self, embedder: Embedder, texts: Sequence[str], difference: str) -> None:
        before = self._texts_so_far()
        if before is None and embedder.info.local:
            pytest.skip("define server_texts() to see which texts the model gets: it is local")
        vectors = in_pieces(embedder, texts)
        if self._check_received(before, texts, difference):
            return
        for (i, one), (j, other) in itertools.combinations(enumerate(texts), 2):
            assert not equal(vectors[i], vectors[j]), (
                f"{shown(one)} and {shown(other)} have the same vector ({difference}): send each "
                "text as it is. If the model takes them for the same, define server_texts(), or "
                f'set alike = ("{difference}",)'
            )

    def _texts_so_far(self) -> int | None:
        texts = self.server_texts()
        return None if texts is None else len(texts)

    def _check_received(self, before: int | None, texts: Sequence[str], what: str) -> bool:
        """Whether the server can be asked; fails if it got other texts than these."""
        if before is None:
            return False
        received = list(self.server_texts() or ())[before:]
        assert len(received) == len(texts), (
            f"{len(texts)} texts were to be sent ({what}), and {len(received)} reached the server"
        )
        pairs = list(zip(texts, received, strict=True))
        for sent, got in pairs:
            assert sent in got, f"{shown(sent)} reached the server as {shown(got)} ({what})"
        # A short text may stand in what is put around it as well.
        first = {got.partition(sent)[::2] for sent, got in pairs}
        last = {got.rpartition(sent)[::2] for sent, got in pairs}
        around = min(first, last, key=len)
        assert len(around) == 1, (
            f"what is put around a text differs from text to text ({what}): {sorted(around)[:3]}"
        )
        return True

    def _counted(self, embedder: Embedder, texts: list[str], what: str) -> None:
        before = self.requests_so_far()
        embed(embedder, texts)
        sent = self.requests_so_far() - before
        if sent == 0 and not hasattr(self, "_counts"):
            pytest.skip("server_requests() does not count the requests of make_embedder()")
        self._counts = True
        assert sent == 1, (
            f"{what} in one call of embed made {sent} requests: a call is one request. embedcore "
            "splits, by info.max_texts_per_request, repeats, and keeps what it has"
        )


def _that_fit(embedder: Embedder, texts: list[str]) -> list[str]:
    """As many of these short texts as fit one request."""
    info, counts = embedder.info, embedder.tokenizer.count(texts)
    longest = max(counts) + info.overhead_tokens_per_text
    largest = max(len(text.encode()) for text in texts)
    most = min(
        (info.max_tokens_per_request or math.inf) / longest,
        (info.max_bytes_per_request or math.inf) / largest,
    )
    return texts if most == math.inf else texts[: max(int(most), 1)]


def _long_text(embedder: Embedder) -> str:
    """A text nearly as long as the model takes, every word of it another one."""
    text = _text_within(embedder)
    while embedder.info.max_input_tokens is None and len(text) > _SHORTEST:
        # Only the server knows: half as long, as long as it refuses.
        if not isinstance(outcome_of(embedder, text), EmbeddingError):
            break
        text = _whole_words(text[: len(text) // 2])
    return text


def _whole_words(text: str) -> str:
    words = text.split(" ")
    return " ".join(words[:-1]) if len(words) > 3 else text


def _text_within(embedder: Embedder) -> str:
    """One that keeps within the limits of ``info``."""
    info = embedder.info
    text = " ".join(f"word{number}" for number in range(_LONG // 10))[:_LONG]
    limits = [info.max_input_tokens, info.max_tokens_per_request]
    tokens = min((each for each in limits if each is not None), default=None)
    if tokens is not None:
        allowed = int(_OF_THE_LIMIT * (tokens - info.overhead_tokens_per_text))
        text = embedder.tokenizer.prefix(text, max(allowed, 1))
    if info.max_bytes_per_request is not None:
        text = text[: info.max_bytes_per_request]
    return _whole_words(text)


def _changed(text: str, share: float) -> str:
    """The same text with other digits in the word at this place."""
    words = text.split(" ")
    place = round(share * (len(words) - 1))
    words[place] = "".join(
        "9876543210"[int(each)] if each.isdigit() else each for each in words[place]
    )
    return " ".join(words)
