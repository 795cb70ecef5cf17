"""Checksums of rows: a CRC-32 over everything that a vector belongs to.

``vector_crc32`` is the sum of, one after the other: who made the file, the digest of the text, by
how much it was cut, the id, and the vector as little-endian float32. A vector that was altered, or
that came to another row or file, is found out. Outputs without sums are older, and are believed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np

from embedcore.files.types import CUT_COLUMNS, Origin

if TYPE_CHECKING:
    from embedcore.files.types import Vectors

SUM: Final = "vector_crc32"


@lru_cache(maxsize=64)
def seed_of(origin: Origin) -> int:
    """What the sums of all rows of that origin start from."""
    maker = [origin.model, origin.fingerprint, origin.input_type]
    return zlib.crc32(json.dumps(maker).encode())


def row_sum(
    seed: int, row_id: bytes, digest: bytes, cuts: Mapping[str, object], vector: Vectors
) -> int:
    """The sum of one row. ``vector``: contiguous ``<f4``. ``cuts``: None is the same as absent, so
    that a later version may know of more ways to cut."""
    known = "".join(f"{name}={cuts[name]}\n" for name in CUT_COLUMNS if cuts.get(name) is not None)
    head = b"".join((digest, known.encode(), b"\n", row_id))
    return zlib.crc32(vector.data, zlib.crc32(head, seed))


def little_endian(vectors: Vectors) -> Vectors:
    """As it is summed and written, without a copy where it is so already."""
    same: Vectors = np.ascontiguousarray(vectors, dtype="<f4")
    return same
