"""Output formats, and the one that a file's name asks for."""

from __future__ import annotations

from pathlib import Path

from embedcore.errors import ConfigurationError
from embedcore.files.disk import display
from embedcore.files.formats.base import OUTPUT_SUFFIXES, OutputFormat


def output_format(output: Path) -> OutputFormat:
    """The format by the file's suffix. Raises ``ConfigurationError`` for any other, and when the
    package that a format needs is not installed."""
    suffix = output.suffix.lower()
    if suffix == ".parquet":
        from embedcore.files.formats.parquet import ParquetFormat

        return ParquetFormat()
    if suffix == ".jsonl":
        from embedcore.files.formats.jsonl import JsonlFormat

        return JsonlFormat()
    if suffix == ".npy":
        from embedcore.files.formats.npy import NpyFormat

        return NpyFormat()
    raise ConfigurationError(
        f"{display(output)}: an output must end in {', '.join(OUTPUT_SUFFIXES)}; "
        f"{repr(suffix) if suffix else 'no suffix'} is none of them"
    )
