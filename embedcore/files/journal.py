"""The journal of a run that has not finished: an append-only file beside the output.

Header: magic, version, header size, JSON size, the origin as JSON, padding, CRC-32; then records
of one size: 32 bytes SHA-256 of the text, what was cut off it (uint32, see ``cuts``), the vector
(float32), CRC-32; all little-endian. A record's CRC starts from that of the header, so that it
belongs to this journal only. A torn tail is cut off, and a record whose CRC is wrong is not there.

A damaged header is made again from what the run would write there: the records prove that it is the
one they had. What was paid for and cannot be read is never deleted.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from embedcore.errors import ConfigurationError, InvalidResponse
from embedcore.files.disk import (
    display,
    not_own,
    open_own_file,
    replacing,
    storage_errors,
)
from embedcore.files.types import SIZE, DigestIndex, Origin, as_digests
from embedcore.storage.filesystem import sync_folder

if TYPE_CHECKING:
    from embedcore.files.types import Digests, Vectors

_MAGIC: Final = b"EMBCJRNL"
_VERSION: Final = 2
# The first one had tokens only, in the same place.
_READABLE: Final = (1, 2)
_FIXED = struct.Struct("<8sIII")
_CRC = struct.Struct("<I")
_ALIGNMENT = 64
_MAX_HEADER = 1 << 20
_RECORDS_AT_ONCE = 1024
# Where a header is made again: how wide a vector may be that no setting says the width of, and how
# many records are tried, since the first may be damaged as well.
_MOST_DIMENSIONS: Final = 1 << 14
_RECORDS_TRIED: Final = 4

_log = logging.getLogger("embedcore")


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalContent:
    """A journal as it was found. ``digests`` has 32 zero bytes where a record is damaged."""

    origin: Origin
    header: bytes
    digests: bytearray

    @property
    def intact(self) -> Digests:
        """The digests of the records that can be trusted."""
        digests = as_digests(self.digests)
        intact: Digests = digests[digests != b""]
        return intact


def read_journal(path: Path, asked: Origin) -> JournalContent | None:
    """What a journal holds, or None if there is none, or one that was cut off before its records.

    ``asked``: what the run would begin a journal with. Raises ``ConfigurationError`` for a file
    that is something else, of a newer version, or damaged so that its records cannot be read.
    """
    if not os.path.lexists(path):
        return None
    with storage_errors(path), open_own_file(path, os.O_RDONLY) as file:
        header = _read_header(file, path) or _restored_header(file, asked)
        if header is None:
            _require_nothing_paid(file, path, asked)
            return None
        file.seek(len(header))
        origin = _origin_in(header)
        records = bytearray().join(_checked_digests(file, header, origin))
    return JournalContent(origin=origin, header=header, digests=records)


class Journal:
    """Appends new vectors so that they survive any crash, and reads them back by number.

    Only one process may have it open. ``origin.dimensions`` may be None until the first vectors.
    """

    def __init__(self, path: Path, origin: Origin, found: JournalContent | None) -> None:
        """Take up what was ``found`` at ``path``; None: begin anew with the first vectors."""
        self.path = path
        self.origin = origin
        self._file: BinaryIO | None = None
        self._header = b""
        self._digests = bytearray()
        if found is not None:
            width = origin.dimensions or found.origin.dimensions
            self.origin = replace(origin, dimensions=width)
            self._header, self._digests = found.header, found.digests

    def __len__(self) -> int:
        """Records, damaged ones included."""
        return len(self._digests) // SIZE

    def index(self) -> DigestIndex:
        """Finds the number of a text's record."""
        return DigestIndex(as_digests(bytes(self._digests)))

    def append(
        self,
        digests: Digests,
        cuts: NDArray[np.uint32],
        vectors: Vectors,
        *,
        durable: bool = True,
    ) -> None:
        """Add records; on return they are on the disk, unless not ``durable``.

        After an error, or an interrupt at any point, the same call may be made again. Raises
        ``InvalidResponse`` for vectors of another width than before, ``StorageError`` for the disk.
        """
        if not len(digests):
            return
        self._require_width(vectors.shape[1])
        with storage_errors(self.path):
            file = self._file or self._opened(vectors.shape[1])
            records = self._records(digests, cuts, vectors)
            file.seek(len(self._header) + len(self) * self._size)
            file.truncate()
            _write_all(file, records)
            if durable:
                os.fsync(file.fileno())
        self._digests += digests.tobytes()

    def read(self, numbers: NDArray[np.intp]) -> tuple[NDArray[np.uint32], Vectors]:
        """Cuts, shape (n,), and vectors, shape (n, d), of these records."""
        if not len(numbers):
            width = self.origin.dimensions or 0
            return np.empty(0, dtype=np.uint32), np.empty((0, width), dtype=np.float32)
        # Mapped anew each time: a map that stays would count as memory of this process.
        with storage_errors(self.path):
            file = self._file or open_own_file(self.path, os.O_RDONLY)
            records = np.memmap(
                file,
                dtype=_record_type(self.origin.dimensions or 0),
                mode="r",
                offset=len(self._header),
                shape=(len(self),),
            )
            if file is not self._file:
                file.close()
        cuts = np.asarray(records["cut"][numbers], dtype=np.uint32)
        vectors = np.asarray(records["vector"][numbers], dtype=np.float32)
        return cuts, vectors

    def close(self) -> None:
        """Release the file. What was appended stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def settle(self, written: Digests) -> int:
        """The output has the vectors of these texts now: drop them. Closes it.

        Vectors of other texts stay, since nothing else has them. Returns how many are left.
        """
        digests = as_digests(bytes(self._digests))
        left = np.flatnonzero((DigestIndex(written).find(digests) < 0) & (digests != b""))
        try:
            with storage_errors(self.path):
                if not len(left):
                    self.path.unlink(missing_ok=True)
                elif len(left) < len(self):
                    # It may stay whole: what is too much in it is in the output.
                    with suppress(OSError):
                        self._replace_by(left)
        finally:
            self.close()
        return len(left)

    def _replace_by(self, numbers: NDArray[np.intp]) -> None:
        """A journal with these records only. Each is bound to the header, which stays the same."""
        with open_own_file(self.path, os.O_RDONLY) as old, replacing(self.path) as (new,):
            _write_all(new, self._header)
            for number in numbers.tolist():
                old.seek(len(self._header) + number * self._size)
                _write_all(new, old.read(self._size))

    @property
    def _size(self) -> int:
        return _record_type(self.origin.dimensions or 0).itemsize

    def _require_width(self, width: int) -> None:
        known = self.origin.dimensions
        if known and known != width:
            raise InvalidResponse(
                f"{self.origin.model} answered with {width} dimensions after {known}: "
                "vectors of two widths cannot be in one output"
            )

    def _opened(self, width: int) -> BinaryIO:
        """The file, open for writing; with its header on the disk."""
        self.origin = replace(self.origin, dimensions=width)
        header = self._header or _packed_header(self.origin)
        file = open_own_file(self.path, os.O_RDWR | os.O_CREAT)
        try:
            there = file.read(len(header))
            if not self._header:
                if not _may_be_ours(there[: len(_MAGIC)]):
                    raise not_own(self.path, "is not a journal of embedcore")
                file.truncate(0)
            if there != header:
                file.seek(0)
                _write_all(file, header)
                os.fsync(file.fileno())
                sync_folder(self.path.parent)
        except BaseException:
            file.close()
            raise
        self._header, self._file = header, file
        return file

    def _records(self, digests: Digests, cuts: NDArray[np.uint32], vectors: Vectors) -> bytearray:
        records = np.empty(len(digests), dtype=_record_type(vectors.shape[1]))
        records["digest"], records["cut"], records["vector"] = digests, cuts, vectors
        raw, size, seed = bytearray(records.tobytes()), records.itemsize, _seed(self._header)
        view = memoryview(raw)
        for end in range(size - _CRC.size, len(raw), size):
            start = end + _CRC.size - size
            _CRC.pack_into(raw, end, zlib.crc32(view[start:end], seed))
        return raw


def _record_type(width: int) -> np.dtype[np.void]:
    return np.dtype(
        [("digest", f"S{SIZE}"), ("cut", "<u4"), ("vector", "<f4", (width,)), ("crc", "<u4")]
    )


def _packed_header(origin: Origin, version: int = _VERSION) -> bytes:
    body = json.dumps(asdict(origin)).encode()
    used = _FIXED.size + len(body) + _CRC.size
    size = -(-used // _ALIGNMENT) * _ALIGNMENT
    start = _FIXED.pack(_MAGIC, version, size, len(body)) + body
    content = start.ljust(size - _CRC.size, b"\0")
    return content + _CRC.pack(zlib.crc32(content))


def _may_be_ours(start: bytes) -> bool:
    """Whether a file that begins so is a journal, or one that was cut off as it was begun."""
    return start.startswith(_MAGIC[: len(start)])


def _read_header(file: BinaryIO, path: Path) -> bytes | None:
    """None if it is damaged."""
    fixed = file.read(_FIXED.size)
    if not _may_be_ours(fixed) or len(fixed) < _FIXED.size:
        return None
    _, version, size, _ = _FIXED.unpack(fixed)
    if not _FIXED.size < size <= _MAX_HEADER:
        return None
    header = fixed + file.read(size - len(fixed))
    content, crc = header[: -_CRC.size], header[-_CRC.size :]
    if len(header) < size or zlib.crc32(content) != _CRC.unpack(crc)[0]:
        return None
    if version not in _READABLE:
        raise ConfigurationError(
            f"{display(path)} was written by a newer version of embedcore: finish that run with it"
        )
    return header


def _restored_header(file: BinaryIO, asked: Origin) -> bytes | None:
    """The header that a run with ``asked`` began it with, if one of the first records fits it."""
    file.seek(0)
    start = file.read(_MAX_HEADER)
    most = min(len(start) // np.dtype(np.float32).itemsize, _MOST_DIMENSIONS)
    widths = (asked.dimensions,) if asked.dimensions else range(1, most + 1)
    for version in _READABLE:
        for width in widths:
            header = _packed_header(replace(asked, dimensions=width), version)
            records = memoryview(start)[len(header) :]
            if any(islice(_are_sound(records, width, header), _RECORDS_TRIED)):
                return header
    return None


def _require_nothing_paid(file: BinaryIO, path: Path, asked: Origin) -> None:
    """Raise ``ConfigurationError`` if a file without a header may have records, or is not ours."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not _may_be_ours(file.read(len(_MAGIC))):
        raise not_own(path, "is not a journal of embedcore")
    if length > len(_packed_header(asked)):
        raise ConfigurationError(
            f"{display(path)} is damaged at its start, and this run cannot read it. Vectors that "
            "were paid for may be in it. If another model or other options made it, run it again "
            "with those: they may read it. Else move the file away"
        )
    _log.warning("%s was cut off at its start: nothing is in it", display(path))


def _origin_in(header: bytes) -> Origin:
    length = _FIXED.unpack_from(header)[3]
    return Origin(**json.loads(header[_FIXED.size : _FIXED.size + length]))


def _seed(header: bytes) -> int:
    seed: int = _CRC.unpack(header[-_CRC.size :])[0]
    return seed


def _checked_digests(file: BinaryIO, header: bytes, origin: Origin) -> Iterator[bytes]:
    """For each whole record its digest, or zeros where its CRC is wrong."""
    width = origin.dimensions or 0
    size = _record_type(width).itemsize
    while len(chunk := file.read(size * _RECORDS_AT_ONCE)) >= size:
        for number, sound in enumerate(_are_sound(memoryview(chunk), width, header)):
            start = number * size
            yield chunk[start : start + SIZE] if sound else bytes(SIZE)


def _are_sound(records: memoryview, width: int, header: bytes) -> Iterator[bool]:
    """For each whole record whether it is as it was written after that header."""
    size, seed = _record_type(width).itemsize, _seed(header)
    for start in range(0, len(records) - size + 1, size):
        end = start + size - _CRC.size
        yield zlib.crc32(records[start:end], seed) == _CRC.unpack_from(records, end)[0]


def _write_all(file: BinaryIO, data: bytes | bytearray) -> None:
    # An unbuffered file may write less than asked, for instance where the disk becomes full.
    rest = memoryview(data)
    while len(rest):
        rest = rest[file.write(rest) :]
