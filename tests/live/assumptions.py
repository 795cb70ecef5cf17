"""Which of docs/assumptions.md a run can test, and what it says of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

PAGE = Path(__file__).parents[2] / "docs" / "assumptions.md"

Verdict: TypeAlias = Literal["confirmed", "contradicted", "not testable"]


@dataclass(kw_only=True)
class Seen:
    """What the steps of a run have seen; None: a step was not made or came to no end.

    ``tokens``, ``byte_count``: of the texts of one call, as answered and in UTF-8. ``counted``: by
    the exact tokenizer. ``models``: names in answers. ``lengths``: smallest and largest norm.
    """

    model: str = ""
    reply_models: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    tokens: int | None = None
    byte_count: int = 0
    counted: int | None = None
    order: float | None = None
    longest: str | None = None
    longest_taken: bool | None = None
    too_long: str | None = None
    too_long_refused: bool | None = None
    largest_request: int = 0
    most_texts: int = 0
    rate_waits: int = 0
    batch_forms: list[str] = field(default_factory=list)
    batch_whole: bool | None = None
    batch_counts: str | None = None
    batch_counts_agree: bool | None = None
    batch_order: float | None = None
    listed: str | None = None
    listed_marked: bool | None = None
    deleted: str | None = None
    deleted_refused: bool | None = None
    expiry_taken: bool | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# None as its first: seen, and still no verdict.
Judged: TypeAlias = tuple[bool | None, str] | None


def named() -> list[str]:
    """The names on the page, in its order."""
    return re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def judge(provider: str, seen: Seen) -> dict[str, tuple[Verdict, str]]:
    """Each assumption about this provider → its verdict and what was seen."""
    found: dict[str, tuple[Verdict, str]] = {}
    for name in named():
        if not name.startswith(f"{provider}-"):
            continue
        test = TESTS.get(name.removeprefix(f"{provider}-")) or TESTS.get(name)
        judged = test(seen) if test is not None else None
        if judged is None:
            why = "no test in this run" if test is None else "this run came to no result"
            found[name] = ("not testable", why)
        elif judged[0] is None:
            found[name] = ("not testable", judged[1])
        else:
            found[name] = ("confirmed" if judged[0] else "contradicted", judged[1])
    return found


def _tokens_per_byte(seen: Seen) -> Judged:
    if seen.tokens is None:
        return None
    said = f"{seen.tokens} tokens for {seen.byte_count} bytes"
    return seen.tokens <= seen.byte_count, said


def _tokenizer(seen: Seen) -> Judged:
    if seen.tokens is None or seen.counted is None:
        return None
    return seen.tokens == seen.counted, f"{seen.tokens} tokens billed, {seen.counted} counted"


def _reply_model(seen: Seen) -> Judged:
    if not seen.models:
        return None
    known = {seen.model, *seen.reply_models}
    return set(seen.models) <= known, f"answers name {', '.join(seen.models)}"


def _usage_reported(seen: Seen) -> Judged:
    return None if seen.tokens is None else _tokens_per_byte(seen)


def _long_refused(seen: Seen) -> Judged:
    if seen.too_long_refused is None:
        return None
    return seen.too_long_refused, seen.too_long or ""


def _long_text(seen: Seen) -> Judged:
    """What is assumed is that it is not known: what was seen is worth more than a verdict."""
    return None if seen.too_long is None else (None, seen.too_long)


def _longest(seen: Seen) -> Judged:
    return None if seen.longest_taken is None else (seen.longest_taken, seen.longest or "")


def _order(seen: Seen) -> Judged:
    if seen.order is None:
        return None
    return seen.order >= ALIKE, f"smallest cosine with the text alone: {seen.order:.6f}"


def _request_texts(seen: Seen) -> Judged:
    if seen.largest_request < seen.most_texts or not seen.most_texts:
        return None
    return True, f"{seen.largest_request} texts were answered in one request"


def _batch_lists(seen: Seen) -> Judged:
    forms = set(seen.batch_forms) - {"none"}
    return (forms == {"numbers"}, f"lines have {', '.join(sorted(forms))}") if forms else None


def _batch_whole(seen: Seen) -> Judged:
    if seen.batch_whole is None:
        return None
    return seen.batch_whole, "every row came" if seen.batch_whole else "rows are missing"


def _batch_counts(seen: Seen) -> Judged:
    if seen.batch_counts_agree is None:
        return None
    return seen.batch_counts_agree, seen.batch_counts or ""


def _batch_rows(seen: Seen) -> Judged:
    if seen.batch_order is None:
        return None
    said = f"smallest cosine with single requests: {seen.batch_order:.6f}"
    return seen.batch_order >= ALIKE, said


def _listed(seen: Seen) -> Judged:
    return None if seen.listed is None else (seen.listed_marked is not None, seen.listed)


def _list_marked(seen: Seen) -> Judged:
    return None if seen.listed_marked is None else (seen.listed_marked, seen.listed or "")


def _deleted(seen: Seen) -> Judged:
    return None if seen.deleted_refused is None else (seen.deleted_refused, seen.deleted or "")


def _expiry(seen: Seen) -> Judged:
    if seen.expiry_taken is None:
        return None
    return seen.expiry_taken, "a job was created with it"


ALIKE = 0.999
# Name on the page, without the provider's where several have it → its test.
TESTS: dict[str, Callable[[Seen], Judged]] = {
    "tokens-per-byte": _tokens_per_byte,
    "tokenizer": _tokenizer,
    "reply-model": _reply_model,
    "text-tokens": _longest,
    "usage": _usage_reported,
    "long-refused": _long_refused,
    "order": _order,
    "request-texts": _request_texts,
    "request-size": _request_texts,
    "batch-lists": _batch_lists,
    "batch-results-whole": _batch_whole,
    "batch-counts": _batch_counts,
    "batch-one-text": _batch_whole,
    "batch-encoding": _batch_whole,
    "batch-rows": _batch_rows,
    "batch-listed": _listed,
    "batch-list-metadata": _list_marked,
    "batch-list": _list_marked,
    "batch-deleted-file": _deleted,
    "batch-output-expiry": _expiry,
    "voyage-batch-params": _batch_whole,
    "gemini-long-text": _long_text,
    "gemini-batch-upload": _batch_whole,
}
