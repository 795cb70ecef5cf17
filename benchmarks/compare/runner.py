"""How is one measurement run? In a fresh child with the client's interpreter, against a meter that
was just started again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from compare import corpus
from compare.child import Used
from compare.clients.contract import KEY, Client, Purpose, Row
from compare.environments import FOLDER
from compare.limits import Limit
from compare.serving import Serving, cores

TIMEOUT: Final = 400.0
_HERE: Final = Path(__file__).parents[1]
# Nothing of the person who runs this: no keys, no settings, no reports to anybody.
_KEPT: Final = ("PATH", "LANG", "TMPDIR", "SYSTEMROOT", "TIKTOKEN_CACHE_DIR")
_QUIET: Final = {
    "ANONYMIZED_TELEMETRY": "False",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LLM_LOAD_PLUGINS": "",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the client used, and what the server saw of it meanwhile."""

    used: Used
    meter: Mapping[str, Any]


class Runner:
    """Runs measurements against one server. ``pythons``: the interpreter of each client."""

    def __init__(self, serving: Serving, pythons: Mapping[str, Path]) -> None:
        self._serving = serving
        self._pythons = pythons
        self._mine = sorted(cores()[1])

    def run(
        self,
        client: Client,
        row: Row,
        purpose: Purpose,
        *,
        texts: int,
        duplicates: float = corpus.DUPLICATES,
        latency: float = 0.0,
        limit: Limit | None = None,
        folder: Path | None = None,
        profile: bool = False,
    ) -> Outcome:
        """``row.processes`` children start together and share the texts and a folder.

        What a client keeps goes to ``kept`` below ``folder``, which is removed unless given.
        """
        with _folder(folder) as own:
            kept = own / "kept"
            kept.mkdir(exist_ok=True)
            share = texts // row.processes
            # Warming up must not teach a client the limits of the run before.
            self._serving.reset()
            children = [
                self._start(
                    client,
                    {
                        "client": client.name,
                        "row": row.name,
                        "purpose": purpose,
                        "base_url": self._serving.base_url(),
                        "folder": str(kept),
                        "texts": share,
                        "first": number * share,
                        "seed": corpus.SEED,
                        "duplicates": duplicates,
                        "cores": self._mine,
                        "profile": profile,
                    },
                )
                for number in range(row.processes)
            ]
            try:
                early = [one for child in children if (one := child.ready()) is not None]
                if early:
                    return Outcome(used=early[0], meter={})
                self._serving.reset(latency=latency, limit=limit)
                for child in children:
                    child.go()
                used = _together([child.result(share) for child in children])
            finally:
                for child in children:
                    child.end()
            return Outcome(used=used, meter=self._serving.meter())

    def _start(self, client: Client, order: Mapping[str, Any]) -> _Child:
        return _Child(self._pythons[client.name], order)


class _Child:
    def __init__(self, python: Path, order: Mapping[str, Any]) -> None:
        FOLDER.mkdir(exist_ok=True)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        self._process = subprocess.Popen(
            [python, "-m", "compare.child", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(str(order["base_url"]), Path(order["folder"]).with_name("home")),
            cwd=order["folder"],
            text=True,
        )
        self._timer = _Deadline(self._process)

    def ready(self) -> Used | None:
        """None once it waits; what it said instead if it cannot."""
        line = self._line()
        return None if line == "ready" else self._understood(line)

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def result(self, texts: int) -> Used:
        used = self._understood(self._line())
        used.texts = used.texts or texts
        return used

    def end(self) -> None:
        self._timer.cancel()
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _understood(self, line: str) -> Used:
        if line:
            return Used(**json.loads(line))
        if self._timer.passed:
            return Used(error=f"took longer than {TIMEOUT:.0f} s")
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return Used(error=f"the process ended: {said[-1][:300] if said else 'without a word'}")


class _Deadline:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.passed = False
        self._process = process
        self._timer = threading.Timer(TIMEOUT, self._pass)
        self._timer.daemon = True
        self._timer.start()

    def _pass(self) -> None:
        self.passed = True
        self._process.kill()

    def cancel(self) -> None:
        self._timer.cancel()


def environment(base_url: str, home: Path) -> dict[str, str]:
    """The variables that a child sees. ``home`` is made if need be."""
    home.mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    own = {
        "HOME": str(home),
        "EMBEDCORE_HOME": str(home / "embedcore"),
        "LLM_USER_PATH": str(home / "llm"),
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": base_url,
        "PYTHONPATH": str(_HERE),
    }
    return {**kept, **_QUIET, **own}


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    own = Path(tempfile.mkdtemp(prefix="compare-"))
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _together(parts: list[Used]) -> Used:
    """Processes side by side: CPU and texts add up, the slowest says how long it took."""
    if len(parts) == 1:
        return parts[0]
    return Used(
        texts=sum(part.texts for part in parts),
        delivered=sum(part.delivered for part in parts),
        wrong=sum(part.wrong for part in parts),
        cpu=sum(part.cpu for part in parts),
        wall=max(part.wall for part in parts),
        growth=sum(part.growth for part in parts),
        error=next((part.error for part in parts if part.error), None),
        missing=next((part.missing for part in parts if part.missing), None),
    )
