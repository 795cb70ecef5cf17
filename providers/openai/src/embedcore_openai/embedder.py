"""The embedder for OpenAI and servers with the same API."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import SecretStr

from embedcore.errors import (
    AuthenticationFailed,
    PermissionDenied,
    ProviderError,
    RequestRejected,
)
from embedcore.provider import access, http
from embedcore.provider.http import without_frames
from embedcore.provider.tokens import EstimatingTokenizer
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo
from embedcore_openai import models
from embedcore_openai.encodings import encodings_of
from embedcore_openai.options import KEY_VARIABLE, OpenAIOptions
from embedcore_openai.session import OpenAIStartup, Session
from embedcore_openai.tokenizer import Cl100kTokenizer

if TYPE_CHECKING:
    from embedcore.provider.batch_errors import Context
    from embedcore.provider.protocol import BatchStrategy, Tokenizer
    from embedcore.provider.types import Vectors
    from embedcore_openai.batch import OpenAIBatch

# Of the body of a refusal, for the names of fields in it.
_READ_FOR_NAMES = 20_000


class OpenAIEmbedder:
    """Implements ``embedcore.provider.protocol.Embedder``. Shared freely between threads.

    Built without key and network; a connection is opened by ``startup`` or the first ``embed``.
    The SDK is for batches.
    """

    def __init__(self, model: str, options: OpenAIOptions) -> None:
        self._options = options
        self._exact = models.counts_like_openai(model, options)
        self._tokenizer: Tokenizer = Cl100kTokenizer() if self._exact else EstimatingTokenizer()
        marks, tokens_per_byte = 0, 1
        if options.tokenizer is not None:
            from embedcore.provider.tokenizer_files import tokenizer_of

            self._tokenizer = found = tokenizer_of(options.tokenizer)
            marks, tokens_per_byte = found.marks, found.tokens_per_byte
        self._info = models.describe(model, options, marks=marks, tokens_per_byte=tokens_per_byte)
        self._session = Session(options)
        place = (options.base_url, tuple(sorted((options.query or {}).items())), model)
        self._encodings = encodings_of(place, options.encoding)
        self._batch: OpenAIBatch | None = None
        access.warn_of_readers(options.endpoint, verified=options.verify is not False)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def batch(self) -> BatchStrategy | None:
        """Always there, since a batch may have been submitted with other settings than these;
        its ``limits`` say whether new ones are."""
        if self._batch is None:
            from embedcore_openai.batch import OpenAIBatch

            self._batch = OpenAIBatch(self._info, self._options, self._session, self._encodings)
        return self._batch

    @property
    def startup(self) -> OpenAIStartup:
        """Imports what a request needs, and connects."""
        return OpenAIStartup(self._info, self._session, exact=self._exact)

    @without_frames
    def embed(self, request: EmbedRequest) -> EmbedReply:
        """Send one request. ``billed`` of what it raises follows the rules of ``errors``.

        Raises ``ConfigurationError`` for a missing or malformed key, ``InputRejected`` for a text
        that is not Unicode, ``InputTooLong``, ``InvalidResponse`` and the errors under
        ``TransientProviderError`` and ``PermanentProviderError``. Does not retry.
        """
        from embedcore.provider import replies

        if not request.texts:
            return replies.nothing(self._info.dimensions)
        form = self._encodings.form_for(request.texts)
        body = self._body(request.texts, form)
        key = self._session.key()
        context = self._context(request.texts, key)
        answer = self._session.send(self._call(body, request), key, context)
        try:
            reply = self._read(answer, context, request.into)
        except ProviderError as error:
            error.again = self._otherwise(error, form, request.texts, answer)
            raise
        finally:
            answer.release()
        self._encodings.succeeded(form)
        return reply

    def close(self) -> None:
        """Close the connections. A later ``embed`` opens new ones."""
        self._session.close()

    def __repr__(self) -> str:
        return f"OpenAIEmbedder({self._info.model!r}, endpoint={self._info.endpoint!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as model and options, without connections and secrets.

        The copy takes its key from ``OPENAI_API_KEY`` where it is unpickled. Raises ``TypeError``
        when that would lose a key or a header that was given otherwise.
        """
        if (
            not (self._options.api_key is None or self._key_is_of_the_environment())
            or self._options.headers
        ):
            raise TypeError(
                "this embedder does not pickle: its key or headers would be lost. "
                f"Set {KEY_VARIABLE} instead, or pickle the client, which keeps its config"
            )
        # One that was kept from a server of one's own is kept from it there as well.
        has_key = self._options.api_key is not None or self._options.endpoint.reach == "public"
        return _rebuild, (self._info.model, self._options, has_key)

    def __copy__(self) -> Self:
        """Another embedder of the same options, the key included, with connections of its own."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _session=Session(self._options), _batch=None)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Options are never changed, and a callable among them may hold what cannot be copied.
        return copy.copy(self)

    def _otherwise(
        self, error: ProviderError, form: str | None, texts: Sequence[str], answer: http.Answer
    ) -> str | None:
        """What would be different if the same request were sent again now; None: nothing."""
        # A key that has ended is refused with 403 by some, and not always in words.
        if isinstance(error, AuthenticationFailed | PermissionDenied) or error.status == 403:
            renewable = callable(self._options.api_key) and not self._options.own_authentication
            return "key" if renewable else None
        rejected = isinstance(error, RequestRejected)
        if rejected or error.status in (500, 501):
            body = bytes(answer.body[:_READ_FOR_NAMES])
            return self._encodings.after_refusal(form, texts, body, may_guess=rejected)
        return None

    def _body(self, texts: Sequence[str], form: str | None) -> bytes:
        from embedcore.provider import replies

        return replies.request_body(
            self._info.model,
            texts,
            encoding=form,
            more=self._options.fields,
        )

    def _key_is_of_the_environment(self) -> bool:
        given = self._options.api_key
        return isinstance(given, SecretStr) and given.get_secret_value() == os.environ.get(
            KEY_VARIABLE
        )

    def _key_hint(self) -> str:
        """What to do about a key that is refused: look where it came from."""
        if self._options.own_authentication:
            return (
                "check the headers that carry it (no other key is sent beside them: where two "
                "are needed, put both into headers)"
            )
        if self._options.api_key is None or self._key_is_of_the_environment():
            return f"check {KEY_VARIABLE}"
        return "check the option api_key, where it came from"

    def _context(self, texts: Sequence[str], key: str | None) -> Context:
        from embedcore.provider.batch_errors import Context

        return Context(
            model=self._info.model,
            endpoint=self._info.endpoint,
            texts=texts,
            secrets=self._session.secrets(key),
            reply_models=self._info.reply_models,
            key_hint=self._key_hint(),
            refusals_billed=self._options.refusals_billed,
            server_errors_billed=self._options.server_errors_billed,
        )

    def _call(self, body: bytes, request: EmbedRequest) -> http.Call:
        from embedcore.provider import replies

        timeout = http.seconds_for(self._options.timeout, request.timeout)
        cap = replies.most_bytes(len(request.texts), self._info.dimensions)
        headers = {"Content-Type": "application/json"}
        return http.Call(
            path="/embeddings", headers=headers, body=body, timeout=timeout, max_bytes=cap
        )

    def _read(self, answer: http.Answer, context: Context, into: Vectors | None) -> EmbedReply:
        from embedcore.provider import replies

        return replies.read(
            answer.status,
            answer.headers,
            answer.body,
            context,
            dimensions=self._info.dimensions,
            trust_order=bool(self._options.trust_order),
            into=into,
        )


def _rebuild(model: str, options: OpenAIOptions, has_key: bool = True) -> OpenAIEmbedder:
    key = os.environ.get(KEY_VARIABLE)
    if key and has_key:
        options = options.model_copy(update={"api_key": SecretStr(key)})
    return OpenAIEmbedder(model, options)
