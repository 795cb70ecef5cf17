"""A session: the key of each request, and one way to send it that never shows the key."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Final

from embedcore.errors import ConfigurationError, InvalidResponse
from embedcore.forksafe import Lazy
from embedcore.provider import access, http
from embedcore.provider.http import without_frames
from embedcore_openai import token_engines as vocabulary
from embedcore_openai.options import KEY_VARIABLE, OpenAIOptions

if TYPE_CHECKING:
    from embedcore.provider.batch_errors import Context
    from embedcore.provider.batch_spool import Spool
    from embedcore.provider.types import ModelInfo
    from embedcore_openai.sdk import SDK


_MOST_BYTES: Final = 1 << 20


class Session:
    """Connections to one endpoint and the key for them. Shared freely between threads.

    A connection is opened by the first ``send``, and the SDK imported by the first ``send_by_sdk``.
    The frames of what is raised here hold the key: a method that others call is
    ``without_frames``.
    """

    def __init__(self, options: OpenAIOptions) -> None:
        self._options = options
        self._http = http.Session(
            options.base_url,
            headers=_headers(options),
            verify=options.verify,
            connect_timeout=options.connect_timeout,
        )
        self._sdk: Lazy[SDK] = Lazy()

    def close(self) -> None:
        """Close the connections. A later ``send`` opens new ones."""
        self._http.close()

    def key(self) -> str | None:
        """The key for one request; None where none is sent.

        Raises ``AuthenticationFailed``, ``ConfigurationError`` and what a callable raises as one of
        ours.
        """
        if self._options.own_authentication:
            # The headers have one, and no other may go along.
            return None
        return access.key_of(
            self._options.api_key,
            self._options.endpoint,
            variable=KEY_VARIABLE,
            keys_at="https://platform.openai.com/api-keys",
        )

    def secrets(self, key: str | None) -> list[str]:
        """What must not be shown of a request with this key."""
        values = [value.get_secret_value() for value in self._options.headers.values()]
        return [*values, key] if key else values

    def prepare(self, context: Context) -> None:
        """Import what a request needs and read the environment; no connection is opened."""
        self._http.prepare(context)

    def connect(self, context: Context) -> None:
        """Open a connection, by a request that costs nothing and carries no key."""
        call = http.Call(
            method="GET", path="/", timeout=self._options.timeout, max_bytes=_MOST_BYTES
        )
        # Any answer will do.
        with contextlib.suppress(InvalidResponse):
            self.send(call, None, context).release()

    def send(self, call: http.Call, key: str | None, context: Context) -> http.Answer:
        """Send one request, once. An HTTP answer of any status is an answer.

        Raises the errors of ``embedcore.provider.http.Session.send``.
        """
        return self._http.send(self._completed(call, key), context)

    def send_by_sdk(
        self, call: http.Call, key: str | None, context: Context, file: tuple[str, Spool] | None
    ) -> http.Answer:
        """The same for the batch API; ``file``: of a form, in place of a body."""
        try:
            sdk = self._sdk.get(self._with_sdk)
        except Exception as error:  # noqa: BLE001 - a package that is broken
            raise ConfigurationError(
                f"the openai package cannot be used ({type(error).__name__}: "
                f"{context.shown(str(error))})"
            ) from None
        return sdk.send(self._completed(call, key), context, file)

    def _with_sdk(self) -> SDK:
        from embedcore_openai.sdk import SDK

        return SDK(self._http, self._options.base_url)

    def _completed(self, call: http.Call, key: str | None) -> http.Call:
        """With the key, and what the options have for every request."""
        headers = {name: value.get_secret_value() for name, value in self._options.headers.items()}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        query = {**(self._options.query or {}), **call.query}
        return replace(call, headers={**call.headers, **headers}, query=query)


def _headers(options: OpenAIOptions) -> Mapping[str, str]:
    """Those that are no secrets."""
    named = {"OpenAI-Organization": options.organization, "OpenAI-Project": options.project}
    return {
        "Accept": "application/json",
        **{name: value for name, value in named.items() if value},
    }


# What a request imports where it needs it; the last by the socket, for the name of a host.
_MODULES: Final = (
    "embedcore.provider.replies",
    "embedcore.provider.http_connections",
    "embedcore.provider.batch_errors",
    "encodings.idna",
)
_ENGINES: Final = ("tiktoken", "splintr")


class OpenAIStartup:
    """Implements ``embedcore.provider.protocol.Startup``. ``exact``: it counts with an engine."""

    def __init__(self, info: ModelInfo, session: Session, *, exact: bool) -> None:
        self._info = info
        self._session = session
        self._exact = exact

    @without_frames
    def load(self) -> None:
        for name in _MODULES:
            import_module(name)
        if self._exact and vocabulary.present():
            for name in _ENGINES:
                _import_if_sound(name)
        self._session.prepare(self._context())

    @without_frames
    def connect(self) -> None:
        """One request without a key and without a body; any answer to it will do."""
        self._session.connect(self._context())

    def _context(self) -> Context:
        from embedcore.provider.batch_errors import Context

        return Context(
            model=self._info.model,
            endpoint=self._info.endpoint,
            secrets=self._session.secrets(None),
        )


def _import_if_sound(name: str) -> None:
    try:
        import_module(name)
    except Exception:  # noqa: BLE001 - what counts says what is wrong with it, and does without
        return
