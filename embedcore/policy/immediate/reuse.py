"""Vectors that a call need not pay for: cached, or in flight in another call or process."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from embedcore.events import Cached
from embedcore.policy.cache import Follower
from embedcore.policy.planning import chosen
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
        self.engine = engine
        self.cache = cache
        self.input_type = input_type
        self._prepared = prepared
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
        asking = Asking(reuse=self, indices=indices)
        ask_together([asking])
        if asking.error is not None:
            raise asking.error
        return asking.missing

    def claim_here(self, indices: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Claim these texts within the process. Returns those that are, and their keys."""
        keys = self._keys.of(self.texts_of(indices))
        # Noted before they are claimed: an interrupt in between must leave no claim behind.
        with self._lock:
            self._mine.update(zip(indices, keys, strict=True))
        theirs = set(self.cache.in_flight.take(keys, indices, self._follower))
        if not theirs:
            return list(indices), keys
        with self._lock:
            for index in theirs:
                self._mine.pop(index, None)
        mine = [place for place, index in enumerate(indices) if index not in theirs]
        return [indices[place] for place in mine], [keys[place] for place in mine]

    def found(self, indices: Sequence[int], vectors: Vectors) -> None:
        """These were looked up, and are there."""
        # To the others first: the caller may change what it is given.
        self._settle(indices, vectors)
        self._receive(indices, vectors)

    def texts_of(self, indices: Sequence[int]) -> Sequence[str]:
        return chosen(self._prepared.texts, indices)

    def room_for(self, indices: Sequence[int]) -> Vectors | None:
        return self._buffer.room_for(indices)

    def await_elsewhere(self, index: int, key: bytes) -> None:
        """Another process is paying for this text."""
        self._elsewhere[index] = key

    def tell(self, reused: int) -> None:
        """So many texts need not be paid for."""
        info = self.engine.info
        if reused:
            self.engine.observe(Cached(provider=info.provider, model=info.model, texts=reused))

    def _look_up(self, mine: dict[int, bytes]) -> set[int]:
        asking = Asking(reuse=self, indices=list(mine))
        wanted = _Wanted([asking])
        wanted.add(asking, list(mine), list(mine.values()))
        found = wanted.look_up(range(len(mine)))
        if asking.error is not None:
            raise asking.error
        return {wanted.indices[place] for place in found}

    def billed(self, indices: Sequence[int], vectors: Vectors, answered_as: str | None) -> None:
        """Keep what was paid for, and hand it to the calls that wait for it."""
        self.cache.put(self._keys_for(indices), vectors, self._origin(answered_as))
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
            if self.engine.learned.agrees(vectors.shape[1]):
                found.append(vectors.copy())

        self.cache.get(self._keys.of([text]), vector_width(self.engine), take)
        return found[0] if found else None

    def store(self, text: str, vectors: Vectors, answered_as: str | None) -> None:
        """Keep the vector of a text that is not one of the call's."""
        self.cache.put(self._keys.of([text]), vectors, self._origin(answered_as))

    def _origin(self, answered_as: str | None) -> Origin:
        return Origin(
            model=self.engine.label,
            fingerprint=self.engine.fingerprint,
            input_type=self.input_type,
            answered_as=answered_as,
        )

    def _settle(self, indices: Sequence[int], vectors: Vectors) -> None:
        with self._lock:
            keys = [self._mine.pop(index, b"") for index in indices]
        # Where they were kept there is nothing to give up any more.
        self.cache.give_up(keys)
        self.cache.in_flight.fulfil(keys, vectors, self._follower)

    def release(self, indices: Sequence[int]) -> None:
        """This call will not pay for them: others may."""
        with self._lock:
            keys = [self._mine.pop(index) for index in indices if index in self._mine]
        # Another call of this process that takes one then has a claim of its own in the file.
        self.cache.give_up(keys)
        self.cache.in_flight.release(keys, self._follower)

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
            gone = self.cache.gone(list(some.values()))
            ended = {index: key for index, key in some.items() if key in gone}
            # Claims first, then vectors: a claim goes when its vector is kept.
            found = self._look_up(ended) if ended else set()
            for index in ended:
                del self._elsewhere[index]
            self.tell(len(found))
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


def _plainly(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)


@dataclass(kw_only=True, slots=True, eq=False)
class Asking:
    """One of several calls of one client that ask what they need not pay for.

    ``run``: does something as that call, in its context. ``missing``: what it pays for, in order.
    ``error``: what ended it.
    """

    reuse: Reuse
    indices: Sequence[int]
    run: Callable[..., Any] = _plainly
    missing: list[int] = field(default_factory=list)
    error: BaseException | None = None

    def do(self, work: Callable[..., object], *arguments: object) -> None:
        """As that call, unless it has ended. What it raises ends only this call."""
        if self.error is None:
            try:
                self.run(work, *arguments)
            except BaseException as error:  # noqa: BLE001 - of this call alone
                self.error = error


def ask_together(asking: Sequence[Asking]) -> None:
    """``Reuse.missing`` for several calls of one client, which have equal types of input: claimed
    and looked up at once.

    Raises what ends all of them. They must be closed then, as where one has an error of its own.
    """
    wanted = _Wanted(asking)
    cache, width = wanted.cache, wanted.width
    cache.introduce(width)
    # Claimed before it is looked up: between the two another call might pay for it and be done.
    for one in asking:
        wanted.add(one, *one.reuse.claim_here(one.indices))
    since = cache.changes()
    every = range(len(wanted.keys))
    found = wanted.look_up(every)
    if all(one.error is not None for one in asking):
        return
    left = [] if len(found) == len(every) else _without(every, found)
    taken = cache.claim(chosen(wanted.keys, left), since) if left else None
    elsewhere: set[int] = set()
    if taken is not None:
        # Between the two another process may have kept them.
        came = [place for place in left if wanted.keys[place] in taken.there]
        found |= wanted.look_up(came) if came else set()
        elsewhere = {place for place in left if wanted.keys[place] in taken.elsewhere} - found
    missing = 0
    left = _without(left, found)
    for one, own in wanted.of_each(left, also_none=True):
        for place in own:
            if place in elsewhere:
                one.reuse.await_elsewhere(wanted.indices[place], wanted.keys[place])
            else:
                one.missing.append(wanted.indices[place])
        one.do(one.reuse.tell, len(one.indices) - len(own))
        missing += len(one.missing)
    if missing:
        cache.warn_of_size(missing, width)


class _Wanted:
    """Texts of one call or of several, one after the other, each with its key."""

    def __init__(self, asking: Sequence[Asking]) -> None:
        first = asking[0].reuse
        self.cache, self.width = first.cache, vector_width(first.engine)
        self.indices: list[int] = []
        self.keys: list[bytes] = []
        # Whose texts they are, and between which places.
        self.spans: list[tuple[Asking, int, int]] = []

    def add(self, one: Asking, indices: list[int], keys: list[bytes]) -> None:
        start = len(self.keys)
        self.indices += indices
        self.keys += keys
        self.spans.append((one, start, len(self.keys)))

    def look_up(self, places: Sequence[int]) -> set[int]:
        """Which of these places have a vector. Each call gets its own."""
        reuse, found = self.spans[0][0].reuse, set[int]()
        self._get(places, chosen(self.keys, places), found)
        for former in former_keys_of(reuse.engine, reuse.input_type):
            places = _without(places, found)
            names = [
                name
                for one, own in self.of_each(places)
                for name in former.of(one.reuse.texts_of(chosen(self.indices, own)))
            ]
            self._get(places, names, found)
        return found

    def _get(self, places: Sequence[int], names: Sequence[bytes], found: set[int]) -> None:
        agrees = self.spans[0][0].reuse.engine.learned.agrees

        def take(at: Sequence[int], vectors: Vectors) -> None:
            if not agrees(vectors.shape[1]):
                return
            start, there = 0, chosen(places, at)
            for one, own in self.of_each(there):
                end = start + len(own)
                one.do(one.reuse.found, chosen(self.indices, own), vectors[start:end])
                start = end
            found.update(there)

        def room(at: Sequence[int]) -> Vectors | None:
            (one, own), *others = self.of_each(chosen(places, at))
            return None if others else one.reuse.room_for(chosen(self.indices, own))

        self.cache.get(names, self.width, take, room=room)

    def of_each(
        self, places: Sequence[int], *, also_none: bool = False
    ) -> Iterator[tuple[Asking, Sequence[int]]]:
        """These places, which are ascending, by the calls whose they are. ``also_none``: calls
        without any as well."""
        at = 0
        for one, _, end in self.spans:
            start, at = at, bisect_left(places, end, at)
            if at > start or also_none:
                yield one, places[start:at]


def _without(places: Sequence[int], found: set[int]) -> list[int]:
    return [place for place in places if place not in found]


def billed_together(
    parts: Sequence[tuple[Reuse, Sequence[int], Vectors]], answered_as: str | None
) -> None:
    """``billed`` for several calls of one client, whose texts one request brought: kept at once."""
    import numpy as np

    first = parts[0][0]
    keys = [key for reuse, indices, _ in parts for key in reuse._keys_for(indices)]
    vectors = np.concatenate([vectors for *_, vectors in parts])
    first.cache.put(keys, vectors, first._origin(answered_as))
    for reuse, indices, own in parts:
        reuse._hand_on(indices, own)
