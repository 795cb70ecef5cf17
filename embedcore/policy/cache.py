"""The vector cache as a call sees it, and which vectors are being billed at this moment."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from embedcore.errors import StorageError, StorageFull
from embedcore.events import CacheProblem, Observer
from embedcore.forksafe import in_child
from embedcore.policy.threads import LOOK_SECONDS
from embedcore.storage.keys import Keys, Origin

if TYPE_CHECKING:
    from embedcore.provider.types import ModelInfo, Vectors
    from embedcore.storage.claims import Taken
    from embedcore.storage.database import Changes
    from embedcore.storage.vectors import Room, Take, VectorStore


_LAST_SECONDS: Final = 5.0

Receive: TypeAlias = "Callable[[Sequence[int], Vectors], None]"


class Follower:
    """What one call waits for while others embed it.

    ``receive(indices, vectors)`` gets what each request of theirs brings: vectors of its own, and
    in a copy of the context in which this was made.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._context = contextvars.copy_context()
        self._changed = threading.Condition()
        self._receiving = threading.Lock()
        self._waiting: set[int] = set()
        self._lost: list[int] = []
        self._error: BaseException | None = None
        self._closed = False

    def expect(self, indices: Sequence[int]) -> None:
        with self._changed:
            self._waiting.update(indices)

    def arrived(self, indices: Sequence[int], vectors: Vectors) -> None:
        """Called in a thread of the call that paid for it, which what fails here must not harm."""
        try:
            with self._receiving:
                if not self._closed:
                    self._context.copy().run(self._receive, indices, vectors)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._error = self._error or error
        self._settle(indices, lost=False)

    def lost(self, indices: Sequence[int]) -> None:
        """The call that was embedding them ended without them."""
        self._settle(indices, lost=True)

    def wait(self, pause: Callable[[float], None]) -> list[int]:
        """Until every expected vector is here or lost; returns the lost ones, ascending.

        ``pause(0)`` is called now and then, and may raise to end the wait. Raises what ``receive``
        raised.
        """
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                if not self._waiting:
                    lost, self._lost = sorted(self._lost), []
                    return lost
                self._changed.wait(LOOK_SECONDS)
            pause(0.0)

    def close(self) -> None:
        """Nothing more is received, save for what does not come to its end within seconds."""
        self._closed = True
        if self._receiving.acquire(timeout=_LAST_SECONDS):
            self._receiving.release()

    def _settle(self, indices: Sequence[int], *, lost: bool) -> None:
        with self._changed:
            ended = self._waiting.intersection(indices)
            self._waiting -= ended
            if lost:
                self._lost += ended
            self._changed.notify_all()


class InFlightKeys:
    """The keys that calls of this process are embedding for one cache."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[bytes, Follower] = {}
        self._waiting: dict[bytes, list[tuple[Follower, int]]] = {}

    def take(self, keys: Sequence[bytes], indices: Sequence[int], caller: Follower) -> list[int]:
        """Claim ``keys[j]`` for text ``indices[j]``. Returns the indices that others have claimed:
        ``caller`` will hear of those."""
        theirs = []
        with self._lock:
            for key, index in zip(keys, indices, strict=True):
                if self._owners.setdefault(key, caller) is not caller:
                    self._waiting.setdefault(key, []).append((caller, index))
                    theirs.append(index)
            caller.expect(theirs)
        return theirs

    def fulfil(self, keys: Sequence[bytes], vectors: Vectors, caller: Follower) -> None:
        """Vector j is here for ``keys[j]``: every call that waits for it gets a copy."""
        for follower, (places, indices) in self._end(keys, caller).items():
            follower.arrived(indices, vectors[places])

    def release(self, keys: Sequence[bytes], caller: Follower) -> None:
        """These were not embedded after all. What ``caller`` has not claimed stays as it is."""
        for follower, (_, indices) in self._end(keys, caller).items():
            follower.lost(indices)

    def _end(
        self, keys: Sequence[bytes], caller: Follower
    ) -> dict[Follower, tuple[list[int], list[int]]]:
        """Calls that wait for any of them: the places in ``keys``, and its own indices for them."""
        ended: dict[Follower, tuple[list[int], list[int]]] = {}
        with self._lock:
            for place, key in enumerate(keys):
                if self._owners.get(key) is caller:
                    del self._owners[key]
                    for follower, index in self._waiting.pop(key, ()):
                        places, indices = ended.setdefault(follower, ([], []))
                        places.append(place)
                        indices.append(index)
        return ended


@functools.cache
def in_flight_keys_for(store: str) -> InFlightKeys:  # noqa: ARG001 - the cache's key
    """What everything in this process claims of one cache."""
    return InFlightKeys()


# The parent's calls do not go on in a child.
in_child(in_flight_keys_for.cache_clear)


logger = logging.getLogger("embedcore")

# After a failure it is left alone for so long: a locked cache must not slow down every request.
_REST_SECONDS: Final = 60.0
_MILLION: Final = 1_000_000
# Of the index, for each vector, with the room that its pages waste: by measurement.
_ROW_BYTES: Final = 130

# Rows that are put at once at most: what each commit costs is shared, and memory stays small.
_PUT_TOGETHER: Final = 1_024

_introduced: set[str] = set()


@dataclass(eq=False, slots=True)
class _Put:
    """What one thread wants kept. ``is_done``: there is nothing left to do for it."""

    keys: Sequence[bytes]
    vectors: Vectors
    origin: Origin
    is_done: bool = False

    def goes_with(self, other: _Put) -> bool:
        return (
            self.origin == other.origin
            and self.vectors.shape[1] == other.vectors.shape[1]
            and self.vectors.dtype == other.vectors.dtype
        )


class VectorCache:
    """Looks up and keeps vectors, and goes on without them when it cannot be used.

    ``keep_until``: seconds since 1970; what is put is counted on until then, so that no cap keeps
    it out, only the disk.
    """

    def __init__(
        self,
        store: VectorStore,
        *,
        observe: Observer,
        monotonic: Callable[[], float] = time.monotonic,
        keep_until: float = 0.0,
    ) -> None:
        self.store = store
        self._keep_until = keep_until
        self._observe = observe
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._putting = threading.Lock()
        self._to_put: list[_Put] = []
        self._rests_until = {"get": 0.0, "put": 0.0, "claim": 0.0}

    def pinned(self, keep_until: float) -> VectorCache:
        """The same for vectors that a batch counts on until then."""
        return VectorCache(
            self.store, observe=self._observe, monotonic=self._monotonic, keep_until=keep_until
        )

    @property
    def in_flight(self) -> InFlightKeys:
        return in_flight_keys_for(str(self.store.path.absolute()))

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
        """Tell before anything is paid for that so many more will not fit."""
        with self._lock:
            warned = self._rests_until["put"] > 0.0
        if width is None or warned:
            return
        needed = room_for(vectors, width)
        try:
            room = math.inf if self._keep_until else self.store.room
            free = shutil.disk_usage(self.store.path.parent).free
        except (StorageError, OSError) as error:
            if self._note("put", error):
                self._tell_of(error)
            return
        if needed > min(room, free):
            what = "cache_cap" if room <= free else "the disk"
            logger.warning(
                "%d vectors take about %s, and %s has %s left for %s: what does not fit is not "
                "kept, and would be billed again",
                vectors,
                shown_size(needed),
                what,
                shown_size(max(round(min(room, free)), 0)),
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
                # To go on after a fork that was not safe would be to pay for everything again.
                raise
            if self._note("get", error):
                self._tell_of(error)
            return
        self._note("get", None)
        if damaged:
            self._tell(f"{damaged} damaged vectors were found and deleted; they are embedded again")

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
        """As ``VectorStore.put``; what cannot be kept is not.

        What threads want kept while another one writes is kept by the next of them, all at once.
        """
        mine = _Put(keys, vectors, origin)
        with self._lock:
            self._to_put.append(mine)
        try:
            # One after another: where one has waited for a lock in vain, no other waits as well.
            with self._putting:
                if not mine.is_done:
                    self._put_together(mine)
        finally:
            with self._lock:
                self._to_put.remove(mine)

    def _put_together(self, mine: _Put) -> None:
        """Also what others wait to have kept, if this thread is not interrupted."""
        if self._rests("put"):
            return
        together, before, trouble = self._with_others(mine), None, None
        try:
            try:
                before = self._put_all(together)
            except StorageFull:
                if len(together) == 1:
                    raise
                # Those of them that fit are kept, each by its own thread.
                together = [mine]
                before = self._put_all(together)
        except StorageError as error:
            trouble = error
        news = self._note("put", trouble)
        for one in together:
            one.is_done = True
        if trouble is not None and news:
            self._tell_of(trouble)
        if before is not None:
            origin = mine.origin
            self._tell(
                f"{origin.model} answered as {before!r} before and answers as "
                f"{origin.answered_as!r} now: if that is another model, its vectors do not belong "
                f"together (embedcore cache prune --model {origin.model})"
            )

    def _with_others(self, mine: _Put) -> list[_Put]:
        """``mine`` first, then what goes with it, in the order in which it came."""
        together, rows = [mine], len(mine.keys)
        with self._lock:
            for one in self._to_put:
                rows += 0 if one is mine or one.is_done else len(one.keys)
                if rows > _PUT_TOGETHER:
                    break
                if one is not mine and not one.is_done and mine.goes_with(one):
                    together.append(one)
        return together

    def _put_all(self, puts: Sequence[_Put]) -> str | None:
        keys, vectors = puts[0].keys, puts[0].vectors
        if len(puts) > 1:
            import numpy as np

            keys = [key for one in puts for key in one.keys]
            vectors = np.concatenate([one.vectors for one in puts])
        return self.store.put(keys, vectors, puts[0].origin, keep_until=self._keep_until)

    def changes(self) -> Changes | None:
        """As ``Claims.changes``; None where that cannot be read."""
        if not self._rests("get"):
            with contextlib.suppress(StorageError):
                return self.store.claims.changes()
        return None

    def claim(self, keys: Sequence[bytes], since: Changes | None) -> Taken | None:
        """As ``Claims.take``. None: where nothing can be kept nothing is claimed."""
        if self._rests("put") or self._rests("claim"):
            return None
        try:
            return self.store.claims.take(keys, since)
        except StorageError as error:
            self._cannot_claim(error)
            return None

    def gone(self, keys: Sequence[bytes]) -> set[bytes]:
        """As ``Claims.gone``; what cannot be read counts as gone, as it does for ``get``."""
        if self._rests("get"):
            return set(keys)
        try:
            return self.store.claims.gone(keys)
        except StorageError as error:
            if self._note("get", error):
                self._tell_of(error)
            return set(keys)

    def give_up(self, keys: Sequence[bytes]) -> None:
        """This process will not pay for them after all, or could not keep them."""
        if self.store.claims.give_up(keys) and not self._rests("claim"):
            try:
                self.store.claims.write_down()
            except StorageError as error:
                self._cannot_claim(error)

    def renew(self) -> None:
        """Prolong what this process has claimed, if it is time to. To be called often."""
        if not self._rests("claim"):
            try:
                self.store.claims.renew()
            except StorageError as error:
                self._cannot_claim(error)

    def _cannot_claim(self, trouble: StorageError) -> None:
        """What stands in the way of a claim does so of vectors: it is told of once."""
        news = self._note("put", trouble)
        self._note("claim", trouble)
        if news:
            self._tell_of(trouble)

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
        self._tell(f"{trouble}. Until then new vectors are not kept, and would be billed again")

    def _tell(self, message: str) -> None:
        self._observe(CacheProblem(path=str(self.store.path), message=message))


def room_for(vectors: int, width: int) -> int:
    """Bytes that so many vectors take on the disk, as float32."""
    return vectors * (width * 4 + _ROW_BYTES)


def shown_size(in_bytes: int) -> str:
    """Bytes as a person reads them."""
    return f"{in_bytes / 1e9:.2f} GB" if in_bytes >= 10**8 else f"{in_bytes / 1e6:.2f} MB"


PROBE_TEXT: Final = "A lighthouse keeper counts ships, stars and the hours until the fog lifts."
# Services that compute on many machines answer the same text with vectors that differ in the last
# digits; another model, or another version of one, is far below.
SAME_ABOVE: Final = 0.999


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """``cosine``: of the vector now and the one that is kept; None: this is the first."""

    cosine: float | None

    @property
    def changed(self) -> bool:
        """Another model answers: its vectors do not belong to those that are kept."""
        return self.cosine is not None and self.cosine < SAME_ABOVE


def probe(store: VectorStore, info: ModelInfo, fingerprint: str, vectors: Vectors) -> Probe:
    """Compare the vector of ``PROBE_TEXT``, of shape (1, d), with the first one ever kept.

    The first is kept under a key of its own, and goes when the model's vectors are pruned. Raises
    ``StorageError``.
    """
    import numpy as np

    own = f"{fingerprint} probe"
    keys = Keys(provider=info.provider, model=info.model, fingerprint=own, input_type=None)
    (key,) = keys.of([PROBE_TEXT])
    kept: list[Vectors] = []

    def take(_: Sequence[int], found: Vectors) -> None:
        kept.append(found)

    store.get([key], None, take)
    if not kept:
        origin = Origin(model=f"{info.provider}:{info.model}", fingerprint=own)
        store.put([key], vectors, origin)
        return Probe(cosine=None)
    if kept[0].shape != vectors.shape:
        return Probe(cosine=0.0)
    before, now = kept[0][0].astype(np.float64), vectors[0].astype(np.float64)
    lengths = float(np.linalg.norm(before) * np.linalg.norm(now))
    return Probe(cosine=float(before @ now) / lengths if lengths else 0.0)
