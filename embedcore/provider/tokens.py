"""Upper bounds of a text's tokens, where no exact tokenizer is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_CHARACTERS_PER_TOKEN = 4


def estimate_tokens(texts: str | Iterable[str]) -> int:
    """A rough guess: four characters per token, rounded up for each text.

    It is neither a count nor a bound (it is far too low for Chinese or emoji); nothing in embedcore
    that touches money uses it.
    """
    if isinstance(texts, str):
        texts = (texts,)
    return sum(-(-len(text) // _CHARACTERS_PER_TOKEN) for text in texts)


def utf8_length(text: str) -> int:
    """UTF-8 bytes of a text. Raises ``UnicodeEncodeError`` for a lone surrogate."""
    return len(text) if text.isascii() else len(text.encode())


def utf8_prefix(text: str, max_bytes: int) -> str:
    """The longest prefix of whole characters with at most ``max_bytes`` UTF-8 bytes."""
    # One character has at least one byte: cutting first keeps a huge text from being encoded whole.
    head = text[: max(max_bytes, 0)]
    if head.isascii():
        return head
    return head.encode()[: max(max_bytes, 0)].decode("utf-8", "ignore")


class EstimatingTokenizer:
    """The bound that always holds for byte-level tokenizers: one token per UTF-8 byte.

    ``bytes_per_token`` above 1 makes it an estimate rather than a bound; use it only for a model
    whose tokenizer is known never to need more.
    """

    exact = False

    def __init__(self, bytes_per_token: float = 1.0) -> None:
        if not bytes_per_token >= 1.0:
            raise ValueError(f"bytes_per_token must be ≥ 1, not {bytes_per_token}")
        self._bytes_per_token = bytes_per_token

    def count(self, texts: Sequence[str]) -> list[int]:
        per_token = self._bytes_per_token
        return [int(-(-utf8_length(text) // per_token)) for text in texts]

    def prefix(self, text: str, max_tokens: int) -> str:
        return utf8_prefix(text, int(max_tokens * self._bytes_per_token))
