"""Is the how-to about these servers true where no server is needed for it?"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from embedcore_openai.options import OpenAIOptions

from embedcore.config import Config

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "how-to" / "compatible-batch-servers.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def text():
    return PAGE.read_text(encoding="utf-8")


def test_its_settings_are_settings(text):
    found = [tomllib.loads(code) for language, code in BLOCK.findall(text) if language == "toml"]
    assert len(found) == 2
    for settings in found:
        Config.model_validate(settings)
        assert OpenAIOptions.model_validate(settings["options"]["openai"]).batch is True


def test_other_settings_that_it_names_exist(text):
    named = set(re.findall(r"`(\w+)(?: = [^`]+)?`", text))
    options = set(OpenAIOptions.model_fields)
    assert {"batch_output_expiry", "batch_encoding", "price", "base_model"} <= named & options
    assert "on_zero" in Config.model_fields


def test_its_versions_are_those_that_are_tested(text):
    pinned = {}
    for name in ("ogx", "aibrix"):
        pins = (HERE / f"requirements-{name}.txt").read_text(encoding="utf-8")
        pinned[name] = re.search(rf"^{name}==(\S+)$", pins, re.MULTILINE)[1]
    package = json.loads((HERE / "package.json").read_text(encoding="utf-8"))
    pinned["aimock"] = package["dependencies"]["@copilotkit/aimock"]
    rows = re.findall(r"^\| (OGX|AIBrix|aimock)[^|]*\| ([\d.]+) \|", text, re.MULTILINE)
    assert {name.lower(): version for name, version in rows} == pinned


def test_its_links_lead_somewhere(text):
    links = re.findall(r"\]\((?!https://)([^)]+)\)", text)
    assert links
    for target in links:
        assert (PAGE.parent / target).is_file(), target
