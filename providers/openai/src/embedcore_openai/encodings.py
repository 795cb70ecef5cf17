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
        # Requests that were refused, by their texts: the form to send them in again, and whether
        # the refusal named the field.
        self._trials: dict[int, tuple[str | None, bool]] = {}

    def form_for(self, texts: Sequence[str]) -> str | None:
        """How to ask for the vectors of these texts; None: without the field."""
        if self._proven or not self._trials:
            return self._known
        return self._trials.get(_key(texts), (self._known, False))[0]

    def in_lines(self, wanted: str) -> str:
        """How the lines of a batch ask, where that is ``wanted``: a form that was refused in a
        request, and another one taken, is not asked for there either."""
        if not self._proven or wanted == "omit":
            return wanted
        if self._known is None:
            return "omit"
        return self._known if wanted in self._forms[: self._forms.index(self._known)] else wanted

    def succeeded(self, form: str | None) -> None:
        if not self._proven:
            self._known, self._proven = form, True
            self._trials.clear()

    def after_refusal(
        self, form: str | None, texts: Sequence[str], body: bytes, *, may_guess: bool = True
    ) -> str | None:
        """A name for sending the same request again, if ``form_for`` has another form for it.

        ``form``: the one that was refused, with that ``body``. A refusal of one text, of which
        there is nothing left to divide, is taken to be about the form even if it does not say so,
        where one ``may_guess``.
        """
        if self._proven:
            return None if form == self._known else _name(self._known, _key(texts))
        key, named = _key(texts), any(name in body.lower() for name in _NAMES)
        _, named_before = self._trials.pop(key, (None, False))
        if named_before and not named:
            # Asked in this form it is refused for another reason, so the form is taken.
            self._known = form
            return None
        following = self._forms[self._forms.index(form) + 1 :]
        if not named and form == self._forms[0]:
            if len(texts) > 1 or not may_guess or self._guesses >= _MOST_GUESSES:
                return None
            self._guesses += 1
            # The second time what every server takes that takes anything.
            following = following[-1:] if self._guesses > 1 else following
        if not following or len(self._trials) >= _MOST_TRIALS:
            # It is refused in every form: the reason is another one.
            return None
        self._trials[key] = (following[0], named)
        return _name(following[0], key)


def advice(said: str, asked: str) -> str:
    """What to set where lines that ``asked`` so were refused for it; empty where that is not what
    was ``said``. A job costs nothing then, and its lines cannot be sent again one by one."""
    if asked == "omit" or not any(name in said.lower().encode() for name in _NAMES):
        return ""
    others = ("float", "omit") if asked == "base64" else ("omit",)
    return ": set batch_encoding = " + " or ".join(f'"{one}"' for one in others)


def _name(form: str | None, key: int) -> str:
    # Of these texts: for others, parts of them say, it is another matter.
    return f"encoding_format = {form or 'none'}, texts {key & 0xFFFFFFFF:08x}"


def _key(texts: Sequence[str]) -> int:
    return hash(tuple(texts))


_endpoints: dict[Hashable, Encodings] = {}


def encodings_of(endpoint: Hashable, first: str) -> Encodings:
    """What is known of an endpoint, for all embedders of this process that begin alike."""
    return _endpoints.setdefault((endpoint, first), Encodings(first))


def forget() -> None:
    """Of every endpoint, as in a new process."""
    _endpoints.clear()
