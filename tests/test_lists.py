"""A list of vectors has no place to say that a row failed: it is whole, or an error is raised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedcore import EmbeddingClient, InputRejected
from embedcore.testing import FakeEmbedder

FORMS: dict[str, Callable[[EmbeddingClient], Any]] = {
    "embed_text": lambda client: client.embed_text(""),
    "embed_texts": lambda client: client.embed_texts(["a", "", "b"]),
    "embed_documents": lambda client: client.embed_documents(["a", ""]),
    "embed_query": lambda client: client.embed_query(""),
    "aembed_text": lambda client: asyncio.run(client.aembed_text("")),
    "aembed_texts": lambda client: asyncio.run(client.aembed_texts(["", "a"])),
    "aembed_documents": lambda client: asyncio.run(client.aembed_documents(["a", ""])),
    "aembed_query": lambda client: asyncio.run(client.aembed_query("")),
    "without a budget": lambda client: client.embed_texts([""], check_budget=False),
}


@pytest.mark.case("H5")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("where", ["config", "profile"])
def test_a_form_that_returns_lists_raises_whatever_the_setting(
    form: Callable[[EmbeddingClient], Any], where: str
) -> None:
    keep: dict[str, Any] = {"on_empty": "keep"}
    if where == "profile":
        keep = {"model": "p", "profiles": {"p": {"model": "hashing:64", "on_empty": "keep"}}}
    fake = FakeEmbedder()
    with EmbeddingClient(embedder=fake, config=keep) as client:
        with pytest.raises(InputRejected, match="empty text"):
            form(client)
        assert fake.calls == []
        # What says what became of each row keeps it.
        result = client.embed(["a", ""])
        assert result.ok.tolist() == [True, False]
        assert np.isnan(result.vectors[1]).all()
        (block,) = client.embed_iter(["a", ""])
        assert block.ok.tolist() == [True, False]
