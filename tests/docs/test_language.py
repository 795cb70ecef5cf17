"""User-facing pages and messages use the words of the glossary, in short sentences.

Pages are the README, CONTRIBUTING, those of the providers and ``docs/``, but not its decisions and
architecture. Messages are the string literals of the packages that can reach a person: errors, log
lines, what commands print, and the docstrings of commands, which are their help. Some words are not
used in comments, docstrings and names either, which only those read who work on the code.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MEAN, LONGEST = 20, 35
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "README.md",
    *sorted(ROOT.glob("providers/*/README.md")),
    *sorted(
        path
        for path in DOCS.rglob("*.md")
        if path != DOCS / "architecture.md" and path.parent.name != "decisions"
    ),
]
SOURCES = [
    *sorted((ROOT / "embedcore").rglob("*.py")),
    *sorted(ROOT.glob("providers/*/src/**/*.py")),
]
# What the words are of the glossary in docs/architecture.md is beside each.
BANNED = {
    r"bought|buys?|buying": "billed, paid for, sent",
    r"held": "reserved",
    r"set aside": "reserved",
    r"uncertain": "unconfirmed",
    r"gates?": "rate limit",
    r"shel(f|ves)": "cache",
    r"the store|stores? of (bought )?vectors": "the cache, or the vector store",
    r"books": "usage, state file",
    r"offices?": "batch",
    r"strays?": "job",
    r"abandon(s|ed|ing)?": "forget",
    r"picodollars?": "US dollars",
    r"whoever": "who or a noun",
    r"nobody|somebody": "a noun",
    r"is to blame": "is at fault",
    r"gone on with": "continued",
    r"what did arrive": "results received so far",
}
# What does not say who does something, or what it is, in the code as well.
NOT_IN_CODE = {
    *("bureau", "crew", "nobody", "outlet", "patience", "purse", "shelf", "somebody", "whoever"),
    *("bureaus", "crews", "outlets", "purses", "shelves"),
    *("books", "bought"),
}
WRONG = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)
# An abbreviation ends no sentence, nor does an ordinal or a version number.
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|approx|St|No)\.$")
_END = re.compile(r"(?<=[.!?…])[)\"”'*_]*\s+(?=[(\"“'*_]*([A-Z0-9$…]|embedcore\b))")
# SQL, and the schema with its comments, are read by no user.
_SQL = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|WITH|PRAGMA|BEGIN|ON) ")
# Modules whose strings no person reads.
_NO_MESSAGES = {
    "embedcore/storage/schema.py",
    "providers/hashing/src/embedcore_hashing/embedder.py",  # its English words
}
# States of batches and jobs as the state file has them, and what ``in_dollars`` turns to dollars.
_NAMES = {"abandoned", "stray"}
_COMMANDS = {"command", "group"}
# What is put into a message: one word, that ends where it ends.
_PLACE = "\u200bCode\u200b"


def plain(text: str) -> str:
    """Inline code is one word, a link is its text, an image its alternative text."""
    text = re.sub(r"``[^`]+``|`[^`]+`", "Code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"[*_]{1,2}(?=\w)|(?<=[\w.!?…])[*_]{1,2}", "", text)


def paragraphs(page: str) -> Iterator[str]:
    """Prose, items and cells of a page, each by itself; no code, no headings, no HTML."""
    page = re.sub(r"^(```|~~~).*?^\1\s*$", "\n", page, flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    current: list[str] = []
    for line in [*page.splitlines(), ""]:
        bare = line.strip()
        item = re.match(r"(?:[-*+]|\d+\.) +", bare)
        if not bare or bare[0] in "#|<" or item:
            if current:
                yield " ".join(current)
            current = []
        if " · " in bare:
            yield from filter(None, (part.strip(" ·") for part in bare.split(" · ")))
        elif bare.startswith("|"):
            if not re.fullmatch(r"[|:\- ]+", bare):
                yield from filter(None, map(str.strip, re.split(r"(?<!\\)\|", bare)))
        elif bare and bare[0] not in "#<":
            current.append(bare[item.end() :] if item else bare)


def sentences(paragraph: str) -> list[str]:
    """Split where a sentence ends and another begins: by the sign, the space and what follows."""
    found: list[str] = []
    for piece in re.split("\n", _END.sub("\n", plain(paragraph))):
        if found and _ABBREVIATION.search(found[-1]):
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return found


def words(sentence: str) -> int:
    return sum(1 for word in sentence.split() if re.search(r"\w", word))


def wrong_words(text: str) -> list[str]:
    return [
        f"{found[0]!r}: say {advice}"
        for found in WRONG.finditer(plain(text))
        for pattern, advice in BANNED.items()
        if re.fullmatch(pattern, found[0], re.IGNORECASE)
    ]


def faults(where: str, text: str) -> Iterator[str]:
    """What is wrong with a paragraph or message."""
    for sentence in sentences(text):
        if words(sentence) > LONGEST:
            yield f"{where}: {words(sentence)} words: {sentence}"
        for wrong in wrong_words(sentence):
            yield f"{where}: {wrong}: {sentence}"


def messages(source: str, *, labels: bool = False) -> Iterator[tuple[int, str]]:
    """Every literal of a module that may be shown, with its line: what is put in is one word."""
    tree = ast.parse(source)
    hidden: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for one in body if isinstance(body, list) else []:
            if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
                hidden.add(id(one.value))
        if isinstance(node, ast.FunctionDef) and _is_command(node):
            yield node.lineno, ast.get_docstring(node) or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            hidden.update(id(part) for part in node.values)
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else _PLACE
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) in hidden:
                continue
            text = node.value
        else:
            continue
        # In commands a word alone may be a label or a heading.
        label = labels and text.isalpha() and text not in _NAMES
        if (" " in text.strip() or label) and not _SQL.match(text):
            yield node.lineno, text


def _is_command(function: ast.FunctionDef) -> bool:
    called = (one.func if isinstance(one, ast.Call) else one for one in function.decorator_list)
    return any(isinstance(one, ast.Attribute) and one.attr in _COMMANDS for one in called)


def code_words(source: str) -> Iterator[tuple[int, str]]:
    """Every word of comments, docstrings and names of a module, with its line, in lower case.

    A name is as many words as its writing shows: ``_first_of``, ``FirstOf``.
    """
    texts = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in (tokenize.COMMENT, tokenize.NAME)
    ]
    texts += [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    for line, text in sorted(texts):
        for number, part in enumerate(text.splitlines(), line):
            for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part):
                yield number, word.lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_easy_to_read(page: Path) -> None:
    found: list[str] = []
    lengths: list[int] = []
    for paragraph in paragraphs(page.read_text(encoding="utf-8")):
        found += faults(page.name, paragraph)
        lengths += [length for one in sentences(paragraph) if (length := words(one)) > 1]
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    if mean > MEAN:
        found.append(f"{page.name}: {mean:.1f} words a sentence on average")
    assert not found, "\n".join(found)


def test_messages_are_easy_to_read() -> None:
    found: list[str] = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if name in _NO_MESSAGES:
            continue
        source = path.read_text(encoding="utf-8")
        for line, text in messages(source, labels=name.startswith("embedcore/cli/")):
            for paragraph in re.split(r"\n\s*\n", text):
                found += faults(f"{name}:{line}", " ".join(paragraph.split()))
    assert not found, "\n".join(found)


def test_code_says_who_and_what() -> None:
    found: list[str] = []
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        small = source.lower()
        # Taking a module apart takes a hundred times as long as seeing that no such word is in it.
        if any(word in small for word in NOT_IN_CODE):
            found += (
                f"{path.relative_to(ROOT).as_posix()}:{line}: {word!r}"
                for line, word in code_words(source)
                if word in NOT_IN_CODE
            )
    assert not found, "\n".join(found)


def test_sentences_are_split_where_they_end() -> None:
    text = (
        "It costs $0.02 per million tokens, e.g. For one. See `a.b. C`. "
        "Was it **paid**? (Yes.) 3,000 rows… Then [a page. Or two](x.md) of v1.5 follow."
    )
    assert sentences(text) == [
        "It costs $0.02 per million tokens, e.g. For one.",
        "See Code.",
        "Was it paid?",
        "(Yes.",
        "3,000 rows…",
        "Then a page.",
        "Or two of v1.5 follow.",
    ]
    assert [words(one) for one in sentences("One, two – three. `x y z` is one word.")] == [3, 4]


def test_a_page_is_taken_apart() -> None:
    page = (
        "# Not this\n\nOne line\nand its rest.\n- an item\n  goes on\n1. another\n\n"
        "| A cell | `code` |\n|---|:-:|\n| x | |\n\n```sh\nheld\n```\n<!-- held -->\nThe end.\n"
    )
    assert list(paragraphs(page)) == [
        "One line and its rest.",
        "an item goes on",
        "another",
        "A cell",
        "`code`",
        "x",
        "The end.",
    ]


def test_wrong_words_are_found() -> None:
    assert wrong_words("The gate was Held by `held` whoever.") == [
        "'gate': say rate limit",
        "'Held': say reserved",
        "'whoever': say who or a noun",
    ]
    assert not wrong_words("A household, a gateway and `embedcore batch abandon`.")
    assert list(faults("x", f"{'a ' * 36}.")) == [f"x: 36 words: {'a ' * 36}."]


def test_messages_are_found() -> None:
    source = (
        '"""Not shown at all."""\nimport x\n\n\n@x.command(name="a")\ndef f() -> None:\n'
        '    """Help of it."""\n    raise E(f"{f} is not there")\n\n\n'
        'NAME = "name"\nSQL = "SELECT a FROM b"\n"""Nor is this."""\n'
    )
    assert [text for _, text in messages(source)] == ["Help of it.", f"{_PLACE} is not there"]


def test_words_of_code_are_found() -> None:
    source = (
        'class TheCrew:\n    """Of somebody\'s\n    ``shelf_of`` x."""\n\n'
        '    _MOST_PATIENCE = f(outlet="nobody", screws=1)  # Whoever\n    """Purse."""\n'
    )
    found = [(line, word) for line, word in code_words(source) if word in NOT_IN_CODE]
    assert found == [
        *((1, "crew"), (2, "somebody"), (3, "shelf")),
        *((5, "whoever"), (5, "patience"), (5, "outlet"), (6, "purse")),
    ]
