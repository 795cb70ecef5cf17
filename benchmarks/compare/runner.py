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
from compare.clients.contract import KEY, Client, Purpose, Row
from compare.environments import FOLDER
from compare.limits import Limit
from compare.serving import Serving, cores
from compare.used import Used

TIMEOUT: Final = 400.0
# What is measured with short texts.
SHORT: Final = ("short", "short-stream", "strict", "query", "gather", "arrivals")
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

    @property
    def base_url(self) -> str:
        return self._serving.base_url()

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
        request_texts: int = 0,
        timeout: float | None = None,
        **more: Any,
    ) -> Outcome:
        """``row.processes`` children start together and share the texts and a folder.

        What a client keeps goes to ``kept`` below ``folder``, which is removed unless given.
        ``timeout``: seconds until a child is ended, if they are not the usual. ``more`` is for the
        way in which the purpose is measured.
        """
        with _folder(folder) as own:
            kept = own / "kept"
            kept.mkdir(exist_ok=True)
            share = texts // row.processes
            # Warming up must not teach a client the limits of the run before.
            self._serving.reset()
            order = {
                "client": client.name,
                "row": row.name,
                "purpose": purpose,
                "base_url": self._serving.base_url(tls=row.tls),
                "authority": str(self._serving.authority) if row.tls else None,
                "folder": str(kept),
                "texts": share,
                "short": purpose in SHORT,
                "seed": corpus.SEED,
                "duplicates": duplicates,
                "cores": self._mine,
                "request_texts": request_texts,
                "timeout": timeout or TIMEOUT,
                **more,
            }
            children = [
                _Child(self._pythons[client.name], {**order, "first": number * share})
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


class _Child:
    def __init__(self, python: Path, order: Mapping[str, Any]) -> None:
        FOLDER.mkdir(exist_ok=True)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in end()
        self._process = subprocess.Popen(
            [python, "-m", "compare.child", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(
                str(order["base_url"]),
                Path(order["folder"]).with_name("home"),
                order["authority"],
            ),
            cwd=order["folder"],
            text=True,
        )
        self._timer = _Deadline(self._process, order["timeout"])

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
            return Used(error=f"took longer than {self._timer.seconds:.0f} s")
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        return Used(error=f"the process ended: {said[-1][:300] if said else 'without a word'}")


class _Deadline:
    def __init__(self, process: subprocess.Popen[str], seconds: float) -> None:
        self.passed = False
        self.seconds = seconds
        self._process = process
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True
        self._timer.start()

    def _pass(self) -> None:
        self.passed = True
        self._process.kill()

    def cancel(self) -> None:
        self._timer.cancel()


def environment(base_url: str, home: Path, authority: str | None = None) -> dict[str, str]:
    """The variables that a child sees. ``home`` is made if need be. ``authority``: file with the
    certificate that it must trust."""
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
    if authority is not None:
        own["SSL_CERT_FILE"] = authority
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
        laps=[lap for part in parts for lap in part.laps],
        error=next((part.error for part in parts if part.error), None),
        missing=next((part.missing for part in parts if part.missing), None),
    )
