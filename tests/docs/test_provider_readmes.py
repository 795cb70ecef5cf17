"""What the READMEs of the providers and the page of assumptions say is true of their code."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from embedcore.provider import registry
from embedcore.provider.options import environment_options
from embedcore.provider.protocol import Embedder

ROOT = Path(__file__).parents[2]
# The other two have tests of their own.
NAMES = sorted(
    {path.parent.name for path in ROOT.glob("providers/*/pyproject.toml")} - {"hashing", "openai"}
)


# A bridge knows no models: a service's name stands before each.
BRIDGES = {"litellm"}


def readme(name: str) -> str:
    return (ROOT / "providers" / name / "README.md").read_text(encoding="utf-8")


def configured(name: str) -> tuple[str, Embedder, dict[str, object]]:
    """The model of the README's lines of config, what they make, and their options."""
    (block,) = re.findall(r"```toml\n(.*?)```", readme(name), re.DOTALL)
    lines = [line for line in block.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 5
    settings = tomllib.loads(block)
    provider, _, model = settings["model"].partition(":")
    assert provider == name
    found, options = registry.load(name), settings["options"][name]
    return model, found.create(model, found.options(**options)), options


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_of_config_make_a_known_model(name: str) -> None:
    model, embedder, options = configured(name)
    known = registry.load(name).models
    assert model in known or (name in BRIDGES and "/" in model and not known)
    dimensions = known[model].dimensions if known else None
    assert embedder.info.dimensions == options.get("dimensions", dimensions)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_are_three(name: str) -> None:
    block, *_ = re.findall(r"```sh\n(.*?)```", readme(name), re.DOTALL)
    lines = block.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"pip install . ./providers/{name} ")
    variables = dict(environment_options(registry.load(name).options))
    if "api_key" in variables and f"export {variables['api_key']}=" in lines[1]:
        return
    if name in BRIDGES:
        model, _, _ = configured(name)
        assert lines[1].startswith(f"export {model.partition('/')[0].upper()}_API_KEY=")
        return
    assert lines[1].startswith(("ollama pull", "hf download"))


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_three_commands_where_there_are_any(name: str) -> None:
    _, embedder, _ = configured(name)
    _, *blocks = re.findall(r"```sh\n(.*?)```", readme(name), re.DOTALL)
    assert (embedder.batch is not None) == bool(blocks)
    for block in blocks:
        commands = [line.split()[:3] for line in block.splitlines()]
        assert commands == [["embedcore", "batch", step] for step in ("submit", "status", "fetch")]


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_in_the_table_with_its_default(name: str) -> None:
    options = registry.load(name).options
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", readme(name), re.MULTILINE)
    told = [option for cell, _ in rows for option in re.findall(r"`(\w+)`", cell)]
    assert sorted(told) == sorted(options.model_fields)
    defaults = {cell.strip("`"): default for cell, default in rows}
    if "base_url" in options.model_fields:
        address = options.model_fields["base_url"].default
        assert ("the service's" if address is None else str(address)) in defaults["base_url"]
    for option, variable in environment_options(options):
        assert f"${variable}" in defaults[option]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_of_the_service_is_what_the_page_says_it_assumes(name: str) -> None:
    page = (ROOT / "docs" / "assumptions.md").read_text(encoding="utf-8")
    switches = re.findall(rf"options\.{name}\.(\w+)", page)
    fields = set(registry.load(name).options.model_fields)
    assert {"refusals_billed", "max_input_tokens"} & set(switches) or "base_url" not in fields
    assert set(switches) <= fields
    assert switches
