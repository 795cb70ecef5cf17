"""The texts as they will be sent: each different one once, none longer than the model allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from embedcore.errors import InputTooLong
from embedcore.policy.intake import take_in
from embedcore.policy.planning import PlannedRequest, Sizes, plan_requests
from embedcore.policy.truncation import cut_overlong

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine


class Prepared:
    """Texts, byte sizes and counts by index; ``taken.rows`` has the index of each of the rows."""

    def __init__(self, engine: Engine, texts: Iterable[object], *, keep: bool) -> None:
        self._engine = engine
        self.keep = keep
        self.taken = take_in(texts, keep_empty=engine.keep_empty, keep=keep)
        self.cuts: dict[int, int] = {}
        self._counts: dict[int, int] = {}
        self._all_counted = False
        self._shortened: set[int] = set()
        self.texts: list[str] = []
        self.sizes: list[int] = []
        self._cut_all()

    def _cut_all(self) -> None:
        """Cut what is too long; texts that are equal only after that are bought once as well."""
        engine, taken = self._engine, self.taken
        limit, tokenizer = engine.info.max_input_tokens, engine.embedder.tokenizer
        if limit is None or max(taken.sizes, default=0) <= limit:
            self.texts, self.sizes = taken.texts, taken.sizes
            return
        places: dict[tuple[str, int], int] = {}
        moved: list[int] = []
        for index, (text, size) in enumerate(zip(taken.texts, taken.sizes, strict=True)):
            cut = cut_overlong(text, size, limit, tokenizer)
            if cut is not None and (engine.overlong == "reject" or not cut.kept):
                moved.append(self._refuse(index, cut.tokens_cut, limit))
                continue
            kept, tokens_cut = (text, 0) if cut is None else (cut.kept, cut.tokens_cut)
            place = places.setdefault((kept, tokens_cut), len(self.texts))
            moved.append(place)
            if place == len(self.texts):
                self._add(place, kept, cut.tokens if cut else None, tokens_cut)
        taken.rows[:] = [moved[index] if index >= 0 else -1 for index in taken.rows]

    def _add(self, place: int, text: str, tokens: int | None, tokens_cut: int) -> None:
        self.texts.append(text)
        self.sizes.append(len(text.encode()))
        if tokens is not None:
            self._counts[place] = tokens
        if tokens_cut:
            self.cuts[place] = tokens_cut

    def _refuse(self, index: int, over: int, limit: int) -> int:
        row = self.taken.rows.index(index)
        error = InputTooLong(
            f"row {row} is {over} tokens over the {limit} that {self._engine.label} takes: split "
            'it, or set overlong = "truncate". Nothing was sent',
            position=row,
            reason=f"{over} tokens over the limit of {limit}",
        )
        if not self.keep:
            raise error
        for place, found in enumerate(self.taken.rows):
            if found == index:
                self.taken.rejected[place] = error
        return -1

    def shorten(self, index: int) -> bool:
        """Halve a text that the server calls too long in spite of our count. Once for each text."""
        limit = self._engine.info.max_input_tokens
        if self._engine.overlong == "reject" or limit is None or index in self._shortened:
            return False
        self._shortened.add(index)
        tokenizer, text = self._engine.embedder.tokenizer, self.texts[index]
        before = tokenizer.count([text])[0]
        kept = tokenizer.prefix(text, min(before, limit) // 2)
        if not kept:
            return False
        self.cuts[index] = self.cuts.get(index, 0) + before - tokenizer.count([kept])[0]
        self.texts[index], self.sizes[index] = kept, len(kept.encode())
        self._counts.pop(index, None)
        return True

    def measured(self, *, exact: bool) -> Sizes:
        """Bytes and tokens of every text; ``exact`` runs the tokenizer over those not counted."""
        if exact and not self._all_counted:
            missing = [index for index in range(len(self.texts)) if index not in self._counts]
            counted = self._engine.embedder.tokenizer.count([self.texts[i] for i in missing])
            self._counts.update(zip(missing, counted, strict=True))
            self._all_counted = True
        tokens = [self._counts.get(index, size) for index, size in enumerate(self.sizes)]
        return Sizes(in_bytes=self.sizes, tokens=tokens, exact=exact)

    def plan(self, exact: bool) -> list[PlannedRequest]:
        learned = self._engine.learned
        return plan_requests(
            range(len(self.texts)),
            self.measured(exact=exact),
            self._engine.info,
            max_texts=learned.max_texts,
            scale=learned.scale,
        )
