"""Shortens a text that the server refused as too long.

No unit of the server's is known: only what passed and what did not. The rules:
``docs/decisions/0019-cut-by-counts.md``.

No wording decides. Whether it was the length is known once a shorter one has passed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from embedcore.errors import (
    BudgetExceeded,
    EmbeddingError,
    InputRejected,
    InputTooLong,
    ProviderError,
    RequestRejected,
    RequestTooLarge,
    StorageError,
)
from embedcore.policy.immediate.attempts import Attempts, priced_alone, send_alone
from embedcore.provider.tokens import utf8_length, utf8_prefix

if TYPE_CHECKING:
    from embedcore.policy.engine import Engine
    from embedcore.policy.immediate.call import Call
    from embedcore.policy.immediate.verdict import Inquiry, Verdict
    from embedcore.provider.types import Vectors


# What is kept must be so much of something that was refused, in characters and in bytes. A little
# above the 80 % that are promised: tokens are spread unevenly.
_ENOUGH: Final = 0.83
_MOST_TRIES: Final = 20
_MOST_SUGGESTED: Final = 2
# What is tried above something that passed, to see it refused, is so much longer.
_ABOVE: Final = 1.18
_JUST_ABOVE: Final = 1.02
_JUST_BELOW: Final = 0.97


class Fitting:
    """Tries prefixes of one text until the longest that passed is nearly as long as the shortest
    that was refused.

    ``kept``: the longest prefix that passed; None: none yet. ``trusted``: of the last prefix it is
    known otherwise that hardly more would fit.
    """

    def __init__(
        self,
        text: str,
        *,
        start: str | None,
        step: float,
        floor: int,
        snap: Callable[[str, str], str] = lambda prefix, _: prefix,
    ) -> None:
        """``text`` was refused. ``start``: the prefix to try first, None: one ``step`` (a factor
        below 1) shorter. ``floor``: UTF-8 bytes; no shorter prefix is tried, unless suggested.
        ``snap(prefix, refused)``: what is tried instead of a prefix of what was refused."""
        self.kept: str | None = None
        self._refused = text
        self._step = step
        self._floor = max(floor, 1)
        self._snap = snap
        self._next = start
        self._steps = 1
        self._tries = 0
        self._suggested = 0
        self._has_grown = False
        self._is_over = False

    def next(self) -> str | None:
        """The prefix to try now; None: it is over."""
        if self._is_over or self._tries >= _MOST_TRIES:
            return None
        suggestion, self._next = self._next, None
        candidate = self._between(suggestion) if suggestion else None
        candidate = candidate or (self._shorter() if self.kept is None else self._longer())
        if candidate is None:
            return None
        self._tries += 1
        return candidate

    def refused(self, prefix: str, suggestion: str | None = None) -> None:
        """It is too long as well. ``suggestion``: what the refusal says that would fit."""
        self._refused = prefix
        if suggestion and self.kept is None and self._suggested < _MOST_SUGGESTED:
            self._suggested += 1
            self._next = suggestion

    def passed(self, prefix: str, *, room: float | None = None, trusted: bool = False) -> None:
        """The server took it. ``room``: how many times its length would probably fit; None: not
        known. ``trusted``: so much is known to fit, and hardly more."""
        self.kept = prefix
        self._is_over = trusted or self._is_enough()
        if self._is_over or room is None:
            return
        size = utf8_length(prefix) * room
        near = utf8_length(prefix) / _ENOUGH
        # Either just above what is expected to fit, to see it refused, or as much as will do.
        wanted = size * _JUST_ABOVE if size * _JUST_ABOVE < near else size * _JUST_BELOW
        self._next = utf8_prefix(self._refused, int(wanted))

    def _is_enough(self) -> bool:
        if self.kept is None:
            return False
        enough_bytes = utf8_length(self.kept) >= _ENOUGH * utf8_length(self._refused)
        return enough_bytes and len(self.kept) >= _ENOUGH * len(self._refused)

    def _between(self, prefix: str) -> str | None:
        shortest = 0 if self.kept is None else len(self.kept)
        if not shortest < len(prefix) < len(self._refused):
            return None
        prefix = self._snap(prefix, self._refused)
        return prefix if shortest < len(prefix) < len(self._refused) else None

    def _shorter(self) -> str | None:
        """Ever larger steps down: what is far too long must not take many requests."""
        size = utf8_length(self._refused)
        if size <= self._floor:
            return None
        wanted = max(int(size * self._step**self._steps), self._floor)
        self._steps *= 2
        return self._between(self._at_most(wanted))

    def _longer(self) -> str | None:
        """Between what passed and what did not, once steps were too large."""
        if self.kept is None or self._is_enough():
            return None
        low, high = len(self.kept), len(self._refused)
        middle = round((low * high) ** 0.5)
        if not self._has_grown:
            # Most often it began near the end: just far enough above to know it, once refused.
            middle = min(int(low * _ABOVE), middle)
        self._has_grown = True
        middle = min(max(middle, low + 1), high - 1)
        return self._between(self._refused[:middle])

    def _at_most(self, in_bytes: int) -> str:
        prefix = utf8_prefix(self._refused, in_bytes)
        if len(prefix) == len(self._refused):
            prefix = prefix[:-1]
        # At the least one character, however many bytes it has.
        return prefix or self._refused[:1]


# How a text is shortened that cannot be counted, and one that was counted and is hardly too long.
_STEP: Final = 0.85
_COUNTED_STEP: Final = 0.97
# A refusal that says nothing of a length makes one suspect it from this share of the limit.
_NEAR_LIMIT: Final = 0.9
_LEAST_COUNTED: Final = 0.8
# Below this share of what should fit, it is not the length.
_LEAST: Final = 0.25
# Servers put marks around a text, and the end of a text has more tokens than its bytes say.
_SAFE: Final = 0.99
_SURELY: Final = 0.9
# A limit that a refusal names is believed if it is the one that we know, and the bill agrees.
_SAME_LIMIT: Final = 0.02
_AGREES: Final = 0.8
_REFUSALS: Final = (InputTooLong, RequestRejected, RequestTooLarge)


@dataclass(kw_only=True, slots=True)
class _Taken:
    """The longest beginning that has a vector, of shape (1, d)."""

    kept: str
    vectors: Vectors
    is_cached: bool


def may_be_length(call: Call, index: int, error: EmbeddingError) -> bool:
    """Whether the text, which was refused alone, may have been too long, and may be cut."""
    engine = call.engine
    limit = engine.info.max_input_tokens
    if engine.overlong == "reject" or limit is None or not isinstance(error, _REFUSALS):
        return False
    if isinstance(error, InputTooLong):
        return True
    prepared = call.prepared
    if engine.tokenizer.exact:
        # Counting is not free: no text has more tokens than its bytes allow.
        most = prepared.sizes[index] * engine.info.tokens_per_byte
        if most < _NEAR_LIMIT * limit:
            return False
        return engine.tokenizer.count([prepared.texts[index]])[0] >= _NEAR_LIMIT * limit
    return prepared.sizes[index] * engine.info.tokens_per_byte > limit


def may_be_cut(engine: Engine, tokens: int, too_long: bool | None) -> bool:
    """The same for a line of a batch that was refused. ``tokens``: its count, or the bound that was
    reserved for it. ``too_long``: what is known of the reason; None: nothing."""
    limit = engine.info.max_input_tokens
    if engine.overlong == "reject" or limit is None or too_long is not None:
        return engine.overlong != "reject" and limit is not None and bool(too_long)
    return tokens >= _NEAR_LIMIT * limit if engine.tokenizer.exact else tokens > limit


def way_to_cut(engine: Engine, tokens: int, too_long: bool | None = None) -> str:
    """What is added to the reason of such a line, in case that no job takes it shortened either."""
    if not may_be_cut(engine, tokens, too_long):
        return ""
    return (
        "; if it is too long: embedded at once (embedcore embed, or strategy = "
        '"immediate"), it is cut to what the server takes'
    )


class Guesses:
    """What may fit of a text that was refused: by what refusals name, and by what is known of the
    server. ``named_limit``: that of the last refusal that named one."""

    def __init__(self, engine: Engine, text: str) -> None:
        self.named_limit: int | None = None
        self._engine = engine
        self._text = text
        self._limit = engine.info.max_input_tokens or 0

    def fitting(self, error: EmbeddingError) -> Fitting:
        """How the text is shortened that was refused for this."""
        text, exact = self._text, self._engine.tokenizer.exact
        size = utf8_length(text)
        if isinstance(error, InputTooLong):
            start = self.named(text, error) or self._expected(size)
            least = size if exact else min(size, self._surely_fits())
            floor = int(least * _LEAST)
        elif exact:
            start, floor = None, int(size * _LEAST_COUNTED)
        else:
            # What must fit by its bytes comes first: if that is refused too, it is no length.
            floor = int(self._surely_fits() * _SURELY)
            start = utf8_prefix(text, floor)
        step = _COUNTED_STEP if exact else _STEP
        if exact:
            return Fitting(text, start=start, step=step, floor=floor, snap=self._counted)
        return Fitting(text, start=start, step=step, floor=floor)

    def _counted(self, prefix: str, refused: str) -> str:
        """A beginning of whole tokens, with fewer of them than what was refused."""
        tokenizer = self._engine.tokenizer
        tokens, most = tokenizer.count([prefix, refused])
        return tokenizer.prefix(self._text, min(tokens, most - 1))

    def safest(self, error: EmbeddingError) -> str:
        """What is most likely to fit, of all that would be tried."""
        tokenizer = self._engine.tokenizer
        if not tokenizer.exact:
            return utf8_prefix(self._text, int(self._surely_fits() * _SURELY))
        share = _LEAST if isinstance(error, InputTooLong) else _LEAST_COUNTED
        return tokenizer.prefix(self._text, int(tokenizer.count([self._text])[0] * share))

    def _surely_fits(self) -> int:
        """UTF-8 bytes that cannot have more tokens than the limit."""
        return max(self._limit // self._engine.info.tokens_per_byte, 1)

    def _expected(self, size: int) -> str | None:
        """What the last such text, or the bills so far, let expect to fit; None: nothing useful."""
        if self._engine.tokenizer.exact:
            return None
        learned, sizes = self._engine.learned, self._engine.sizes
        expected = sizes.longest_text or self._limit / max(learned.tokens_in(1), 1e-9)
        return utf8_prefix(self._text, int(expected)) if expected < _STEP * size else None

    def named(self, text: str, error: EmbeddingError) -> str | None:
        """What the refusal of ``text`` says that would fit, if it says anything that can be."""
        most, tokens = getattr(error, "max_tokens", None), getattr(error, "tokens", None)
        if not most or most < 0:
            return None
        self.named_limit = most
        if not tokens or tokens <= most:
            return None
        tokenizer = self._engine.tokenizer
        if tokenizer.exact:
            counted = tokenizer.count([text])[0]
            return tokenizer.prefix(text, min(counted * most // tokens, counted - 1))
        return utf8_prefix(text, int(utf8_length(text) * most / tokens * _SAFE))


class Shortening:
    """Finds how much of one text is taken, and gives its row the vector of that.

    It stays within the bounds of ``inquiry``. ``ending``: the error that ends the call, if one was
    raised that does.
    """

    def __init__(
        self,
        call: Call,
        verdict: Verdict,
        inquiry: Inquiry,
        index: int,
        error: EmbeddingError,
    ) -> None:
        self.ending: EmbeddingError | None = None
        self._call = call
        self._verdict = verdict
        self._inquiry = inquiry
        self._engine = call.engine
        self._index = index
        self._text = call.prepared.texts[index]
        self._limit = call.engine.info.max_input_tokens or 0
        self._last: EmbeddingError = error
        self._taken: _Taken | None = None
        self._guesses = Guesses(call.engine, self._text)
        self._fitting = self._guesses.fitting(error)

    def run(self) -> bool:
        """Whether the row has its vector now. Without one the text's own refusal stands.

        Raises what ends the call, and what no shorter text avoids; what was paid for until then
        is the row's.
        """
        try:
            while (prefix := self._fitting.next()) is not None:
                if not self._try(prefix):
                    break
        except EmbeddingError as error:
            # With a vector in hand, what kept a longer one from coming is not the row's fault.
            harmless = isinstance(error, (ProviderError, InputRejected, BudgetExceeded))
            if self._taken is None or not harmless or isinstance(error, StorageError):
                raise
        finally:
            self._end()
        return self._taken is not None

    def _try(self, prefix: str) -> bool:
        """Whether it goes on. A prefix that is cached is not sent."""
        if not prefix.strip():
            return False
        call, inquiry = self._call, self._inquiry
        cached = None if call.reuse is None else call.reuse.find(prefix)
        if cached is not None:
            self._took(prefix, cached, tokens=None, is_cached=True)
            return True
        if call.is_late or priced_alone(call, prefix).amount.tokens > inquiry.tokens_left:
            return False
        attempts = Attempts(
            after=self._last,
            fresh=self._taken is not None,
            asked=inquiry.asked,
            text=prefix,
            is_cached=True,
        )
        try:
            vectors = send_alone(call, attempts)
        except _REFUSALS as refusal:
            if refusal.budget_blocked:
                raise
            self._refused(prefix, refusal)
        else:
            self._took(prefix, vectors, tokens=attempts.billed, is_cached=False)
        finally:
            inquiry.tokens_left -= attempts.unconfirmed
            inquiry.retries += attempts.retries
        return True

    def _refused(self, prefix: str, refusal: EmbeddingError) -> None:
        try:
            self._verdict.failed(refusal)
        except EmbeddingError as error:
            self.ending = error
            raise
        self._last = refusal
        self._fitting.refused(prefix, self._guesses.named(prefix, refusal))

    def _took(self, prefix: str, vectors: Vectors, *, tokens: int | None, is_cached: bool) -> None:
        self._taken = _Taken(kept=prefix, vectors=vectors, is_cached=is_cached)
        room = self._limit / tokens if tokens else None
        self._fitting.passed(prefix, room=room, trusted=self._is_as_named(tokens))

    def _is_as_named(self, tokens: int | None) -> bool:
        """Whether it is as long as the refusal says, and that may be believed: the limit is the one
        that we know, and the bill says the same."""
        named, limit = self._guesses.named_limit, self._limit
        if named is None or abs(named - limit) > max(_SAME_LIMIT * limit, 1):
            return False
        # Words alone end nothing: a count in them may be of something else.
        return tokens is not None and _AGREES * named <= tokens <= named

    def _end(self) -> None:
        """Give the row what is there. Everything that was taken has been paid for."""
        taken = self._taken
        if taken is None:
            return
        self._engine.sizes.learn_longest(utf8_length(taken.kept))
        self._call.shortened(self._index, taken.kept, taken.vectors, cached=taken.is_cached)
