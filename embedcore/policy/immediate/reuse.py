"""Vectors that a call need not pay for: cached, or in flight in another call or process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from embedcore.events import Cached
from embedcore.policy.cache import Follower
from embedcore.storage.keys import Keys, Origin

if TYPE_CHECKING:
    from embedcore.policy.budget import CallProgress
    from embedcore.policy.cache import VectorCache
    from embedcore.policy.engine import Engine
    from embedcore.policy.result_buffer import ResultBuffer
    from embedcore.policy.texts import Prepared
    from embedcore.provider.types import Vectors


# How often the claims of other processes are looked at.
_SHORTEST_LOOK: Final = 0.01
_LONGEST_LOOK: Final = 0.2
_LOOK_GROWS: Final = 1.5
_LOOKED_AT: Final = 500


def keys_of(engine: Engine, input_type: str | None) -> Keys:
    """The cache's keys of texts that this client sends. ``input_type``: as it is sent."""
    return _named(engine, engine.fingerprint, input_type)


def former_keys_of(engine: Engine, input_type: str | None) -> list[Keys]:
    """Under which keys earlier versions kept the same vectors. Nearly always there are none."""
    former = [_named(engine, fingerprint, input_type) for fingerprint in engine.former]
    if input_type is not None and input_type == engine.info.default_input_type:
        # Before a provider names its default, a call without a type has a key without one.
        names = (engine.fingerprint, *engine.former)
        former += [_named(engine, fingerprint, None) for fingerprint in names]
    return former


def _named(engine: Engine, fingerprint: str, input_type: str | None) -> Keys:
    info = engine.info
    return Keys(
        provider=info.provider,
        model=info.model,
        fingerprint=fingerprint,
        input_type=input_type,
    )


def vector_width(engine: Engine) -> int | None:
    """Numbers in each vector, as far as that is known."""
    return engine.info.dimensions or engine.learned.width


class Reuse:
    """The claims of one call, and what it gets without paying: from the cache, or from another
    call that pays for the same texts at the same time. That goes to ``buffer``, in any thread.

    Each key is claimed within the process first, and what is not cached among the processes then.
    """

    def __init__(
        self,
        engine: Engine,
        cache: VectorCache,
        prepared: Prepared,
        input_type: str | None,
        buffer: ResultBuffer,
        progress: CallProgress,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._prepared = prepared
        self._input_type = input_type
        self._buffer = buffer
        self._progress = progress
        self._keys = keys_of(engine, input_type)
        self._follower = Follower(self._receive)
        self._lock = threading.Lock()
        self._mine: dict[int, bytes] = {}
        # Those of them that another process is paying for. Only the caller's thread has to do with
        # these.
        self._elsewhere: dict[int, bytes] = {}

    def _receive(self, indices: Sequence[int], vectors: Vectors) -> None:
        self._buffer.put(indices, vectors, reused=True)
        self._progress.add(len(indices))

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Claim these texts and look them up. Returns those that this call pays for, in order."""
        width = vector_width(self._engine)
        self._cache.introduce(width)
        keys = self._keys.of([self._prepared.texts[index] for index in indices])
        # Noted before they are claimed: an interrupt in between must leave no claim behind.
        with self._lock:
            self._mine.update(zip(indices, keys, strict=True))
        # Claimed before it is looked up: between the two another call might pay for it and be done.
        theirs = set(self._cache.in_flight.take(keys, indices, self._follower))
        mine = {index: key for index, key in zip(indices, keys, strict=True) if index not in theirs}
        with self._lock:
            for index in theirs:
                self._mine.pop(index, None)
        since = self._cache.changes()
        found = self._look_up(mine, width)
        left = {index: key for index, key in mine.items() if index not in found}
        taken = self._cache.claim(list(left.values()), since) if left else None
        if taken is not None:
            # Between the two another process may have kept them.
            came = {index: key for index, key in left.items() if key in taken.there}
            found |= self._look_up(came, width) if came else set()
            self._elsewhere.update(
                (index, key) for index, key in left.items() if key in taken.elsewhere
            )
        self._tell(len(theirs) + len(found))
        missing = [index for index in left if index not in found and index not in self._elsewhere]
        if missing:
            self._cache.warn_of_size(len(missing), width)
        return missing

    def _tell(self, reused: int) -> None:
        info = self._engine.info
        if reused:
            self._engine.observe(Cached(provider=info.provider, model=info.model, texts=reused))

    def _look_up(self, mine: dict[int, bytes], width: int | None) -> set[int]:
        indices, keys = list(mine), list(mine.values())
        found: set[int] = set()

        def take(places: Sequence[int], vectors: Vectors) -> None:
            if not self._engine.learned.agrees(vectors.shape[1]):
                return
            chosen = [indices[place] for place in places]
            found.update(chosen)
            # To the others first: the caller may change what it is given.
            self._settle(chosen, vectors)
            self._receive(chosen, vectors)

        def room(places: Sequence[int]) -> Vectors | None:
            return self._buffer.room_for([indices[place] for place in places])

        self._cache.get(keys, width, take, room=room)
        for former in former_keys_of(self._engine, self._input_type):
            indices = [index for index in indices if index not in found]
            names = former.of([self._prepared.texts[index] for index in indices])
            self._cache.get(names, width, take, room=room)
        return found

    def billed(self, indices: Sequence[int], vectors: Vectors, answered_as: str | None) -> None:
        """Keep what was paid for, and hand it to the calls that wait for it."""
        self._cache.put(self._keys_for(indices), vectors, self._origin(answered_as))
        self._hand_on(indices, vectors)

    def _keys_for(self, indices: Sequence[int]) -> list[bytes]:
        with self._lock:
            known = [self._mine.get(index) for index in indices]
        texts = self._prepared.texts
        return [
            self._keys.of([texts[index]])[0] if key is None else key
            for key, index in zip(known, indices, strict=True)
        ]

    def _hand_on(self, indices: Sequence[int], vectors: Vectors) -> None:
        from embedcore.storage.vector_format import all_zero

        # Zeros may be bad luck: a call that waits for them asks for itself.
        useful = (~all_zero(vectors)).tolist()
        if all(useful):
            self._settle(indices, vectors)
            return
        kept = [place for place, good in enumerate(useful) if good]
        self._settle([indices[place] for place in kept], vectors[kept])
        self.release([index for index, good in zip(indices, useful, strict=True) if not good])

    def find(self, text: str) -> Vectors | None:
        """The vector of a text that is not one of the call's, if it is cached; shape (1, d)."""
        found: list[Vectors] = []

        def take(_: Sequence[int], vectors: Vectors) -> None:
            if self._engine.learned.agrees(vectors.shape[1]):
                found.append(vectors.copy())

        self._cache.get(self._keys.of([text]), vector_width(self._engine), take)
        return found[0] if found else None

    def store(self, text: str, vectors: Vectors, answered_as: str | None) -> None:
        """Keep the vector of a text that is not one of the call's."""
        self._cache.put(self._keys.of([text]), vectors, self._origin(answered_as))

    def _origin(self, answered_as: str | None) -> Origin:
        return Origin(
            model=self._engine.label,
            fingerprint=self._engine.fingerprint,
            input_type=self._input_type,
            answered_as=answered_as,
        )

    def _settle(self, indices: Sequence[int], vectors: Vectors) -> None:
        with self._lock:
            keys = [self._mine.pop(index, b"") for index in indices]
        # Where they were kept there is nothing to give up any more.
        self._cache.give_up(keys)
        self._cache.in_flight.fulfil(keys, vectors, self._follower)

    def release(self, indices: Sequence[int]) -> None:
        """This call will not pay for them: others may."""
        with self._lock:
            keys = [self._mine.pop(index) for index in indices if index in self._mine]
        # Another call of this process that takes one then has a claim of its own in the file.
        self._cache.give_up(keys)
        self._cache.in_flight.release(keys, self._follower)

    def others(self, pause: Callable[[float], None]) -> list[int]:
        """Wait for what others pay for. Returns what they ended without.

        ``pause(seconds)`` is called again and again, and may raise to end the wait.
        """
        seconds = _SHORTEST_LOOK
        while self._elsewhere:
            before = len(self._elsewhere)
            lost = self._ask_elsewhere()
            if lost:
                return lost
            if len(self._elsewhere) < before:
                seconds = _SHORTEST_LOOK
            pause(seconds)
            seconds = min(seconds * _LOOK_GROWS, _LONGEST_LOOK)
        return self._follower.wait(pause)

    def _ask_elsewhere(self) -> list[int]:
        """Take what other processes have paid for by now. Returns what they ended without."""
        lost: list[int] = []
        waiting = list(self._elsewhere.items())
        for start in range(0, len(waiting), _LOOKED_AT):
            some = dict(waiting[start : start + _LOOKED_AT])
            gone = self._cache.gone(list(some.values()))
            ended = {index: key for index, key in some.items() if key in gone}
            # Claims first, then vectors: a claim goes when its vector is kept.
            found = self._look_up(ended, vector_width(self._engine)) if ended else set()
            for index in ended:
                del self._elsewhere[index]
            self._tell(len(found))
            lost += [index for index in ended if index not in found]
            # All of them are waited for: of many, a few are enough to look at.
            if len(ended) < len(some) and not lost:
                break
        return lost

    def close(self) -> None:
        """The call has ended; what it did not pay for others may."""
        with self._lock:
            left = list(self._mine)
        self._elsewhere.clear()
        self.release(left)
        self._follower.close()


def billed_together(
    parts: Sequence[tuple[Reuse, Sequence[int], Vectors]], answered_as: str | None
) -> None:
    """``billed`` for several calls of one client, whose texts one request brought: kept at once."""
    import numpy as np

    first = parts[0][0]
    keys = [key for reuse, indices, _ in parts for key in reuse._keys_for(indices)]
    vectors = np.concatenate([vectors for *_, vectors in parts])
    first._cache.put(keys, vectors, first._origin(answered_as))
    for reuse, indices, own in parts:
        reuse._hand_on(indices, own)
