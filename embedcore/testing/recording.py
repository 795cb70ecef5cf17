"""Records what a service answers, without secrets, and plays it again.

A recorder stands between a provider and its service: the provider is given the recorder's ``url``
as its address. Each exchange becomes one file of JSON::

    with Recorder("https://api.acme.example", Path("tests/recordings"), secrets=[key]) as recorder:
        embedder = AcmeEmbedder("v1", AcmeOptions(base_url=recorder.url, api_key=key))
        embedder.embed(EmbedRequest(texts=["a red apple"]))

    with Replay(Path("tests/recordings")) as replay:
        ...  # the same with base_url=replay.url, and without a key

Of a request only its method, address and body are written, of an answer its status, its body and
the headers that say how it is to be read. Keys, cookies, and the names of organisations, projects
and accounts are taken out. Where a key that is known is still in it, in whatever form, nothing of
the recording is written.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from embedcore.errors import EmbeddingError
from embedcore.provider import http, redact
from embedcore.provider.refusals import Asked
from embedcore.testing.openai.http import HttpReply, OnSocket

if TYPE_CHECKING:
    from types import TracebackType

    from embedcore.testing.openai.http import HttpRequest

HIDDEN: Final = "[hidden]"
_LARGEST: Final = 1 << 30
_SECONDS: Final = 600.0
_SHORTEST: Final = 6
# What a reply is read by. No other header is written, so that none has to be known as a secret.
_KEPT: Final = re.compile(
    r"content-type|retry-after(?:-ms)?|(?:x-)?ratelimit-[a-z-]+|x-should-retry|openai-model|allow"
)
_OF_THE_CONNECTION: Final = frozenset(
    {"connection", "content-length", "host", "keep-alive", "transfer-encoding", "accept-encoding"}
)
_SECRET_NAME: Final = re.compile(
    r"(?:^|[_-])(?:api[_-]?)?(?:key|secret|password|token|signature|sig|credentials?|authorization"
    r"|cookie)$|^(?:access|refresh|id|session|bearer)[_-]?token$",
    re.IGNORECASE,
)
_ACCOUNT_NAME: Final = re.compile(
    r"^(?:x-)?(?:openai-)?(?:org|organi[sz]ation|project|account|tenant|team|user|customer|workspace"
    r"|subscription|resource)(?:[_-]?(?:id|name|number))?$|^e?-?mail$",
    re.IGNORECASE,
)
# What is an account or a key by its form, wherever it stands.
_BY_FORM: Final = re.compile(
    r"\b(?:org|proj|user|acct|sess)[-_][A-Za-z0-9]{8,}\b"
    r"|\b(?:sk|pk|rk|pa|key|xai|gsk|hf)[-_][A-Za-z0-9_-]{12,}\b"
    r"|\bAIza[A-Za-z0-9_-]{20,}\b|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9._-]{10,}"
    r"|\b[Bb]earer\s+[A-Za-z0-9._~+/=-]{8,}|[\w.+-]+@[\w-]+\.[\w.-]+"
)


class SecretLeft(Exception):
    """A known secret would have been written. It is not in the message."""


class Recorder(OnSocket):
    """Passes requests on to ``upstream``, and writes an exchange for each into ``folder``.

    ``secrets``: what must be in no file; the keys that requests carry are known without. Use as a
    context manager: the files are written at its end, all of them, or none and ``SecretLeft``.
    """

    def __init__(self, upstream: str, folder: Path, *, secrets: Iterable[str] = ()) -> None:
        self._session = http.Session(upstream)
        self._upstream = upstream.rstrip("/")
        self._folder = folder
        self._secrets = {secret for secret in secrets if secret}
        self._exchanges: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._session.close()
        if kind is None:
            self.write()

    def write(self) -> list[Path]:
        """Write what was recorded so far. Raises ``SecretLeft``, and then has written nothing."""
        texts = {
            self._folder / f"{number:03}.json": json.dumps(
                {"interactions": [exchange]}, indent=1, ensure_ascii=False
            )
            for number, exchange in enumerate(self._exchanges, 1)
        }
        for path, text in texts.items():
            if any(holds(text, secret) for secret in self._secrets):
                raise SecretLeft(
                    f"a secret is still in what would be {path.name}: nothing was written. Look "
                    "where the service repeats it"
                )
        self._folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text + "\n", encoding="utf-8")
        return list(texts)

    def answer(self, request: HttpRequest) -> HttpReply:
        with self._lock:
            self._secrets |= set(_keys_of(request))
        target = f"{request.path}?{request.query}" if request.query else request.path
        call = http.Call(
            method=request.method,
            path=target,
            headers={
                name: value
                for name, value in request.headers.items()
                if name not in _OF_THE_CONNECTION
            },
            body=request.body,
            timeout=_SECONDS,
            max_bytes=_LARGEST,
        )
        asked = Asked(model="", endpoint=self._upstream, secrets=list(self._secrets))
        try:
            with self._session.send(call, asked) as answer:
                body, headers, status = bytes(answer.body), dict(answer.headers), answer.status
        except EmbeddingError as error:
            # There is no answer to record.
            return HttpReply(status=502, body=type(error).__name__.encode())
        exchange = {
            "request": {
                "method": request.method,
                "uri": without_secrets(self._upstream + _without_query_keys(target)),
                "body": _scrubbed_body(request.body),
            },
            "status": status,
            "headers": {
                name: without_secrets(value)
                for name, value in headers.items()
                if _KEPT.fullmatch(name)
            },
            "body": _scrubbed_body(body),
        }
        with self._lock:
            self._exchanges.append(exchange)
        passed_on = {
            name: value for name, value in headers.items() if name not in _OF_THE_CONNECTION
        }
        return HttpReply(status=status, headers=passed_on, body=body)


class Replay(OnSocket):
    """Plays what was recorded in a folder: each request is answered as the same one was then.

    ``asked``: the requests so far, as ``METHOD /path``. A request that was not recorded, or is not
    in the same JSON, is answered with 501; ``missed`` has what differed. Several answers to one
    request are played in their order, and the last of them again.
    """

    def __init__(self, folder: Path) -> None:
        self._exchanges = [
            each
            for path in sorted(folder.glob("*.json"))
            for each in json.loads(path.read_text(encoding="utf-8"))["interactions"]
        ]
        if not self._exchanges:
            raise FileNotFoundError(f"there is no recording in {folder}")
        self.asked: list[str] = []
        self.missed: list[str] = []
        self._played: dict[str, int] = {}
        self._lock = threading.Lock()

    def answer(self, request: HttpRequest) -> HttpReply:
        line = f"{request.method} {request.path}"
        body = _scrubbed_body(request.body)
        found = [
            each
            for each in self._exchanges
            if _line_of(each["request"]) == line and each["request"]["body"] == body
        ]
        with self._lock:
            self.asked.append(line)
            if not found:
                self.missed.append(line)
                return HttpReply(status=501, body=b'{"error": "not recorded"}')
            key = json.dumps([line, body], sort_keys=True)
            number = self._played.get(key, 0)
            self._played[key] = number + 1
        chosen = found[min(number, len(found) - 1)]
        content = chosen["body"]
        return HttpReply(
            status=chosen["status"],
            headers=chosen["headers"],
            body=content.encode() if isinstance(content, str) else json.dumps(content).encode(),
        )


def _line_of(request: Mapping[str, Any]) -> str:
    path = "/" + request["uri"].partition("://")[2].partition("/")[2].partition("?")[0]
    return f"{request.get('method', 'POST')} {path}"


def holds(text: str, secret: str) -> bool:
    """Whether a secret is in a text: as it is, or in base64, percent or JSON encoding."""
    if len(secret) < _SHORTEST:
        return secret in text
    forms = {*redact.forms(secret), json.dumps(secret)[1:-1]}
    return any(form in text for form in forms if len(form) >= _SHORTEST)


def without_secrets(text: str) -> str:
    """A text without what is a key, an account or an address of mail by its form."""
    return _BY_FORM.sub(HIDDEN, text)


def scrubbed(value: Any) -> Any:
    """JSON without the values of names that hold keys or accounts, and without what is one by its
    form. Numbers stay: ``total_tokens`` is no key."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {
            name: HIDDEN if isinstance(inner, str) and _is_secret(name) else scrubbed(inner)
            for name, inner in value.items()
        }
    return [scrubbed(each) for each in value] if isinstance(value, list) else value


def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name) or _ACCOUNT_NAME.fullmatch(name))


def _scrubbed_body(body: bytes) -> Any:
    text = body.decode("utf-8", "replace")
    try:
        return scrubbed(json.loads(text))
    except ValueError:
        return without_secrets(text)


def _without_query_keys(target: str) -> str:
    path, mark, query = target.partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")] if mark else []
    kept = [
        f"{name}={HIDDEN if _is_secret(name) else value}" if sign else name
        for name, sign, value in pairs
    ]
    return path + mark + "&".join(kept)


def _keys_of(request: HttpRequest) -> Iterator[str]:
    """What a request carries that is a secret, by the names of its headers and parameters."""
    for name, value in request.headers.items():
        if _is_secret(name):
            scheme, _, rest = value.partition(" ")
            yield rest or scheme
    for pair in request.query.split("&"):
        name, _, value = pair.partition("=")
        if value and _is_secret(name):
            yield value
