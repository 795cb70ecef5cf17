"""The fake server as the harness sees it: a process on its own core, and its controls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from compare.limits import Limit

# Large replies come from the same memory again instead of from fresh pages.
_GLIBC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def cores() -> tuple[set[int], set[int]]:
    """The server's core and the clients'. Both empty where there is one core or no way to pin."""
    if not hasattr(os, "sched_getaffinity"):
        return set(), set()
    usable = sorted(os.sched_getaffinity(0))
    return ({usable[-1]}, set(usable[:-1])) if len(usable) > 1 else (set(), set())


class Serving:
    """Starts the server and ends it: use it as a context manager.

    ``texts`` and ``short``: how many texts of each corpus it has answers to. ``authority``: file
    with the certificate that clients must trust for ``base_url(tls=True)``, as SSL_CERT_FILE.
    """

    def __init__(self, texts: int, short: int = 0) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="compare-")
        self.authority = Path(self._folder.name) / "authority.pem"
        certificate = Path(self._folder.name) / "server.pem"
        _certify(self.authority, certificate)
        wanted = {"--texts": texts, "--short": short, "--certificate": certificate}
        options = [str(part) for pair in wanted.items() for part in pair]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compare.server", *options, "--attached"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_GLIBC, "PYTHONPATH": str(Path(__file__).parents[1])},
        )
        assert self._process.stdout is not None
        self.port, self.tls_port = map(int, self._process.stdout.readline().split())
        mine, _ = cores()
        if mine:
            os.sched_setaffinity(self._process.pid, mine)

    def base_url(self, *, tls: bool = False) -> str:
        if tls:
            return f"https://127.0.0.1:{self.tls_port}/v1"
        return f"http://127.0.0.1:{self.port}/v1"

    def reset(self, *, latency: float = 0.0, limit: Limit | None = None) -> None:
        """Start the meter again."""
        wanted = {"latency": latency, "limit": None if limit is None else asdict(limit)}
        self._ask(json.dumps(wanted).encode())

    def meter(self) -> dict[str, Any]:
        return self._ask(None)

    def _ask(self, body: bytes | None) -> dict[str, Any]:
        address = f"http://127.0.0.1:{self.port}/control"
        # Proxies of the environment are not for this machine itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, body, timeout=60) as reply:
            report: dict[str, Any] = json.load(reply)
        return report

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _certify(authority: Path, certificate: Path) -> None:
    """An authority of this run's own, and a certificate of it for this machine."""
    import trustme

    own = trustme.CA()
    own.cert_pem.write_to_path(str(authority))
    own.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(
        str(certificate)
    )
