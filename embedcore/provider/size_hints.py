"""Numbers of a refusal: how long a text may be, and how many texts one request may have.

Hints from wording, in any language that has numbers. They make the search for what is at fault
quicker and decide nothing, so they may be missing, or wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_INTEGER: Final = re.compile(
    r"(?<![A-Za-z0-9_.#/-])(?:\d{1,3}(?:[,'’_\u00a0\u202f]\d{3})+|\d{1,9})(?![A-Za-z0-9_%]|[.,]\d)"
)
_SEPARATORS: Final = re.compile(r"[,'’_\u00a0\u202f]")
# "input[3]", "#/texts/3", "inputs.3", "at index 3": which text it is.
_PLACE: Final = re.compile(
    r"(?:input|text|content|instance|document|prompt|request)s?\W{0,2}[\[./]\W{0,2}(\d{1,6})\b\]?"
    r"|\bindex:? ?(\d{1,6})\b|\bposition:? ?(\d{1,6})\b",
    re.I,
)
_LIMIT: Final = re.compile(
    r"max|limit|exceed|at most|no more than|up to|or (?:less|fewer)"
    r"|(?:less|fewer|larger|longer|more|greater) than|too (?:large|long|many|big)|allowed"
    r"|does not fit|[<>≤≥]|supported range"
    r"|最大|最多|上限|不得超过|超过|超出|过[长多大]|以下|以内|超え|초과|최대"
    r"|höchst|überschreit|zu (?:viele|lang|groß)|dépass|trop (?:de|long|grand)|demasiad"
    r"|превыш|максим",
    re.I,
)
_TOKEN: Final = re.compile(r"token|トークン|토큰|токен", re.I)
_OTHER_LENGTH: Final = re.compile(
    r"charact|\bchars?\b|byte|zeichen|caract|字符|字节|文字|символ"
    r"|\b(?:input|text|prompt|document|string|sentence)\b(?: \([^)]*\))? is (?:too|larger|longer)",
    re.I,
)
_WEAK_LENGTH: Final = re.compile(
    r"max(?:imum)?[ _-]?(?:input |context )?length|(?:input|context|text|prompt|string)"
    r" (?:length|window|size)|长度|長さ|länge|longueur|longitud|длин",
    re.I,
)
_SEVERAL: Final = re.compile(
    r"\b(?:inputs|texts|items?|documents|instances?|elements?|strings|sentences|requests|entries"
    r"|prompts|examples|rows|records|embeddings|array|list|batch(?:es|[ _]?size)?)\b"
    r"|数组|列表|批|[条件个項]|einträge|texte|éléments|elementos|строк|элемент",
    re.I,
)
_WHOLE: Final = re.compile(
    r"per (?:submitted )?(?:request|batch|call)\b|in (?:the |your |one |a )?(?:batch|request)\b"
    r"|request (?:payload|body|size)|payload|overall|in total|total (?:number of )?tokens"
    r"|max_?tokens_?per_?request",
    re.I,
)
_OF_SOMETHING_ELSE: Final = re.compile(r"dimension|encoding|维度|次元|timeout|priority", re.I)
_BELOW: Final = re.compile(
    r"(?:less|fewer|smaller|shorter) than\W*$|(?:under|below)\W*$|<\W*$", re.I
)
_EXCLUSIVE: Final = re.compile(r"\W{0,2}exclusive", re.I)
# "744 tokens exceed": the number is the text's own.
_THAT_MUCH: Final = re.compile(r"\d\W*(?:tokens?\W+)?exceed", re.I)
_UNIT_OF_LENGTH: Final = re.compile(
    r"\W{0,2}(?:token|charact|char\b|chars\b|bytes?\b|[kmg]i?b\b|字符|字节|文字|トークン|토큰)",
    re.I,
)
_LONG_NAME: Final = re.compile(
    r"context(?:length|size|window)|stringabovemaxlength|(?:string|text|input|prompt)s?toolong"
)
_LARGE_NAME: Final = re.compile(
    r"maxtokensperrequest|arrayabovemaxlength|toolarge|toomany|batchsize|payload"
)
_INPUTS: Final = re.compile(r"input|text|content|instance|document|prompt|body|request|^$", re.I)


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeHints:
    """What a refusal seems to say of a size; each may be missing, or wrong.

    ``one_text``: one text is too long, rather than all of them too much. ``position``: which one.
    ``max_tokens``: the limit of a text; ``tokens``: what it has, by the server's count.
    ``max_texts``: the most in one request, below the number that was sent.
    """

    one_text: bool = False
    position: int | None = None
    max_tokens: int | None = None
    tokens: int | None = None
    max_texts: int | None = None


def size_hints(
    said: str,
    texts: Sequence[str],
    model: str,
    *,
    parameter: str = "",
    names: frozenset[str] = frozenset(),
    ignored: frozenset[str] = frozenset(),
    strict: bool = False,
) -> SizeHints | None:
    """What a reason says of a size, in any language that has numbers; None if of none.

    ``names``: the server's names for the error, plain. ``ignored``: numbers that are statuses and
    codes. ``strict``: a number beside a word for a limit is not enough.
    """
    count = len(texts)
    position = _position(parameter, said, count)
    if model:
        said = re.sub(rf"(?<![\w-]){re.escape(model)}(?![\w-])", " ", said)
    said = _PLACE.sub(" ", said)
    numbers = [one for one in _numbers(said) if one.value and str(one.exact) not in ignored]
    long_named = any(map(_LONG_NAME.search, names))
    large_named = any(map(_LARGE_NAME.search, names)) and not long_named
    limit = _LIMIT.search(said) is not None
    several = _SEVERAL.search(said) is not None
    counts = [one for one in numbers if not one.of_length]
    below = sorted({one.value for one in counts if one.value < count} - {1}) or [
        one.value for one in counts if one.value < count
    ]
    if count > 1 and below and any(one.exact == count for one in counts) and (limit or several):
        return SizeHints(max_texts=below[0])
    lengthy = _TOKEN.search(said) or _OTHER_LENGTH.search(said)
    lengthy = lengthy or (_WEAK_LENGTH.search(said) if not several else None)
    if long_named or (lengthy and limit and not large_named):
        whole = position is None and count > 1 and _WHOLE.search(said) and not long_named
        return SizeHints() if whole else _of_one_text(said, numbers, texts, position)
    about_texts = _INPUTS.search(parameter) and not _OF_SOMETHING_ELSE.search(said)
    if large_named or (limit and several and about_texts):
        return SizeHints(max_texts=below[0] if below and not lengthy else None)
    if not strict and limit and about_texts and below and len(numbers) == 1:
        return SizeHints(max_texts=below[0])
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Number:
    """``value``: as a limit, since "less than 512" is one of 511. ``exact``: as it stands.

    ``of_length``: it counts tokens, characters or bytes.
    """

    value: int
    exact: int
    of_length: bool


def _numbers(said: str) -> list[_Number]:
    found = []
    for match in _INTEGER.finditer(said):
        exact = int(_SEPARATORS.sub("", match[0]))
        before = said[max(0, match.start() - 16) : match.start()]
        outside = _BELOW.search(before) or _EXCLUSIVE.match(said, match.end())
        found.append(
            _Number(
                value=exact - 1 if outside else exact,
                exact=exact,
                of_length=_UNIT_OF_LENGTH.match(said, match.end()) is not None,
            )
        )
    return found


def _of_one_text(
    said: str, numbers: list[_Number], texts: Sequence[str], position: int | None
) -> SizeHints:
    limit, tokens = _lengths(said, numbers, texts)
    return SizeHints(
        one_text=True,
        position=0 if len(texts) == 1 else position,
        max_tokens=limit,
        tokens=tokens,
    )


def _lengths(
    said: str, numbers: list[_Number], texts: Sequence[str]
) -> tuple[int | None, int | None]:
    """The limit of a text and its length in tokens, as far as they can be true.

    No text has more tokens than UTF-8 bytes, and one that is refused has more than the limit.
    """
    if not _TOKEN.search(said) or not numbers or not texts:
        return None, None
    most = max(len(text.encode("utf-8", "replace")) for text in texts) + _MARKS
    tokens = max(one.exact for one in numbers)
    limits = [one.value for one in numbers if one.exact < tokens]
    if not limits and _THAT_MUCH.search(said):
        return None, tokens if tokens <= most else None
    if not limits:
        limits, tokens = [one.value for one in numbers], 0
    limit = max(limits)
    if limit >= most:
        return None, None
    return limit, tokens if limit < tokens <= most else None


# What servers put around a text counts as well.
_MARKS: Final = 64


def _position(parameter: str, said: str, count: int) -> int | None:
    found = _PLACE.search(parameter) or _PLACE.search(said)
    if found is None:
        return None
    position = int(next(filter(None, found.groups())))
    return position if position < count else None
