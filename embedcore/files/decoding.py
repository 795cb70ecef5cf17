"""How do bytes become lines? Strictly as UTF-8: no other encoding is embedded as garbage."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from embedcore.errors import InputRejected

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_FOREIGN_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_PROBE = 32


def decoded_lines(stream: BinaryIO, name: str) -> Iterator[str]:
    """The lines of a UTF-8 stream, cut after each line feed, which stays. A leading BOM is dropped.

    Raises ``InputRejected`` naming the line and the offset of the first byte that is not UTF-8.
    """
    offset = 0
    for number, line in enumerate(stream, 1):
        content = line
        if number == 1:
            _refuse_other_encodings(line, name)
            content = line.removeprefix(codecs.BOM_UTF8)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            start = offset + len(line) - len(content) + error.start
            raise _not_utf8(name, number, start, content[error.start]) from None
        if text:
            yield text
        offset += len(line)


def _refuse_other_encodings(first_line: bytes, name: str) -> None:
    for mark, encoding in _FOREIGN_MARKS:
        if first_line.startswith(mark):
            raise _other_encoding(name, encoding)
    # Western text in UTF-16 without a mark is valid UTF-8 with a NUL beside every letter.
    probe = first_line[:_PROBE]
    halves = probe[0::2], probe[1::2]
    if len(probe) == _PROBE and {any(half) for half in halves} == {True, False}:
        filled = next(half for half in halves if any(half))
        if 0 not in filled:
            raise _other_encoding(name, "UTF-16")


def _other_encoding(name: str, encoding: str) -> InputRejected:
    return InputRejected(
        f"{name}:1: byte 0: the file is {encoding}, and only UTF-8 is read. "
        f"Convert it, for instance with: iconv -f {encoding} -t UTF-8",
        reason=f"encoded as {encoding}",
    )


def _not_utf8(name: str, line: int, offset: int, byte: int) -> InputRejected:
    return InputRejected(
        f"{name}:{line}: byte {offset} (0x{byte:02X}) is not UTF-8. If the file is Latin-1 or "
        "Windows-1252, convert it first: iconv -f WINDOWS-1252 -t UTF-8",
        reason="not UTF-8",
    )
