"""Do equal keys mean the same vector, and only then?"""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import assume, example, given, strategies as st

from embedcore.storage.keys import KEY_BYTES, Keys

# Few letters, so that the fields of different tuples often run together into the same text.
field = st.text("ab\0", max_size=4)
origins = st.tuples(field, field, field, st.none() | field)
texts = st.text("ab\0é", max_size=4)


def key(origin: tuple[str, str, str, str | None], text: str) -> bytes:
    provider, model, fingerprint, input_type = origin
    keys = Keys(provider=provider, model=model, fingerprint=fingerprint, input_type=input_type)
    return keys.of([text])[0]


@pytest.mark.fault(115)
@given(st.tuples(origins, texts), st.tuples(origins, texts))
@example((("a", "b", "f", None), "t"), (("ab", "", "f", None), "t"))
@example((("p", "m", "f", None), "t"), (("p", "m", "f", ""), "t"))
@example((("p", "m", "f", "a"), "b"), (("p", "m", "f", None), "ab"))
def test_two_different_tuples_never_have_one_key(
    one: tuple[tuple[str, str, str, str | None], str],
    other: tuple[tuple[str, str, str, str | None], str],
) -> None:
    assert (key(*one) == key(*other)) == (one == other)


@pytest.mark.fault(115)
@given(origins, texts, st.integers(0, 4), texts)
def test_each_field_alone_makes_another_key(
    origin: tuple[str, str, str, str | None], text: str, place: int, other: str
) -> None:
    whole = [*origin, text]
    assume(whole[place] != other)
    changed = [*whole[:place], other, *whole[place + 1 :]]
    assert key(tuple(whole[:4]), whole[4] or "") != key(tuple(changed[:4]), changed[4] or "")  # type: ignore[arg-type]


def test_the_keys_of_files_that_exist_never_change() -> None:
    """Another digest here means that everybody buys everything again."""
    wanted = "f7537fc9ccf05960"
    found = key(("openai", "text-embedding-3-small", "0" * 16, None), "hello")
    fields = [b"embedcore key 1", b"openai", b"text-embedding-3-small", b"0" * 16, b"\0", b"hello"]
    by_hand = b"".join(len(one).to_bytes(8, "little") + one for one in fields)
    assert found == hashlib.sha256(by_hand).digest()
    assert found.hex()[:16] == wanted
    assert len(found) == KEY_BYTES


@given(st.lists(texts, max_size=5))
def test_keys_come_in_the_order_of_the_texts(several: list[str]) -> None:
    origin = ("p", "m", "f", "query")
    keys = Keys(provider="p", model="m", fingerprint="f", input_type="query")
    assert keys.of(several) == [key(origin, text) for text in several] == keys.of(iter(several))
