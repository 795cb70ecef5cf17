"""What a server says is shown without the key and without the texts."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from hypothesis import given, strategies as st

from embedcore.provider.redact import clean

keys = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=60).filter(
    lambda key: len(set(key)) > 6
)


@pytest.mark.fault(132)
@given(keys, st.text(max_size=40), st.text(max_size=40), st.data())
def test_no_piece_of_a_key_survives(key: str, before: str, after: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(key) - 8))
    stop = data.draw(st.integers(start + 8, len(key)))
    piece = key[start:stop]
    shown = clean(before + piece + after, secrets=[key])
    assert piece not in shown
    assert piece.lower() not in shown.lower()


@pytest.mark.fault(132)
@given(keys, st.binary(max_size=9), st.binary(max_size=9))
def test_no_base64_of_a_key_survives(key: str, before: bytes, after: bytes) -> None:
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        encoded = encode(before + key.encode() + after).decode()
        shown = clean(f"token={encoded}.", secrets=[key])
        inner = encode(key.encode()).decode().rstrip("=")[:-2]
        assert inner not in shown
        # Not even most of it: at each end some characters belong to the neighbours.
        kept = [word for word in shown.replace("[hidden]", " ").split() if len(word) > 24]
        assert not kept


@pytest.mark.fault(132)
def test_other_spellings_and_other_keys() -> None:
    key = "k/y+with=signs&more"
    assert quote(key, safe="")[:10] not in clean(f"?k={quote(key, safe='')}", secrets=[key])
    assert clean("Incorrect API key provided: sk-proj-abcdef1234567890.") == (
        "Incorrect API key provided: [hidden]."
    )
    assert "abc" not in clean("Authorization: Bearer abc")
    assert (
        clean("proxy http://user:pass@proxy:80 failed") == "proxy http://[hidden]@proxy:80 failed"
    )
    assert clean("the key is abcd!", secrets=["abcd"]) == "the key is [hidden]!"
    assert clean("a cat", secrets=["a"]) == "a cat"


@given(st.text(max_size=500), st.lists(keys, max_size=2), st.lists(st.text(), max_size=2))
def test_always_one_short_printable_line(text: str, secrets: list[str], texts: list[str]) -> None:
    shown = clean(text, secrets=secrets, texts=texts)
    assert shown.isprintable()
    assert len(shown) <= 240


@given(
    st.text(st.characters(categories=["L", "N"]), min_size=24, max_size=80), st.text(max_size=50)
)
def test_passages_of_the_texts_are_hidden(text: str, around: str) -> None:
    shown = clean(f"{around} Invalid value: {text}", texts=["other", text])
    assert text[:24] not in shown


def test_what_is_harmless_stays() -> None:
    message = "This model's maximum context length is 8192 tokens, however you requested 13028."
    assert clean(message, secrets=["sk-CANARY7d1f0e5b"], texts=["a text", "b" * 100]) == message
