"""The store of bought vectors as a call sees it: it may help, and it never stops anything."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from embedcore.errors import StorageError, StorageFull
from embedcore.events import Observer, StoreProblem
from embedcore.policy.claims import Claims, claims_for

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors
    from embedcore.storage.keys import Origin
    from embedcore.storage.vectors import Room, Take, VectorStore

logger = logging.getLogger("embedcore")

# After a failure it is left alone for so long: a locked store must not slow down every request.
_REST_SECONDS: Final = 60.0
_MILLION: Final = 1_000_000
# A row with its key, its index and the room that pages waste, by measurement.
_ROW_FACTOR: Final = 1.09

_introduced: set[str] = set()


class Shelf:
    """Looks up and keeps vectors, and goes on without them when the file cannot be used."""

    def __init__(
        self,
        store: VectorStore,
        *,
        observe: Observer,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self._observe = observe
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._putting = threading.Lock()
        self._rests_until = {"get": 0.0, "put": 0.0}

    @property
    def claims(self) -> Claims:
        return claims_for(str(self.store.path.absolute()))

    def introduce(self, width: int | None) -> None:
        """Say once where vectors are kept, how many, and how to turn that off."""
        place = str(self.store.path)
        if place in _introduced:
            return
        _introduced.add(place)
        size = f", about {room_for(_MILLION, width) / 1e9:.1f} GB per million" if width else ""
        logger.info(
            "vectors are kept in %s, so that none is paid for twice: at most %.1f GB (cache_cap)%s;"
            " cache = false turns that off",
            place,
            self.store.cap / 1e9,
            size,
        )

    def warn_of_size(self, vectors: int, width: int | None) -> None:
        """Tell before anything is bought that so many more will not fit."""
        with self._lock:
            told = self._rests_until["put"] > 0.0
        if width is None or told:
            return
        needed = room_for(vectors, width)
        try:
            room = self.store.cap - self.store.used
            free = shutil.disk_usage(self.store.path.parent).free
        except (StorageError, OSError) as error:
            if self._note("put", error):
                self._tell_of(error)
            return
        if needed > min(room, free):
            what = "cache_cap" if room <= free else "the disk"
            logger.warning(
                "%d vectors take about %s, and %s has %s left for %s: what does not fit is not "
                "kept, and would be bought again",
                vectors,
                shown_size(needed),
                what,
                shown_size(max(min(room, free), 0)),
                self.store.path,
            )

    def get(
        self,
        keys: Sequence[bytes],
        width: int | None,
        take: Take,
        *,
        room: Room | None = None,
    ) -> None:
        """As ``VectorStore.get``; what cannot be read counts as not there.

        Raises what ``take`` raises.
        """
        if self._rests("get"):
            return
        not_ours: list[StorageError] = []

        def guarded(places: Sequence[int], vectors: Vectors) -> None:
            try:
                take(places, vectors)
            except StorageError as error:
                not_ours.append(error)
                raise

        try:
            damaged = self.store.get(keys, width, guarded, room=room)
        except StorageError as error:
            if error in not_ours or getattr(error, "reason", None) == "fork":
                # To go on after a fork that was not safe would be to buy everything again.
                raise
            if self._note("get", error):
                self._tell_of(error)
            return
        self._note("get", None)
        if damaged:
            self._tell(f"{damaged} damaged vectors were found and deleted; they are bought again")

    def look(self, keys: Sequence[bytes], width: int | None) -> set[int]:
        """Places of the keys for which ``get`` would give a vector. Changes nothing.

        What cannot be read counts as not there, as it does for ``get``.
        """
        if self._rests("get"):
            return set()
        try:
            return self.store.look(keys, width).there
        except StorageError as error:
            self._tell(f"{error}. The plan counts nothing as cached")
            return set()

    def put(self, keys: Sequence[bytes], vectors: Vectors, origin: Origin) -> None:
        """As ``VectorStore.put``; what cannot be kept is not."""
        before, trouble = None, None
        # One after another: where one has waited for a lock in vain, no other waits as well.
        with self._putting:
            if self._rests("put"):
                return
            try:
                before = self.store.put(keys, vectors, origin)
            except StorageError as error:
                trouble = error
            news = self._note("put", trouble)
        if trouble is not None and news:
            self._tell_of(trouble)
        if before is not None:
            self._tell(
                f"{origin.model} answered as {before!r} before and answers as "
                f"{origin.answered_as!r} now: if that is another model, its vectors do not belong "
                f"together (embedcore cache prune --model {origin.model})"
            )

    def _rests(self, what: str) -> bool:
        with self._lock:
            return self._monotonic() < self._rests_until[what]

    def _note(self, what: str, trouble: Exception | None) -> bool:
        """Leave it alone for a while after trouble. Returns whether the trouble is new."""
        with self._lock:
            known = self._rests_until[what] > 0.0
            until = 0.0 if trouble is None else self._monotonic() + _REST_SECONDS
            both = trouble is not None and not isinstance(trouble, StorageFull)
            self._rests_until.update(dict.fromkeys(self._rests_until if both else [what], until))
        return not known

    def _tell_of(self, trouble: Exception) -> None:
        self._tell(f"{trouble}. Until then new vectors are not kept, and would be bought again")

    def _tell(self, message: str) -> None:
        self._observe(StoreProblem(path=str(self.store.path), message=message))


def room_for(vectors: int, width: int) -> int:
    """Bytes that so many vectors take on the disk, as float32."""
    return int(vectors * (width * 4 + 100) * _ROW_FACTOR)


def shown_size(in_bytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{in_bytes / 1e9:.2f} GB" if in_bytes >= 10**8 else f"{in_bytes / 1e6:.2f} MB"
