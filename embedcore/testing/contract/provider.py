"""Contract tests of what a distribution declares: entry point, options, models, fingerprints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest

from embedcore.provider import registry
from embedcore.provider.hookspecs import Provider
from embedcore.provider.options import is_secret, options_fingerprint
from embedcore.testing import process
from embedcore.testing.contract.base import KitBase
from embedcore.testing.contract.variants import keeps_vectors, other_value, types_of

if TYPE_CHECKING:
    from pydantic import BaseModel

    from embedcore.provider.protocol import Embedder

_KEY_LIKE: Final = re.compile(
    r"(?:^|_)(?:api_?)?(?:key|secret|password|passwd|passphrase|token|credential|bearer|auth)s?$"
)
_TOLD: Final = ("provider", "model", "dimensions", "max_input_tokens", "price")  # by `models`
_KEY: Final = "kit-0123456789abcdef"
_NO_OPTION: Final = "no_option_of_this_name"


class ProviderContract(KitBase):
    """Inherit, set ``provider``, and run pytest. No request is sent.

    - ``provider``: the ``Provider`` that the hook returns, or the name of an installed one.
    - ``model``: a model to build; by default ``default_model``, or the first of ``models``.
    - ``options``: what an embedder cannot be built without.
    - ``option_values``: other values of options, to be tried; None: not this one.
    - ``kit``, ``known_failures``: as in ``EmbedderContract``; those of the provider count too.
    """

    provider: ClassVar[Provider | str]
    model: ClassVar[str | None] = None
    options: ClassVar[Mapping[str, Any]] = {}
    option_values: ClassVar[Mapping[str, Any]] = {}

    def expected_failures(self) -> Mapping[str, str]:
        return {**self._provider.known_failures, **self.known_failures}

    def test_entry_point_gives_this_provider(self) -> None:
        name = self._provider.name
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", name), (
            f"the provider's name is {name!r}: it stands before the colon of a model's name, so "
            "use small letters, digits and hyphens"
        )
        if name not in [found.name for found in registry.installed()]:
            pytest.skip(f"no installed distribution has the entry point {name}: pip install -e .")
        found = registry.load(name)
        assert found.options is self._provider.options, (
            f"the entry point {name} leads to another provider, with other options"
        )

    def test_unknown_options_are_refused(self) -> None:
        try:
            self._provider.options(**self.options, **{_NO_OPTION: 1})
        except ValueError:
            return
        raise AssertionError(
            "a misspelt option is taken without a word: write class "
            'AcmeOptions(BaseModel, extra="forbid")'
        )

    def test_options_have_defaults(self) -> None:
        missing = [
            name
            for name, field in self._provider.options.model_fields.items()
            if field.is_required() and name not in self.options
        ]
        assert not missing, (
            f"{', '.join(missing)} must be given: give every option a default, keys too, so that "
            "an embedder can be built, and its limits asked for, without them"
        )

    def test_keys_are_secrets(self) -> None:
        kind = self._provider.options
        plain = [
            name
            for name, field in kind.model_fields.items()
            if _KEY_LIKE.search(name)
            and not is_secret(kind, name)
            and str in types_of(field.annotation)
        ]
        assert not plain, (
            f"{', '.join(plain)} is named like a key and is a plain string, which is shown in "
            "messages, reports and fingerprints: declare it as pydantic.SecretStr"
        )

    def test_options_do_not_show_a_key(self) -> None:
        for name in self._secrets():
            options = self._made(**{name: _KEY})
            for way in (repr(options), str(options), options.model_dump_json()):
                assert _KEY not in way, f"the options show {name}: leave it a pydantic.SecretStr"

    def test_info_names_the_provider_and_the_model(self) -> None:
        for model in self._models():
            info = self._build(model).info
            assert info.provider == self._provider.name, (
                f"info.provider of {model} is {info.provider!r}, and the provider's name is "
                f"{self._provider.name!r}: they are one word"
            )
            assert info.model == model, (
                f"an embedder for {model!r} has info.model {info.model!r}: it is what the caller "
                "wrote, and a part of every key"
            )

    def test_listed_models_are_what_is_built(self) -> None:
        for model, listed in self._provider.models.items():
            built = self._build(model).info
            for name in _TOLD:
                one, other = getattr(listed, name), getattr(built, name)
                assert one in (None, other), (
                    f"models[{model!r}].{name} is {one!r}, and that of an embedder {other!r}: "
                    "make both with one function"
                )

    def test_building_sends_nothing(self) -> None:
        with process.connections_seen() as seen:
            for model in self._models():
                self._build(model)
        assert not seen, f"building an embedder made {seen[0]}: leave the network to embed"

    def test_fingerprint_follows_the_options(self) -> None:
        plain = self._fingerprint(self._made())
        assert plain == self._fingerprint(self._made()), (
            "two equal options have different fingerprints: what of them has no JSON form of its "
            "own? A set has no order, and an object is named by its place in memory"
        )
        for name, value in self._other_values():
            found = self._fingerprint(self._made(**{name: value}))
            marked = keeps_vectors(self._provider.options, name)
            assert marked or found != plain, (
                f"{name} = {value!r} leaves the fingerprint as it is, and has no mark "
                "KeepsVectors(): leave the option in model_dump()"
            )
            assert not marked or found == plain, (
                f"{name} = {value!r} is marked KeepsVectors() and changes the fingerprint: does "
                "info.variant, or another option, depend on it?"
            )

    def test_fingerprint_knows_no_key(self) -> None:
        plain = self._fingerprint(self._made())
        for name in self._secrets():
            assert self._fingerprint(self._made(**{name: _KEY})) == plain, (
                f"another {name} gives another fingerprint: all vectors would be paid for again"
            )

    @property
    def _provider(self) -> Provider:
        given = getattr(type(self), "provider", None)
        if given is None:
            raise NotImplementedError(f"{type(self).__name__} must set provider")
        return registry.load(given) if isinstance(given, str) else given

    def _models(self) -> list[str]:
        named = [self.model, self._provider.default_model, *self._provider.models]
        found = list(dict.fromkeys(name for name in named if name is not None))
        if not found:
            pytest.skip("set model: the provider names neither models nor default_model")
        return found

    def _secrets(self) -> list[str]:
        from pydantic import SecretStr

        kind = self._provider.options
        return [
            name
            for name, field in kind.model_fields.items()
            if SecretStr in types_of(field.annotation)
        ]

    def _made(self, **changed: Any) -> BaseModel:
        return self._provider.options(**{**self.options, **changed})

    def _build(self, model: str, options: BaseModel | None = None) -> Embedder:
        embedder = self._provider.create(model, self._made() if options is None else options)
        embedder.close()
        return embedder

    def _fingerprint(self, options: BaseModel) -> str:
        model = self._models()[0]
        info = self._build(model, options).info
        return options_fingerprint(self._provider.name, model, options, info)

    def _other_values(self) -> Iterator[tuple[str, Any]]:
        options = self._made()
        width = self._build(self._models()[0]).info.dimensions
        for name in type(options).model_fields:
            named = name in self.option_values
            value = self.option_values[name] if named else other_value(options, name, width)
            if value is None or value == getattr(options, name):
                continue
            try:
                self._build(self._models()[0], self._made(**{name: value}))
            except Exception:  # noqa: BLE001, S112 - a made-up value may well be refused
                continue
            yield name, value
