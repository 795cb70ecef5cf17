"""Contract tests of the tokenizer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st

from embedcore.provider.types import EmbedRequest
from embedcore.testing.contract.base import PROBES, ContractBase, embed
from embedcore.testing.strategies import ODD_TEXTS, text_lists, texts, token_counts

if TYPE_CHECKING:
    from collections.abc import Callable

    from embedcore.provider.protocol import Embedder


_SHORT = 200
_SMALL_LIMITS = 12
_LARGEST_TEXT = 1_000_000  # bytes


class TokensContract(ContractBase):
    """``tokenizer``: counts, prefixes, and the bill that the counts must bound."""

    def test_tokenizer_says_whether_it_is_exact(self, embedder: Embedder) -> None:
        exact = embedder.tokenizer.exact
        assert isinstance(exact, bool), f"tokenizer.exact must be True or False, not {exact!r}"

    def test_counts_are_whole_numbers(self, embedder: Embedder) -> None:
        def counted(given: list[str]) -> None:
            counts = embedder.tokenizer.count(given)
            assert len(counts) == len(given), (
                f"tokenizer.count gave {len(counts)} counts for {len(given)} texts"
            )
            for text, count in zip(given, counts, strict=True):
                assert isinstance(count, int), f"a count must be an int, not {count!r}"
                assert count >= 1, f"{text[:40]!r} counts {count} tokens: a text has at least 1"

        self.holds(counted, text_lists(max_size=8))

    def test_count_of_a_text_depends_on_it_alone(self, embedder: Embedder) -> None:
        def the_same_alone(given: list[str]) -> None:
            together = list(embedder.tokenizer.count(given))
            alone = [embedder.tokenizer.count([text])[0] for text in given]
            assert together == alone, (
                f"tokenizer.count gives {together} for a list and {alone} text by text"
            )

        self.holds(the_same_alone, text_lists(max_size=8))

    def test_prefix_is_a_prefix_that_fits(self, embedder: Embedder) -> None:
        def fits(given: tuple[str, int]) -> None:
            text, limit = given
            prefix = embedder.tokenizer.prefix(text, limit)
            assert text.startswith(prefix), (
                f"prefix({text[:40]!r}, {limit}) ends in {prefix[-3:]!r}, which is not in the text "
                f"there: cut between whole characters, never inside one"
            )
            count = embedder.tokenizer.count([prefix])[0] if prefix else 0
            assert count <= limit, f"prefix({text[:40]!r}, {limit}) counts {count} tokens"

        _with_odd_texts(fits)
        self.holds(fits, st.tuples(texts(), token_counts(max_value=100)))

    def test_prefix_is_the_longest(self, embedder: Embedder) -> None:
        def nothing_longer_fits(given: tuple[str, int]) -> None:
            text, limit = given[0][:_SHORT], given[1]
            prefix = embedder.tokenizer.prefix(text, limit)
            longer = [text[:end] for end in range(len(prefix) + 1, len(text) + 1)]
            for each, count in zip(longer, embedder.tokenizer.count(longer), strict=True):
                assert count > limit, (
                    f"prefix({text[:40]!r}, {limit}) has {len(prefix)} characters, and {len(each)} "
                    f"would still count only {count} tokens: the longest that fits is wanted"
                )

        _with_odd_texts(nothing_longer_fits)
        self.holds(nothing_longer_fits, st.tuples(texts(), token_counts(max_value=40)))

    def test_text_that_fits_is_not_cut(self, embedder: Embedder) -> None:
        def whole(text: str) -> None:
            count = embedder.tokenizer.count([text])[0]
            for limit in (count, count + 1, 10 * count):
                prefix = embedder.tokenizer.prefix(text, limit)
                assert prefix == text, f"a text of {count} tokens is cut by prefix(text, {limit})"

        self.holds(whole, texts())

    def test_long_text_can_be_cut(self, embedder: Embedder) -> None:
        text = "".join(PROBES) * 100
        for limit in (1, 100, 2000):
            prefix = embedder.tokenizer.prefix(text, limit)
            assert text.startswith(prefix), "the prefix of a long text is not its beginning"
            if prefix == text:
                continue
            within, beyond = embedder.tokenizer.count([prefix, text[: len(prefix) + 1]])
            assert not prefix or within <= limit, f"prefix(text, {limit}) counts {within} tokens"
            assert beyond > limit, f"prefix(text, {limit}) could be one character longer"

    def test_counts_stay_within_the_bytes(self, embedder: Embedder) -> None:
        factor = embedder.info.tokens_per_byte

        def within(text: str) -> None:
            count, most = embedder.tokenizer.count([text])[0], factor * len(text.encode())
            assert count <= most, (
                f"{text[:40]!r} counts {count} tokens, more than the {most} that its UTF-8 bytes "
                f"allow: cost is reserved by bytes, so raise info.tokens_per_byte, or put what "
                f"every text has on top into info.overhead_tokens_per_text"
            )

        for text in ODD_TEXTS.values():
            within(text)
        self.holds(within, texts())

    def test_longest_text_is_accepted(self, embedder: Embedder) -> None:
        limit = embedder.info.max_input_tokens
        if limit is None:
            pytest.skip("info.max_input_tokens is None: no text is too long")
        text = _text_of(embedder, limit)
        try:
            embed(embedder, [text])
        except Exception as error:
            raise AssertionError(
                f"a text of {embedder.tokenizer.count([text])[0]} tokens raised "
                f"{type(error).__name__}, and info.max_input_tokens is {limit}: lower it; it is "
                f"compared with the tokenizer's count alone, so what the service adds to each "
                f"text must be taken off"
            ) from error

    def test_counts_bound_the_bill(self, embedder: Embedder) -> None:
        cases = {**ODD_TEXTS, **{text[:20]: text for text in PROBES}}
        known = [self._check_bill(embedder, text, name) for name, text in cases.items()]
        if not any(known):
            pytest.skip("neither EmbedReply.tokens nor server_bill() says what was billed")

    def _check_bill(self, embedder: Embedder, text: str, name: str) -> bool:
        """Send one text and compare; False if it is not known what it cost."""
        before = self.server_bill()
        reported = embedder.embed(EmbedRequest(texts=[text])).tokens
        after = self.server_bill()
        counted = embedder.tokenizer.count([text])[0] + embedder.info.overhead_tokens_per_text
        billed = None if before is None or after is None else after - before
        if billed is not None and reported is not None:
            assert reported == billed, (
                f"{name}: EmbedReply.tokens is {reported} and the server billed {billed}"
            )
        tokens = billed if billed is not None else reported
        if tokens is None:
            return False
        assert tokens <= counted, (
            f"{name}: {tokens} tokens were billed and the tokenizer counts {counted} (overhead "
            f"included): a count must never be too low, since that much is reserved"
        )
        assert tokens == counted or not embedder.tokenizer.exact, (
            f"{name}: {tokens} tokens were billed and the tokenizer, which calls itself exact, "
            f"counts {counted}: set exact = False, or mend the count or the overhead"
        )
        return True


def _text_of(embedder: Embedder, limit: int) -> str:
    """The longest beginning of plain text with so many tokens; skips what no request can hold."""
    info = embedder.info
    length = len(PROBES[0]) + 1
    repeats = 1
    while repeats * length <= _LARGEST_TEXT:
        text = f"{PROBES[0]} " * repeats
        if embedder.tokenizer.count([text])[0] >= limit:
            text = embedder.tokenizer.prefix(text, limit)
            break
        repeats *= 2
    else:
        pytest.skip("a text of info.max_input_tokens tokens would be larger than a megabyte")
    tokens = max(
        embedder.tokenizer.count([text])[0] + info.overhead_tokens_per_text,
        len(text) / (info.request_bytes_per_token or math.inf),
    )
    too_many = tokens > (info.max_tokens_per_request or math.inf)
    if too_many or len(text) > (info.max_bytes_per_request or math.inf):
        pytest.skip("a text of info.max_input_tokens tokens does not fit a request")
    return text


def _with_odd_texts(claim: Callable[[tuple[str, int]], None]) -> None:
    """Try a claim with each odd text and every small limit, where most cuts go wrong."""
    for text in ODD_TEXTS.values():
        for limit in range(_SMALL_LIMITS):
            claim((text[:_SHORT], limit))
