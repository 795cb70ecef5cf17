"""Cache keys: equal keys mean the same vector."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

KEY_BYTES: Final = 32
_KEY_VERSION: Final = b"embedcore key 1"
_LENGTH_BYTES: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What the vectors of a call have in common. ``answered_as``: the model the reply named."""

    model: str
    fingerprint: str
    input_type: str | None = None
    answered_as: str | None = None


class Keys:
    """Makes the keys of texts sent to one model in one way.

    A key is the SHA-256 of key version, provider, model, fingerprint, input type and text, each
    with its length before it, so that no two different tuples run together into the same bytes.
    An absent input type differs from every given one.
    """

    def __init__(
        self, *, provider: str, model: str, fingerprint: str, input_type: str | None
    ) -> None:
        kind = b"\0" if input_type is None else b"\1" + input_type.encode()
        head = hashlib.sha256()
        for field in (_KEY_VERSION, provider.encode(), model.encode(), fingerprint.encode(), kind):
            head.update(len(field).to_bytes(_LENGTH_BYTES, "little") + field)
        self._head = head

    def of(self, texts: Iterable[str]) -> list[bytes]:
        """The key of each text, as it is sent."""
        begin, keys = self._head.copy, []
        for text in texts:
            raw = text.encode()
            one = begin()
            one.update(len(raw).to_bytes(_LENGTH_BYTES, "little") + raw)
            keys.append(one.digest())
        return keys
