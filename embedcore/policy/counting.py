"""What does the plugin's tokenizer say, and may it be believed?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from embedcore.errors import EmbeddingError, ProviderError

if TYPE_CHECKING:
    from embedcore.provider.protocol import Tokenizer

Answer = TypeVar("Answer")


class CheckedTokenizer:
    """A ``Tokenizer`` that never lets anything but an ``EmbeddingError`` escape.

    Money is held by these counts and texts are cut by these prefixes, so nonsense is an error.
    """

    def __init__(self, inner: Tokenizer, typed: Callable[[Exception], EmbeddingError]) -> None:
        self._inner = inner
        self._typed = typed

    @property
    def exact(self) -> bool:
        return bool(self._inner.exact)

    def count(self, texts: Sequence[str]) -> list[int]:
        counts = self._ask(lambda: list(map(int, self._inner.count(texts))))
        if len(counts) != len(texts) or min(counts, default=0) < 0:
            raise self._nonsense("one count ≥ 0 for each text")
        return counts

    def prefix(self, text: str, max_tokens: int) -> str:
        kept: object = self._ask(lambda: self._inner.prefix(text, max_tokens))
        if not isinstance(kept, str) or not text.startswith(kept):
            raise self._nonsense("a prefix of the text")
        return kept

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except Exception as error:  # noqa: BLE001 - raised again, as one of ours
            failure = self._typed(error)
        # Not inside the handler, where the raw error, a key perhaps in it, would become a context.
        raise failure

    def _nonsense(self, expected: str) -> ProviderError:
        kind = type(self._inner).__name__
        return ProviderError(
            f"the tokenizer {kind} did not return {expected}. Nothing was sent; please report "
            "this to the provider's author",
            billed="no",
        )
