"""What does it cost to import embedcore, and to ask for its help? CPU over a bare interpreter.

Both run in fresh interpreters with the same site-packages; the median of several runs counts, since
other work on the machine only ever adds. The aims are 0.05 s and 0.15 s.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys

CASES = {
    "import embedcore": ("-c", "import embedcore"),
    "embedcore --help": ("-c", "from embedcore.cli import main; main(['--help'])"),
    "embedcore --version": ("-c", "from embedcore.cli import main; main(['--version'])"),
    "embedcore embed --help": ("-c", "from embedcore.cli import main; main(['embed', '--help'])"),
}
BARE = ("-c", "pass")


def cpu_seconds(arguments: tuple[str, ...]) -> float:
    """User and system time of one interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def median(arguments: tuple[str, ...], runs: int) -> float:
    return statistics.median(cpu_seconds(arguments) for _ in range(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21)
    runs = parser.parse_args().runs
    bare = median(BARE, runs)
    print(f"{'bare interpreter':24} {bare:.3f} s")
    for name, arguments in CASES.items():
        print(f"{name:24} {median(arguments, runs) - bare:.3f} s over it")


if __name__ == "__main__":
    main()
