"""How an endpoint lets its vectors be asked for: what it takes for ``encoding_format``.

Some servers refuse base64, some the field itself. What a refusal says of it proves nothing; that
the same texts succeed in another form does, and is remembered in this process.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

# In this order. None: the field is left out.
_FORMS: Final = ("base64", "float", None)
# How often another form is tried after a refusal that names neither the field nor the form.
_MOST_GUESSES: Final = 2
_MOST_TRIALS: Final = 256
_NAMES: Final = (b"encoding_format", b"encodingformat", b"base64")


class Encodings:
    """What one endpoint takes. ``first``: the form to begin with; "omit" leaves the field out.

    Shared between threads without a lock: every step is one operation on a dict or one assignment.
    """

    def __init__(self, first: str) -> None:
        self._forms = _FORMS[_FORMS.index(None if first == "omit" else first) :]
        self._known = self._forms[0]
        self._proven = False
        self._guesses = 0
        # Requests that were refused, by their texts, and the form to send them in again.
        self._trials: dict[int, str | None] = {}

    def form_for(self, texts: Sequence[str]) -> str | None:
        """How to ask for the vectors of these texts; None: without the field."""
        if self._proven or not self._trials:
            return self._known
        return self._trials.get(_key(texts), self._known)

    def succeeded(self, form: str | None) -> None:
        if not self._proven:
            self._known, self._proven = form, True
            self._trials.clear()

    def after_refusal(self, form: str | None, texts: Sequence[str], body: bytes) -> bool:
        """Whether to send the same request again, for ``form_for`` has another form for it.

        ``form``: the one that was refused, with that ``body``. A refusal of one text, of which
        there is nothing left to divide, is taken to be about the form even if it does not say so.
        """
        if self._proven:
            return form != self._known
        named = any(name in body.lower() for name in _NAMES)
        key, first = _key(texts), form == self._forms[0]
        if not named and first and (len(texts) > 1 or self._guesses >= _MOST_GUESSES):
            return False
        following = self._forms[self._forms.index(form) + 1 :]
        if not following or len(self._trials) >= _MOST_TRIALS:
            # It is refused in every form: the reason is another one.
            self._trials.pop(key, None)
            return False
        self._guesses += not named and first
        self._trials[key] = following[0]
        return True


def _key(texts: Sequence[str]) -> int:
    return hash(tuple(texts))


_endpoints: dict[Hashable, Encodings] = {}


def encodings_of(endpoint: Hashable, first: str) -> Encodings:
    """What is known of an endpoint, for all embedders of this process that begin alike."""
    return _endpoints.setdefault((endpoint, first), Encodings(first))


def forget() -> None:
    """Of every endpoint, as in a new process."""
    _endpoints.clear()
