"""How is money held that is only short because others hold more than they will need?"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from embedcore.errors import BudgetExceeded
from embedcore.events import Observer
from embedcore.storage.amounts import HeldLoosely

if TYPE_CHECKING:
    from embedcore.policy.purse import Account

_SHORTEST_LOOK: Final = 0.02
_LONGEST_LOOK: Final = 0.5

Held = TypeVar("Held")


def hold_patiently(
    hold: Callable[[], Held],
    account: Account,
    observe: Observer,
    *,
    pause: Callable[[float], None],
    monotonic: Callable[[], float],
) -> Held:
    """What ``hold`` gives, tried again for ``account.wait`` seconds while only loose bounds of
    others forbid it. Raises ``BudgetExceeded``, and observers are told."""
    until = monotonic() + account.wait
    look = _SHORTEST_LOOK
    while True:
        try:
            return hold()
        except HeldLoosely as wait:
            if monotonic() >= until:
                observe(account.refused(wait))
                raise wait.refusal from None
        except BudgetExceeded as error:
            observe(account.refused(error))
            raise
        pause(look * random.uniform(0.5, 1.5))  # noqa: S311 - spreads, hides nothing
        look = min(look * 2, _LONGEST_LOOK)
