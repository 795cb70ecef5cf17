"""Hypothesis strategies for texts, counts and failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from embedcore.errors import (
    AuthenticationFailed,
    InvalidResponse,
    OutcomeUnknown,
    PermanentProviderError,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    RequestRejected,
    TransientProviderError,
)
from embedcore.testing.fakes.embedder import Outcome

if TYPE_CHECKING:
    from embedcore.errors import Billed

ODD_TEXTS = {
    "one letter": "a",
    "a space": " ",
    "only white space": " \t\u2003\u00a0 ",
    "a line feed": "\n",
    "CRLF": "first line\r\nsecond line\r\n",
    "NUL": "before\x00after",
    "control characters": "\x01\x1b[31mred\x7f",
    "byte order mark": "\ufeffbegins with a mark",
    "special token": "<|endoftext|>",
    "special tokens inside": "a <|fim_prefix|> b <|endofprompt|> c [CLS] d </s>",
    "Chinese": "自然语言处理是人工智能的一个分支。",
    "Arabic": "معالجة اللغة الطبيعية",
    "Thai, no spaces": "การประมวลผลภาษาธรรมชาติ",
    "emoji": "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 thumb",
    "combining marks": "e\u0301 is not \u00e9, Z\u0351\u036b\u0343\u034al\u0363go",
    "beyond the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀 🀄",
    "noncharacter": "\ufffe\uffff",
    "replacement character": "\ufffd\ufffd",
    "punctuation": "!?…—“”%$#@&*()",
    "digits": "3.14159265358979",
    "JSON": '{"input": ["a", null], "model": "x"}\\u0000\\',
    "markup": "<b>not</b> &amp; <script>",
    "one long word": "a" * 500,
    "repeated words": "again and " * 100,
}
"""Texts that providers have stumbled over, by name. Each is valid Unicode and not empty."""

_BLOCKS = st.one_of(
    st.characters(codec="utf-8"),
    st.characters(min_codepoint=32, max_codepoint=126),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),
    st.sampled_from(["\x00", "\r\n", "\n", "\t", "\u200d", "\ufeff", "\u2028", "\u0301"]),
    st.sampled_from(["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇪🇺", "<|endoftext|>", "<|fim_suffix|>", "  ", "é"]),
    st.sampled_from(["the ", "embedding ", "budget ", "Vektor ", "データ", "слово "]),
)


def texts(*, min_size: int = 1, max_size: int = 40) -> st.SearchStrategy[str]:
    """Valid texts of every script, with white space, NUL, joined emoji and special-token spellings.

    The sizes count pieces, most of them one character. Some are long and repetitive.
    """
    pieces = st.lists(_BLOCKS, min_size=min_size, max_size=max_size).map("".join)
    odd = st.sampled_from(list(ODD_TEXTS.values()))
    long = st.builds(lambda text, times: text * times, pieces, st.integers(2, 50))
    return st.one_of(pieces, odd, long) if max_size >= 40 else pieces


def nasty_texts() -> st.SearchStrategy[str]:
    """Texts with a lone surrogate somewhere: no bytes, no request and no database take them."""
    lone = st.characters(min_codepoint=0xD800, max_codepoint=0xDFFF, categories=["Cs"])
    short = texts(min_size=0, max_size=10)
    return st.builds(lambda before, mark, after: before + mark + after, short, lone, short)


def text_lists(*, min_size: int = 0, max_size: int = 20) -> st.SearchStrategy[list[str]]:
    """Lists of texts in which some come more than once."""

    def repeated(distinct: list[str]) -> st.SearchStrategy[list[str]]:
        return st.lists(st.sampled_from(distinct), min_size=min_size, max_size=max_size)

    plain = st.lists(texts(max_size=12), min_size=min_size, max_size=max_size)
    pool = st.lists(texts(max_size=12), min_size=1, max_size=5)
    return plain | pool.flatmap(repeated)


def token_counts(*, max_value: int = 10_000) -> st.SearchStrategy[int]:
    """Limits in tokens: small, at the edges, large."""
    return st.one_of(
        st.integers(0, 20),
        st.sampled_from([0, 1, 2, max_value - 1, max_value]),
        st.integers(0, max_value),
    )


_BILLED: st.SearchStrategy[Billed] = st.sampled_from(["no", "yes", "unknown"])


def transient_errors() -> st.SearchStrategy[TransientProviderError]:
    """Errors after which the same request may succeed."""
    waits = st.none() | st.floats(0, 5)
    return st.one_of(
        st.builds(lambda wait: RateLimited("too fast", retry_after=wait, status=429), waits),
        st.builds(
            lambda billed: ProviderUnavailable("overloaded", billed=billed, status=503), _BILLED
        ),
        st.builds(lambda: OutcomeUnknown("no answer")),
    )


def permanent_errors() -> st.SearchStrategy[PermanentProviderError]:
    """Errors after which the same request fails again."""
    return st.one_of(
        st.builds(lambda: AuthenticationFailed("the key is wrong", status=401)),
        st.builds(lambda: QuotaExhausted("no money left", status=429)),
        st.builds(lambda billed: RequestRejected("no", billed=billed, status=400), _BILLED),
    )


def outcomes() -> st.SearchStrategy[Outcome]:
    """What one call does: mostly the truth, sometimes an error, billed or not.

    An error that says ``billed="no"`` never is billed, and one that says "yes" always.
    """
    errors = st.one_of(
        transient_errors(),
        permanent_errors(),
        st.builds(lambda: InvalidResponse("nonsense", status=200)),
    )

    def failing(
        error: TransientProviderError | PermanentProviderError | InvalidResponse,
    ) -> Outcome:
        return Outcome(error=error, bills=error.billed == "yes")

    unknown = st.builds(
        lambda bills: Outcome(error=OutcomeUnknown("no answer"), bills=bills), st.booleans()
    )
    return st.one_of(st.just(Outcome()), st.just(Outcome()), errors.map(failing), unknown)


def scripts(*, max_size: int = 12) -> st.SearchStrategy[list[Outcome]]:
    """Scripts for a ``FakeEmbedder``."""
    return st.lists(outcomes(), max_size=max_size)
