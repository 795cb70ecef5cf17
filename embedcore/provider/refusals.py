"""Refusals of OpenAI-like servers: status, headers and body in, one typed error out.

For every provider that speaks HTTP, without its SDK::

    raise refusals.translate(response.status, response.headers, response.read(), asked)

What an error is, its status and codes say; wording is looked at last, and only where nothing else
tells cases apart. Numbers and wording about sizes are hints: they make the search for what is at
fault quicker and decide nothing. What a refusal cost, the HTTP status says, and for some statuses
whether an error that can be recognised came with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import SplitResult, urljoin, urlsplit

from embedcore.errors import (
    AuthenticationFailed,
    Billed,
    ConfigurationError,
    EmbeddingError,
    InputTooLong,
    ModelNotFound,
    OutcomeUnknown,
    PermanentProviderError,
    PermissionDenied,
    ProviderError,
    ProviderUnavailable,
    QuotaExhausted,
    RateLimited,
    RequestRejected,
    RequestTooLarge,
    TransientProviderError,
)
from embedcore.provider import rate_headers, redact
from embedcore.provider.error_bodies import ErrorBody, plain, quoted_in, read_body, status_in_words
from embedcore.provider.size_hints import SizeHints, size_hints

Kind: TypeAlias = Literal[
    "quota", "key", "permission", "model", "rate", "size", "outcome", "moment", "request"
]

# A refusal costs nothing: with these statuses whatever the body says, with the others if an error
# can be recognised in the body.
FREE_BY_STATUS: Final = frozenset({401, 403, 404, 405, 411, 413, 414, 415, 429, 431, 451})
FREE_WITH_ERROR: Final = frozenset({400, 402, 406, 416, 417, 421, 422, 423, 425, 426, 428})
# Free by an assumption that can be switched off, if the server of the API itself says it.
_SERVER_ERRORS: Final = frozenset({424, 500, 503, 529})
# What a status alone says.
_CLEAR: Final[dict[int, Kind]] = {
    401: "key",
    402: "quota",
    408: "outcome",
    409: "outcome",
    413: "size",
    414: "size",
    # The gateway's client, which is another gateway, went away.
    499: "outcome",
    # Not implemented: no waiting helps.
    501: "request",
    502: "outcome",
    504: "outcome",
    505: "request",
}
# Statuses that say little: one named in the body says more.
_VAGUE: Final = frozenset({400, 422, 500})
_INNER_OF: Final = {
    400: frozenset({401, 402, 403, 404, 413, 429}),
    422: frozenset({401, 402, 403, 404, 413, 429}),
    500: frozenset({400, 401, 402, 403, 404, 413, 422, 429, 503}),
}

# Names of errors without case and separators, in the order in which they decide.
_NAMES: Final[dict[Kind, re.Pattern[str]]] = {
    "quota": re.compile(
        r"(?:insufficient|exhausted|outof|notenough)\w*?(?:quota|balance|credit|fund)"
        r"|(?:balance|credit|fund)s?\w*?(?:insufficient|exhausted|depleted|limit)"
        r"|billing|payment|arrear|overdue|(?:spend(?:ing)?|usage|hard|credit)limit"
        r"|budget\w*?exceed|exceed\w*?budget|overbudget|freetieronly"
    ),
    "key": re.compile(
        r"api_?(?:key|token)|(?:access|auth|bearer)token|subscriptionkey|credential|secretkey"
        r"|unauthenticated|unauthori[sz]ed|authentication|auth(?:orization)?(?:fail|error|missing)"
        r"|(?:invalid|missing|expired)auth|keyinvalid|login"
    ),
    "model": re.compile(
        r"(?:model|deployment|engine)\w*?(?:not?exist|notfound|unknown|unsupported|notsupported"
        r"|notavailable)|(?:unknown|invalid|nosuch|unsupported)(?:model|deployment)(?:name|id)?$"
    ),
    "permission": re.compile(r"permission|^forbidden|accessdenied|unsupportedcountry"),
    "rate": re.compile(
        r"ratelimit|toomanyrequests|throttl|resourceexhausted|slowdown|toofast|concurrencylimit"
        r"|requestlimit"
    ),
    "size": re.compile(
        r"context(?:length|size|window)|abovemaxlength|(?:string|text|input|prompt)s?toolong"
        r"|maxtokensperrequest|toolarge|toomany(?:inputs|items|texts|tokens|documents|instances)"
        r"|batchsize"
    ),
    "outcome": re.compile(r"timeout|timedout|deadlineexceeded"),
    "moment": re.compile(
        r"unavailable|overload|notready|busy|capacity|internal|server(?:error|exception)|backend"
    ),
    "request": re.compile(r"invalid|badrequest|validation|unprocessable|malformed|unsupported"),
}
_STATUS_OF: Final[dict[Kind, int]] = {
    "quota": 402,
    "key": 401,
    "model": 404,
    "permission": 403,
    "rate": 429,
    "size": 400,
    "outcome": 504,
    "moment": 503,
    "request": 400,
}

# Wording, for where neither status nor code tells.
_KEY_WORDS: Final = re.compile(
    r"api[\s_-]*(?:key|token|schlüssel)|(?:access|auth|bearer)[\s_-]*token|subscription key"
    r"|security[\s_-]*token|api[\s_-]*secret|\bcredentials?\b|unauthenticated|unauthori[sz]ed"
    r"|authentication|authori[sz]ation (?:header|field|fail|token|is (?:missing|invalid))"
    r"|log ?in fail|login required"
    r"|cl[eé] d.api|clave (?:de )?api|密[钥鑰]|令牌|鉴权|认证失败|api\s*キー|api\s*키",
    re.I,
)
# Of a 403: what a key may do, and where.
_PERMISSION_WORDS: Final = re.compile(
    r"permission|privilege|\baccess|denied|not (?:allowed|permitted|entitled|enabled|activated)"
    r"|may not|subscri|project|organi[sz]ation|\baccount|tenant|workspace|\bregion|countr|territor"
    r"|location|\bplan\b|\btier\b|\broles?\b|\bscopes?\b|\bkey\b|credential|allow-?list|white-?list"
    r"|authori[sz]|approved|endpoint|network|\bIP\b|deployment|\bmodels?\b|权限|權限|无权|無權|拒绝访问|地区|権限|許可|권한"
    r"|berechtig|zugriff|autoris|permiso|permiss|acc[eè]s\b|acceso",
    re.I,
)
# Where the status says something else, a key that is only mentioned is not the reason.
_KEY_FAULT: Final = re.compile(
    r"(?:invalid|incorrect|missing|expired|wrong|unknown|no)\W+(?:\w+\W+){0,2}api[\s_-]*key"
    r"|api[\s_-]*key\W+(?:\w+\W+){0,4}"
    r"(?:invalid|incorrect|missing|expired|wrong|not valid|required)",
    re.I,
)
_QUOTA_WORDS: Final = re.compile(
    r"payment method|insufficient (?:account )?(?:balance|credit|fund|quota)"
    r"|(?:balance|credits?) (?:is |are )?(?:insufficient|exhausted|too low|not enough)"
    r"|out of credits?|no credits? left|add (?:more )?credits|past invoices|spending limit"
    r"|over budget|budget has been exceeded|exceeded (?:your |the )?(?:usage|spending|monthly) "
    r"|out of call volume quota|余额不足|餘額不足|欠费",
    re.I,
)
_RATE_WORDS: Final = re.compile(
    r"rate[\s-]?limit|too many requests|throttl|request limit|请求过于频繁", re.I
)
# In a text of several requests, "too many requests" may mean the texts of one.
_THROTTLED: Final = re.compile(r"rate[\s-]?limit|throttl", re.I)
_MOMENT_WORDS: Final = re.compile(
    r"internal (?:server )?error|unavailable|overload|high load|(?:server|service|model) is busy"
    r"|try again later|稍[后後][再重]?[试試]|服务繁忙|系统繁忙|\bupstream\b"
    r"|connection (?:reset|refused)|no healthy|(?:is|still) (?:loading|starting)"
    r"|queue (?:is )?full|concurrency limit",
    re.I,
)
_TIME_WORDS: Final = re.compile(r"\btime-?out\b|timed out|deadline exceeded", re.I)
# Of what a text says, by whatever status: one text must not cost the others their vectors.
_CONTENT: Final = re.compile(
    r"content[\s_-]*(?:filter|policy|management)|moderation|\bflagged\b|(?:data|content)[\s_-]*inspection"
    r"|inappropriate content|内容审核|敏感",
    re.I,
)
_NO_MODEL_WORDS: Final = re.compile(
    r"not found|(?:does|do) not exist|doesn't exist|is not supported|not available|no such"
    r"|not a valid model|unsupported"
    r"|(?:unknown|invalid) (?:model|deployment)|不存在|未找到|nicht gefunden|n.existe pas"
    r"|no existe",
    re.I,
)
_MODEL_WORDS: Final = re.compile(r"model|deployment|模型|モデル", re.I)
_OTHER_PARAMETER: Final = re.compile(
    r"encoding|base64|dimension|param(?:eter|s)|field|format", re.I
)
_NO_MODEL_ID: Final = re.compile(
    r"\bmodel (?:identifier|id|name)\b.{0,24}\b(?:invalid|unknown)"
    r"|\bmodel (?:does not exist|not found)|模型不存在",
    re.I,
)
_ONE_TOO_MUCH: Final = "finds a request of this text alone too large"
_QUOTED: Final = 2_000
_LARGEST_ERROR: Final = 1_100_000
# A 429 that no waiting can help: this request alone is above the limit per minute.
_NEVER_FITS: Final = re.compile(r"request too large", re.I)
_LIMIT_AND_ASKED: Final = re.compile(
    r"\blimit\W{1,3}([\d,]+)\b.*\brequested\W{1,3}([\d,]+)\b", re.I
)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Asked:
    """What a request was, for judging the answer to it.

    ``endpoint`` and ``path``: where it went. ``secrets`` and ``texts``: what must not be shown,
    even if the server repeats it. ``reply_models``: further names of the model. ``key_hint``: what
    to do about a wrong key. ``refusals_billed`` and ``server_errors_billed``: "unknown" charges
    what is taken to be free.
    """

    model: str
    endpoint: str
    path: str = "/embeddings"
    texts: Sequence[str] = ()
    reply_models: Sequence[str] = ()
    secrets: Sequence[str] = ()
    key_hint: str = "check the API key"
    refusals_billed: Billed = "no"
    server_errors_billed: Billed = "no"

    def shown(self, message: str) -> str:
        """One short line of it, without secrets and without the texts."""
        return redact.clean(message, secrets=self.secrets, texts=self.texts)


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Refused:
    """An answer that is no success, as far as it was understood.

    ``status``: of HTTP. ``judged``: the one that it amounts to. ``said``: the beginning of the
    reason, without the texts of the request. ``wait``: seconds, wherever they are named.
    """

    status: int
    judged: int
    headers: Mapping[str, str]
    body: ErrorBody
    asked: Asked
    said: str
    wait: float | None


def translate(
    status: int, headers: Mapping[str, str], body: bytes | memoryview, asked: Asked
) -> EmbeddingError:
    """The error for an HTTP answer that is not a success. Never raises."""
    if 300 <= status < 400:
        return _redirected(status, rate_headers.lowered(headers), asked)
    if status == 407:
        return ConfigurationError(
            "the HTTP proxy wants a password: put it into HTTPS_PROXY (http://user:password@host)"
        )
    refused = read(status, headers, body, asked)
    error = _error(refused)
    _set_money(error, refused)
    return error


def read(
    status: int, headers: Mapping[str, str], body: bytes | memoryview, asked: Asked
) -> Refused:
    """What an answer that is no success says, before anything is made of it."""
    headers = rate_headers.lowered(headers)
    found = error_body(headers, body)
    inner = found.status if found.status in _INNER_OF.get(status, ()) else None
    return understood(status, inner or status, headers, found, asked)


def error_within(
    status: int, headers: Mapping[str, str], body: bytes | memoryview, asked: Asked
) -> EmbeddingError | None:
    """The error for a success whose body is an error; None if no status can be made out.

    Its kind, and whether it is tried again, are those of the status named in it. Whether it was
    billed is unknown: the server said that it was a success.
    """
    headers = rate_headers.lowered(headers)
    found = error_body(headers, body)
    # With vectors beside it, only what calls itself an error is one; a page, if it names a status.
    if found.charged and not found.own:
        return None
    if not found.known and status_in_words(found.message) is None:
        return None
    said = redact.without_texts(found.message, asked.texts, most=_QUOTED)
    inner = quoted_in(said)
    names = found.names | inner.names
    judged = found.status or inner.status or status_in_words(said)
    judged = judged or _status_by_names(names) or _status_by_words(said, asked)
    if judged is None:
        return None
    found = replace(found, names=names, wait=found.wait or inner.wait)
    error = _error(understood(status, judged, headers, found, asked))
    error.billed = "unknown"
    return error


def error_of(status: int, body: ErrorBody, asked: Asked) -> EmbeddingError:
    """The error that a refusal is, of which only the status and the body are known. What it cost
    is not in it."""
    return _error(understood(status, status, {}, body, asked))


def error_body(headers: Mapping[str, str], body: bytes | memoryview) -> ErrorBody:
    """The error in a body, if it is no larger than one. ``headers`` by names in lower case."""
    if len(body) > _LARGEST_ERROR:
        return ErrorBody()
    return read_body(body, headers.get("content-type", ""))


def understood(
    status: int, judged: int, headers: Mapping[str, str], body: ErrorBody, asked: Asked
) -> Refused:
    """``headers`` by names in lower case."""
    said = redact.without_texts(body.message, asked.texts)
    wait = rate_headers.retry_after(headers) or body.wait
    too_fast = judged == 429 or (judged in _VAGUE and _by_name(body.names) == "rate")
    if wait is None and (too_fast or judged == 503):
        # At its end, often; and no text is quoted there.
        words = body.message if judged == status else said
        wait = rate_headers.wait_in_words(words, headers)
    if wait is None and too_fast:
        wait = rate_headers.refill_after(headers)
    return Refused(
        status=status,
        judged=judged,
        headers=headers,
        body=body,
        asked=asked,
        said=said,
        wait=wait,
    )


def says_quota(names: frozenset[str]) -> bool:
    """Whether one of a server's names for an error means that there is no money left."""
    return _by_name(names) == "quota"


def request_id(headers: Mapping[str, str], asked: Asked) -> str | None:
    """The server's name for the request; None if the server put a secret there."""
    name = rate_headers.request_id(headers)
    return None if name and any(secret in name for secret in asked.secrets) else name


def facts(refused: Refused) -> dict[str, Any]:
    """What every error of a provider carries."""
    shown = refused.asked.shown
    return {
        "status": refused.status,
        "code": shown(refused.body.code or refused.body.kind)[:80] or None,
        "request_id": request_id(refused.headers, refused.asked),
    }


def describe(refused: Refused, what: str) -> str:
    """``what`` the server does, with its status and the reason that it gives."""
    said = redact.clean(refused.said, secrets=refused.asked.secrets)
    within = f", an error of status {refused.judged}" if refused.status < 300 else ""
    reason = f": {said}" if said else ""
    return f"{refused.asked.endpoint} {what} (HTTP {refused.status}{within}{reason})"


def _error(refused: Refused) -> EmbeddingError:
    kind = kind_of(refused)
    if kind in _ACCOUNT:
        return _about_the_account(refused, kind)
    if kind in ("rate", "outcome", "moment"):
        return _about_the_moment(refused, kind)
    hints = _hints(refused)
    if kind == "size" or hints is not None:
        return _about_the_size(refused, hints or SizeHints())
    what = "refused the request"
    if refused.status == 403 and not refused.body.parsed:
        what = (
            "refused the request, and not with an error of the API: a firewall before it dislikes "
            "a text, this address, or the key"
        )
    return RequestRejected(describe(refused, what), **facts(refused))


def kind_of(refused: Refused) -> Kind:
    """What the refusal is about: status first, then the server's names for it, wording last."""
    status = refused.judged
    named = _by_name(refused.body.names)
    if status in _CLEAR:
        return _CLEAR[status]
    if status == 429:
        return _kind_of_429(refused, named)
    if status == 424 or status > 500:
        return "moment"
    if named in ("quota", "key") and status != 413:
        return named
    if 400 <= status < 500 and _about(_QUOTA_WORDS, refused.said, refused.asked):
        return "quota"
    words = _KEY_WORDS if status in (400, 403, 422) else _KEY_FAULT
    if status in (400, 403, 404, 422, 500) and _about(words, refused.said, refused.asked):
        return "key"
    if status == 403 and _is_of_content(refused):
        return "request"
    if status == 403:
        return _kind_of_403(refused, named)
    if status == 404:
        other = _OTHER_PARAMETER.search(refused.said) and not _MODEL_WORDS.search(refused.said)
        return "request" if other else "model"
    if status in _VAGUE and named in ("model", "permission", "rate"):
        return named
    if status in (400, 422) and _names_no_model(refused):
        return "model"
    if status == 500 and _about(_THROTTLED, refused.said, refused.asked):
        return "rate"
    return "moment" if status == 500 and _hints(refused) is None else "request"


def _kind_of_429(refused: Refused, named: Kind | None) -> Kind:
    if named == "quota" or (refused.wait is None and _QUOTA_WORDS.search(refused.said)):
        return "quota"
    if _NEVER_FITS.search(refused.said) or _asks_too_much(refused.said):
        return "size"
    return "rate"


def _kind_of_403(refused: Refused, named: Kind | None) -> Kind:
    if named == "rate":
        return named
    # A firewall or a guard before the API says 403 of a text that it dislikes as of a key or an
    # address: only an error in JSON that names the key, or what it may do, is about that.
    if not (refused.body.parsed and refused.body.known):
        return "request"
    # Inside another status it may have been billed: nothing is tried to find out.
    names = frozenset(name for name in refused.body.names if plain(name) != "forbidden")
    told = refused.status != 403 or _by_name(names) == "permission"
    told = told or _PERMISSION_WORDS.search(refused.said) is not None
    return "permission" if told else "request"


def _asks_too_much(said: str) -> bool:
    found = _LIMIT_AND_ASKED.search(said)
    if found is None:
        return False
    limit, requested = (int(number.replace(",", "")) for number in found.groups())
    return requested > limit > 0


def _by_name(names: frozenset[str]) -> Kind | None:
    """What the server's names for the error mean; the most telling of them decides."""
    spelled = [plain(name) for name in names]
    for kind, pattern in _NAMES.items():
        if any(map(pattern.search, spelled)):
            return kind
    return None


def _status_by_names(names: frozenset[str]) -> int | None:
    named = _by_name(names)
    return None if named is None else _STATUS_OF[named]


def _status_by_words(said: str, asked: Asked) -> int | None:
    for words, status in ((_QUOTA_WORDS, 402), (_KEY_WORDS, 401), (_RATE_WORDS, 429)):
        if _about(words, said, asked):
            return status
    if size_hints(said, asked.texts, asked.model) is not None:
        return 400
    if _about(_TIME_WORDS, said, asked):
        return 504
    return 503 if _about(_MOMENT_WORDS, said, asked) else None


def _about(words: re.Pattern[str], said: str, asked: Asked) -> bool:
    """Does the reason speak of it? A word that a text of the request has as well may be its own."""
    found = words.search(said)
    if found is None:
        return False
    word = found[0].lower()
    return not any(word in text.lower() for text in asked.texts)


def _is_of_content(refused: Refused) -> bool:
    by_name = any(map(_CONTENT.search, refused.body.names))
    return by_name or _about(_CONTENT, refused.said, refused.asked)


def _names_no_model(refused: Refused) -> bool:
    model, said = refused.asked.model, refused.said
    if _OTHER_PARAMETER.search(f"{refused.body.parameter} {said}"):
        return False
    if _NO_MODEL_ID.search(said):
        return True
    named = re.search(rf"(?<![\w-]){re.escape(model)}(?![\w-])", said) is not None
    return (
        named
        and bool(_MODEL_WORDS.search(said))
        and _about(_NO_MODEL_WORDS, refused.said, refused.asked)
    )


_ACCOUNT: Final[dict[Kind, tuple[type[PermanentProviderError], str]]] = {
    "quota": (QuotaExhausted, "has no quota left for this account; waiting does not help"),
    "key": (AuthenticationFailed, "does not accept the API key; {key_hint}"),
    "permission": (PermissionDenied, "does not let this key use {model!r}"),
    "model": (ModelNotFound, "does not know the model {model!r}, or base_url is wrong"),
}


def _about_the_account(refused: Refused, kind: Kind) -> EmbeddingError:
    error, what = _ACCOUNT[kind]
    asked = refused.asked
    what = what.format(key_hint=asked.key_hint, model=asked.model)
    return error(describe(refused, what), **facts(refused))


def _hints(refused: Refused) -> SizeHints | None:
    """What the refusal says of a size; None if it speaks of none."""
    asked, names = refused.asked, refused.body.names
    hints = size_hints(
        refused.said,
        asked.texts,
        asked.model,
        parameter=refused.body.parameter,
        names=frozenset(map(plain, names)),
        ignored=frozenset({str(refused.status), *names}),
        strict=refused.judged == 500,
    )
    # One request above a limit per minute: of several texts none need be too long.
    return None if refused.judged == 429 else hints


def _about_the_size(refused: Refused, hints: SizeHints) -> EmbeddingError:
    if not hints.one_text:
        count = len(refused.asked.texts)
        return RequestTooLarge(
            describe(
                refused, f"finds {count} texts too much at once" if count > 1 else _ONE_TOO_MUCH
            ),
            max_texts=hints.max_texts,
            **facts(refused),
        )
    return InputTooLong(
        # Without its place in the request: the caller knows it by the row, which is put before it.
        describe(refused, "finds a text too long"),
        position=hints.position,
        reason="longer than the model takes",
        max_tokens=hints.max_tokens,
        tokens=hints.tokens,
    )


def _about_the_moment(refused: Refused, kind: Kind) -> EmbeddingError:
    error: type[TransientProviderError]
    if kind == "rate":
        error, what = RateLimited, "gets requests too fast"
    elif kind == "outcome":
        error, what = OutcomeUnknown, "did not finish; the request may have been billed"
    else:
        error, what = ProviderUnavailable, "cannot serve at the moment"
    return error(
        describe(refused, what),
        retry_after=refused.wait,
        limits=rate_headers.rate_limits(refused.headers),
        **facts(refused),
    )


def _set_money(error: EmbeddingError, refused: Refused) -> None:
    """What the refusal cost. Free is what was refused before any work was done."""
    status, body, asked = refused.status, refused.body, refused.asked
    if body.charged:
        error.billed = "unknown" if body.tokens is None else "yes"
        error.billed_tokens = body.tokens
    elif status in FREE_BY_STATUS:
        error.billed = asked.refusals_billed
        if isinstance(error, ProviderError):
            error.free_by_status = not body.known and error.billed == "no"
    elif status in FREE_WITH_ERROR and body.known:
        error.billed = asked.refusals_billed
    elif status in _SERVER_ERRORS and body.own:
        error.billed = asked.server_errors_billed
    else:
        error.billed = "unknown"


def redirected_to(headers: Mapping[str, str], asked: Asked) -> str:
    """Where a redirect leads, for showing it. ``headers`` by names in lower case."""
    try:
        target = urlsplit(urljoin(f"{asked.endpoint}{asked.path}", headers.get("location", "")))
        # Without what may be a secret in it: user, password and query.
        return asked.shown(f"{target.scheme}://{target.hostname or ''}{_port(target)}{target.path}")
    except ValueError:
        return "an unreadable address"


def _redirected(status: int, headers: Mapping[str, str], asked: Asked) -> ConfigurationError:
    return ConfigurationError(
        f"{asked.endpoint} redirects (HTTP {status}) to {redirected_to(headers, asked)}. Redirects "
        "are not followed, so that the key goes nowhere else: set base_url to the final address, "
        f"without {asked.path}"
    )


def _port(address: SplitResult) -> str:
    return "" if address.port is None else f":{address.port}"
