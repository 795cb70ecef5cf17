"""Contract tests of limits: a rate that is used up, a text that is too long, the default type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from embedcore.errors import EmbeddingError, RateLimited
from embedcore.testing.contract.base import PROBES, ContractBase, embed, outcome_of
from embedcore.testing.contract.failures import failure_of

if TYPE_CHECKING:
    from embedcore.provider.protocol import Embedder

_TIMES: Final = 2
_LARGEST: Final = 1_000_000  # bytes


class LimitsContract(ContractBase):
    """What the service allows is told as it is."""

    def test_rate_limit_is_named_as_one(self, limited_embedder: Embedder) -> None:
        error = failure_of(limited_embedder)
        assert isinstance(error, RateLimited), (
            f"a request that was refused for its rate raised {type(error).__name__}: raise "
            "RateLimited, so that embedcore slows down and tries again"
        )
        assert error.billed == "no", (
            f'a request that was refused for its rate says billed="{error.billed}", and it cost '
            "nothing: its money would count as spent"
        )

    def test_rate_limit_says_when_to_try_again(self, limited_embedder: Embedder) -> None:
        if self.retry_after is None:
            pytest.skip("retry_after is None: the service does not say when")
        found = getattr(failure_of(limited_embedder), "retry_after", None)
        assert found == self.retry_after, (
            f"the service says {self.retry_after} seconds, and error.retry_after is {found}: pass "
            "on what it says, and do not wait in the provider"
        )

    def test_rate_limited_request_is_sent_once(self, limited_embedder: Embedder) -> None:
        before = self.requests_so_far()
        failure_of(limited_embedder)
        sent = self.requests_so_far() - before
        assert sent <= 1, (
            f"a call of embed that was refused for its rate sent {sent} requests: do not retry in "
            "a provider (SDKs have a setting for it); embedcore does, for all callers together"
        )

    def test_default_input_type_is_what_is_sent_for_none(self, embedder: Embedder) -> None:
        kind = embedder.info.default_input_type
        if kind is None:
            pytest.skip("info.default_input_type is None")
        for text in PROBES[:2]:
            self.assert_same(
                embed(embedder, [text])[0],
                embed(embedder, [text], kind)[0],
                f"a request without an input type has another vector than one for {kind!r}, which "
                "is info.default_input_type: both are one key, and one vector would be given for "
                "the other",
            )

    def test_too_long_text_is_an_error_where_info_says_so(self, embedder: Embedder) -> None:
        info = embedder.info
        if info.truncation != "error" or info.max_input_tokens is None:
            pytest.skip('info.truncation is not "error", or info.max_input_tokens is None')
        # Words have a token or more.
        text = " ".join(f"w{number}" for number in range(_TIMES * info.max_input_tokens))
        if len(text) > _LARGEST:
            pytest.skip("a text that is too long would be larger than a megabyte")
        outcome = outcome_of(embedder, text)
        assert isinstance(outcome, EmbeddingError), (
            f"a text of {_TIMES} times as many words as info.max_input_tokens allows was "
            'answered, and info.truncation is "error": have the service refuse it (many have a '
            'switch), or say "silent"'
        )
