"""From a caller's texts to distinct texts that fit: intake, truncation, preparation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from embedcore.errors import ConfigurationError, EmbeddingError, InputRejected, InputTooLong
from embedcore.policy.planning import (
    PlannedRequest,
    Sizes,
    chosen,
    in_waves,
    plan_requests,
    refuses_long,
)
from embedcore.policy.result import TextCut
from embedcore.policy.sources import choices_in, in_order, plain
from embedcore.provider.protocol import Tokenizer
from embedcore.provider.tokens import utf8_length

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine


_SHOWN_TYPE = 40
_EMPTY = (
    "is an empty text, which no model embeds: drop it, or have it kept as a failed row "
    '(on_empty = "keep", for embed and embed_iter)'
)


_PLAIN_INPUT_TYPES: Final = frozenset({"query", "document"})


def resolve_input_type(engine: Engine, input_type: str | None) -> str | None:
    """What is sent to the provider: nothing if the model makes no difference between the types.

    No type is the one for stored texts, where the model says which one that is.
    """
    known = engine.info.input_types
    if input_type is None:
        return engine.info.default_input_type
    if input_type in known:
        return input_type
    if not known and input_type in _PLAIN_INPUT_TYPES:
        return None
    choices = ", ".join(known) or "query, document"
    raise ConfigurationError(
        f"{engine.label} knows no input_type {input_type!r}; it takes: {choices}"
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
    # Whatever else gives texts in an order is read only once anyway.
    given = list(texts) if isinstance(texts, list) else texts
    if isinstance(given, list) and (plain_texts := _plainly_taken(given)) is not None:
        plain_texts.number_of_first = first_row
        return plain_texts
    taken = Intake(number_of_first=first_row)
    known: dict[str, int] = {}
    for row, text in enumerate(in_order(given, "a list of texts")):
        try:
            taken.rows.append(_index_of(first_row + row, text, known, taken))
        except InputRejected as problem:
            if not (keep or (keep_empty and problem.reason == _EMPTY)):
                raise
            taken.rejected[row] = problem
            taken.rows.append(-1)
    return taken


def _plainly_taken(given: list[object]) -> Intake | None:
    """The same of a list in which nothing can be wrong with any text; None for another."""
    if set(map(type, given)) != {str}:
        return None
    texts: list[str] = list(dict.fromkeys(given))  # type: ignore[arg-type]
    try:
        sizes = list(map(utf8_length, texts))
    except UnicodeEncodeError:
        return None
    if 0 in sizes:
        return None
    if len(texts) == len(given):
        return Intake(texts=texts, sizes=sizes, rows=list(range(len(texts))))
    places = dict(zip(texts, range(len(texts)), strict=True))
    return Intake(texts=texts, sizes=sizes, rows=[*map(places.__getitem__, given)])  # type: ignore[arg-type]


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


# Counting ten megabytes exactly, only to say how much of them was thrown away, is not worth it.
_COUNTED_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A shortened text: ``kept`` is sent, ``tokens_cut`` tokens of its end are not."""

    kept: str
    tokens: int
    tokens_cut: int


def cut_overlong(
    text: str, size: int, limit: int | None, tokenizer: Tokenizer, *, tokens_per_byte: int = 1
) -> Cut | None:
    """The longest prefix of whole characters within ``limit`` tokens; None if the text fits.

    ``size`` is the text's UTF-8 bytes, which bound its tokens, so that most never meet the
    tokenizer. For a text of more than a megabyte ``tokens_cut`` is extrapolated from them.
    """
    if limit is None or size * tokens_per_byte <= limit:
        return None
    # Before it is counted: that a text fits may be seen without.
    kept = tokenizer.prefix(text, limit)
    if len(kept) == len(text):
        return None
    head, whole = _counted_part(text, size)
    tokens = tokenizer.count([head])[0]
    if whole and tokens <= limit:
        return None
    kept_tokens = tokenizer.count([kept])[0] if kept else 0
    total = tokens if whole else round(tokens * size / max(utf8_length(head), 1))
    return Cut(kept=kept, tokens=kept_tokens, tokens_cut=max(total - kept_tokens, 1))


def _counted_part(text: str, size: int) -> tuple[str, bool]:
    if size <= _COUNTED_BYTES:
        return text, True
    return text[: _COUNTED_BYTES * len(text) // size], False


class Prepared:
    """Texts, byte sizes and counts by index; ``taken.rows`` has the index of each of the rows."""

    def __init__(
        self, engine: Engine, texts: Iterable[object], *, keep: bool, first_row: int = 0
    ) -> None:
        self._engine = engine
        self.keep = keep
        self.taken = take_in(texts, keep_empty=engine.keep_empty, keep=keep, first_row=first_row)
        self.texts, self.sizes = self.taken.texts, self.taken.sizes
        self._cut_rows: dict[int, int] = {}
        self._shortened: dict[int, TextCut] = {}
        counted: dict[int, int] = {}
        limit = engine.info.max_input_tokens
        per_byte = engine.info.tokens_per_byte
        self._long: frozenset[int] = frozenset()
        if limit is not None and max(self.sizes, default=0) * per_byte > limit:
            # A bound is for money: what may be too long is cut only if it was counted.
            if engine.tokenizer.exact:
                counted = self._cut_all(limit)
            else:
                sizes = enumerate(self.sizes)
                self._long = frozenset(at for at, size in sizes if size * per_byte > limit)
        # No tokenizer of bytes yields more tokens than bytes: until it is counted, that is it.
        self._tokens = [size * per_byte for size in self.sizes]
        self._counted = set(counted)
        for index, tokens in counted.items():
            self._tokens[index] = tokens

    def cuts(self, rows: Sequence[int] | None = None) -> dict[int, TextCut]:
        """Row → what was cut off the end of its text; only those that were cut, or may have been.

        ``rows``: those that matter, by default all. A text that may be over the limit, and was
        taken whole by a server that is not known to refuse such texts, may have been cut there.
        """
        unknown, cuts = self.perhaps_long, dict[int, TextCut]()
        if not (unknown or self._shortened or self._cut_rows):
            return cuts
        places = self.taken.rows
        for row in range(len(places)) if rows is None else rows:
            index = places[row]
            before = TextCut(tokens=self._cut_rows.get(row))
            if index in self._shortened:
                cuts[row] = before.and_then(self._shortened[index])
            elif before.is_known or index in unknown:
                cuts[row] = before
        return cuts

    @property
    def perhaps_long_rows(self) -> int:
        """Rows whose text may be over the model's limit, and was not counted."""
        long = self.perhaps_long
        return sum(index in long for index in self.taken.rows) if long else 0

    @property
    def perhaps_long(self) -> frozenset[int]:
        """Texts that may be over the limit, and were not counted, of a server that may cut them."""
        engine = self._engine
        return frozenset() if refuses_long(engine.info, engine.sizes) else self._long

    def _cut_all(self, limit: int) -> dict[int, int]:
        """Cut what is too long; texts that are equal only after that are sent once as well.

        Returns the tokens that had to be counted for it.
        """
        taken, tokenizer = self.taken, self._engine.tokenizer
        per_byte = self._engine.info.tokens_per_byte
        cuts: dict[int, Cut] = {}
        dropped: set[int] = set()
        # Few are as long: the others are not looked at one by one.
        for index in [at for at, size in enumerate(taken.sizes) if size * per_byte > limit]:
            text, size = taken.texts[index], taken.sizes[index]
            cut = cut_overlong(text, size, limit, tokenizer, tokens_per_byte=per_byte)
            if cut is None:
                continue
            cuts[index] = cut
            if self._engine.overlong == "reject" or not cut.kept:
                if not self.keep:
                    raise self._too_long(taken.rows.index(index), cut, limit)
                dropped.add(index)
        if not cuts:
            return {}
        places: dict[str, int] = {}
        moved: list[int] = []
        for index, text in enumerate(taken.texts):
            kept = cuts[index].kept if index in cuts else text
            moved.append(-1 if index in dropped else places.setdefault(kept, len(places)))
        self._move_rows(moved, cuts, limit)
        self.texts = list(places)
        self.sizes = list(map(utf8_length, self.texts))
        return {moved[index]: cut.tokens for index, cut in cuts.items() if moved[index] >= 0}

    def _move_rows(self, moved: list[int], cuts: dict[int, Cut], limit: int) -> None:
        """Lead each row to its text as it is sent, and note what became of the long ones."""
        errors: dict[int, InputTooLong] = {}
        rows = self.taken.rows
        for row, index in enumerate(rows):
            if index < 0:
                continue
            rows[row] = moved[index]
            if index not in cuts:
                continue
            if moved[index] >= 0:
                self._cut_rows[row] = cuts[index].tokens_cut
            else:
                error = errors.get(index) or self._too_long(row, cuts[index], limit)
                errors[index] = self.taken.rejected[row] = error

    def _too_long(self, row: int, cut: Cut, limit: int) -> InputTooLong:
        over, row = cut.tokens_cut, row + self.taken.number_of_first
        return InputTooLong(
            f"row {row} is {over} tokens over the {limit} that {self._engine.label} takes: split "
            'it, or set overlong = "truncate". Nothing of it was sent',
            position=row,
            reason=f"{over} tokens over the limit of {limit}",
        )

    def was_shortened(self, index: int, kept: str) -> None:
        """The server refused the text, and took ``kept``, its beginning."""
        tokenizer, text = self._engine.tokenizer, self.texts[index]
        tokens = None
        if tokenizer.exact:
            whole, rest = tokenizer.count([text, kept])
            tokens = max(whole - rest, 1)
        self._shortened[index] = TextCut(tokens=tokens, characters=len(text) - len(kept))

    def measured(self, *, exact: bool, indices: Sequence[int] | None = None) -> Sizes:
        """Bytes and tokens of the texts; ``exact`` runs the tokenizer over those not counted.

        ``indices``: the texts that matter, by default all of them.
        """
        if exact:
            wanted = range(len(self.texts)) if indices is None else indices
            missing = [index for index in wanted if index not in self._counted]
            texts = [self.texts[index] for index in missing]
            counts = self._engine.tokenizer.count(texts) if texts else []
            for index, tokens in zip(missing, counts, strict=True):
                self._tokens[index] = tokens
            self._counted.update(missing)
        return Sizes(in_bytes=self.sizes, tokens=self._tokens)

    def plan(self, exact: bool, indices: Sequence[int] | None = None) -> list[PlannedRequest]:
        """The requests for these texts, by default for all of them."""
        learned = self._engine.learned
        wanted = range(len(self.texts)) if indices is None else indices
        return plan_requests(
            wanted,
            self.measured(exact=exact or learned.always_count, indices=wanted),
            self._engine.info,
            size=self._engine.sizes.wanted,
            scale=learned.scale,
            texts=self._best_texts(wanted),
        )

    def _best_texts(self, wanted: Sequence[int]) -> int | None:
        """How many texts to put into one request; None: as many as go.

        Larger ones than are cheapest where that saves a wave of requests, or where the requests
        per minute would be used up before the tokens are.
        """
        best = self._engine.info.best_texts_per_request
        if best is None or not wanted:
            return best
        best = in_waves(len(wanted), best, self._engine.pool.size)
        requests, tokens = self._engine.learned.limits
        if not requests or not tokens:
            return best
        in_bytes = sum(chosen(self.sizes, wanted))
        per_text = self._engine.learned.tokens_in(in_bytes) / len(wanted)
        return max(best, math.ceil(tokens / requests / max(per_text, 1.0)))
