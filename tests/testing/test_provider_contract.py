"""Does the contract of a provider's declaration catch what is broken, and pass what is sound?

Also what both contracts have in common: versions and failures that are known.
"""

from __future__ import annotations

import dataclasses
import itertools
import socket
import subprocess
import textwrap
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, SecretStr, field_serializer

from embedcore.provider import registry
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.hookspecs import KeepsVectors, Provider
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo
from embedcore.testing import EmbedderContract, ProviderContract

pytest_plugins = ["pytester"]

NUMBERS = itertools.count()


class Options(BaseModel, extra="forbid", frozen=True):
    api_key: SecretStr = SecretStr("")
    flavour: Literal["plain", "spiced"] = "plain"
    timeout: Annotated[float, KeepsVectors()] = 30.0


def info_of(model: str) -> ModelInfo:
    return ModelInfo(provider="acme", model=model, dimensions=8)


class Acme(BaseEmbedder):
    def __init__(self, model: str, options: Any) -> None:
        self.info, self.options = info_of(model), options

    def embed(self, request: EmbedRequest) -> EmbedReply:
        return EmbedReply(vectors=np.ones((len(request.texts), 8), np.float32))


SOUND = Provider(
    name="acme",
    options=Options,
    create=Acme,
    default_model="v1",
    models={model: info_of(model) for model in ("v1", "v2")},
)


class TestSound(ProviderContract):
    provider = SOUND


class TestInstalledByName(ProviderContract):
    provider = "hashing"


class Lenient(BaseModel):
    pass


class PlainKey(Options, extra="forbid", frozen=True):
    access_token: str | None = None


class ShownKey(Options, extra="forbid", frozen=True):
    @field_serializer("api_key")
    def shown(self, key: SecretStr) -> str:
        return key.get_secret_value()


class Required(Options, extra="forbid", frozen=True):
    region: str


class Dropped(Options, extra="forbid", frozen=True):
    @field_serializer("flavour")
    def always(self, flavour: str) -> str:
        return "plain"


class Unsteady(Options, extra="forbid", frozen=True):
    @field_serializer("flavour")
    def other(self, flavour: str) -> str:
        return f"{flavour} {next(NUMBERS)}"


def with_options(options: type[BaseModel]) -> Provider:
    return dataclasses.replace(SOUND, options=options)


def created(change: Callable[[Acme], object]) -> Provider:
    def create(model: str, options: Any) -> Acme:
        made = Acme(model, options)
        change(made)
        return made

    return dataclasses.replace(SOUND, create=create)


def called(**fields: str) -> Callable[[Acme], None]:
    def change(made: Acme) -> None:
        made.info = dataclasses.replace(made.info, **fields)  # type: ignore[arg-type]

    return change


def varied(made: Acme) -> None:
    key = made.options.api_key.get_secret_value()
    made.info = dataclasses.replace(made.info, variant=f"{made.options.timeout} {len(key)}")


def narrow(made: Acme) -> None:
    made.info = dataclasses.replace(made.info, dimensions=4)


def connects(made: Acme) -> None:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)


BROKEN = {
    "test_entry_point_gives_this_provider": dataclasses.replace(SOUND, name="hashing"),
    "test_unknown_options_are_refused": with_options(Lenient),
    "test_options_have_defaults": with_options(Required),
    "test_keys_are_secrets": with_options(PlainKey),
    "test_options_do_not_show_a_key": with_options(ShownKey),
    "test_info_names_the_provider_and_the_model": created(called(provider="Acme Inc.")),
    "test_listed_models_are_what_is_built": created(narrow),
    "test_building_sends_nothing": created(connects),
    "test_fingerprint_follows_the_options": with_options(Dropped),
    "test_fingerprint_knows_no_key": created(varied),
}
ALSO_BROKEN = {
    "another model's name": ("info_names_the_provider_and_the_model", created(called(model="v0"))),
    "other fingerprints for one": ("fingerprint_follows_the_options", with_options(Unsteady)),
    "a mark that does not hold": ("fingerprint_follows_the_options", created(varied)),
}


@pytest.mark.parametrize("test", BROKEN)
def test_broken_declaration_is_caught(test: str) -> None:
    _fails(test, BROKEN[test])


@pytest.mark.parametrize("what", ALSO_BROKEN)
def test_another_broken_declaration_is_caught(what: str) -> None:
    test, provider = ALSO_BROKEN[what]
    _fails(f"test_{test}", provider)


def _fails(test: str, broken: Provider) -> None:
    class Contract(ProviderContract):
        provider = broken

    with pytest.raises(AssertionError):
        getattr(Contract(), test)()


def test_every_test_of_a_declaration_can_fail() -> None:
    assert set(BROKEN) == {name for name in dir(ProviderContract) if name.startswith("test_")}


def test_a_contract_without_a_provider_says_what_to_set() -> None:
    with pytest.raises(NotImplementedError, match="must set provider"):
        ProviderContract().test_keys_are_secrets()


CLASS = """
    import numpy as np
    from embedcore.testing import EmbedderContract, FakeEmbedder
    from embedcore.testing.contract.base import since

    class Wide(FakeEmbedder):
        def embed(self, request):
            reply = super().embed(request)
            object.__setattr__(reply, "vectors", reply.vectors.astype(np.float64))
            return reply

    class TestWide(EmbedderContract):
        {body}

        def make_embedder(self):
            return Wide()

        @since(2)
        def test_from_a_later_kit(self, embedder):
            assert embedder is None
"""


@pytest.mark.parametrize(
    ("body", "outcomes"),
    [
        ("known_failures = {'test_vectors_are_float32_rows': 'it is wide'}", {"xfailed": 2}),
        ("kit = '1'", {"failed": 1, "xfailed": 1}),
        ("kit = '2'", {"failed": 2}),
    ],
)
def test_failures_that_are_expected(
    pytester: pytest.Pytester, body: str, outcomes: dict[str, int]
) -> None:
    pytester.makepyfile(textwrap.dedent(CLASS).replace("{body}", body))
    chosen = "later_kit or float32"
    result = pytester.runpytest_inprocess("-rx", "-k", chosen, "-p", "no:cacheprovider")
    result.assert_outcomes(**outcomes)
    if "known" in body:
        result.stdout.fnmatch_lines("*it is wide*")
    if "1" in body:
        result.stdout.fnmatch_lines("*came with kit 2*")


@pytest.mark.parametrize(
    ("line", "touched"),
    [
        ("x = 1", ""),
        ("import socket; socket.setdefaulttimeout(3)", "the default time-out of sockets"),
        ("import os; os.environ['ACME'] = '1'", "the environment variable ACME"),
        ("import logging; logging.basicConfig(level=10)", "the level of the root logger"),
        ("import socket; socket.getaddrinfo('127.0.0.1', 9)", "the network"),
        ("import locale; locale.setlocale(locale.LC_ALL, 'C.UTF-8')", "the locale"),
        ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)", "SIGTERM"),
    ],
)
def test_what_an_import_touches_is_named(
    tmp_path: Any, forks: Any, line: str, touched: str
) -> None:
    (tmp_path / "acme_module.py").write_text(line)
    process = forks(
        "import locale, runpy, sys\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "locale.setlocale(locale.LC_ALL, 'C')\n"
        "runpy.run_module('embedcore.testing.process', run_name='__main__')",
        tmp_path,
        "acme_module",
        stdout=subprocess.PIPE,
    )
    said = process.communicate(timeout=120)[0].partition("touched:")[2].strip()
    assert process.returncode == 0
    assert touched in said
    assert bool(said) == bool(touched)


def test_an_import_that_touches_something_fails_the_contract(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_loud.py").write_text("import os\nos.environ['ACME_LOUD'] = '1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    embedder = type("Loud", (Acme,), {"__module__": "acme_loud"})("v1", Options())
    with pytest.raises(AssertionError, match="ACME_LOUD"):
        EmbedderContract().test_import_touches_nothing(embedder)


def test_known_failures_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from embedcore.cli import models

    known = dataclasses.replace(SOUND, known_failures={"test_time_out_is_kept": "no time-out"})
    monkeypatch.setattr(registry, "load", lambda name: known)
    shown = models.found_providers()[0]
    assert shown.known_failures == {"test_time_out_is_kept": "no time-out"}
    assert models._provider_row(shown)[-1] == "ok, 1 known failure"
