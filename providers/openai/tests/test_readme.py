"""The README's configurations are read by the core and give what the text says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


def test_every_option_is_in_the_table() -> None:
    rows = "".join(re.findall(r"^\| (`.*?) \|", README, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) == set(OpenAIOptions.model_fields)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_configurations_work(block: str) -> None:
    settings = tomllib.loads(block)
    provider, _, model = settings["model"].partition(":")
    info = create(model, OpenAIOptions(**settings["options"][provider])).info
    assert info.endpoint == settings["options"][provider]["base_url"]
    assert info.price is not None


def test_there_is_something_to_check() -> None:
    assert len(BLOCKS) == 3
