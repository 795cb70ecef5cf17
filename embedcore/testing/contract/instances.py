"""Contract tests of several embedders: options, what they share, copies, earlier requests."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from embedcore.provider.types import ModelInfo
from embedcore.testing.contract.base import (
    PROBES,
    ContractBase,
    distance,
    embed,
    equal,
    in_pieces,
)
from embedcore.testing.contract.variants import (
    fingerprint,
    is_width,
    keeps_vectors,
    options_of,
    other_values,
    rebuilt,
    secret_options,
    variables,
)

if TYPE_CHECKING:
    from embedcore.provider.protocol import Embedder
    from embedcore.provider.types import Vectors

_ANOTHER_KEY: Final = "another-key-0123456789abcdef"
_CALLS: Final = 25


class InstancesContract(ContractBase):
    """Embedders that live side by side, and one that has lived for a while."""

    def test_equal_embedders_are_equal(self, embedder: Embedder) -> None:
        other = self.fresh()
        for each in fields(ModelInfo):
            one, two = getattr(embedder.info, each.name), getattr(other.info, each.name)
            assert one == two, f"info.{each.name} of two equal embedders is {one!r} and {two!r}"
        assert fingerprint(embedder) == fingerprint(other), (
            "two equal embedders have different fingerprints: no vector would ever be found again"
        )
        self._compare(
            embed(embedder, [PROBES[0]]), embed(other, [PROBES[0]]), "two equal embedders"
        )
        other.close()

    def test_embedders_do_not_share_options(self, embedder: Embedder) -> None:
        before, info = self._vectors(embedder), embedder.info
        tried = False
        for name, _, other in self._tried(embedder):
            tried = True
            for _ in range(2):
                found = self._vectors(embedder)
                assert found.shape == before.shape, (
                    f"an embedder with another {name} changed the width of this one's vectors from "
                    f"{before.shape[1]} to {found.shape[1]}: keep options in self, not in a module "
                    "or a class"
                )
                self._compare(before, found, f"an embedder, while another {name} is in use")
                assert embedder.info == info, f"info changed by an embedder with another {name}"
                with suppress(Exception):
                    embed(other, [PROBES[0]])
            other.close()
        if not tried:
            pytest.skip("no other value of an option is known: set option_values")

    def test_embedders_do_not_share_a_key(self, embedder: Embedder) -> None:
        names = secret_options(embedder)
        if not names:
            pytest.skip("the embedder has no attribute options with a SecretStr in it")
        before = embed(embedder, [PROBES[0]])
        for name in names:
            other = self._variant(embedder, **{name: _ANOTHER_KEY})
            try:
                found = embed(embedder, [PROBES[0]])
            except Exception as error:
                raise AssertionError(
                    f"an embedder with another {name} was made, and this one then raised "
                    f"{type(error).__name__}: keep the key in self, not in a module, a class or "
                    "the environment"
                ) from error
            self._compare(before, found, f"an embedder, while another {name} is in use")
            assert fingerprint(other) == fingerprint(embedder), (
                f"another {name} gives another fingerprint: all vectors would be paid for again"
            )
            assert other.info == embedder.info, (
                f"info depends on {name}: a new key of the same account must not change it"
            )
            other.close()

    def test_closing_one_leaves_the_other(self, embedder: Embedder) -> None:
        other = self.fresh()
        embed(other, [PROBES[0]])
        embed(embedder, [PROBES[0]])
        other.close()
        try:
            embed(embedder, [PROBES[1]])
        except Exception as error:
            raise AssertionError(
                f"another embedder was closed, and this one then raised {type(error).__name__}: "
                "each must close only what is its own"
            ) from error

    def test_options_in_the_fingerprint_change_vectors(self, embedder: Embedder) -> None:
        before = self._vectors(embedder)
        for name, value, other in self._tried(embedder, marked=False):
            if is_width(name) and not self._makes_variants():
                continue  # test_width_is_that_of_the_options sees to it
            found = self._vectors_of(other)
            assert found is None or not equal(before, found), (
                f"the option {name} = {value!r} changes no vector, and it is a part of the "
                "fingerprint: read it, or mark it KeepsVectors(). If only other texts show it, "
                f'say so: option_values = {{"{name}": None}}'
            )

    def test_options_that_keep_vectors_keep_them(self, embedder: Embedder) -> None:
        before = self._vectors(embedder)
        for name, value, other in self._tried(embedder, marked=True):
            found = self._vectors_of(other)
            assert found is None or _near(before, found, self.tolerance), (
                f"the option {name} = {value!r} is marked KeepsVectors() and changes vectors: old "
                "and new ones would be mixed. Take the mark away"
            )

    def test_fingerprint_changes_with_the_vectors(self, embedder: Embedder) -> None:
        before = self._vectors(embedder)
        for name, value, other in self._tried(embedder):
            named = fingerprint(other) != fingerprint(embedder)
            found = self._vectors_of(other)
            assert found is None or named or _near(before, found, self.tolerance), (
                f"the option {name} = {value!r} changes vectors, and the fingerprint stays: old "
                "and new vectors would be mixed. Take KeepsVectors() away from it, or set "
                "info.variant"
            )

    def test_key_of_the_options_is_used(
        self, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = variables(embedder)
        if not names:
            pytest.skip("no option of this embedder comes from an environment variable")
        before = embed(embedder, [PROBES[0]])
        for name in names:
            monkeypatch.setenv(name, _ANOTHER_KEY)
        other = self.fresh()
        try:
            found = embed(other, [PROBES[0]])
        except Exception as error:
            raise AssertionError(
                f"with {' and '.join(names)} set to something else a request raised "
                f"{type(error).__name__}: use the options that are given, and do not read the "
                "environment. embedcore does, by FromEnvironment"
            ) from error
        self._compare(before, found, f"an embedder with another {names[0]} in the environment")
        other.close()

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copy_is_whole_or_refused(self, embedder: Embedder, way: str) -> None:
        before = embed(embedder, [PROBES[0]])
        make: dict[str, Callable[[Embedder], Any]] = {
            "deepcopy": copy.deepcopy,
            "pickle": lambda one: pickle.loads(pickle.dumps(one)),  # noqa: S301 - made here
        }
        try:
            twin = make[way](embedder)
        except Exception:  # noqa: BLE001 - it cannot be copied, and says so
            return
        assert twin.info == embedder.info, f"a copy by {way} has another info"
        assert fingerprint(twin) == fingerprint(embedder), (
            f"a copy by {way} has another fingerprint"
        )
        if way == "pickle" and not _has_keys(twin, secret_options(embedder)):
            return  # a key that stays out of a pickle is welcome
        try:
            found = embed(twin, [PROBES[0]])
        except Exception as error:
            raise AssertionError(
                f"a copy by {way} raised {type(error).__name__}: copy whole, or refuse with a "
                "TypeError"
            ) from error
        self._compare(before, found, f"a copy by {way}")
        twin.close()
        try:
            embed(embedder, [PROBES[0]])
        except Exception as error:
            raise AssertionError(
                f"a copy by {way} was closed, and the embedder then raised {type(error).__name__}"
            ) from error

    def test_earlier_requests_leave_no_trace(self, embedder: Embedder) -> None:
        texts = PROBES[: min(embedder.info.max_texts_per_request, 3)]
        before = embed(embedder, texts)
        for number in range(_CALLS):
            embed(embedder, [f"request number {number}"])
        self._compare(
            before, embed(embedder, texts), f"an embedder, after {_CALLS} other requests,"
        )

    def test_input_type_does_not_stick(self, embedder: Embedder) -> None:
        kinds = embedder.info.input_types
        if not kinds:
            pytest.skip("info.input_types is empty")
        before = {kind: embed(embedder, [PROBES[0]], kind) for kind in (None, *kinds)}
        for place, earlier in enumerate(kinds):
            for kind in {None, kinds[place - 1]}:
                vectors = before[kind]
                embed(embedder, [PROBES[1]], earlier)
                self._compare(
                    vectors,
                    embed(embedder, [PROBES[0]], kind),
                    f"input_type {kind!r} after a request with {earlier!r}",
                )

    def test_width_is_that_of_the_options(self, embedder: Embedder) -> None:
        options = options_of(embedder)
        names = [] if options is None else [*filter(is_width, type(options).model_fields)]
        asked = {name: getattr(options, name) for name in names}
        width = embed(embedder, [PROBES[0]]).shape[1]
        for name, value in asked.items():
            assert not isinstance(value, int) or value == width, (
                f"the option {name} is {value}, and vectors have {width} numbers: send it to the "
                "service, or refuse it"
            )

    def _makes_variants(self) -> bool:
        return type(self).make_variant is not ContractBase.make_variant

    def _variant(self, embedder: Embedder, **options: Any) -> Embedder:
        other = self.make_variant(**options)
        if other is None and not self._makes_variants():
            other = rebuilt(embedder, options)
        if other is None:
            pytest.skip("define make_variant(**options) to have options compared")
        return other

    def _tried(
        self, embedder: Embedder, *, marked: bool | None = None
    ) -> Iterator[tuple[str, Any, Embedder]]:
        """One embedder after the other in which one option has another value.

        ``marked``: only those with, or without, the mark ``KeepsVectors``.
        """
        options = options_of(embedder)
        if options is None:
            pytest.skip("the embedder has no attribute options, a pydantic model")
        for name, value in other_values(embedder, self.option_values).items():
            if marked not in (None, keeps_vectors(type(options), name)):
                continue
            try:
                other = self._variant(embedder, **{name: value})
            except Exception:  # noqa: BLE001, S112 - the options refuse this value
                continue
            yield name, value, other

    def _vectors(self, embedder: Embedder) -> Vectors:
        """Some vectors of each input type."""
        kinds = embedder.info.input_types
        parts = [in_pieces(embedder, PROBES[:3])]
        parts += [embed(embedder, [PROBES[0]], kind) for kind in kinds]
        return np.concatenate(parts)

    def _vectors_of(self, other: Embedder) -> Vectors | None:
        """Those of a variant, which is then closed; None if the server refuses its option."""
        try:
            return self._vectors(other)
        except Exception:  # noqa: BLE001 - a made-up value may well be refused
            return None
        finally:
            other.close()

    def _compare(self, one: Vectors, other: Vectors, what: str) -> None:
        assert _near(one, other, self.tolerance), f"{what} gives other vectors"


def _near(one: Vectors, other: Vectors, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    apart = max(map(distance, one, other), default=0.0)
    length, width = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    return apart <= tolerance and bool(np.allclose(length, width, rtol=1e-3 + tolerance))


def _has_keys(embedder: Embedder, names: list[str]) -> bool:
    """Whether it has the keys that the one had of which it is a copy."""
    from pydantic import SecretStr

    options = options_of(embedder)
    keys = [getattr(options, name, None) for name in names]
    return all(isinstance(key, SecretStr) and key.get_secret_value() for key in keys)
