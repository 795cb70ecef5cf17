"""A planned part becomes a remote job: upload, which costs nothing, then the one call that does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import (
    EmbeddingError,
    InputNotReady,
    ProviderError,
    RequestRejected,
    RequestTooLarge,
    StorageCorrupt,
    TransientProviderError,
)
from embedcore.provider.types import BatchItem
from embedcore.storage.amounts import Amount
from embedcore.storage.calendar import MICROSECONDS
from embedcore.storage.jobsteps import Ended
from embedcore.storage.partrecords import Part

if TYPE_CHECKING:
    from embedcore.policy.batchoffice import BatchOffice

logger = logging.getLogger("embedcore")

_RENEW_SECONDS: Final = 20.0
_TEXTS_PER_READ: Final = 1_000
_MOST_CREATE_TRIES: Final = 5

Call = Callable[[Callable[[], Any]], Any]


class Asker:
    """Steps of a part of which no job was asked for. ``problems`` gets what a person must mend."""

    def __init__(self, office: BatchOffice, call: Call, problems: list[EmbeddingError]) -> None:
        self._office = office
        self._engine = office.engine
        self._jobs, self._steps = office.jobs, office.steps
        self._call = call
        self._problems = problems

    def ask(self, part: Part) -> Part:
        """State *planned*: upload its input and have its job created, if there is room for it."""
        office = self._office
        queue, limit = self._jobs.queue(office.pool), office.queue_tokens()
        too_large = limit is not None and part.tokens > limit and part.items > 1
        if too_large or not self._jobs.is_wanted(part) or not self._has_texts(part):
            # It is larger than was learned since to be allowed, or nobody wants it, or who planned
            # it has ended: others who want it cut parts of their own.
            self._delete_input(part)
            self._steps.dissolve(part)
            return replace(part, state="done")
        room = office.room()
        if room.is_full(*self._jobs.in_flight(office.pool), part) or queue.until > self._jobs.now():
            return part
        if part.input is None:
            part = self._upload(part)
            if part.state != "planned":
                return part
        asked = self._steps.ask(part, room)
        return part if asked is None else self._create(asked)

    def _has_texts(self, part: Part) -> bool:
        batch = None if part.batch is None else self._office.batches.numbered(part.batch)
        return batch is not None and batch.state == "open" and not batch.draining

    def _upload(self, part: Part) -> Part:
        try:
            reference = self._call(
                lambda: self._office.strategy.upload(self._texts(part), key=part.key)
            )
        except RequestTooLarge as error:
            if part.items == 1:
                return self._refused(part, error)
            raise
        return self._jobs.note(part, input=reference, tries=0, trouble=None)

    def _texts(self, part: Part) -> Iterator[BatchItem]:
        office = self._office
        batch = None if part.batch is None else office.batches.numbered(part.batch)
        if batch is None:
            raise StorageCorrupt(f"part {part.id} belongs to no batch any more")
        manifest, items = office.manifest(batch), self._jobs.items(part)
        renewed = self._engine.monotonic()
        try:
            for start in range(0, len(items), _TEXTS_PER_READ):
                some = items[start : start + _TEXTS_PER_READ]
                texts = manifest.texts([key for _, _, key, _ in some])
                for ordinal, _, key, _ in some:
                    if key not in texts:
                        raise StorageCorrupt(
                            f"{manifest.path} lacks a text of batch {batch.name}: submit it again"
                        )
                    yield BatchItem(
                        id=part.item_id(ordinal),
                        text=texts[key],
                        input_type=part.input_type or None,
                    )
                if self._engine.monotonic() - renewed > _RENEW_SECONDS:
                    renewed = self._engine.monotonic()
                    self._jobs.renew(part)
        finally:
            manifest.close()

    def _create(self, part: Part) -> Part:
        """The call that costs money: it was committed that it is made, and it is made once."""
        try:
            job = self._call(lambda: self._office.strategy.create(part.input or "", key=part.key))
        except EmbeddingError as error:
            if error.billed == "no":
                return self._not_created(part, error)
            logger.warning(
                "Batch part %d: nobody can say whether its job was created (%s); it is looked for",
                part.id,
                error,
            )
            return self._jobs.note(part, next=self._office.backoff(0), trouble=str(error))
        return self._jobs.note(
            part, state="submitted", job=job, tries=0, next=0, since=None, status="", trouble=None
        )

    def _not_created(self, part: Part, error: EmbeddingError) -> Part:
        by_status = isinstance(error, ProviderError) and error.free_by_status
        if isinstance(error, InputNotReady):
            now = self._jobs.now()
            since = now if part.since is None else part.since
            end = since + round(self._office.settings.input_wait * MICROSECONDS)
            if now < end:
                return self._not_ready(part, error, since, end)
            error = RequestRejected(
                f"its input, which was uploaded, could not be used for "
                f"{(now - since) / MICROSECONDS:.0f} s: {error}",
                billed="no",
                status=error.status,
                code=error.code,
            )
        lasting = not isinstance(error, TransientProviderError)
        if lasting:
            self._problems.append(error)
        # The input itself may be what is refused, or be gone.
        new_input = lasting or part.tries >= _MOST_CREATE_TRIES
        if new_input:
            self._delete_input(part)
        return self._steps.not_created(
            part,
            next_at=0 if lasting else self._office.backoff(part.tries, error),
            why=str(error),
            new_input=new_input,
            not_before=self._office.not_before(error),
            by_status=by_status,
        )

    def _not_ready(self, part: Part, error: InputNotReady, since: int, end: int) -> Part:
        """Ask again at once, then more and more rarely, with the input that is there."""
        logger.info("Batch part %d: its job is asked for again (%s)", part.id, error)
        not_before = self._office.not_before(error)
        return self._steps.not_created(
            part,
            next_at=max(self._office.next_look(since, end), not_before),
            why=str(error),
            new_input=False,
            since=since,
            not_before=not_before,
            by_status=error.free_by_status,
        )

    def _delete_input(self, part: Part) -> None:
        """No job was made of it, and none will be."""
        if part.input is None:
            return
        try:
            self._call(lambda: self._office.strategy.discard(part.input or ""))
        except EmbeddingError as error:
            # It costs nothing, and embedcore batch gc finds it.
            logger.info("Batch part %d: its input stays at the provider (%s)", part.id, error)

    def _refused(self, part: Part, error: EmbeddingError) -> Part:
        self._jobs.fail(part, [(one[1], str(error)) for one in self._jobs.items(part)])
        ended = Ended(actual=Amount(), note=str(error), retry=False)
        self._office.tell(*self._steps.end(part, ended))
        return replace(part, state="done")
