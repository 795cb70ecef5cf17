"""Texts from the command line as vectors on standard output."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from embedcore.cli.estimate import agree, ask_above, estimated
from embedcore.cli.exits import BUDGET, FAILED, OK
from embedcore.cli.opening import Opened, opened
from embedcore.cli.text import amount_cut, dollars, perhaps_cut_text, plural, tokens
from embedcore.files.cuts import codes_of, tally
from embedcore.files.types import FilePlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from embedcore.cli.embed import Wish
    from embedcore.cli.screen import Screen
    from embedcore.policy.result import EmbeddingResult


def embed_literally(screen: Screen, wish: Wish) -> int:
    """``embedcore embed -c TEXT``: one JSON array per text, one a line; null for a failed one."""
    screen.buying = False
    with opened(wish.model, wish.scope) as ready:
        estimate = estimated(
            ready,
            _plan(ready, wish),
            lane="query" if wish.input_type == "query" else "all",
            on_budget=wish.on_budget,
        )
        if wish.dry_run:
            screen.answer({"plan": estimate.fields(ready)})
            screen.show(estimate.text(ready))
            return 0
        if not agree(screen, ready, estimate, yes=wish.yes, ask_above=ask_above(ready)):
            screen.complain("Nothing was sent.")
            return 2
        screen.buying = True
        result = ready.client.embed(
            list(wish.texts),
            input_type=wish.input_type,
            on_error=wish.on_error,
            on_budget=wish.on_budget,
        )
        screen.buying = None
    _show(screen, result)
    if result.stopped_at is not None:
        return BUDGET
    return FAILED if result.errors else OK


def _plan(ready: Opened, wish: Wish) -> FilePlan:
    plan = ready.client.plan(list(wish.texts), input_type=wish.input_type)
    return FilePlan(
        rows=plan.rows,
        duplicates=plan.rows - plan.unique - plan.rejected,
        cached=plan.cached,
        to_embed=plan.to_embed,
        rejected=plan.rejected,
        tokens=plan.tokens,
        exact=plan.exact,
        picodollars=plan.picodollars,
        requests=plan.requests,
        truncated=plan.truncated,
        perhaps_long=plan.perhaps_long,
    )


def _show(screen: Screen, result: EmbeddingResult) -> None:
    rows = [
        _numbers(row) if ok else None for row, ok in zip(result.vectors, result.ok, strict=True)
    ]
    usage = result.usage
    screen.answer(
        {
            "model": result.model,
            "fingerprint": result.fingerprint,
            "vectors": rows,
            "errors": {row: str(error) for row, error in result.errors.items()},
            "tokens_cut": dict(result.tokens_cut),
            "characters_cut": dict(result.characters_cut),
            "perhaps_cut": sorted(result.perhaps_cut),
            **_cost_fields(result),
        }
    )
    for row in rows:
        screen.show(json.dumps(row))
    for said in dict.fromkeys(str(error) for error in result.errors.values()):
        screen.complain(said)
    cut = tally(codes_of(result.cuts, list(result.cuts)))
    if cut.rows:
        screen.complain(
            f"{plural(cut.rows, 'text')} cut by {amount_cut(cut.tokens, cut.characters)}"
        )
    if cut.unknown:
        screen.complain(perhaps_cut_text(cut.unknown, "text"))
    if usage.tokens:
        requests = plural(usage.requests, "request")
        cost = dollars(usage.picodollars)
        screen.say(
            f"{result.model}: {tokens(usage.tokens, exact=usage.exact)} in {requests}, {cost}"
        )


def _cost_fields(result: EmbeddingResult) -> dict[str, Any]:
    usage = result.usage
    return {
        "tokens": usage.tokens,
        "picodollars": usage.picodollars,
        "requests": usage.requests,
        "uncertain_tokens": usage.uncertain_tokens,
        "uncertain_picodollars": usage.uncertain_picodollars,
        "free_by_status_tokens": usage.free_by_status_tokens,
        "free_by_status_picodollars": usage.free_by_status_picodollars,
        "free_by_status_requests": usage.free_by_status_requests,
    }


def _numbers(vector: NDArray[np.float32]) -> list[float]:
    # The shortest digits that give the same float32, instead of those of its double.
    return [float(str(number)) for number in vector]
