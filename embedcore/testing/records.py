"""What arrived at the fake, and what came of it?"""

from __future__ import annotations

from dataclasses import dataclass

from embedcore.testing.wire import HttpRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Received(HttpRequest):
    """A request that arrived: what met it, what it was answered and what it was billed.

    ``status`` is that of the reply, also when it did not get through.
    """

    fault: str | None = None
    status: int = 0
    billed_tokens: int = 0

    @property
    def texts(self) -> list[str]:
        """The texts of an embeddings request; empty for any other."""
        try:
            body = self.json()
        except ValueError:
            return []
        given = body.get("input", []) if isinstance(body, dict) else []
        return [given] if isinstance(given, str) else list(given)


def received(request: HttpRequest, fault: str | None, status: int, billed: int) -> Received:
    return Received(
        method=request.method,
        path=request.path,
        headers=request.headers,
        body=request.body,
        query=request.query,
        fault=fault,
        status=status,
        billed_tokens=billed,
    )
