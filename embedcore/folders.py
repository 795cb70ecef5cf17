"""The folders of the user and of the machine, and what ``~`` stands for.

A process need not have a home folder: a service without ``HOME``, a container under a number that
is no user's, ``HOME`` set to nothing. Then there is no file of the user's and no place for state,
and what needs one says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from embedcore.errors import ConfigurationError


def home() -> Path | None:
    """The user's home folder; None if there is none."""
    # Unset, the password file is asked; set to nothing means that there is none.
    if os.name == "posix" and os.environ.get("HOME") == "":
        return None
    try:
        found = Path.home()
    except (RuntimeError, KeyError):
        return None
    return found if found.is_absolute() else None


def user_config() -> Path | None:
    """The folder of the user's own settings; None if the user has none."""
    import platformdirs

    return _of_user(platformdirs.user_config_dir, "XDG_CONFIG_HOME")


def user_data() -> Path | None:
    """The folder of what is kept for the user; None if there is no place for it."""
    import platformdirs

    return _of_user(platformdirs.user_data_dir, "XDG_DATA_HOME")


def site_config() -> Path:
    """The folder of the settings that hold for every user of this machine."""
    import platformdirs

    return Path(platformdirs.site_config_dir("embedcore", appauthor=False))


def search_folders() -> tuple[list[Path], list[Path]]:
    """The folders in which settings are looked for, the nearest first, and those above them."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return [], []
    upwards, own = [here, *here.parents], home()
    # Accounts that need no home folder have "/", which is no border.
    border = None if own is None or own == own.parent else own
    for number, folder in enumerate(upwards, start=1):
        # In a worktree and in a submodule it is a file.
        if os.path.lexists(folder / ".git") or (border is not None and same(folder, border)):
            return upwards[:number], upwards[number:]
    return upwards[:1], upwards[1:]


def same(one: Path, other: Path) -> bool:
    """Whether both are the same file or folder."""
    try:
        return one.samefile(other)
    except OSError:
        return False


def expanded(path: Path | str) -> Path:
    """The path with its ``~`` replaced. Raises ``ConfigurationError`` if there is nothing to
    replace it by."""
    path = Path(path)
    if not path.parts or not path.parts[0].startswith("~"):
        return path
    if path.parts[0] == "~":
        own = home()
        if own is not None:
            return own.joinpath(*path.parts[1:])
    else:
        try:
            return path.expanduser()
        except RuntimeError:
            pass
    raise ConfigurationError(
        f"{path}: there is no home folder that {path.parts[0]} could stand for here: "
        "write the path in full"
    )


def in_full(path: Path | str) -> Path:
    """The same, and what is relative below the working directory of this moment, so that it stays
    the same path, in every message as well, when the program changes that.

    Raises ``ConfigurationError`` also where there is no working directory.
    """
    found = expanded(path)
    try:
        return found.absolute()
    except FileNotFoundError:
        raise ConfigurationError(
            f"{path}: the working directory does not exist any more: write the path in full"
        ) from None


def _of_user(find: Callable[..., str], variable: str) -> Path | None:
    # Without a home folder only an XDG variable can name one, and not every version of platformdirs
    # says that there is none.
    if home() is None and os.name == "posix" and not os.environ.get(variable):
        return None
    try:
        found = Path(find("embedcore", appauthor=False))
    except RuntimeError:
        return None
    return found if found.is_absolute() else None
