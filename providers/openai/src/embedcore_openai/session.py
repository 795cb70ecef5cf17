"""A session: the key of each request, and one way to send it that never shows the key."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from pydantic import SecretStr

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    InvalidResponse,
)
from embedcore.forksafe import Lazy
from embedcore_openai import token_engines as vocabulary
from embedcore_openai.options import KEY_VARIABLE, OpenAIOptions

if TYPE_CHECKING:
    from embedcore.provider.types import ModelInfo
    from embedcore_openai.errors import Context
    from embedcore_openai.http import Answer, Call, Transport


_MOST_BYTES: Final = 1 << 20

Given = ParamSpec("Given")
Result = TypeVar("Result")


def without_frames(method: Callable[Given, Result]) -> Callable[Given, Result]:
    """The method, whose errors do not show the way they came: frames down there hold the key.

    Nor does the error of which one was made, unless it is its cause.
    """

    @wraps(method)
    def only_this_frame(*given: Given.args, **named: Given.kwargs) -> Result:
        try:
            return method(*given, **named)
        except EmbeddingError as error:
            failure = error
        if failure.__cause__ is None:
            failure.__context__ = None
        # Outside of the handler, where it would become its own context.
        raise failure.with_traceback(None)

    return only_this_frame


class Session:
    """Connections to one endpoint and the key for them. Shared freely between threads.

    The SDK is imported, and a connection opened, by the first ``send``. The frames of what is
    raised here hold the key: a method that others call is ``without_frames``.
    """

    def __init__(self, options: OpenAIOptions) -> None:
        self._options = options
        # Two processes must not read from one connection: a child of a fork opens its own.
        self._transport: Lazy[Transport] = Lazy()

    def close(self) -> None:
        """Close the connections. A later ``send`` opens new ones."""
        transport = self._transport.take()
        if transport is not None:
            transport.close()

    def key(self) -> str | None:
        """The key for one request; None where none is sent.

        Raises ``AuthenticationFailed``, ``ConfigurationError`` and what a callable raises as one of
        ours.
        """
        if self._options.own_authentication:
            # The headers have one, and no other may go along.
            return None
        given: object = self._options.api_key
        if callable(given):
            try:
                given = given()
            except EmbeddingError:
                raise
            except Exception as error:
                raise AuthenticationFailed(
                    f"the callable given as api_key failed with {type(error).__name__}"
                ) from error
        key = given.get_secret_value() if isinstance(given, SecretStr) else given
        if key is not None and not isinstance(key, str):
            raise ConfigurationError(f"api_key gave a {type(key).__name__} instead of a string")
        if not key or not key.strip():
            if self._options.endpoint.reach == "public":
                raise _missing_key(self._options.base_url)
            return None
        if not all("!" <= character <= "~" for character in key):
            raise ConfigurationError(
                "the API key contains white space, line breaks or characters beyond ASCII: "
                f"copy it again, without a line end, into {KEY_VARIABLE}"
            )
        return key

    def secrets(self, key: str | None) -> list[str]:
        """What must not be shown of a request with this key."""
        values = [value.get_secret_value() for value in self._options.headers.values()]
        return [*values, key] if key else values

    def prepare(self, context: Context) -> Transport:
        """Import the SDK and build the connections; none is opened."""
        from embedcore_openai import errors

        try:
            return self._connected()
        except Exception as error:  # noqa: BLE001 - a proxy's address, a certificate, a package
            raise errors.from_setup(error, context) from None

    def connect(self, context: Context) -> None:
        """Open a connection, by a request that costs nothing and carries no key."""
        from embedcore_openai.http import Call

        call = Call(method="GET", path="/", timeout=self._options.timeout, max_bytes=_MOST_BYTES)
        # Any answer will do.
        with contextlib.suppress(InvalidResponse):
            self.send(call, None, context).release()

    def send(self, call: Call, key: str | None, context: Context) -> Answer:
        """Send one request, once. An HTTP answer of any status is an answer.

        Raises the error of an exchange without one.
        """
        from embedcore_openai import errors

        sent = {name: value.get_secret_value() for name, value in self._options.headers.items()}
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        transport = self.prepare(context)
        if self._options.query:
            call = replace(call, query={**self._options.query, **call.query})
        try:
            return transport.send(call, sent)
        except Exception as error:  # noqa: BLE001 - of the SDK and of either HTTP library
            raise errors.from_exception(error, context) from None

    def _connected(self) -> Transport:
        from embedcore_openai.http import Transport

        return self._transport.get(
            lambda: Transport(
                base_url=self._options.base_url,
                organization=self._options.organization,
                project=self._options.project,
                connect_timeout=self._options.connect_timeout,
                verify=self._options.verify,
            )
        )


def _missing_key(endpoint: str) -> ConfigurationError:
    return ConfigurationError(
        f"no API key for {endpoint}: set the environment variable {KEY_VARIABLE} "
        f"(export {KEY_VARIABLE}=sk-…), or pass api_key. Keys are made at "
        "https://platform.openai.com/api-keys"
    )


# What a request imports where it needs it; the last by the socket, for the name of a host.
_MODULES: Final = (
    "embedcore.provider.replies",
    "embedcore_openai.errors",
    "embedcore_openai.errors",
    "embedcore_openai.http",
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
        from embedcore_openai.errors import Context

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
