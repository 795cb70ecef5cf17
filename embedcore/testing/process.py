"""The state of this process that a provider must leave alone, and what it opens and leaves open."""

from __future__ import annotations

import contextlib
import decimal
import gc
import locale
import logging
import os
import random
import signal
import socket
import ssl
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

_IGNORED: Final = frozenset({"PYTEST_CURRENT_TEST"})
_MOST_WAIT: Final = 1.0
"""Seconds that threads and sockets may take to end after what used them was closed."""

_SIGNALS: Final = {f"the handler of {number.name}": number for number in signal.Signals}


def state_of_process() -> dict[str, Any]:
    """What belongs to the program, by a name that a message can say."""
    root = logging.getLogger()
    state: dict[str, Any] = {
        f"the environment variable {name}": value
        for name, value in os.environ.items()
        if name not in _IGNORED
    }
    state |= {name: signal.getsignal(number) for name, number in _SIGNALS.items()}
    return state | {
        "the working folder": _working_folder(),
        "the level of the root logger": root.level,
        # Those of a test runner come and go with the phases of a test.
        "the handlers of the root logger": [
            each for each in root.handlers if not type(each).__module__.startswith("_pytest")
        ],
        "logging.disable": logging.root.manager.disable,
        "the locale": locale.setlocale(locale.LC_ALL),
        "the default time-out of sockets": socket.getdefaulttimeout(),
        "the class socket.socket": socket.socket,
        "socket.getaddrinfo": socket.getaddrinfo,
        "socket.create_connection": socket.create_connection,
        "the check of certificates": ssl._create_default_https_context,
        "sys.path": list(sys.path),
        "sys.stdout": sys.stdout,
        "sys.stderr": sys.stderr,
        "the limit of recursion": sys.getrecursionlimit(),
        "a filter of warnings for all of them": [
            each for each in warnings.filters if each[1] is None and each[2] is Warning
        ],
        **{f"the logger {name}": _state_of(logger) for name, logger in _loggers() if _set(logger)},
        "sys.excepthook": sys.excepthook,
        "threading.excepthook": threading.excepthook,
        "the trace function": sys.gettrace(),
        "the collection of garbage": (gc.isenabled(), gc.get_threshold()),
        "the switch interval": round(sys.getswitchinterval(), 6),
        "the stack size of threads": threading.stack_size(),
        "the context of decimals": _decimals(),
        "the mask of new files": _mask(),
        "the opener of urllib": _private("urllib.request", "_opener"),
        "the policy of event loops": _private("asyncio.events", "_event_loop_policy"),
        **_state_of_numpy(),
    }


def _loggers() -> list[tuple[str, logging.Logger]]:
    found = list(logging.root.manager.loggerDict.items())
    return [(name, each) for name, each in found if isinstance(each, logging.Logger)]


def _state_of(logger: logging.Logger) -> tuple[Any, ...]:
    handlers = [each for each in logger.handlers if not isinstance(each, logging.NullHandler)]
    return logger.level, handlers, logger.propagate, logger.disabled


def _set(logger: logging.Logger) -> bool:
    """Whether a logger is another than one that was only named."""
    return _state_of(logger) != (logging.NOTSET, [], True, False)


def _working_folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def _private(module: str, name: str) -> object:
    """What a module keeps for the whole process; None where it is not loaded."""
    return getattr(sys.modules.get(module), name, None)


def _decimals() -> tuple[int, str]:
    context = decimal.getcontext()
    return context.prec, context.rounding


def _mask() -> str:
    """Where Linux tells it; reading it otherwise would set it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return line.split()[1]
    return ""


def _state_of_numpy() -> dict[str, Any]:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return {}
    return {
        "numpy.geterr": numpy.geterr(),
        "numpy.get_printoptions": numpy.get_printoptions(),
    }


def seeds(call: Callable[[], object]) -> list[str]:
    """Which generators of random numbers, of all the program, a call starts anew.

    To draw from them is no fault: after a draw their state depends on that of before.
    """
    import numpy

    states: list[tuple[Any, Any]] = []
    before = random.getstate(), numpy.random.get_state()
    for seed in (1, 2):
        random.seed(seed)
        numpy.random.seed(seed)
        call()
        states.append((random.getstate(), numpy.random.get_state(legacy=True)[1].tobytes()))  # type: ignore[index]
    random.setstate(before[0])
    numpy.random.set_state(before[1])
    names = ("random", "numpy.random")
    return [name for place, name in enumerate(names) if states[0][place] == states[1][place]]


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs, sorted; what was not there before, and is now, is one of them."""
    absent = object()
    names = before.keys() | after.keys()
    return sorted(n for n in names if before.get(n, absent) != after.get(n, absent))


def restore(before: dict[str, Any]) -> None:
    """Put back what a faulty provider changed, so that the next test sees the change again."""
    now = state_of_process()
    found = changes(before, now)
    prefix = "the environment variable "
    for name in found:
        if name.startswith(prefix):
            variable = name.removeprefix(prefix)
            if name in before:
                os.environ[variable] = before[name]
            else:
                os.environ.pop(variable, None)
        elif name in _SIGNALS:
            _restore_signal(_SIGNALS[name], before[name])
    if "the working folder" in found and before["the working folder"]:
        os.chdir(before["the working folder"])
    logging.getLogger().setLevel(before["the level of the root logger"])
    if "the handlers of the root logger" in found:
        _restore_handlers(before["the handlers of the root logger"])
    logging.disable(before["logging.disable"])
    if "the locale" in found:
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, before["the locale"])
    for name, logger in _loggers():
        if f"the logger {name}" in found:
            state = before.get(f"the logger {name}", (logging.NOTSET, [], True, False))
            logger.setLevel(state[0])
            logger.handlers[:] = state[1]
            logger.propagate, logger.disabled = state[2:]
    socket.setdefaulttimeout(before["the default time-out of sockets"])
    sys.setrecursionlimit(before["the limit of recursion"])
    sys.excepthook = before["sys.excepthook"]
    gc.set_threshold(*before["the collection of garbage"][1])
    threading.stack_size(before["the stack size of threads"])
    decimal.getcontext().prec, decimal.getcontext().rounding = before["the context of decimals"]
    if "the switch interval" in found:
        sys.setswitchinterval(before["the switch interval"])
    if "the mask of new files" in found:
        os.umask(int(before["the mask of new files"], 8))
    for module, attribute, what in (
        ("urllib.request", "_opener", "the opener of urllib"),
        ("asyncio.events", "_event_loop_policy", "the policy of event loops"),
    ):
        if what in found and module in sys.modules:
            setattr(sys.modules[module], attribute, before[what])
    ssl._create_default_https_context = before["the check of certificates"]


def _restore_signal(number: signal.Signals, handler: Any) -> None:
    if handler is not None:
        with contextlib.suppress(ValueError):  # another thread than the main one
            signal.signal(number, handler)


def _restore_handlers(handlers: list[logging.Handler]) -> None:
    root = logging.getLogger()
    for each in list(root.handlers):
        if each not in handlers and not type(each).__module__.startswith("_pytest"):
            root.removeHandler(each)
    for each in handlers:
        if each not in root.handlers:
            root.addHandler(each)


@contextlib.contextmanager
def connections_seen() -> Iterator[list[str]]:
    """What is connected to, or looked up, by Python code while the block runs."""
    seen: list[str] = []
    connect, connect_ex, look_up = (
        socket.socket.connect,
        socket.socket.connect_ex,
        socket.getaddrinfo,
    )

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return function(*arguments, **named)

        return call

    socket.socket.connect = watched("a connection", connect)  # type: ignore[method-assign]
    socket.socket.connect_ex = watched("a connection", connect_ex)  # type: ignore[method-assign]
    socket.getaddrinfo = watched("a look-up of a host", look_up)
    try:
        yield seen
    finally:
        socket.socket.connect = connect  # type: ignore[method-assign]
        socket.socket.connect_ex = connect_ex  # type: ignore[method-assign]
        socket.getaddrinfo = look_up


def open_files() -> set[object]:
    """The files and sockets that this process has open; empty where the system does not say."""
    folder = Path("/proc/self/fd")
    # The folder itself is open while it is read: that one is gone at the second look.
    listed = list(folder.iterdir()) if folder.is_dir() else []
    return {path.name for path in listed if path.is_symlink()}


def live_threads() -> set[object]:
    """The threads of Python code that have not ended."""
    return set(threading.enumerate())


def left_behind(
    rounds: int, once: Callable[[], None], there: Callable[[], set[object]]
) -> list[int]:
    """How much more there is after each round; what ends within a second is not counted.

    What a library keeps for the length of a process comes in the first round alone. Nothing more
    is done after a round that left nothing.
    """
    grown = []
    for _ in range(rounds):
        before = there()
        once()
        gc.collect()
        until = time.monotonic() + _MOST_WAIT
        while there() - before and time.monotonic() < until:
            time.sleep(0.01)
        grown.append(len(there() - before))
        if grown[-1] == 0:
            break
    return grown


def check_import(module: str) -> str:
    """Import a module and say what that touched; "" if it touched nothing. For a process of its
    own, in which nothing of the provider has been imported."""
    import importlib

    import numpy  # noqa: F401 - what every provider imports may set up what it likes
    import pydantic  # noqa: F401

    import embedcore.provider.base
    import embedcore.provider.hookspecs
    import embedcore.provider.http  # noqa: F401

    before = state_of_process()
    with connections_seen() as seen:
        importlib.import_module(module)
    found = changes(before, state_of_process())
    if seen:
        found.append(f"the network ({seen[0]})")
    return ", ".join(found)


if __name__ == "__main__":
    print("touched:", check_import(sys.argv[1]))  # noqa: T201
