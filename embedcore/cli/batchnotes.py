"""What is remembered of the files of a batch, so that its vectors can be put beside their columns?

``<id>.json`` says where the rows came from, ``<id>.digests`` has the SHA-256 of each row's text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import ConfigurationError, InputRejected
from embedcore.files.disk import replacing, storage_errors
from embedcore.files.inputs import STDIN, Inputs
from embedcore.files.scan import Scan, scan
from embedcore.files.types import Columns

if TYPE_CHECKING:
    from embedcore.files.types import InputFormat, Row

ENDINGS: Final = (".json", ".digests")

_log = logging.getLogger("embedcore")


@dataclass(frozen=True, kw_only=True)
class Note:
    """How a batch was submitted.

    - ``model``: as it was named on the command line. ``folder``: where the command was run.
    - ``files``: absolute paths, "-" for standard input. ``text`` to ``input_format``: how they are
      read. ``input_type``: as it was asked for.
    - ``rows``: how many; ``texts``, ``ids``: SHA-256 of all of them, to see whether they changed.
    """

    model: str | None
    folder: str
    files: tuple[str, ...]
    text: str
    id: str | None
    keep: tuple[str, ...]
    input_format: InputFormat | None
    input_type: str | None
    rows: int
    texts: str
    ids: str

    @property
    def columns(self) -> Columns:
        return Columns(text=self.text, id=self.id, keep=self.keep)


class CountedInputs(Inputs):
    """Inputs that know, once they were read to the end, what their ids were. ``ids``: SHA-256."""

    ids = ""

    def rows(self) -> Iterator[Row]:
        digest = hashlib.sha256()
        for row in super().rows():
            digest.update(json.dumps(row.id).encode())
            yield row
        self.ids = digest.hexdigest()


def digest_of(found: Scan) -> str:
    """One digest for the texts of all rows in their order."""
    return hashlib.sha256(found.raw).hexdigest()


def absolute(files: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """Paths that mean the same in another folder."""
    return tuple(STDIN if str(one) == STDIN else str(Path(one).absolute()) for one in files)


def write_note(folder: Path, name: str, note: Note, digests: bytes) -> None:
    """Remember it beside the batch's own file. Raises ``StorageError``."""
    path = folder / f"{name}.json"
    with storage_errors(path), replacing(*_paths(folder, name)) as (text, hashes):
        for file in (text, hashes):
            if os.name == "posix":
                os.fchmod(file.fileno(), 0o600)
        # ASCII escapes carry the bytes of a path that is not Unicode.
        text.write(json.dumps(asdict(note), indent=1).encode())
        hashes.write(digests)


def read_note(folder: Path, name: str) -> Note | None:
    """None if there is none, as for a batch that a program submitted, or if it is damaged."""
    path = folder / f"{name}.json"
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        known = {one.name: found[one.name] for one in fields(Note)}
        return Note(**{**known, "files": tuple(known["files"]), "keep": tuple(known["keep"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        _log.warning("%s cannot be used: %s", path, error)
        return None


def read_digests(folder: Path, name: str, rows: int) -> bytes:
    """32 bytes for each row; zeros, which no text has, where they are not known."""
    try:
        found = (folder / f"{name}.digests").read_bytes()
    except OSError:
        found = b""
    return found if len(found) == rows * 32 else bytes(rows * 32)


def drop_note(folder: Path, name: str) -> None:
    """Gone already is fine."""
    for path in _paths(folder, name):
        path.unlink(missing_ok=True)


@contextmanager
def same_files(note: Note, files: Sequence[Path] = ()) -> Iterator[tuple[Inputs, Scan] | str]:
    """The rows as they were submitted, or why they cannot be had any more.

    ``files``: where they are now, if they were moved.
    """
    places = absolute(files) or note.files
    missing = [one for one in places if one == STDIN or not Path(one).is_file()]
    if missing:
        gone = "standard input" if missing[0] == STDIN else missing[0]
        yield f"{gone} is not there any more"
        return
    with CountedInputs(places, columns=note.columns, input_format=note.input_format) as inputs:
        try:
            found = scan(inputs, on_empty="keep")
        except (ConfigurationError, InputRejected) as error:
            yield f"what was submitted has changed since: {error}"
            return
        if (digest_of(found), inputs.ids) != (note.texts, note.ids):
            names = ", ".join(places)
            yield (
                f"{names} changed since it was submitted"
                if len(places) == 1
                else (f"one of {names} changed since they were submitted")
            )
            return
        yield inputs, found


def _paths(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}{ending}" for ending in ENDINGS]
