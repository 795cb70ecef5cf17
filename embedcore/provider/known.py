"""Known providers, and how each is installed.

A command with the name of a package that is not registered would be an invitation: the package that
is registered under it first is installed. So only what is in this repository is named, by its path,
and packages of others that are on the list below.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final

IN_REPOSITORY: Final = ("hashing", "openai")
"""The folders below ``providers/``."""

OF_OTHERS: Final[Mapping[str, str]] = {}
"""Provider → its distribution on the package index, for those that their authors have registered
and that were looked at here: a pull request adds a line."""

_PAGE: Final = "docs/how-to/write-a-provider.md"


def how_to_install(name: str) -> str:
    """What to do where this provider is missing, as one sentence."""
    if name in IN_REPOSITORY:
        folder = Path(__file__).parents[2] / "providers" / name
        if (folder / "pyproject.toml").is_file():
            return f"Install it with: pip install {shlex.quote(str(folder))}"
        return (
            "It comes with embedcore's repository: in a clone of that, "
            f"pip install ./providers/{name}"
        )
    if name in OF_OTHERS:
        return f"Install it with: pip install {OF_OTHERS[name]}"
    return f"If you have its package, install it; or write one: {_PAGE} in embedcore's repository"
