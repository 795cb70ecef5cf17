"""Do the how-to for a provider's author and its template say the same, and is it true?"""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from embedcore import errors
from embedcore.config import Config
from embedcore.provider import protocol
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.testing import BatchContract, EmbedderContract, ProviderContract
from embedcore.testing.contract.base import ContractBase, KitBase

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="session")
def page(how_to: Path) -> str:
    return (how_to / "write-a-provider.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def kit_page(how_to: Path) -> str:
    return (how_to / "test-a-provider.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def source(template: Callable[[str], Path]) -> str:
    path = template("plain") / "src" / "embedcore_acme" / "plugin.py"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def own_tests(template: Callable[[str], Path]) -> str:
    path = template("plain") / "tests" / "test_contract.py"
    return path.read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page) if kind == language]


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table whose first heading is this, by their first cell."""
    (found,) = re.findall(rf"^\| {heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_template_has_less_than_60_lines_of_code(source: str) -> None:
    lines = [line for line in source.splitlines() if line.strip()]
    assert ast.get_docstring(ast.parse(source)) is not None
    assert len(lines) - 1 < 60  # the docstring is one line


def test_every_python_block_is_the_templates_or_runs(
    page: str, source: str, own_tests: str
) -> None:
    alone = [
        block
        for block in blocks(page, "python")
        if f"\n{block}" not in f"\n{source}" and f"\n{block}" not in own_tests
    ]
    for block in alone:
        compile(block, "write-a-provider.md", "exec")
    # All are run: below, by tests/test_third_party_provider.py, by test_acme_batch.py
    # and by test_like_openai.py.
    first_lines = [block.splitlines()[0].partition("(")[0] for block in alone]
    assert first_lines == [
        "import numpy as np",
        "from embedcore import EmbeddingClient",
        "price = Price",
        "def info_of",
        "class CharacterTokenizer:",
        "import json",
        "from contextlib import suppress",
        "from embedcore import EmbeddingClient",
        "from embedcore.provider import http, refusals, replies",
    ]


def test_the_price_and_the_models_of_the_page_are_valid(page: str, plugin: Any) -> None:
    names: dict[str, Any] = {**vars(plugin), "Decimal": Decimal, "date": date}
    for block in blocks(page, "python"):
        if block.startswith(("price = ", "def info_of")):
            exec(block, names)
    assert names["price"].picodollars(1_000_000) == 10**11
    assert names["acme"].default_model in names["acme"].models
    assert {name: info.model for name, info in names["acme"].models.items()} == {
        "v1": "v1",
        "v2": "v2",
    }


def test_every_hook_of_the_contract_is_listed(kit_page: str) -> None:
    hooks = {
        name
        for kind in (KitBase, ContractBase)
        for name, value in vars(kind).items()
        if name in kind.__annotations__
        or (inspect.isfunction(value) and name.startswith(("make_", "server_")))
    }
    assert {row.partition("(")[0] for row in table(kit_page, "Hook")} == hooks


def test_every_test_of_the_contract_is_listed(kit_page: str) -> None:
    tests = [
        name
        for kind in (EmbedderContract, ProviderContract, BatchContract)
        for name in dir(kind)
        if name.startswith("test_")
    ]
    listed = re.findall(r"^\| `(test_\w+)` \|", kit_page, re.MULTILINE)
    assert sorted(listed) == sorted(tests)


def test_the_class_of_the_kits_page_is_a_test_class(kit_page: str, plugin: Any) -> None:
    (block,) = blocks(kit_page, "python")
    names: dict[str, Any] = {**vars(plugin)}
    exec(block, names)
    made = names["TestAcme"]()
    made.url = "http://127.0.0.1:9"
    assert made.make_embedder().info.provider == "acme"


def test_the_page_shows_all_of_the_template(page: str, source: str) -> None:
    shown = {line for block in blocks(page, "python") for line in block.splitlines()}
    assert [line for line in source.splitlines() if line not in shown] == []


def test_the_tokenizer_of_the_page_keeps_its_word(page: str) -> None:
    names: dict[str, Any] = {}
    (block,) = (text for text in blocks(page, "python") if text.startswith("class Character"))
    exec(block, names)
    tokenizer: protocol.Tokenizer = names["CharacterTokenizer"]()
    for text in ("", "a", "été 🍏", "one two three"):
        assert tokenizer.count([text, text]) == [len(text)] * 2
        for limit in range(len(text) + 2):
            prefix = tokenizer.prefix(text, limit)
            assert text.startswith(prefix)
            assert tokenizer.count([prefix]) == [min(limit, len(text))]
    assert EstimatingTokenizer(bytes_per_token=3).count(["abcd"]) == [2]


def test_every_toml_block_is_the_templates_or_a_valid_config(
    page: str, template: Callable[[str], Path]
) -> None:
    project = (template("plain") / "pyproject.toml").read_text(encoding="utf-8")
    settings = [
        block
        for block in blocks(page, "toml")
        if block not in project and "embedcore.observers" not in block
    ]
    assert len(settings) == len(blocks(page, "toml")) - 2
    models = [Config.model_validate(tomllib.loads(block)).model for block in settings]
    assert models == ["acme:v1", "hashing:512"]


def test_the_options_of_the_page_are_the_providers(page: str, plugin: Any) -> None:
    (block,) = (text for text in blocks(page, "toml") if "[options.acme]" in text)
    options = plugin.AcmeOptions(**tomllib.loads(block)["options"]["acme"])
    assert options.timeout == 10


def test_the_members_of_the_protocol_are_listed(page: str) -> None:
    members = {name for name in vars(protocol.Embedder) if not name.startswith("_")}
    assert {row.split("(")[0] for row in table(page, "Member")} == members


def test_the_error_table_is_true(page: str) -> None:
    rows = table(page, "Class")
    for name, (_, again, billed) in rows.items():
        kind = getattr(errors, name)
        assert issubclass(kind, errors.ProviderError)
        assert (kind.retryable, kind.billed) == (again == "yes", billed), name
    general = {
        errors.ProviderError,
        errors.TransientProviderError,
        errors.PermanentProviderError,
    }
    specific = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ProviderError) and kind not in general
    }
    assert set(rows) == specific


def test_every_outcome_is_explained(page: str) -> None:
    outcomes = {cell.strip('"') for cell in table(page, "`billed`")}
    assert outcomes == {"no", "yes", "unknown"}


def test_the_provider_of_fifteen_lines_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The page begins with it: a real provider, of so many lines with code in them."""
    first, second, *_ = blocks(page, "python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 15
    names: dict[str, Any] = {}
    exec(first + second, names)
    promised = re.findall(r"^ *print\(.*\)  # (.*)$", second, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == promised
    provider = names["embedcore_provider"]()
    embedder = provider.create("v1", provider.options())
    assert embedder.info.provider == provider.name


@pytest.mark.parametrize("contract", [EmbedderContract, ProviderContract])
def test_the_kit_takes_the_provider_of_fifteen_lines(page: str, contract: Any) -> None:
    names: dict[str, Any] = {}
    exec(blocks(page, "python")[0], names)
    provider = names["embedcore_provider"]()
    if contract is ProviderContract:
        kit = type("Test", (contract,), {"provider": provider, "model": "v1"})()
        kit.test_unknown_options_are_refused()
        kit.test_info_names_the_provider_and_the_model()
    else:
        made = provider.create("v1", provider.options())
        kit = type("Test", (contract,), {"make_embedder": lambda self: made})()
        kit.test_row_i_belongs_to_text_i(made)
        kit.test_vectors_are_float32_rows(made)
