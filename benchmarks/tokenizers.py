"""What do exact token counts cost, with tiktoken and with the faster engine, on long texts?

Texts of 8,200 to 50,000 bytes, the 1 % that a bound does not settle: Python sources, words of them
in any order (hardly a sentence twice, so that no cache of sentences helps), Chinese words between
commas, and base64. Tokens are compared with tiktoken's one by one. Rounds of both engines alternate
and start with an empty cache; the median counts. ``cut`` is what the policy layer does with a long
text; 100 of them are those of 10,000 texts.

    python benchmarks/tokenizers.py
"""

from __future__ import annotations

import argparse
import base64
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from embedcore_openai import token_engines as fast, token_engines as vocabulary
from embedcore_openai.token_engines import Engine, TiktokenEngine
from embedcore_openai.tokenizer import Cl100kTokenizer

from embedcore.policy.texts import cut_overlong

LIMIT = 8_191
TEXTS = 100
LEAST_RATIO = 2.5
# What people write; noise has many tokens per piece, where the merging itself is what takes time.
JUDGED = ("sources", "words")


def corpora(source: random.Random) -> dict[str, list[str]]:
    code = list(python_sources(source))
    words = sorted({word for text in code for word in text.split() if word.isalpha()})
    return {
        "sources": code,
        "words": [" ".join(source.choices(words, k=length // 9)) for length in lengths(source)],
        "chinese": ["，".join(chinese_words(source, length // 18)) for length in lengths(source)],
        "base64": [
            base64.b64encode(source.randbytes(length * 3 // 4)).decode()
            for length in lengths(source)
        ],
    }


def chinese_words(source: random.Random, number: int) -> Iterator[str]:
    for _ in range(number):
        yield "".join(chr(source.randrange(0x4E00, 0x9FA5)) for _ in range(source.randrange(1, 10)))


def lengths(source: random.Random) -> list[int]:
    return [source.randrange(8_200, 50_000) for _ in range(TEXTS)]


def python_sources(source: random.Random) -> Iterator[str]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    source.shuffle(files)
    whole = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    start = 0
    for length in lengths(source):
        yield whole[start : start + length]
        start = (start + length) % (len(whole) - 50_000)


def build(make: Callable[[], Engine]) -> tuple[Engine, float]:
    began = time.process_time()
    return make(), time.process_time() - began


def splintr() -> Engine:
    engine = fast.engine(vocabulary.ranks(), instead=vocabulary.tiktoken)
    if engine is None:
        sys.exit("splintr is not installed, or not sound: pip install 'splintr-rs>=0.22,<0.23'")
    return engine


def seconds(engine: Engine, work: Callable[[], object]) -> float:
    vocabulary._engine = engine
    began = time.process_time()
    work()
    return time.process_time() - began


def ratio(engines: tuple[Engine, Engine], work: Callable[[], object], rounds: int) -> list[float]:
    """CPU seconds of the two engines for the same work, and how many times faster the second is."""
    pairs: list[tuple[float, ...]] = []
    for _ in range(rounds):
        if isinstance(engines[1], fast.FastEngine):
            engines[1].forget()
        pairs.append(tuple(seconds(engine, work) for engine in engines))
    by_engine = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return [*by_engine, statistics.median(slow / quick for slow, quick in pairs)]


def works(texts: list[str]) -> dict[str, Callable[[], object]]:
    tokenizer = Cl100kTokenizer()
    sizes = [(text, len(text.encode())) for text in texts]
    return {
        "count": lambda: tokenizer.count(texts),
        "prefix": lambda: [tokenizer.prefix(text, LIMIT // 4) for text in texts],
        "cut": lambda: [cut_overlong(text, size, LIMIT, tokenizer) for text, size in sizes],
    }


def check(engines: tuple[Engine, Engine], texts: list[str]) -> int:
    """Compare token by token; the number of tokens. Exits where they differ."""
    tokens = 0
    for position, text in enumerate(texts):
        expected, found = (list(engine.encode(text)) for engine in engines)
        if expected != found:
            sys.exit(f"text {position} has other tokens than those of tiktoken")
        tokens += len(expected)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    reference, slow = build(lambda: TiktokenEngine(vocabulary.ranks()))
    other, quick = build(splintr)
    engines = (reference, other)
    print(f"CPU to load: tiktoken {slow:.3f} s, splintr {quick:.3f} s")
    slowest = float("inf")
    for name, texts in corpora(random.Random(arguments.seed)).items():
        tokens = check(engines, texts)
        print(f"{name}: {len(texts)} texts, {tokens:,} tokens, all identical")
        for task, work in works(texts).items():
            slow, quick, times = ratio(engines, work, arguments.rounds)
            print(
                f"  {task:8} tiktoken {slow:.3f} s, splintr {quick:.3f} s: {times:.1f} times faster"
            )
            if task == "count" and name in JUDGED:
                slowest = min(slowest, times)
    verdict = "met" if slowest >= LEAST_RATIO else "MISSED"
    print(f"{', '.join(JUDGED)}: at least {LEAST_RATIO:g} times faster: {verdict} ({slowest:.1f})")


if __name__ == "__main__":
    main()
