"""The lines of a batch's input are what the API takes."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from hypothesis import given, strategies as st

from embedcore.errors import InputRejected
from embedcore.provider.types import BatchItem


def line_of(
    text: str, *, item: str = "0", encoding: str = "float", width: int | None = None
) -> bytes:
    batch = create("m", OpenAIOptions(batch_encoding=encoding, dimensions=width)).batch
    assert batch is not None
    return batch.line_of(BatchItem(id=item, text=text))  # type: ignore[attr-defined,no-any-return]


@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_an_input_line_is_one_line_with_the_text(text: str) -> None:
    line = line_of(text, item="7", encoding="base64", width=256)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "custom_id": "7",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "m", "input": text, "encoding_format": "base64", "dimensions": 256},
    }


def test_the_body_of_a_line_is_what_the_api_describes(
    conforms: Callable[[str, object], None],
) -> None:
    conforms("CreateEmbeddingRequest", json.loads(line_of("a", width=8))["body"])


def test_a_recorded_input_has_the_same_members(
    recordings: Callable[[str], list[dict[str, object]]],
) -> None:
    upload = recordings("openai_embedding_batch_lifecycle.json")[0]["request_body"]
    assert isinstance(upload, dict)
    recorded = json.loads(upload["file_text"].splitlines()[1])
    ours = json.loads(line_of("b", width=256))
    assert recorded.keys() == ours.keys()
    assert recorded["url"] == ours["url"]
    assert recorded["body"].keys() == ours["body"].keys() - {"encoding_format"}


def test_a_text_that_is_no_unicode_names_its_item() -> None:
    with pytest.raises(InputRejected, match="'17'"):
        line_of("a\ud800", item="17")
