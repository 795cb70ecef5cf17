"""What would a batch buy, and at which price?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from embedcore.cli.estimate import rows_text, will_be_cut
from embedcore.cli.text import dollars, facts, plural

if TYPE_CHECKING:
    from embedcore.cli.estimate import Estimate
    from embedcore.cli.opening import Opened
    from embedcore.files.types import FilePlan


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """What a batch would buy. ``plan`` has the batch's price, ``at_once`` that of ``embed``.

    ``same``: the id of an open batch with the same rows, whose texts it would join. ``mixed``: part
    of it, or all, may be embedded at once.
    """

    plan: FilePlan
    at_once: int | None
    same: str | None
    mixed: bool = False

    @property
    def at_most(self) -> FilePlan:
        """With the most that it may cost."""
        return replace(self.plan, picodollars=self.at_once) if self.mixed else self.plan

    @property
    def at_least(self) -> FilePlan:
        """With the lower price of the ways that it may take: limits refuse what fits in none."""
        prices = [one for one in (self.plan.picodollars, self.at_once) if one is not None]
        if not self.mixed or not prices:
            return self.plan
        return replace(self.plan, picodollars=min(prices))

    def fields(self) -> dict[str, Any]:
        """For ``--json``."""
        plan = self.plan
        return {
            "rows": plan.rows,
            "empty": plan.empty,
            "duplicates": plan.duplicates,
            "rejected": plan.rejected,
            "cached": plan.cached,
            "in_flight": plan.in_flight,
            "to_embed": plan.to_embed,
            "tokens": plan.tokens,
            "exact": plan.exact,
            "truncated": plan.truncated,
            "perhaps_long": plan.perhaps_long,
            "picodollars": plan.picodollars,
            "picodollars_at_once": self.at_once,
            "joins": self.same,
        }

    def text(self, ready: Opened, estimate: Estimate, *, waits: bool) -> str:
        """For a person. ``waits``: what is over a limit waits for budget."""
        plan = self.plan
        pairs = [("model", f"{ready.name}, as a batch"), ("rows", rows_text(plan))]
        if self.same is not None:
            pairs.append(("to embed", f"nothing: batch {self.same} has the same rows under way"))
        elif not plan.to_embed:
            pairs += [("to embed", "nothing: every text is cached or under way"), ("cost", "$0")]
        else:
            bound = "" if plan.exact else "at most "
            cut = will_be_cut(plan)
            texts = plural(plan.to_embed, "text")
            pairs.append(("to embed", f"{texts}, {bound}{plural(plan.tokens, 'token')}{cut}"))
            pairs.append(("cost", self._cost(ready)))
        verb = "will" if plan.exact else "may"
        then = f"{verb} make a part of it wait" if waits else f"{verb} refuse"
        for refusal in estimate.refusals:
            reason = str(refusal).removeprefix("not sent: ").partition(". Send less")[0]
            pairs.append(("limit", f"{then}: {reason}"))
        return facts(pairs)

    def _cost(self, ready: Opened) -> str:
        price = ready.client.info.price
        if price is None or self.plan.picodollars is None:
            return "not known: the price of this model is not"
        if price.free:
            return "$0"
        if price.batch is None:
            return (
                f"at most {dollars(self.plan.picodollars)}: it has no price of its own for batches"
            )
        at_once = "if all is embedded at once, it" if self.mixed else "at once it"
        return (
            f"at most {dollars(self.plan.picodollars)} (${price.batch:f} per million tokens); "
            f"{at_once} would be {dollars(self.at_once)}"
        )
