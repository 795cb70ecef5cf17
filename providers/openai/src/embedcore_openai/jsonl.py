"""What are the lines of a batch: those that go out, and where one that comes in begins and ends?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import orjson

from embedcore.errors import InputRejected
from embedcore.provider.types import BatchItem
from embedcore_openai.capped import UnreadableBody

ENDPOINT: Final = "/v1/embeddings"

# Of any honest line: a vector of 16,384 dimensions as text, and as much again.
_LONGEST: Final = 1_000_000
_BOM: Final = b"\xef\xbb\xbf"


class HalfLine(Exception):
    """A body has come to its end in the middle of a line."""


def input_line(
    item: BatchItem,
    *,
    model: str,
    encoding: str,
    dimensions: int | None,
    more: Mapping[str, object] | None = None,
) -> bytes:
    """The line of one text, with its line end; ``more``: further fields of its request.

    Raises ``InputRejected`` for a text that is not Unicode.
    """
    body: dict[str, object] = {"model": model, "input": item.text}
    if encoding != "omit":
        body["encoding_format"] = encoding
    if dimensions is not None:
        body["dimensions"] = dimensions
    line = {
        "custom_id": item.id,
        "method": "POST",
        "url": ENDPOINT,
        "body": {**body, **(more or {})},
    }
    try:
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        raise InputRejected(
            f"the text of item {item.id!r} is no valid Unicode (a lone surrogate)",
            reason="no valid Unicode",
        ) from None


def whole_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a body that comes in pieces of any size, without blank ones and line ends.

    Keeps no more than one piece and one line. Raises ``HalfLine`` instead of giving half a last
    line, and ``UnreadableBody`` for a line without end.
    """
    begun: list[bytes] = []
    size = 0
    first = True
    for piece in pieces:
        at = 0
        while (end := piece.find(b"\n", at)) >= 0:
            line = piece[at:end]
            at = end + 1
            if begun:
                line = b"".join((*begun, line))
                begun, size = [], 0
            if first:
                line, first = line.removeprefix(_BOM), False
            # A vector's line has nothing to strip, and is not copied.
            if line := line.strip():
                yield line
        begun.append(piece[at:])
        size += len(piece) - at
        if size > _LONGEST:
            raise UnreadableBody(f"a line of it is longer than {_LONGEST:,} bytes")
    last = b"".join(begun)
    last = (last.removeprefix(_BOM) if first else last).strip()
    if last:
        if not _is_whole(last):
            raise HalfLine
        yield last


def _is_whole(line: bytes) -> bool:
    """No part of a JSON object from its beginning on is itself one."""
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False
