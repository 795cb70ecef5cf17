"""Processes of Python that start in hundredths of a second: forked, with everything imported.

``Forks`` starts one process that runs this file and imports what its children use. For each program
it forks: the child has the arguments, folder, environment, files and, if wanted, terminal that it
would have had, and ends as a program of its own would, by its code or by a signal. What differs is
that modules are imported already; what that would hide has to start ``sys.executable``.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
_STREAMS = (0, 1, 2)
_LENGTH = 8


class Forked:
    """A program under way: what ``subprocess.Popen`` offers of it."""

    def __init__(self, link: socket.socket, streams: list[IO[Any] | None]) -> None:
        self._link = link
        self.stdin, self.stdout, self.stderr = streams
        self.returncode: int | None = None
        self.pid = int(_receive(link))

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._link], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked program", timeout or 0.0)
            self.returncode = int(_receive(self._link))
            self._link.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def stop(self) -> None:
        """Returns once it stands still: a signal takes effect a moment after it was sent."""
        from waiting import until

        self.send_signal(signal.SIGSTOP)
        until(lambda: set(_states(self.pid)) == {"T"})

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:  # noqa: A002
        """Write all of the input, read to the end, and wait for it."""
        said: dict[int, Any] = {}
        threads = [
            threading.Thread(target=lambda at=at, stream=stream: said.update({at: stream.read()}))
            for at, stream in ((1, self.stdout), (2, self.stderr))
            if stream is not None and not stream.closed
        ]
        for thread in threads:
            thread.start()
        if self.stdin is not None and not self.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(input) if input else None
                self.stdin.close()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        return said.get(1), said.get(2)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stderr, self.stdin):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.wait()


def _states(pid: int) -> list[str]:
    """Of each thread, or of the process where threads are not shown."""
    tasks = Path(f"/proc/{pid}/task")
    if tasks.is_dir():
        return [
            (task / "stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[0]
            for task in tasks.iterdir()
        ]
    shown = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True)
    return [shown.stdout.strip()[:1]]


class Forks:
    """Starts programs. Called: the program's source and arguments, as after ``python -c``.

    ``env``: what the process that forks imports with, if not with what is there now.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._place = os.path.join(self._folder.name, "forks")  # noqa: PTH118 - as sockets want it
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._place],
            stdin=PIPE,
            stdout=PIPE,
            env=env,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def __call__(
        self,
        code: str,
        *arguments: object,
        stdin: Any = DEVNULL,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        text: bool = True,
        terminal: bool = False,
    ) -> Forked:
        """``terminal``: the streams are a terminal, which the program has for itself."""
        asked = {
            "code": code,
            "arguments": ["-c", *map(str, arguments)],
            "folder": str(Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "terminal": terminal,
        }
        link = socket.socket(socket.AF_UNIX)
        link.connect(self._place)
        with contextlib.ExitStack() as theirs:
            ours: list[IO[Any] | None] = []
            given = []
            for number, wanted in zip(_STREAMS, (stdin, stdout, stderr), strict=True):
                stream, descriptor = _opened(number, wanted, theirs, text=text)
                ours.append(stream)
                given.append(descriptor)
            message = json.dumps(asked).encode("utf-8", "surrogateescape")
            link.sendmsg(
                [len(message).to_bytes(_LENGTH, "big")],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", given))],
            )
            link.sendall(message)
            return Forked(link, ours)

    def close(self) -> None:
        self._process.communicate()
        self._folder.cleanup()


def _opened(
    number: int, wanted: Any, theirs: contextlib.ExitStack, *, text: bool
) -> tuple[IO[Any] | None, int]:
    """Our end, if there is one, and the descriptor for the child."""
    if wanted is None:
        return None, number
    if wanted == DEVNULL:
        descriptor = os.open(os.devnull, os.O_RDWR)
        theirs.callback(os.close, descriptor)
        return None, descriptor
    if wanted != PIPE:
        return None, wanted if isinstance(wanted, int) else wanted.fileno()
    reader, writer = os.pipe()
    own, descriptor, mode = (writer, reader, "w") if number == 0 else (reader, writer, "r")
    theirs.callback(os.close, descriptor)
    if text:
        return os.fdopen(own, mode, encoding="utf-8"), descriptor
    return os.fdopen(own, f"{mode}b"), descriptor


def _receive(link: socket.socket) -> bytes:
    """A message of ``_LENGTH`` characters; raises ``EOFError`` where there is none."""
    data = b""
    while len(data) < _LENGTH:
        more = link.recv(_LENGTH - len(data))
        if not more:
            raise EOFError("the process that forks has died")
        data += more
    return data


# The process that forks


def main(place: str) -> None:
    """Fork for whoever connects, until standard input ends."""
    os.chdir("/")
    sys.path[0] = ""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    # Those that wait for a child are waited for by nobody.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if listener not in ready:
            return
        _learn(Path(place).parent)
        link, _ = listener.accept()
        asked, given = _asked(link)
        # No child looks through what all of them have, nor copies its pages for that.
        gc.freeze()
        if os.fork() == 0:
            listener.close()
            _keep(link, asked, given, Path(place).parent)
        link.close()
        for descriptor in given:
            os.close(descriptor)


def _asked(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    length, given, _, _ = socket.recv_fds(link, _LENGTH, len(_STREAMS))
    left, message = int.from_bytes(length, "big"), b""
    while len(message) < left:
        message += link.recv(left - len(message))
    return json.loads(message.decode("utf-8", "surrogateescape")), given


def _keep(link: socket.socket, asked: dict[str, Any], given: list[int], folder: Path) -> NoReturn:
    """Fork the child, and tell its number and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Nobody's Ctrl-C is meant for this one.
    os.setsid()
    child = os.fork()
    if child == 0:
        link.close()
        _become(asked, given)
        _run(asked["code"], folder)
    for descriptor in (*given, *_STREAMS):
        os.close(descriptor)
    with contextlib.suppress(BrokenPipeError):
        link.sendall(f"{child:{_LENGTH}}".encode())
        _, status = os.waitpid(child, 0)
        link.sendall(f"{os.waitstatus_to_exitcode(status):{_LENGTH}}".encode())
    os._exit(0)


def _become(asked: dict[str, Any], given: list[int]) -> None:
    """Have what the program was given."""
    if asked["terminal"]:
        os.setsid()
        fcntl.ioctl(given[0], termios.TIOCSCTTY, 0)
    for number, descriptor in zip(_STREAMS, given, strict=True):
        os.dup2(descriptor, number)
    for descriptor in set(given) - set(_STREAMS):
        os.close(descriptor)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = asked["arguments"]
    folders = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:1] = ["", *folders]
    if any(Path(folder, "sitecustomize.py").is_file() for folder in folders):
        importlib.import_module("sitecustomize")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, mode, errors in (
        ("stdin", "r", "strict"),
        ("stdout", "w", "strict"),
        ("stderr", "w", "backslashreplace"),
    ):
        number = len("rwe"[: ("stdin", "stdout", "stderr").index(name)])
        lines = 1 if name == "stderr" or os.isatty(number) else -1
        stream = open(number, mode, lines, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _run(code: str, folder: Path) -> NoReturn:
    """As the interpreter would run it, and end."""
    status = 1
    try:
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(code, "<string>", "exec"), vars(module))
        status = 0
    except SystemExit as end:
        status = _code(end.code)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:  # noqa: BLE001 - said as the interpreter would
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    # A program may have set them to None.
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or 120
    learned = Path(folder, f"{os.getpid()}.modules")
    with contextlib.suppress(OSError):
        learned.with_suffix(".new").write_text("\n".join(sys.modules))
        learned.with_suffix(".new").rename(learned)
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def _code(given: object) -> int:
    if given is None:
        return 0
    if isinstance(given, int):
        return given
    print(given, file=sys.stderr)
    return 1


def _learn(folder: Path) -> None:
    """Import what the children so far had to import: the next ones need not."""
    for path in folder.glob("*.modules"):
        for name in path.read_text().split("\n"):
            if name not in sys.modules and not name.startswith("__m"):
                with contextlib.suppress(BaseException):
                    importlib.import_module(name)
        path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
