"""Which texts does everybody embed? The same ones everywhere, made from a seed, without downloads.

Of the texts, 5 % are exact copies of an earlier one, spread so that every beginning of the corpus
has that share too. Of the others, 1 % are long (2,000 to about 5,900 tokens), 6 % are Chinese,
Japanese or Korean, 4 % carry emoji and 10 % are program code. The mean is about 193 cl100k tokens,
and no text reaches the 8,192 that the API takes.

Short texts, as titles and questions are, have 10 to 20 tokens and no copies among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from compare.words import CHINESE, EMOJI, ENGLISH, JAPANESE, KOREAN, NOUNS, VERBS

SEED: Final = 20261124
DUPLICATES: Final = 0.05
_LONG, _CJK, _EMOJI, _CODE = 0.01, 0.06, 0.04, 0.10


def texts(count: int, *, seed: int = SEED, duplicates: float = DUPLICATES) -> list[str]:
    """The first ``count`` texts of the corpus."""
    return list(islice(stream(seed=seed, duplicates=duplicates), count))


def stream(*, seed: int = SEED, duplicates: float = DUPLICATES) -> Iterator[str]:
    """The corpus without end. Remembers the originals only where it has to copy some."""
    choice = random.Random(seed)
    originals: list[str] = []
    while True:
        if originals and choice.random() < duplicates:
            yield choice.choice(originals)
            continue
        text = _original(choice)
        if duplicates:
            originals.append(text)
        yield text


def short_texts(count: int, *, seed: int = SEED) -> list[str]:
    """The first ``count`` short texts: a sentence of a few words, and a number."""
    choice = random.Random(f"short {seed}")
    return [
        f"{_sentence(choice, choice.randint(5, 9))} [{choice.getrandbits(24):x}]"
        for _ in range(count)
    ]


def _original(choice: random.Random) -> str:
    # The number makes it unlike every other, as a heading or a path does in a real corpus.
    number = choice.getrandbits(40)
    kind = choice.random()
    for share, make in _KINDS:
        if kind < share:
            return f"{make(choice)} [{number:x}]"
        kind -= share
    return f"{_english(choice, _words(choice))} [{number:x}]"


def _words(choice: random.Random) -> int:
    return min(900, max(4, int(choice.lognormvariate(4.58, 0.62))))


def _sentence(choice: random.Random, words: int) -> str:
    picked = choice.choices(ENGLISH, k=words)
    if words > 8:
        picked[words // 2] += ","
    ending = "." if choice.random() < 0.9 else "?"
    text = " ".join(picked)
    return text[0].upper() + text[1:] + ending


def _english(choice: random.Random, words: int) -> str:
    """Sentences, some of which end a line: one of ten texts has a line break."""
    parts = []
    left = words
    while left > 0:
        size = min(left, choice.randint(6, 24))
        parts.append(_sentence(choice, size))
        left -= size
    return ("\n" if choice.random() < 0.1 else " ").join(parts)


def _long(choice: random.Random) -> str:
    paragraphs = []
    left = choice.randint(1_800, 5_250)
    while left > 0:
        size = min(left, choice.randint(60, 240))
        paragraphs.append(_english(choice, size))
        left -= size
    return "\n\n".join(paragraphs)


def _cjk(choice: random.Random) -> str:
    script = choice.choice((CHINESE, JAPANESE, KOREAN))
    sentences = choice.randint(1, 12)
    return "".join(
        "".join(choice.choices(script, k=choice.randint(8, 22))) + "。" for _ in range(sentences)
    )


def _emoji(choice: random.Random) -> str:
    words = _english(choice, max(4, _words(choice) // 2)).split(" ")
    for _ in range(choice.randint(1, 8)):
        words.insert(choice.randrange(len(words) + 1), choice.choice(EMOJI))
    return " ".join(words)


def _code(choice: random.Random) -> str:
    return "\n\n\n".join(_function(choice) for _ in range(choice.randint(1, 4)))


def _function(choice: random.Random) -> str:
    verb, noun, other = choice.choice(VERBS), choice.choice(NOUNS), choice.choice(NOUNS)
    number = choice.randrange(10_000)
    return (
        f"def {verb}_{noun}_{number}(self, {other}s: list[{other.title()}], *, size: int = "
        f"{number % 512}) -> dict[str, int]:\n"
        f'    """{_sentence(choice, choice.randint(5, 14))}"""\n'
        f"    found = {{}}\n"
        f"    for position, {other} in enumerate({other}s):\n"
        f"        if {other}.{noun} is None or position % size == {number % 7}:\n"
        f"            continue\n"
        f"        found[{other}.name] = found.get({other}.name, 0) + {other}.{noun}[{number % 3}]\n"
        f"    return found"
    )


_KINDS: Final[tuple[tuple[float, Callable[[random.Random], str]], ...]] = (
    (_LONG, _long),
    (_CJK, _cjk),
    (_EMOJI, _emoji),
    (_CODE, _code),
)
