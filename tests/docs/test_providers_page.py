"""The page that compares the providers is what their code says."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

page = run_path(str(Path(__file__).with_name("providers_page.py")))


def test_the_page_is_what_the_providers_say() -> None:
    found = page["PAGE"].read_text(encoding="utf-8")
    assert found == page["written"](), "run: python tests/docs/providers_page.py"


def test_every_known_model_is_on_it() -> None:
    text = page["PAGE"].read_text(encoding="utf-8")
    for name in ("cohere:embed-v4.0", "openai:text-embedding-3-small", "hashing:512"):
        assert f"| `{name}` |" in text
