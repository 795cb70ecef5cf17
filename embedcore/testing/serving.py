"""How is the fake server run as a process of its own?"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace

from embedcore.testing.api import OPENAI_MODELS
from embedcore.testing.batchsettings import BatchSettings, Listing, Progress
from embedcore.testing.billing import openai_encoding
from embedcore.testing.server import FAKE_KEY, FakeOpenAI


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until terminated; ``embedcore.testing.server`` says how to use it."""
    options = _parser().parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with _server(options) as server:
        place = {
            "url": server.url,
            "base_url": server.base_url,
            "api_key": server.api_key,
            "tokens": openai_encoding(),
        }
        sys.stdout.write(json.dumps(place) + "\n")
        sys.stdout.flush()
        if options.until_eof:
            sys.stdin.read()
        else:
            ended.wait()


def server_of(arguments: Sequence[str]) -> FakeOpenAI:
    """The server that the command would start with these arguments."""
    return _server(_parser().parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m embedcore.testing.server")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each reply")
    parser.add_argument("--api-key", default=FAKE_KEY)
    parser.add_argument("--until-eof", action="store_true", help="end with standard input")
    parser.add_argument("--dimensions", type=int, help="of every model, instead of its own")
    parser.add_argument("--batch-polls", type=int, help="a batch is complete at this poll (3)")
    parser.add_argument("--batch-seconds", type=float, help="a batch is complete after so long")
    parser.add_argument("--batch-by-hand", action="store_true", help="only /_batches moves it")
    parser.add_argument("--batch-lag", type=float, default=0.0, help="seconds until it is listed")
    parser.add_argument("--batch-queue", type=int, help="the limit of enqueued tokens")
    return parser


def _server(options: argparse.Namespace) -> FakeOpenAI:
    models = OPENAI_MODELS
    if options.dimensions is not None:
        models = {
            name: replace(model, dimensions=options.dimensions) for name, model in models.items()
        }
    return FakeOpenAI(
        port=options.port,
        latency=options.latency,
        api_key=options.api_key,
        models=models,
        record=False,
        batch=BatchSettings(
            progress=_progress(options),
            listing=Listing(lag_seconds=options.batch_lag),
            enqueued_token_limit=options.batch_queue,
        ),
    )


def _progress(options: argparse.Namespace) -> Progress:
    if options.batch_by_hand:
        return Progress()
    if options.batch_seconds is not None:
        return Progress(polls=options.batch_polls, seconds=options.batch_seconds)
    return Progress(polls=3 if options.batch_polls is None else options.batch_polls)
