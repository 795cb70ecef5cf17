"""What has a run cost so far? Known at any moment, also when it ends in an error."""

from __future__ import annotations

import threading

from embedcore.cli.text import dollars, tokens
from embedcore.events import Event, Settled


class Tally:
    """An observer of the client that adds up what its requests cost, from any thread."""

    def __init__(self) -> None:
        self.tokens = 0
        self.picodollars = 0
        self.exact = True
        self.uncertain_tokens = 0
        self.uncertain_picodollars = 0
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Settled):
            return
        with self._lock:
            self.tokens += event.tokens
            self.picodollars += event.picodollars
            self.exact = self.exact and event.exact
            if event.uncertain:
                self.uncertain_tokens += event.tokens
                self.uncertain_picodollars += event.picodollars

    def text(self) -> str | None:
        """For a run that did not finish; None if nothing was spent."""
        if not self.tokens:
            return None
        spent = tokens(self.tokens, exact=self.exact)
        said = f"Spent by this run: {spent}, {dollars(self.picodollars)}"
        if self.uncertain_tokens:
            said += (
                f", of which {tokens(self.uncertain_tokens, exact=False)}, "
                f"{dollars(self.uncertain_picodollars)}, for requests that brought no vectors "
                "and may have been billed"
            )
        return f"{said}."
