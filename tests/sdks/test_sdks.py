"""The fakes of the services understand the vendors' own clients, as our providers do.

Runs with ``make test-sdks``, which sets up an environment for the clients.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcore.provider import registry
from embedcore.provider.types import EmbedRequest
from embedcore.testing.service import FakeService

# Read before the tests' own settings are hidden from them.
PYTHON = os.environ.get("EMBEDCORE_SDKS_PYTHON")
KEY = "canary-0123456789abcdefXYZ"
TEXTS = ["a red apple", "été 🍏", "a green pear"]
# Provider → its fake, a model, what its address has beside that of the fake, and more texts than
# one request may have.
SERVICES = {
    "cohere": ("FakeCohere", "embed-v4.0", "", 97),
    "gemini": ("FakeGemini", "gemini-embedding-001", "/v1beta", 101),
    "mistral": ("FakeMistral", "mistral-embed", "/v1", 257),
    "ollama": ("FakeOllama", "all-minilm", "", None),
    "voyage": ("FakeVoyage", "voyage-4", "/v1", 1001),
}

pytestmark = pytest.mark.skipif(PYTHON is None, reason="run with make test-sdks")


def asked_by_the_vendors_client(name: str, url: str, texts: list[str], key: str = KEY) -> Any:
    script = Path(__file__).with_name("clients.py")
    done = subprocess.run(
        [str(PYTHON), str(script), name, url, key, json.dumps(texts)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SERVICES)
def test_both_clients_get_the_same_vectors(name: str) -> None:
    fake_name, model, path, _ = SERVICES[name]
    fake: FakeService
    with getattr(__import__(f"fake_{name}"), fake_name)(key=KEY) as fake:
        theirs = asked_by_the_vendors_client(name, fake.url, TEXTS)
        billed = fake.meter.billed_tokens
        options = {"base_url": fake.url + path, "api_key": KEY}
        embedder = registry.create(name, model, options)
        ours = embedder.embed(EmbedRequest(texts=TEXTS)).vectors
        embedder.close()
        assert fake.meter.billed_tokens == 2 * billed
    assert np.allclose(np.array(theirs["vectors"]), ours, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in SERVICES if SERVICES[name][3]])
def test_a_refusal_is_one_to_the_vendors_client_as_well(name: str) -> None:
    fake_name, _, _, too_many = SERVICES[name]
    with getattr(__import__(f"fake_{name}"), fake_name)(key=KEY) as fake:
        said = asked_by_the_vendors_client(name, fake.url, ["a"] * (too_many or 0))
        assert "error" in said
        assert fake.meter.billed_requests == 0
        wrong = asked_by_the_vendors_client(name, fake.url, TEXTS, key="another-0123456789")
        # Gemini says 400 of a key that it does not know.
        assert wrong["status"] in (400, 401)
        assert fake.meter.billed_requests == 0
