"""Do vectors come back bit for bit, and is every change to a stored one noticed?"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from embedcore.storage import vector_format
from embedcore.storage.vector_format import Encoder, checksums, decode, is_intact

Floats = NDArray[np.float32]

anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
# By their bits: of the floats that are drawn by width, many are too large and thrown away.
halves = (st.integers(0, 0x7BFF) | st.integers(0x8000, 0xFBFF)).map(
    lambda bits: float(np.uint16(bits).view(np.float16))
)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 24))
exact = arrays.arrays(np.float32, shapes, elements=halves)
mixed = arrays.arrays(np.float32, shapes, elements=anything | halves)


def keys_of(count: int) -> list[bytes]:
    return [hashlib.sha256(str(number).encode()).digest() for number in range(count)]


def bits(vectors: NDArray[Any]) -> list[int]:
    found: list[int] = np.ascontiguousarray(vectors, dtype="<f4").view("<u4").ravel().tolist()
    return found


def encode(vectors: Floats) -> NDArray[Any]:
    return Encoder().encode(vectors)


def stored(vectors: Floats) -> tuple[list[bytes], list[int], list[int], list[bytes]]:
    """Rows as they are in the file."""
    rows, keys = encode(vectors), keys_of(len(vectors))
    blobs = [row.tobytes() for row in rows]
    return blobs, checksums(rows, keys).tolist(), [vectors.shape[1]] * len(keys), keys


@given(mixed)
@example(np.array([[-0.0, 0.0]], np.float32))
@example(np.array([[2.0**-24, -(2.0**-14), 65504.0]], np.float32))
@example(np.array([[2.0**-149, 2.0**-126, 3.4e38]], np.float32))
@example(np.array([[65520.0], [1.0]], np.float32))
@example(np.array([[1.0], [1.0 + 2.0**-23]], np.float32))
def test_vectors_come_back_bit_for_bit(vectors: Floats) -> None:
    blobs, sums, widths, keys = stored(vectors)
    found, sound = decode(blobs, sums, widths, keys, width=vectors.shape[1])
    assert sound.all()
    assert found.dtype == np.float32
    assert bits(found) == bits(vectors)


@given(st.lists(mixed | exact, min_size=2, max_size=5))
def test_what_was_encoded_before_changes_nothing(several: list[Floats]) -> None:
    encoder = Encoder()
    for vectors in several:
        found, alone = encoder.encode(vectors), encode(vectors)
        assert (found.dtype, found.tobytes()) == (alone.dtype, alone.tobytes())


@given(exact)
def test_what_a_float16_can_hold_takes_half_the_room(vectors: Floats) -> None:
    assert encode(vectors).dtype == np.dtype("<f2")


@given(exact, st.data(), anything)
def test_one_component_that_needs_more_keeps_all_in_float32(
    vectors: Floats, data: st.DataObject, other: float
) -> None:
    place = tuple(data.draw(st.integers(0, length - 1)) for length in vectors.shape)
    vectors[place] = other
    with np.errstate(over="ignore"):
        fits = bits(vectors.astype(np.float16)) == bits(vectors)
    assert encode(vectors).dtype == np.dtype("<f2" if fits else "<f4")


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 17])
def test_each_float16_is_the_one_that_numpy_makes(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_format, "_AT_ONCE", at_once)
    # At one at a time a few of each exponent are enough.
    every = np.arange(1 << 16, dtype="<u2")[:: 61 if at_once == 1 else 1].view("<f2")
    finite = every[np.isfinite(every)]
    made = encode(finite.astype(np.float32)[None, :])
    assert made.dtype == np.dtype("<f2")
    assert made.view("<u2").tolist() == [finite.view("<u2").tolist()]


@pytest.mark.parametrize("value", [65520.0, 2.0**-25, 2.0**-14 * (1 + 2.0**-10 / 2), 2.0**16])
def test_one_number_that_is_too_large_or_too_small(value: float) -> None:
    vectors = np.full((3, 500), 0.5, np.float32)
    vectors[2, 499] = value
    assert encode(vectors).dtype == np.dtype("<f4")


def test_an_array_in_another_order_is_stored_by_rows() -> None:
    vectors = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4) / 3)
    blobs, sums, widths, keys = stored(vectors)
    assert bits(decode(blobs, sums, widths, keys, width=4)[0]) == bits(vectors)
    assert len(encode(np.empty((0, 4), np.float32))) == 0


@pytest.mark.fault(116)
@settings(deadline=None)
@given(exact | mixed, st.data())
def test_every_flipped_bit_is_noticed(vectors: Floats, data: st.DataObject) -> None:
    blobs, sums, widths, keys = stored(vectors)
    row = data.draw(st.integers(0, len(vectors) - 1))
    assert is_intact(blobs[row], sums[row], widths[row], keys[row])
    part = data.draw(st.sampled_from(["data", "checksum", "key", "width"]))
    blob, total, width, key = blobs[row], sums[row], widths[row], keys[row]
    if part == "data":
        blob = flipped(blob, data)
    elif part == "key":
        key = flipped(key, data)
    elif part == "width":
        width ^= 1 << data.draw(st.integers(0, 62))
    else:
        raw = flipped(total.to_bytes(8, "little", signed=True), data)
        total = int.from_bytes(raw, "little", signed=True)
    assert not is_intact(blob, total, width, key)
    blobs[row], sums[row], widths[row], keys[row] = blob, total, width, key
    found, sound = decode(blobs, sums, widths, keys, width=vectors.shape[1])
    others = [place for place in range(len(vectors)) if place != row]
    assert not sound[row]
    assert sound[others].all()
    assert bits(found[others]) == bits(vectors[others])


def flipped(raw: bytes, data: st.DataObject) -> bytes:
    bit = data.draw(st.integers(0, len(raw) * 8 - 1))
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.fault(116)
@given(mixed)
def test_a_vector_under_the_key_of_another_is_noticed(vectors: Floats) -> None:
    blobs, sums, widths, keys = stored(vectors)
    other = keys_of(len(keys) + 1)[1:]
    assert not decode(blobs, sums, widths, other, width=vectors.shape[1])[1].any()


@pytest.mark.fault(116)
@given(mixed, st.integers(0, 300))
def test_a_vector_that_was_cut_off_or_grew_is_noticed(vectors: Floats, length: int) -> None:
    blobs, sums, widths, keys = stored(vectors)
    blob = (blobs[0] * 300)[:length]
    assert is_intact(blob, sums[0], widths[0], keys[0]) == (blob == blobs[0])


@pytest.mark.fault(116)
@pytest.mark.parametrize(
    "row",
    [
        (None, 0, 1, b"k" * 32),
        ("data", 0, 1, b"k" * 32),
        (b"data", None, 1, b"k" * 32),
        (b"data", 1.5, 1, b"k" * 32),
        (b"data", 0, None, b"k" * 32),
        (b"data", 0, -1, b"k" * 32),
        (b"data", 0, 2**62, b"k" * 32),
        (b"", 0, 0, b"k" * 32),
        (b"data", 0, 1, b"short"),
        (b"data", 0, 1, None),
    ],
)
def test_what_a_row_cannot_be_is_no_vector(row: Any) -> None:
    assert not is_intact(*row)


def test_the_checksums_of_files_that_exist_never_change() -> None:
    vectors = np.array([[1 / 3, -2.5, 1e-9], [0.0, -0.0, 7.0]], np.float32)
    assert checksums(vectors, keys_of(2)).tolist() == [
        130748166289357721,
        6735460521736623123,
    ]
    halves = np.array([[0.5, -2.5, 1.0]], np.float16)
    assert checksums(halves, keys_of(1)).tolist() == [6965977118392765657]
