"""Redacts a server's words for showing: they may repeat the key or a text."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from string import ascii_lowercase, ascii_uppercase
from typing import Final
from urllib.parse import quote

_MASK: Final = "[hidden]"
_FRAGMENT: Final = 8
_QUOTED: Final = 24
_WINDOW: Final = 16
_READ: Final = 4_000
_SHOWN: Final = 240
_JUDGED: Final = 400
# str.lower() may change the length of a line, and with it every place in it.
_LOWER: Final = str.maketrans(ascii_uppercase, ascii_lowercase)
# Keys that are not ours but look like one, as a gateway's own might.
# The last form is the user name and password of an address, a proxy's for instance.
_KEY_LIKE: Final = re.compile(
    r"\bsk-[\w*-]{8,}|\bBearer\s+\S+|(?<=://)[^/\s@]+(?=@)", re.IGNORECASE
)


def clean(message: str, *, secrets: Iterable[str] = (), texts: Sequence[str] = ()) -> str:
    """One printable line of at most 240 characters, without secrets and without the texts sent.

    Hidden are: each secret, every piece of it of 8 characters or more, its base64 and percent
    encoding, whatever the case; anything spelled like a key; passages of 24 characters or more
    that stand in one of ``texts``.
    """
    line = " ".join(_printable(message[:_READ]).split())
    line = _hide(line, _secret_places(line, list(secrets)))
    line = _hide(line, (match.span() for match in _KEY_LIKE.finditer(line)))
    line = _hide(line[: _SHOWN + _QUOTED], _quoted_places(line[: _SHOWN + _QUOTED], texts))
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def without_texts(message: str, texts: Sequence[str], *, most: int = _JUDGED) -> str:
    """The beginning of a message on one line, without passages of the texts; secrets are in it."""
    line = " ".join(_printable(message[:most]).split())
    return _hide(line, _quoted_places(line, texts))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _hide(line: str, places: Iterable[tuple[int, int]]) -> str:
    """Replace what the places cover; those that touch or overlap become one mask."""
    shown, end = [], 0
    open_mask = False
    for start, stop in sorted(places):
        if start > end or not open_mask:
            shown.append(line[end:start])
            shown.append(_MASK)
            open_mask = True
        end = max(end, stop)
    return "".join(shown) + line[end:]


def _secret_places(line: str, secrets: Sequence[str]) -> Iterator[tuple[int, int]]:
    lower = line.translate(_LOWER)
    fragments = set()
    for form in (form.translate(_LOWER) for secret in secrets for form in forms(secret)):
        fragments |= {form[at : at + _FRAGMENT] for at in range(len(form) - _FRAGMENT + 1)}
        if 4 <= len(form) < _FRAGMENT:
            yield from (match.span() for match in re.finditer(re.escape(form), lower))
    for at in range(len(lower) - _FRAGMENT + 1):
        if lower[at : at + _FRAGMENT] in fragments:
            yield at, at + _FRAGMENT


def forms(secret: str) -> Iterator[str]:
    """The spellings of a secret that are looked for: as it is, in percent encoding, in base64."""
    yield secret
    yield quote(secret, safe="")
    raw = secret.encode()
    for lead in range(3):
        # base64 looks different for each place a key can have in a group of three bytes; the
        # first and last characters depend on the neighbours.
        encoded = base64.b64encode(b"\0" * lead + raw).decode().rstrip("=")
        inner = encoded[(0, 2, 3)[lead] : -1]
        yield inner
        yield inner.translate(str.maketrans("+/", "-_"))


def _quoted_places(line: str, texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    # White space of the line was collapsed: of a text with line breaks the parts are found.
    sent = "\0".join(text for text in texts if len(text) >= _WINDOW)
    windows = range(len(line) - _WINDOW + 1)
    # A long enough passage covers one of the windows looked at first; mostly there is none.
    if any(line[at : at + _WINDOW] in sent for at in windows[:: _QUOTED - _WINDOW + 1]):
        for at in windows:
            if line[at : at + _WINDOW] in sent:
                yield at, at + _WINDOW
