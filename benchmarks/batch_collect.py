"""What does a finished batch cost to collect, from the provider's files to vectors in the store?

CPU for 10,000 texts of 1,536 dimensions in both encodings: download, parse, check, store, the state
of every text, and the books; and how the memory of that grows from 5,000 texts to 50,000. The fake
server and the submission are processes of their own and are not counted. It takes about a gigabyte
of disk in the temporary folder, and some minutes.

    python benchmarks/batch_collect.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedcore import EmbeddingClient

FEW, MANY = 5_000, 50_000
MOST_MEGABYTES = 60.0


def texts(count: int) -> Iterator[str]:
    return (f"text number {number} of a batch" for number in range(count))


def connect(place: dict[str, str], home: str, encoding: str) -> EmbeddingClient:
    options = {"base_url": place["base_url"], "api_key": place["api_key"], "batch": True}
    return EmbeddingClient(
        "text-embedding-3-small",
        options={**options, "batch_encoding": encoding},
        config={"home": home},
    )


def peak() -> float:
    """Megabytes that this process took at its most, so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(found) / 1024


def submit(client: EmbeddingClient, count: int) -> dict[str, float]:
    began, cpu = time.monotonic(), time.process_time()
    client.submit_batch(texts(count))
    return {"seconds": time.monotonic() - began, "cpu": time.process_time() - cpu, "peak": peak()}


def collect(client: EmbeddingClient, count: int) -> dict[str, float]:
    (job,) = client.batch_jobs()
    before, began, cpu = peak(), time.monotonic(), time.process_time()
    problems = job.advance()
    used = time.process_time() - cpu
    seconds, after = time.monotonic() - began, peak()
    report = job.status(poll=False)
    assert not problems, problems
    assert report.state == "done", report
    assert report.done == count, report
    return {"seconds": seconds, "cpu": used, "before": before, "peak": after}


def in_process(deed: str, place: dict[str, str], home: str, encoding: str, count: int) -> Any:
    command = [sys.executable, __file__, "--deed", deed, "--home", home, "--encoding", encoding]
    command += ["--place", json.dumps(place), "--texts", str(count)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def is_over(place: dict[str, str]) -> bool:
    with urllib.request.urlopen(place["url"] + "/_batches", timeout=600) as reply:
        return all(job["status"] == "completed" for job in json.load(reply)["jobs"])


def measure(encoding: str, count: int) -> dict[str, float]:
    command = [sys.executable, "-m", "embedcore.testing.openai.server", "--until-eof"]
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(
            [*command, "--batch-seconds", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        assert server.stdout is not None
        assert server.stdin is not None
        place = json.loads(server.stdout.readline())
        submitted = in_process("submit", place, home, encoding, count)
        while not is_over(place):
            time.sleep(0.5)
        found: dict[str, float] = in_process("collect", place, home, encoding, count)
        server.stdin.close()
        print(
            f"{encoding:7} {count:6,} texts: collected in {found['seconds']:.1f} s, "
            f"{found['cpu'] / count * 10_000:.2f} s of CPU for 10,000; at most "
            f"{found['peak']:.0f} MB, {found['before']:.0f} MB before; submitted with "
            f"{submitted['cpu'] / count * 10_000:.2f} s of CPU for 10,000, at most "
            f"{submitted['peak']:.0f} MB",
            flush=True,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deed", choices=["submit", "collect"], help=argparse.SUPPRESS)
    parser.add_argument("--place", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    parser.add_argument("--encoding", choices=["base64", "float"])
    parser.add_argument("--texts", type=int, help="instead of 5,000 and 50,000")
    options = parser.parse_args()
    if options.deed:
        client = connect(options.place, options.home, options.encoding)
        deed = {"submit": submit, "collect": collect}[options.deed]
        print(json.dumps(deed(client, options.texts)))
        return 0
    worst = 0.0
    for encoding in [options.encoding] if options.encoding else ["base64", "float"]:
        if options.texts:
            measure(encoding, options.texts)
            continue
        few, many = (measure(encoding, count)["peak"] for count in (FEW, MANY))
        worst = max(worst, many - few)
    print(f"ten times the texts took at most {worst:.0f} MB more")
    return int(worst > MOST_MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
