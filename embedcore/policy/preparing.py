"""The texts as they will be sent: each different one once, none longer than the model allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from embedcore.errors import InputTooLong
from embedcore.policy.intake import take_in
from embedcore.policy.planning import PlannedRequest, Sizes, plan_requests
from embedcore.policy.truncation import Cut, cut_overlong

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine


class Prepared:
    """Texts, byte sizes and counts by index; ``taken.rows`` has the index of each of the rows."""

    def __init__(self, engine: Engine, texts: Iterable[object], *, keep: bool) -> None:
        self._engine = engine
        self.keep = keep
        self.taken = take_in(texts, keep_empty=engine.keep_empty, keep=keep)
        self.texts, self.sizes = self.taken.texts, self.taken.sizes
        self._cut_rows: dict[int, int] = {}
        self._shortened: dict[int, int] = {}
        counted: dict[int, int] = {}
        limit = engine.info.max_input_tokens
        per_byte = engine.info.tokens_per_byte
        if limit is not None and max(self.sizes, default=0) * per_byte > limit:
            counted = self._cut_all(limit)
        # No tokenizer of bytes yields more tokens than bytes: until it is counted, that is it.
        self._tokens = [size * per_byte for size in self.sizes]
        self._uncounted = set(range(len(self.texts))) - set(counted)
        for index, tokens in counted.items():
            self._tokens[index] = tokens

    @property
    def truncated(self) -> int:
        """Rows whose text was cut."""
        return len(self.tokens_cut())

    def tokens_cut(self) -> dict[int, int]:
        """Row → tokens cut off its end; only the rows that were cut."""
        shortened = dict(self._shortened)
        if not shortened:
            return self._cut_rows
        cut = dict(self._cut_rows)
        for row, index in enumerate(self.taken.rows):
            if index in shortened:
                cut[row] = cut.get(row, 0) + shortened[index]
        return cut

    def _cut_all(self, limit: int) -> dict[int, int]:
        """Cut what is too long; texts that are equal only after that are bought once as well.

        Returns the tokens that had to be counted for it.
        """
        taken, tokenizer = self.taken, self._engine.tokenizer
        per_byte = self._engine.info.tokens_per_byte
        places: dict[str, int] = {}
        cuts: dict[int, Cut] = {}
        moved: list[int] = []
        for index, (text, size) in enumerate(zip(taken.texts, taken.sizes, strict=True)):
            cut = cut_overlong(text, size, limit, tokenizer, tokens_per_byte=per_byte)
            if cut is not None:
                cuts[index] = cut
                if self._engine.overlong == "reject" or not cut.kept:
                    if not self.keep:
                        raise self._too_long(taken.rows.index(index), cut, limit)
                    moved.append(-1)
                    continue
            kept = text if cut is None else cut.kept
            moved.append(places.setdefault(kept, len(places)))
        self._move_rows(moved, cuts, limit)
        self.texts = list(places)
        self.sizes = [len(text.encode()) for text in self.texts]
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
        over = cut.tokens_cut
        return InputTooLong(
            f"row {row} is {over} tokens over the {limit} that {self._engine.label} takes: split "
            'it, or set overlong = "truncate". Nothing of it was sent',
            position=row,
            reason=f"{over} tokens over the limit of {limit}",
        )

    def shorten(self, index: int) -> bool:
        """Halve a text that the server calls too long in spite of our count. Once for each text."""
        limit = self._engine.info.max_input_tokens
        if self._engine.overlong == "reject" or limit is None or index in self._shortened:
            return False
        tokenizer, text = self._engine.tokenizer, self.texts[index]
        before = tokenizer.count([text])[0]
        kept = tokenizer.prefix(text, min(before, limit) // 2)
        if not kept:
            return False
        after = tokenizer.count([kept])[0]
        self._shortened[index] = before - after
        self.texts[index], self.sizes[index] = kept, len(kept.encode())
        self._tokens[index] = after
        return True

    def measured(self, *, exact: bool) -> Sizes:
        """Bytes and tokens of every text; ``exact`` runs the tokenizer over those not counted."""
        if exact and self._uncounted:
            missing = sorted(self._uncounted)
            counts = self._engine.tokenizer.count([self.texts[index] for index in missing])
            for index, tokens in zip(missing, counts, strict=True):
                self._tokens[index] = tokens
            self._uncounted = set()
        return Sizes(in_bytes=self.sizes, tokens=self._tokens)

    def plan(self, exact: bool) -> list[PlannedRequest]:
        learned = self._engine.learned
        return plan_requests(
            range(len(self.texts)),
            self.measured(exact=exact or learned.always_count),
            self._engine.info,
            smaller=learned.smaller,
            scale=learned.scale,
        )
