"""What a provider implements. Four protocols; only ``Embedder`` is required.

The evolution rule: a protocol never gains a member in a minor release. New knowledge becomes a
field with a default in ``embedcore.provider.types``; a new ability becomes a new optional object.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Protocol

from embedcore.provider.types import (
    BatchItem,
    BatchLimits,
    BatchOutcome,
    BatchStatus,
    EmbedReply,
    EmbedRequest,
    FoundJob,
    ModelInfo,
)


class Tokenizer(Protocol):
    """Counts what a text costs. Callable from several threads."""

    @property
    def exact(self) -> bool:
        """True: ``count`` is what the provider bills. False: an upper bound of it."""
        ...

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special-token spellings counted as plain text."""
        ...

    def prefix(self, text: str, max_tokens: int) -> str:
        """The longest prefix of whole characters with ``count`` ≤ ``max_tokens``."""
        ...


class BatchStrategy(Protocol):
    """Many texts as one remote job that outlives this process.

    Every method may raise the errors under ``ProviderError``, and is callable from several threads.
    Only ``create`` costs money, and the core sends it once: an implementation must not retry it.
    The others may be retried. A job or a result that is no longer there, or belongs to another
    account, is ``RemoteGone``.
    """

    @property
    def limits(self) -> BatchLimits: ...

    def sizes(self, items: Sequence[BatchItem]) -> list[int]:
        """Bytes that each item takes of ``limits.max_bytes``."""
        ...

    def upload(self, items: Iterable[BatchItem], *, key: str) -> str:
        """Store the input remotely and return its reference. Costs nothing.

        ``items`` is read once, as it is sent; an error that it raises ends the upload.
        """
        ...

    def create(self, input_ref: str, *, key: str) -> str:
        """Start the job, marked with ``key``, and return its id.

        An error with ``billed="no"`` is proof that there is no job; after any other one there may
        be, and the core looks for it with ``find``.
        """
        ...

    def find(self, *, key: str, input_ref: str, since: datetime) -> list[FoundJob]:
        """Every job created since then that carries this key or this input, earliest first.

        Complete, or an error: jobs that cannot all be listed are no proof that there is none.
        """
        ...

    def discard(self, input_ref: str) -> None:
        """Delete the input. That it is gone already is fine."""
        ...

    def orphans(self, *, before: datetime) -> Iterator[str]:
        """Inputs that embedcore uploaded before then and that no job uses."""
        ...

    def poll(self, job_id: str) -> BatchStatus:
        """The job's state now. Remote states that are not known mean "running"."""
        ...

    def results(self, job_id: str) -> Iterator[BatchOutcome]:
        """What became of each item of a job that has ended, streamed, in any order.

        Readable again. Items that were not run may be missing. A download that is cut off raises
        ``TransientProviderError``; an item is never given from half a line.
        """
        ...

    def cancel(self, job_id: str) -> None:
        """Ask the provider to stop the job. What was done stays billed and readable.

        That it has ended already is fine.
        """
        ...


class Startup(Protocol):
    """What an embedder can do before its first request, so that no request has to wait for it.

    Optional: an embedder that has it names it in an attribute ``startup``. Both methods cost
    nothing, may be called again, and raise what ``embed`` raises; ``embed`` works without them.
    """

    def load(self) -> None:
        """Import and build whatever ``embed`` needs. Touches no network.

        Called before the first thread that sends is started: an import that fails in such a thread
        may hang. It is no part of the time that an attempt takes.
        """
        ...

    def connect(self) -> None:
        """Open a connection that the first request will use."""
        ...


class Embedder(Protocol):
    """One model of one provider, ready to use, callable from several threads at once."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def batch(self) -> BatchStrategy | None:
        """None: this provider has no batch API."""
        ...

    def embed(self, request: EmbedRequest) -> EmbedReply:
        """Send one request and return its vectors, row i for text i.

        Raises ``TransientProviderError`` or ``PermanentProviderError`` (or a subclass) with
        ``billed`` set, ``InputTooLong`` with the position of a text that the server names as too
        long, and ``InvalidResponse``. Does not retry.
        """
        ...

    def close(self) -> None:
        """Release connections. Callable more than once."""
        ...
