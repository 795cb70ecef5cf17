"""The asyncio methods of the client: the same calls in a thread, ended when cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, Self

from embedcore.policy.engine import Stop
from embedcore.policy.result import listed

if TYPE_CHECKING:
    from types import TracebackType

    from embedcore.events import Progress
    from embedcore.policy.immediate.call import OnBudget
    from embedcore.policy.result import EmbeddingResult


class AwaitedForms:
    """What ``EmbeddingClient`` adds to itself by defining ``_embed``, ``open`` and ``close``.

    Cancelling a call sends nothing more of it; what was under way is accounted for.
    """

    def _embed(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        on_budget: OnBudget = "raise",
        progress: bool | Callable[[Progress], None] = False,
        check_budget: bool = True,
        stop: Stop | None = None,
        cache: bool = True,
        whole: bool = False,
    ) -> EmbeddingResult:
        raise NotImplementedError

    def open(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aopen(self) -> None:
        """``open`` without blocking the event loop."""
        await asyncio.to_thread(self.open)

    async def aclose(self) -> None:
        """``close`` without blocking the event loop."""
        await asyncio.to_thread(self.close)

    async def aembed(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        on_error: Literal["raise", "keep"] = "raise",
        on_budget: OnBudget = "raise",
        progress: bool | Callable[[Progress], None] = False,
        cache: bool = True,
    ) -> EmbeddingResult:
        """``embed`` without blocking the event loop."""
        texts = _snapshot(texts)
        return await _in_thread(
            lambda stop: self._embed(
                texts,
                input_type=input_type,
                on_error=on_error,
                on_budget=on_budget,
                progress=progress,
                stop=stop,
                cache=cache,
            )
        )

    async def aembed_text(self, text: str) -> list[float]:
        """``embed_text`` without blocking the event loop."""
        return (await self._listed([text]))[0]

    async def aembed_texts(
        self,
        texts: Iterable[str],
        check_budget: bool = True,
        *,
        on_budget: OnBudget = "raise",
    ) -> list[list[float]]:
        """``embed_texts`` without blocking the event loop."""
        return await self._listed(texts, check_budget=check_budget, on_budget=on_budget)

    async def aembed_documents(self, texts: Iterable[str]) -> list[list[float]]:
        """``embed_documents`` without blocking the event loop."""
        return await self._listed(texts, input_type="document")

    async def aembed_query(self, text: str) -> list[float]:
        """``embed_query`` without blocking the event loop."""
        return (await self._listed([text], input_type="query"))[0]

    async def _listed(
        self,
        texts: Iterable[str],
        *,
        input_type: str | None = None,
        on_budget: OnBudget = "raise",
        check_budget: bool = True,
    ) -> list[list[float]]:
        texts = _snapshot(texts)
        result = await _in_thread(
            lambda stop: self._embed(
                texts,
                input_type=input_type,
                on_budget=on_budget,
                check_budget=check_budget,
                stop=stop,
                whole=True,
            )
        )
        return listed(result)


def _snapshot(texts: Iterable[str]) -> Iterable[str]:
    # The caller's task goes on while a thread opens the client: its list may change meanwhile.
    return list(texts) if isinstance(texts, list) else texts


async def _in_thread(work: Callable[[Stop], EmbeddingResult]) -> EmbeddingResult:
    stop = Stop()
    try:
        return await asyncio.to_thread(work, stop)
    finally:
        stop.set()
