"""Known providers and how each is installed, and which known model a name may mean.

A command with the name of a package that is not registered would be an invitation: the package that
is registered under it first is installed. So only what is in this repository is named, by its path,
and packages of others that are on the list below.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Final

IN_REPOSITORY: Final = (
    *("cohere", "fastembed", "gemini", "hashing", "litellm", "mistral", "model2vec", "ollama"),
    *("openai", "voyage"),
)
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


_NUMBER: Final = re.compile(r"\d+")
_NEARLY_EQUAL: Final = 0.9


def near_models(asked: str, known: Iterable[str]) -> list[str]:
    """The known models that a name may mean that is none of them.

    The end of a name (``3-small``), one behind a slash (``openai/text-embedding-3-small``), other
    capitals, or a slip. Another number is no slip: ``text-embedding-4-small`` may be new.
    """
    names = {name.lower(): name for name in known}
    plain = asked.rpartition("/")[2].lower()
    if not plain or asked in names.values():
        return []
    ends = [name for low, name in names.items() if f"-{low}".endswith(f"-{plain}")]
    if ends:
        return ends
    numbers = _NUMBER.findall(plain)
    near = get_close_matches(plain, names, n=3, cutoff=_NEARLY_EQUAL)
    return [names[low] for low in near if not numbers or numbers == _NUMBER.findall(low)][:1]
