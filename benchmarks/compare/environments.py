"""Which interpreter runs a client? One of an environment that holds this client and nothing else.

Made once under ``.environments/`` with pip's own settings, and again when what it is made from
changes. The harness has one too: no client sees matplotlib or the fake server's parts.
Only the standard library is needed here, since the first environment is made from here.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
REPOSITORY: Final = HERE.parents[1]
FOLDER: Final = HERE / ".environments"
HARNESS: Final = ("numpy", "orjson", "pybase64", "tiktoken", "matplotlib", "trustme")
_VERSIONS: Final = (
    "import importlib.metadata as m, json, sys;"
    "print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
)


class NotInstalled(Exception):
    """pip could not install it; the message is the end of what pip said."""


def python(name: str, packages: Sequence[str], *, fresh: bool = False) -> Path:
    """The interpreter of the environment, which is made if need be. Raises ``NotInstalled``.

    A package that is a folder of this repository is installed editable: what is measured is the
    code as it is now.
    """
    folder = FOLDER / name
    interpreter = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = folder / "made-from"
    made_from = _made_from(packages)
    if not fresh and stamp.is_file() and stamp.read_text() == made_from:
        return interpreter
    stamp.unlink(missing_ok=True)
    venv.create(folder, with_pip=True, clear=True)
    _install(interpreter, packages)
    stamp.write_text(made_from)
    return interpreter


def versions(interpreter: Path, distributions: Sequence[str]) -> dict[str, str]:
    """The installed version of each."""
    done = subprocess.run(
        [interpreter, "-c", _VERSIONS, *distributions], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _install(interpreter: Path, packages: Sequence[str]) -> None:
    arguments: list[str] = []
    for package in packages:
        local = REPOSITORY / package
        arguments += ["-e", str(local)] if local.is_dir() else [package]
    command = [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled("; ".join(said)[:300] or done.stderr.strip()[-300:])


def _made_from(packages: Sequence[str]) -> str:
    """Changes when the packages do, or the project files of those that live here."""
    digest = hashlib.sha256(f"{sys.version}\n{sorted(packages)}".encode())
    for package in packages:
        project = REPOSITORY / package / "pyproject.toml"
        if project.is_file():
            digest.update(project.read_bytes())
    return digest.hexdigest()
