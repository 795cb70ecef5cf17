"""One program, five services: another is one changed line of the settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcore import EmbeddingClient
from embedcore.cli import main
from embedcore.provider import registry
from embedcore.testing.service import FakeService

KEY = "canary-0123456789abcdefXYZ"
TEXTS = [f"text {number}" for number in range(120)]
# Model → its fake, the variable of its key, and what its address has beside that of the fake.
SERVICES = {
    "cohere:embed-v4.0": ("FakeCohere", "CO_API_KEY", ""),
    "voyage:voyage-4": ("FakeVoyage", "VOYAGE_API_KEY", "/v1"),
    "ollama:nomic-embed-text": ("FakeOllama", "OLLAMA_API_KEY", ""),
    "mistral:mistral-embed": ("FakeMistral", "MISTRAL_API_KEY", "/v1"),
    "gemini:gemini-embedding-2": ("FakeGemini", "GEMINI_API_KEY", "/v1beta"),
}

Run = Callable[[], dict[str, Any]]


def fake_of(model: str) -> AbstractContextManager[FakeService]:
    """Of the provider's own tests."""
    provider = model.partition(":")[0]
    if provider not in {found.name for found in registry.installed()}:
        pytest.skip(f"embedcore-{provider} is not installed here")
    module = __import__(f"fake_{provider}")
    fake: AbstractContextManager[FakeService] = getattr(module, SERVICES[model][0])(key=KEY)
    return fake


def settings(model: str, urls: dict[str, str]) -> str:
    """Every service is in it; the first line says which one is used."""
    tables = [f'[options.{name}]\nbase_url = "{url}"\n' for name, url in urls.items()]
    return "\n".join(
        (f'model = "{model}"', "cache = true\n[budget]\ndaily_cost_limit = 1\n", *tables)
    )


def program() -> dict[str, Any]:
    """What does not change."""
    with EmbeddingClient() as client:
        found = client.embed_documents(TEXTS)
        question = client.embed_query("text 7")
        again = client.embed(TEXTS)
        return {
            "model": f"{client.provider}:{client.model}",
            "found": np.array(found),
            "question": np.array(question),
            "cached": again.reused.all(),
            "cost": client.embed(["once more"]).usage.cost,
        }


@pytest.mark.parametrize("model", SERVICES)
def test_another_service_is_one_line(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, variable, path = SERVICES[model]
    config = tmp_path / "embedcore.toml"
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(config))
    monkeypatch.setenv(variable, KEY)
    with fake_of(model) as fake:
        urls = {
            name.partition(":")[0]: f"http://127.0.0.1:9{SERVICES[name][2]}" for name in SERVICES
        }
        urls[model.partition(":")[0]] = fake.url + path
        config.write_text(settings(model, urls), encoding="utf-8")
        result = program()
        # The question is one of the texts, of another type where the service knows types.
        assert fake.meter.billed_twice.keys() <= {"text 7"}
        assert fake.meter.rejected_requests == 0
    assert result["model"] == model
    assert result["found"].shape == (len(TEXTS), result["question"].shape[0])
    assert np.linalg.norm(result["found"], axis=1) == pytest.approx(1, abs=1e-5)
    assert len({row.tobytes() for row in result["found"]}) == len(TEXTS)
    assert result["cached"]
    assert (result["cost"] == 0) == model.startswith("ollama")
    assert result["cost"] < Decimal("0.0001")


@pytest.mark.parametrize("model", SERVICES)
def test_the_commands_of_the_readme_work(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, variable, path = SERVICES[model]
    provider = model.partition(":")[0]
    config = tmp_path / "embedcore.toml"
    monkeypatch.setenv("EMBEDCORE_CONFIG", str(config))
    corpus = Path("corpus.jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:5]))
    with fake_of(model) as fake:
        config.write_text(settings(model, {provider: fake.url + path}), encoding="utf-8")
        if provider != "ollama":
            assert main(["embed", str(corpus), "-o", "vectors.npy"]) != 0
            assert variable in capsys.readouterr().err
            # On this machine it is sent without one.
            assert fake.meter.billed_requests == 0
        monkeypatch.setenv(variable, KEY)
        assert main(["embed", str(corpus), "-o", "vectors.npy"]) == 0
        assert main(["models", provider]) == 0
    shown = "".join(capsys.readouterr())
    assert model in shown
    assert KEY not in shown
    assert np.load("vectors.npy").shape[0] == 5
