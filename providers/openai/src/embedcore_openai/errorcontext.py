"""What a request of this provider was about, for the errors of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from embedcore.provider.refusals import Asked

BATCH_API: Final = "batch API"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Context(Asked):
    """A request of the batch API has more to say.

    ``batch``: what it is about, such as a job and its id. ``creates``: it starts a job, which
    costs; the others cost nothing. ``key_print``: tells keys apart.
    """

    batch: str = ""
    creates: bool = False
    key_print: str = ""
