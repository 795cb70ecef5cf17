"""Which texts are these? A snapshot, checked and without duplicates, before anything is spent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from embedcore.errors import EmbeddingError, InputRejected
from embedcore.policy.sources import choices_in, in_order, plain
from embedcore.provider.tokens import utf8_length

_SHOWN_TYPE = 40
_EMPTY = (
    "is an empty text, which no model embeds: drop it, or have it kept as a failed row "
    '(on_empty = "keep", for embed and embed_iter)'
)


@dataclass(kw_only=True, slots=True)
class Intake:
    """The caller's rows, reduced to what may be sent.

    - ``texts``: each different text once, in the order of its first row.
    - ``sizes``: the UTF-8 bytes of each.
    - ``rows``: for each row of the caller its index in ``texts``, or -1 for a rejected row.
    - ``rejected``: row → why.
    - ``number_of_first``: what the first row is called in messages.
    """

    texts: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    rejected: dict[int, EmbeddingError] = field(default_factory=dict)
    number_of_first: int = 0
    _first_rows: dict[int, int] = field(default_factory=dict, repr=False)

    def first_row(self, index: int) -> int:
        """What the first row of a text is called. To be asked only once ``rows`` is final."""
        if not self._first_rows:
            last = len(self.rows) - 1
            backwards = enumerate(reversed(self.rows))
            self._first_rows = {found: last - behind for behind, found in backwards}
        return self._first_rows[index] + self.number_of_first


def take_in(texts: Iterable[object], *, keep_empty: bool, keep: bool, first_row: int = 0) -> Intake:
    """Snapshot, check and deduplicate. The caller may change its list at once afterwards.

    ``first_row``: the number by which the first row is named. ``keep``: a bad row is noted instead
    of raised; ``keep_empty``: only for empty texts. Raises ``InputRejected`` with the position, the
    reason and no part of the text.
    """
    taken = Intake(number_of_first=first_row)
    known: dict[str, int] = {}
    # Whatever else gives texts in an order is read only once anyway.
    given = list(texts) if isinstance(texts, list) else texts
    for row, text in enumerate(in_order(given, "a list of texts")):
        try:
            taken.rows.append(_index_of(first_row + row, text, known, taken))
        except InputRejected as problem:
            if not (keep or (keep_empty and problem.reason == _EMPTY)):
                raise
            taken.rejected[row] = problem
            taken.rows.append(-1)
    return taken


def _index_of(row: int, text: object, known: dict[str, int], taken: Intake) -> int:
    if not isinstance(text, str):
        text = plain(text)
        if not isinstance(text, str):
            raise _rejected(row, _no_text(text))
    # A subclass may compare and print as it likes (an enum does): the characters are what counts.
    as_str = text if type(text) is str else str.__str__(text)
    index = known.get(as_str, -1)
    if index < 0:
        size = _checked_size(row, as_str)
        index = known[as_str] = len(taken.texts)
        taken.texts.append(as_str)
        taken.sizes.append(size)
    return index


def _no_text(value: object) -> str:
    kind = type(value).__name__[:_SHOWN_TYPE]
    if hasattr(type(value), "as_py"):
        return f"is a {kind} that cannot be read as text: its bytes are not what its type says"
    choices = choices_in(value)
    if choices is None:
        return f"is of type {kind}, not str; convert or drop it"
    way = choices.expression
    if choices.is_mapping:
        way = f"[{replace(choices, variable='row').expression} for row in rows]"
    return f"is of type {kind} with the {choices}, not str: take the text out of it, as in {way}"


def _checked_size(row: int, text: str) -> int:
    if not text:
        raise _rejected(row, _EMPTY)
    try:
        return utf8_length(text)
    except UnicodeEncodeError as error:
        raise _rejected(
            row,
            f"has a lone surrogate at character {error.start} and is no valid Unicode; "
            f"{_way_out(text[error.start])}",
        ) from None


def _way_out(surrogate: str) -> str:
    if "\udc80" <= surrogate <= "\udcff":
        return (
            f"Python writes the byte 0x{ord(surrogate) - 0xDC00:02X} so if it cannot decode it: "
            "decode it with the encoding that it is in, or set PYTHONUTF8=1 if that is UTF-8"
        )
    return "clean it, for instance with text.encode(errors='replace').decode()"


def _rejected(row: int, why: str) -> InputRejected:
    return InputRejected(f"row {row} {why}. Nothing of it was sent", position=row, reason=why)
