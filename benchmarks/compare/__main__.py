"""Measure embedcore beside its peers: one command, one run, one table and one picture.

    python benchmarks/compare                          everything; about half an hour
    python benchmarks/compare --quick                  fewer texts and rounds
    python benchmarks/compare --only limit,embedcore   these rows (the limit is always there)

The first start makes an environment for the harness and one per client, with pip as it is set up.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PACKAGES = Path(__file__).resolve().parents[1]


def main() -> int:
    # Modules are found as compare.…, never as top-level names that might be another package's.
    sys.path[0] = str(_PACKAGES)
    from compare import environments

    harness = environments.python("harness", environments.HARNESS)
    if Path(sys.prefix) == harness.parents[1]:
        from compare.command import run

        return run(sys.argv[1:])
    variables = {**os.environ, "PYTHONPATH": str(_PACKAGES)}
    return subprocess.run(
        [harness, str(Path(__file__).parent), *sys.argv[1:]], env=variables, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
