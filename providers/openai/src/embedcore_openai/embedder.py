"""One OpenAI model as an embedder: key, request, reply."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    EmbeddingError,
    InputRejected,
    ProviderUnavailable,
)
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo
from embedcore_openai import models
from embedcore_openai.options import KEY_VARIABLE, OpenAIOptions
from embedcore_openai.tokenizer import Cl100kTokenizer

if TYPE_CHECKING:
    from embedcore.provider.protocol import BatchStrategy, Tokenizer
    from embedcore.provider.types import Vectors
    from embedcore_openai.errors import Context
    from embedcore_openai.transport import Answer, Transport

# A component takes at most 25 characters as JSON text, and 5.4 as base64.
_BYTES_PER_COMPONENT: Final = 32
_BYTES_BESIDE: Final = 1_000_000
_WIDEST: Final = 16_384

_log = logging.getLogger("embedcore.openai")
_warned: set[str] = set()


class OpenAIEmbedder:
    """Implements ``embedcore.provider.protocol.Embedder``. Shared freely between threads.

    Built without key and network; the SDK is imported, and a connection opened, by the first
    ``embed``.
    """

    def __init__(self, model: str, options: OpenAIOptions) -> None:
        self._options = options
        self._info = models.describe(model, options)
        exact = models.counts_like_openai(model, options)
        self._tokenizer: Tokenizer = Cl100kTokenizer() if exact else EstimatingTokenizer()
        self._transport: Transport | None = None
        self._lock = threading.Lock()
        _warn_of_plaintext(options)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def batch(self) -> BatchStrategy | None:
        return None

    def embed(self, request: EmbedRequest) -> EmbedReply:
        """Send one request. ``billed`` of what it raises follows the rules of ``errors``.

        Raises ``ConfigurationError`` for a missing or malformed key, ``InputRejected`` for a text
        that is not Unicode, ``InputTooLong``, ``InvalidResponse`` and the errors under
        ``TransientProviderError`` and ``PermanentProviderError``. Does not retry.
        """
        outcome = self._outcome(request)
        if isinstance(outcome, EmbeddingError):
            # Raised here and without the way it came: frames down there hold the key.
            raise outcome.with_traceback(None)
        return outcome

    def close(self) -> None:
        """Close the connections. A later ``embed`` opens new ones."""
        with self._lock:
            transport, self._transport = self._transport, None
        if transport is not None:
            transport.close()

    def __repr__(self) -> str:
        return f"OpenAIEmbedder({self._info.model!r}, endpoint={self._info.endpoint!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as model and options, without connections and secrets.

        The copy takes its key from ``OPENAI_API_KEY`` where it is unpickled. Raises ``TypeError``
        when that would lose a key or a header that was given otherwise.
        """
        given = self._options.api_key
        kept = given is None or (
            isinstance(given, SecretStr)
            and given.get_secret_value() == os.environ.get(KEY_VARIABLE)
        )
        if not kept or self._options.headers:
            raise TypeError(
                "this embedder does not pickle: its key or headers would be lost. "
                f"Set {KEY_VARIABLE} instead, or pickle the client, which keeps its config"
            )
        return _rebuild, (self._info.model, self._options)

    def _outcome(self, request: EmbedRequest) -> EmbedReply | EmbeddingError:
        if not request.texts:
            return self._nothing()
        body = self._body(request.texts)
        if isinstance(body, EmbeddingError):
            return body
        key = self._key()
        if isinstance(key, EmbeddingError):
            return key
        context = self._context(request.texts, key)
        answer = self._exchange(body, key, request, context)
        if isinstance(answer, EmbeddingError):
            return answer
        try:
            return self._understood(answer, context, request.into)
        finally:
            answer.release()

    def _nothing(self) -> EmbedReply:
        import numpy as np

        width = self._info.dimensions or 0
        return EmbedReply(vectors=np.empty((0, width), dtype=np.float32), tokens=0)

    def _body(self, texts: Sequence[str]) -> bytes | EmbeddingError:
        from embedcore_openai import wire

        try:
            return wire.request_body(
                self._info.model,
                texts,
                encoding=self._options.encoding,
                dimensions=self._options.dimensions,
            )
        except wire.NotUnicode as error:
            return InputRejected(
                f"text {error.position} of the request is no valid Unicode (a lone surrogate)",
                position=error.position,
                reason="no valid Unicode",
            )

    def _key(self) -> str | EmbeddingError | None:
        """The key for one request; None where none is sent. Never raises: its frame has the key."""
        given: object = self._options.api_key
        if callable(given):
            try:
                given = given()
            except EmbeddingError as error:
                return error
            except Exception as error:  # noqa: BLE001 - it is the caller's own function
                failure = AuthenticationFailed(
                    f"the callable given as api_key failed with {type(error).__name__}"
                )
                failure.__cause__ = error
                return failure
        key = given.get_secret_value() if isinstance(given, SecretStr) else given
        if key is not None and not isinstance(key, str):
            return ConfigurationError(f"api_key gave a {type(key).__name__} instead of a string")
        if not key or not key.strip():
            return None if self._works_without_key else _missing_key(self._info.endpoint)
        if not all("!" <= character <= "~" for character in key):
            return ConfigurationError(
                "the API key contains white space, line breaks or characters beyond ASCII: "
                f"copy it again, without a line end, into {KEY_VARIABLE}"
            )
        return key

    @property
    def _works_without_key(self) -> bool:
        return self._options.own_authentication or self._options.endpoint.reach != "public"

    def _context(self, texts: Sequence[str], key: str | None) -> Context:
        from embedcore_openai.errors import Context

        secrets = [value.get_secret_value() for value in self._options.headers.values()]
        return Context(
            model=self._info.model,
            endpoint=self._info.endpoint,
            texts=texts,
            secrets=[*secrets, key] if key else secrets,
            server_errors_billed=self._options.server_errors_billed,
        )

    def _exchange(
        self, body: bytes, key: str | None, request: EmbedRequest, context: Context
    ) -> Answer | EmbeddingError:
        from embedcore_openai import errors

        timeout = self._options.timeout
        if request.timeout is not None:
            timeout = min(timeout, request.timeout)
        if not timeout > 0:
            return ProviderUnavailable("no time is left for the request", billed="no")
        sent = {name: value.get_secret_value() for name, value in self._options.headers.items()}
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        width = self._info.dimensions or _WIDEST
        cap = len(request.texts) * width * _BYTES_PER_COMPONENT + _BYTES_BESIDE
        try:
            transport = self._connected()
        except Exception as error:  # noqa: BLE001 - a proxy's address, a certificate, a package
            return errors.from_setup(error, context)
        try:
            return transport.post(body, sent, timeout=timeout, max_bytes=cap)
        except Exception as error:  # noqa: BLE001 - whatever it is, its frames hold the key
            return errors.from_exception(error, context)

    def _connected(self) -> Transport:
        from embedcore_openai.transport import Transport

        with self._lock:
            if self._transport is None:
                self._transport = Transport(
                    base_url=self._options.base_url,
                    organization=self._options.organization,
                    project=self._options.project,
                    connect_timeout=self._options.connect_timeout,
                )
            return self._transport

    def _understood(
        self, answer: Answer, context: Context, into: Vectors | None
    ) -> EmbedReply | EmbeddingError:
        from embedcore_openai import errors, headers, wire

        if not 200 <= answer.status < 300:
            return errors.from_answer(answer, context)
        try:
            reply = wire.parse_reply(
                answer.body,
                count=len(context.texts),
                dimensions=self._info.dimensions,
                into=into,
            )
        except wire.BadReply as bad:
            return errors.from_bad_reply(bad, answer, context)
        expected = reply.model in (None, self._info.model, *self._info.reply_models)
        return EmbedReply(
            vectors=reply.vectors,
            tokens=reply.tokens,
            model=reply.model if expected else context.shown(reply.model or ""),
            request_id=errors.request_id(answer, context),
            limits=headers.rate_limits(answer.headers),
        )


def _missing_key(endpoint: str) -> ConfigurationError:
    return ConfigurationError(
        f"no API key for {endpoint}: set the environment variable {KEY_VARIABLE} "
        f"(export {KEY_VARIABLE}=sk-…), or pass api_key. Keys are made at "
        "https://platform.openai.com/api-keys"
    )


def _warn_of_plaintext(options: OpenAIOptions) -> None:
    where = options.endpoint
    if where.plaintext and where.reach == "private" and where.url not in _warned:
        _warned.add(where.url)
        _log.warning(
            "%s is not encrypted: whoever is on that network can read texts and key", where.url
        )


def _rebuild(model: str, options: OpenAIOptions) -> OpenAIEmbedder:
    key = os.environ.get(KEY_VARIABLE)
    if key:
        options = options.model_copy(update={"api_key": SecretStr(key)})
    return OpenAIEmbedder(model, options)
