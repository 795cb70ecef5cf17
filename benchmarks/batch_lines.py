"""What does it cost to read a batch's results, from the bytes of the socket to float32 vectors?

CPU for 10,000 lines of 1,536 dimensions in both encodings, and the memory that a download of 50,000
lines of floats (1.6 GB) takes over a real socket. Lines have the form that the real API sends. The
aims are 0.15 s (base64) and 0.9 s (float), and memory that does not grow with the lines. Other work
on the machine only ever adds, so the best round counts.

    python benchmarks/batch_lines.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pybase64
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create

from embedcore.provider.batch_lines import LineReader, whole_lines

WIDTH = 1536
PIECE = 1 << 16
DISTINCT = 500
AIMS = {"base64": 0.15, "float": 0.9}
MOST_MEGABYTES = 20.0
FEW, MANY = 500, 50_000


def line(number: int, encoding: str) -> bytes:
    """One line as the API writes it, after recordings; numbers have about 20 characters."""
    drawn = np.random.default_rng(number).standard_normal(WIDTH)
    vector = (drawn / np.linalg.norm(drawn)).astype(np.float16).astype(np.float32)
    digits = pybase64.b64encode(vector.astype("<f4").tobytes()).decode()
    entry = {
        "object": "embedding",
        "embedding": digits if encoding == "base64" else vector.tolist(),
        "index": 0,
    }
    body = {
        "object": "list",
        "data": [entry],
        "model": "text-embedding-3-small",
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    }
    response = {"status_code": 200, "request_id": f"ad841ee1-{number:027}", "body": body}
    document = {"id": f"batch_req_{number:032}", "custom_id": str(number), "response": response}
    return json.dumps({**document, "error": None}).encode() + b"\n"


def pieces(content: bytes) -> Iterator[bytes]:
    return (content[at : at + PIECE] for at in range(0, len(content), PIECE))


def read(content: bytes) -> int:
    reader = LineReader(shown=str, errors_billed="no")
    count = 0
    for each in whole_lines(pieces(content)):
        outcome = reader.read(each)
        assert outcome.vector is not None
        count += 1
    return count


def cpu_per_10k(encoding: str, rounds: int) -> float:
    content = b"".join(line(number, encoding) for number in range(DISTINCT))
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(4):
            count = read(content)
        best = min(best, (time.process_time() - began) / (4 * count))
    return best * 10_000


def serve(listener: socket.socket, lines: int) -> None:
    """Answers as an OpenAI with one finished batch, again and again."""
    block = b"".join(line(number, "float") for number in range(100))
    job = {"id": "batch_1", "status": "completed", "output_file_id": "file-1"}
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            while request := stream.readline():
                while stream.readline() not in (b"\r\n", b""):
                    pass
                content = b"/content" in request
                body = block if content else json.dumps(job).encode()
                times = lines // 100 if content else 1
                length = len(body) * times
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length)
                for _ in range(times):
                    connection.sendall(body)


def download(port: int, result: Connection) -> None:
    """Tell how many outcomes came, and the peak of this process's memory in bytes."""
    options = OpenAIOptions(base_url=f"http://127.0.0.1:{port}/v1", batch=True)
    batch = create("text-embedding-3-small", options).batch
    assert batch is not None
    count = sum(outcome.vector is not None for outcome in batch.results("batch_1"))
    result.send((count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def peak_of(lines: int) -> int:
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = context.Process(target=serve, args=(listener, lines), daemon=True)
        server.start()
        receiving, sending = context.Pipe(duplex=False)
        client = context.Process(target=download, args=(listener.getsockname()[1], sending))
        client.start()
        count, peak = receiving.recv()
        client.join()
        server.terminate()
        server.join()
    assert count == lines, f"{count} of {lines} lines came"
    return int(peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lines", type=int, default=MANY, help="of the download")
    given = parser.parse_args()
    met = True
    for encoding, aim in AIMS.items():
        seconds = cpu_per_10k(encoding, given.rounds)
        met &= seconds <= aim
        print(f"{encoding:6}  {seconds:.3f} s CPU per 10,000 lines (aim {aim})")
    few, many = peak_of(FEW), peak_of(given.lines)
    grown = (many - few) / 1e6
    met &= grown <= MOST_MEGABYTES
    print(f"memory  {many / 1e6:.1f} MB at {given.lines:,} lines, {grown:+.1f} MB over {FEW} lines")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
