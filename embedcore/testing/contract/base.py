"""What a provider's author fills in for the contract tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from embedcore.provider.types import EmbedRequest
from embedcore.testing import process

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import EmbedReply, Vectors


Value = TypeVar("Value")
Function = TypeVar("Function", bound=Callable[..., Any])

KIT: Final = 1
"""The newest version of the kit: a release that adds tests which a sound provider may fail raises
it."""

PROBES = (
    "The cat sat on the mat.",
    "Invoices are due within thirty days.",
    "def factorial(n): return 1 if n < 2 else n * factorial(n - 1)",
    "Der Zug nach Hamburg fährt um sieben Uhr ab.",
    "今日は東京で雨が降っています。",
    "42",
    "Photosynthesis turns light into sugar; chlorophyll makes leaves green. " * 4,
    "please reset my password",
)
"""Texts so different that no model may give two of them nearly the same vector."""

_SHOWN: Final = 40
_SINCE: Final = "embedcore_kit"


def since(kit: int) -> Callable[[Function], Function]:
    """Mark a test that came with a version of the kit after the first.

    For a test class with an older ``kit`` it only warns: pytest shows it as an expected failure.
    """

    def mark(function: Function) -> Function:
        setattr(function, _SINCE, kit)
        return function

    return mark


class KitBase:
    """What holds for each class of the kit: its version, and what is known to fail."""

    kit: ClassVar[str] = "1"
    known_failures: ClassVar[Mapping[str, str]] = {}

    def expected_failures(self) -> Mapping[str, str]:
        """What is known to fail, by the test's name."""
        return self.known_failures

    @pytest.fixture(autouse=True)
    def _expectations(self, request: pytest.FixtureRequest) -> None:
        name = request.node.name
        plain = getattr(request.node, "originalname", None) or name
        came_with = int(getattr(getattr(self, plain, None), _SINCE, 1))
        expected = self.expected_failures()
        reason = expected.get(name) or expected.get(plain)
        if reason is None and came_with > int(self.kit):
            reason = (
                f'this test came with kit {came_with}, and the class has kit = "{self.kit}": what '
                f'it finds is not counted until you set kit = "{came_with}"'
            )
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=False))

    @pytest.fixture(autouse=True)
    def _process_as_it_was(self) -> Iterator[None]:
        """What a faulty provider changes in one test is changed again, and seen, in the next."""
        before = process.state_of_process()
        yield
        process.restore(before)


class ContractBase(KitBase):
    """The places that a provider's author fills in; see ``EmbedderContract``."""

    secret: ClassVar[str | None] = None
    tolerance: ClassVar[float] = 1e-3
    examples: ClassVar[int] = 30
    option_values: ClassVar[Mapping[str, Any]] = {}
    alike: ClassVar[tuple[str, ...]] = ()
    retry_after: ClassVar[float | None] = 7.0

    def make_embedder(self) -> Embedder:
        """A working embedder. Not needed by a class that defines the fixture ``embedder``."""
        raise NotImplementedError(
            f"{type(self).__name__} must define make_embedder() or a fixture named embedder"
        )

    def make_broken_embedder(self) -> Embedder | None:
        """An embedder whose every request fails: no server listens, the key is wrong, …"""
        return None

    def make_slow_embedder(self) -> Embedder | None:
        """An embedder whose server takes five seconds or more to answer."""
        return None

    def make_limited_embedder(self) -> Embedder | None:
        """An embedder whose server refuses each request for its rate (429), and says that another
        may be sent after ``retry_after`` seconds; None: it does not say when."""
        return None

    def make_variant(self, **options: Any) -> Embedder | None:  # noqa: ARG002
        """What ``make_embedder`` gives, with these options changed.

        A class without this hook has its embedder built once more where its attributes tell how:
        ``options``, a pydantic model, and one for each other argument, or ``info.model``.
        """
        return None

    def server_bill(self) -> int | None:
        """Tokens billed so far by the server behind the embedder; None if it cannot be asked."""
        return None

    def server_requests(self) -> int | None:
        """Requests that reached the server so far, those of the broken embedder among them."""
        return None

    def server_texts(self) -> Sequence[str] | None:
        """The texts that reached the server so far, in order; None if it cannot be asked."""
        return None

    @pytest.fixture
    def embedder(self) -> Iterator[Embedder]:
        embedder = self.make_embedder()
        yield embedder
        embedder.close()

    @pytest.fixture
    def broken_embedder(self) -> Iterator[Embedder]:
        broken = self.make_broken_embedder()
        if broken is None:
            pytest.skip("define make_broken_embedder() to have errors tested")
        yield broken
        broken.close()

    @pytest.fixture
    def slow_embedder(self) -> Iterator[Embedder]:
        slow = self.make_slow_embedder()
        if slow is None:
            pytest.skip("define make_slow_embedder() to have time-outs tested")
        yield slow
        slow.close()

    @pytest.fixture
    def limited_embedder(self) -> Iterator[Embedder]:
        limited = self.make_limited_embedder()
        if limited is None:
            pytest.skip("define make_limited_embedder() to have rate limits tested")
        yield limited
        limited.close()

    def fresh(self) -> Embedder:
        """One more working embedder; skips a class that has a fixture instead."""
        try:
            return self.make_embedder()
        except NotImplementedError:
            pytest.skip("define make_embedder() to have several embedders compared")

    def requests_so_far(self) -> int:
        """``server_requests()``; skips a class without it."""
        requests: int = self._asked("server_requests", "requests counted")
        return requests

    def _asked(self, hook: str, purpose: str) -> Any:
        try:
            found = getattr(self, hook)()
        except AttributeError:  # it reads what only another hook makes
            found = None
        if found is None:
            pytest.skip(f"define {hook}() to have {purpose}")
        return found

    def holds(
        self,
        claim: Callable[[Value], None],
        values: SearchStrategy[Value],
        *,
        examples: int | None = None,
    ) -> None:
        """Try a claim with many values; the same ones in every run.

        The values are drawn inside the test, so a claim may use what fixtures gave to the test.
        """

        @settings(
            max_examples=examples or self.examples,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(values)
        def claim_holds(value: Value) -> None:
            claim(value)

        claim_holds()

    def assert_same(self, one: Vectors, other: Vectors, why: str) -> None:
        """Two vectors of one text are the same within ``tolerance``."""
        apart = distance(one, other)
        assert apart <= self.tolerance, f"{why} (1 - cosine is {apart:.2g})"


def embed(embedder: Embedder, texts: Sequence[str], input_type: str | None = None) -> Vectors:
    """The vectors of one request, sure to be one row per text."""
    vectors = embedder.embed(EmbedRequest(texts=list(texts), input_type=input_type)).vectors
    assert isinstance(vectors, np.ndarray), (
        f"EmbedReply.vectors must be a numpy array, not {type(vectors).__name__}"
    )
    assert vectors.ndim == 2, (
        f"EmbedReply.vectors must have two dimensions (texts, width), not shape {vectors.shape}"
    )
    assert len(vectors) == len(texts), (
        f"{len(texts)} texts were sent and {len(vectors)} rows came back: there must be exactly "
        f"one for each; raise InvalidResponse if the server leaves one out"
    )
    return vectors


def in_pieces(embedder: Embedder, texts: Sequence[str], input_type: str | None = None) -> Vectors:
    """The vectors of texts, in as few requests as the model allows."""
    most = embedder.info.max_texts_per_request
    parts = [
        embed(embedder, texts[start : start + most], input_type)
        for start in range(0, len(texts), most)
    ]
    return np.concatenate(parts)


def several(embedder: Embedder, texts: Sequence[str] = PROBES) -> list[str]:
    """As many of these texts as fit one request; skips a model that takes one at a time."""
    most = embedder.info.max_texts_per_request
    if most < 2:
        pytest.skip("this model takes one text per request")
    return list(texts[:most])


def distance(one: Vectors, other: Vectors) -> float:
    """1 − cosine; infinite where there is no angle: widths that differ, NaN, a zero vector."""
    if one.shape != other.shape:
        return float("inf")
    left, right = one.astype(np.float64), other.astype(np.float64)
    length = float(np.sqrt((left @ left) * (right @ right)))
    apart = 1.0 - float(left @ right) / length if length > 0 else float("inf")
    return apart if np.isfinite(apart) else float("inf")


def equal(one: Vectors, other: Vectors) -> bool:
    """Whether two arrays are the same, but for the last digits of a float."""
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-6, atol=1e-8))


def shown(text: str) -> str:
    """The beginning of a text, for a message."""
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def outcome_of(
    embedder: Embedder, text: str = PROBES[0], timeout: float | None = None
) -> EmbedReply | BaseException:
    """What one request gives or raises."""
    try:
        return embedder.embed(EmbedRequest(texts=[text], timeout=timeout))
    except pytest.skip.Exception:
        # Of ``embedcore provider check``: nothing may be sent.
        raise
    except BaseException as error:  # noqa: BLE001 - it is what is looked at
        return error


def within(seconds: float, call: Callable[[], Value]) -> tuple[Value | None, float]:
    """What a call in a thread of its own returns, and the seconds it took; None if it took longer.

    A provider that never comes back must not stop the tests of its author.
    """
    found: list[Value] = []
    start = time.monotonic()
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return (found[0] if found else None), time.monotonic() - start
