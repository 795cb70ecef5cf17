"""What an output format provides, and what all of them share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

import numpy as np

from embedcore.errors import ConfigurationError
from embedcore.files.disk import display
from embedcore.files.scan import Kind
from embedcore.files.types import Block, Origin, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from embedcore.files.types import Digests, Vectors


OUTPUT_SUFFIXES: Final = (".parquet", ".jsonl", ".npy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a writer must know before the first row. ``rows``: how many will be written.

    ``kinds``: the kept columns. ``origin.dimensions`` is 0 if nothing was ever embedded.
    """

    origin: Origin
    rows: int = 0
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    keep_text: bool = True


class RowWriter(Protocol):
    """Writes one output, block by block."""

    def write(
        self,
        rows: Sequence[Row],
        digests: Digests,
        cuts: NDArray[np.uint32],
        vectors: Vectors,
    ) -> None:
        """Add rows; row i of ``vectors`` belongs to row i of ``rows``."""
        ...

    def finish(self) -> None:
        """Write what comes after the last row."""
        ...

    def abandon(self) -> None:
        """Let go without finishing. Never raises."""
        ...


class OutputFormat(Protocol):
    """One kind of output file. All reading raises ``ConfigurationError``, naming the file, for one
    that is not ours, or so damaged that not even its maker is known. A damaged row is not sound."""

    def paths(self, output: Path) -> tuple[Path, ...]:
        """The files that make up one output, itself first."""
        ...

    def origin(self, output: Path) -> Origin | None:
        """What made it. None: it has no rows and does not say."""
        ...

    def blocks(self, output: Path) -> Iterator[Block]:
        """Its rows, from the first to the last."""
        ...

    def writer(self, files: Sequence[BinaryIO], layout: Layout) -> RowWriter:
        """Begin to write an output into ``files``, one for each of ``paths``."""
        ...


def not_ours(path: Path, detail: str) -> ConfigurationError:
    """The error for a file that cannot be read as vectors that embedcore wrote."""
    return ConfigurationError(
        f"{display(path)} cannot be read as vectors written by embedcore: {detail}. An output "
        "takes the place of it only with overwrite=True"
    )


def finite_rows(vectors: Vectors) -> NDArray[np.bool_]:
    """For each row of shape (n, d) whether all its numbers are finite."""
    finite: NDArray[np.bool_] = np.logical_and.reduce(np.isfinite(vectors), axis=1)
    return finite


def own_version() -> str:
    """The version of embedcore that writes."""
    return version("embedcore")
