"""The texts as they will be sent: each different one once, none counted as too long."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from embedcore.errors import InputTooLong
from embedcore.policy.intake import take_in
from embedcore.policy.planning import PlannedRequest, Sizes, plan_requests
from embedcore.policy.result import TextCut
from embedcore.policy.truncation import Cut, cut_overlong

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine


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
        self._uncounted = set(range(len(self.texts))) - set(counted)
        for index, tokens in counted.items():
            self._tokens[index] = tokens

    def cuts(self, rows: Sequence[int] | None = None) -> dict[int, TextCut]:
        """Row → what was cut off the end of its text; only those that were cut, or may have been.

        ``rows``: those that matter, by default all. A text that may be over the limit, and was
        taken whole by a server that was never seen to refuse one as too long, may have been cut
        there.
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
        """Rows whose text may be over the model's limit, which nobody has counted."""
        long = self.perhaps_long
        return sum(index in long for index in self.taken.rows) if long else 0

    @property
    def perhaps_long(self) -> frozenset[int]:
        """Texts that may be over the limit, which nobody has counted, of a server that was never
        seen to refuse one."""
        return frozenset() if self._engine.sizes.refuses_long else self._long

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
        wanted = self._uncounted if indices is None else self._uncounted.intersection(indices)
        if exact and wanted:
            missing = sorted(wanted)
            counts = self._engine.tokenizer.count([self.texts[index] for index in missing])
            for index, tokens in zip(missing, counts, strict=True):
                self._tokens[index] = tokens
            self._uncounted -= wanted
        return Sizes(in_bytes=self.sizes, tokens=self._tokens)

    def plan(self, exact: bool, indices: Sequence[int] | None = None) -> list[PlannedRequest]:
        """The requests for these texts, by default for all of them."""
        learned = self._engine.learned
        chosen = range(len(self.texts)) if indices is None else indices
        return plan_requests(
            chosen,
            self.measured(exact=exact or learned.always_count, indices=chosen),
            self._engine.info,
            size=self._engine.sizes.wanted,
            scale=learned.scale,
            texts=self._best_texts(chosen),
        )

    def _best_texts(self, chosen: Sequence[int]) -> int | None:
        """How many texts to put into one request; None: as many as go.

        Larger ones than are cheapest where the requests per minute would be used up before the
        tokens are.
        """
        best = self._engine.info.best_texts_per_request
        requests, tokens = self._engine.learned.limits
        if best is None or not requests or not tokens or not chosen:
            return best
        in_bytes = sum(self.sizes[index] for index in chosen)
        per_text = self._engine.learned.tokens_in(in_bytes) / len(chosen)
        return max(best, math.ceil(tokens / requests / max(per_text, 1.0)))
