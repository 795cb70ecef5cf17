"""An embedder over one JSON endpoint: what providers that speak HTTP have in common.

A subclass says where to ask, what, and where the vectors are in the answer::

    class AcmeEmbedder(HttpEmbedder):
        path = "/embed"
        form = replies.Form(rows=("vectors",), vector=None, numbered=False)
        other = ModelInfo(provider="acme")

        def question(self, texts, input_type):
            return {"model": self.info.model, "texts": texts}

One request is one request: nothing is split, repeated or asked for otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from decimal import Decimal
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    field_validator,
    model_validator,
)

from embedcore.errors import (
    AuthenticationFailed,
    ConfigurationError,
    PermissionDenied,
    ProviderError,
)
from embedcore.provider import access, http
from embedcore.provider.base import BaseEmbedder, unit_length
from embedcore.provider.hookspecs import KeepsVectors
from embedcore.provider.options import environment_options
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price

if TYPE_CHECKING:
    from embedcore.provider.refusals import Asked
    from embedcore.provider.replies import Form

Key = Annotated[SecretStr | Callable[[], str] | None, Field(repr=False), KeepsVectors()]
"""An option that is a key: a string, or a callable that is asked before each request."""

# What a request imports where it needs it; the last by the socket, for the name of a host.
_MODULES: Final = (
    "embedcore.provider.replies",
    "embedcore.provider.http_connections",
    "encodings.idna",
)
# A text that the answer repeats takes at most so many bytes for each of the request's.
_ECHO: Final = 6


class HttpOptions(BaseModel):
    """Options that every provider over HTTP has. A subclass declares ``api_key`` and ``base_url``
    once more, with the service's address and the variables of the environment.

    ``timeout`` is in seconds, for one attempt as a whole; ``connect_timeout`` for reaching the
    server. ``dimensions``: fewer than the model has; sent only when set. ``verify``: a file or
    folder with the certificates to trust, or False to trust any. ``price``: US dollars per million
    tokens instead of the table's; 0 for an own server. ``max_…`` replace the model's limits.
    ``refusals_billed`` and ``server_errors_billed``: "unknown" charges refused requests to the
    budget, which are taken to be free.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    keys_at: ClassVar[str] = "the service's site"

    api_key: Key = None
    base_url: str
    verify: Annotated[bool | str, KeepsVectors()] = True
    timeout: Annotated[PositiveFloat, Field(allow_inf_nan=False), KeepsVectors()] = 60.0
    connect_timeout: Annotated[PositiveFloat, Field(allow_inf_nan=False), KeepsVectors()] = 5.0
    allow_plaintext: Annotated[bool, KeepsVectors()] = False
    dimensions: PositiveInt | None = None
    price: Annotated[Decimal | None, Field(ge=0, allow_inf_nan=False), KeepsVectors()] = None
    max_input_tokens: PositiveInt | None = None
    max_texts_per_request: Annotated[PositiveInt | None, KeepsVectors()] = None
    max_tokens_per_request: Annotated[PositiveInt | None, KeepsVectors()] = None
    max_concurrency: Annotated[PositiveInt | None, KeepsVectors()] = None
    refusals_billed: Annotated[Literal["no", "unknown"], KeepsVectors()] = "no"
    server_errors_billed: Annotated[Literal["no", "unknown"], KeepsVectors()] = "no"

    @field_validator("base_url", mode="before")
    @classmethod
    def _normalise(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        usual: str = cls.model_fields["base_url"].default
        # An exported but empty variable means that none was set.
        return access.parse(value.strip(), such_as=usual).url if value.strip() else usual

    @model_validator(mode="after")
    def _plaintext_only_nearby(self) -> Self:
        access.refuse_plaintext(self.endpoint, allowed=self.allow_plaintext)
        return self

    @property
    def endpoint(self) -> access.Endpoint:
        return access.parse(self.base_url, such_as=self.base_url)

    @property
    def key_variable(self) -> str:
        """The variable of the environment that supplies the key."""
        return dict(environment_options(type(self))).get("api_key", "api_key")

    def key(self) -> str | None:
        """The key for one request; None where none is sent. Raises as ``access.key_of``."""
        return access.key_of(
            self.api_key, self.endpoint, variable=self.key_variable, keys_at=self.keys_at
        )

    def over(self, info: ModelInfo) -> ModelInfo:
        """A model's facts, with what these options say in place of them."""
        named = {each.name for each in fields(ModelInfo)} & type(self).model_fields.keys()
        names = ("dimensions", *(name for name in named if name[:4] == "max_"))
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        price = info.price if self.price is None else Price(immediate=self.price, source="options")
        return replace(info, price=price, endpoint=self.base_url, **given)

    def __getstate__(self) -> dict[Any, Any]:
        # Pickles end up in caches, queues and files: no secret goes into one.
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}


class HttpEmbedder(BaseEmbedder):
    """Implements ``Embedder`` over ``POST base_url + path``. Shared freely between threads.

    ``form``: where the vectors are; None: as OpenAI has them. ``words``: the core's input types,
    and the service's for them. ``normalises``: vectors get length 1. ``models``: those that are
    known; ``other``: what is known of the others. ``widths``: model → the dimensions that it can be
    asked for, where there are several.

    Raises ``ConfigurationError`` for ``dimensions`` that a known model cannot give.
    """

    path: str = ""
    form: ClassVar[Form | None] = None
    models: ClassVar[Mapping[str, ModelInfo]] = MappingProxyType({})
    other: ClassVar[ModelInfo] = ModelInfo()
    widths: ClassVar[Mapping[str, Sequence[int]]] = MappingProxyType({})
    words: Mapping[str, str] = MappingProxyType({})
    normalises: bool = False

    def __init__(self, model: str, options: HttpOptions) -> None:
        known = self.models.get(model)
        self.width = self._width(known, options.dimensions)
        self.info = options.over(known or replace(self.other, model=model))
        self.options = options
        self.session = self.open_session(options.base_url)
        self.startup = HttpStartup(self.session, self.info)
        access.warn_of_readers(options.endpoint, verified=options.verify is not False)

    def _width(self, known: ModelInfo | None, asked: int | None) -> int | None:
        """What is sent as the width; None: nothing, since it is the model's own."""
        if known is None or asked is None or asked == known.dimensions:
            return asked if known is None else None
        allowed = self.widths.get(known.model, ())
        if asked not in allowed:
            own = "" if known.dimensions is None else f" ({known.dimensions} by itself)"
            if isinstance(allowed, range):
                choices = f"{allowed[0]} to {allowed[-1]}"
            else:
                choices = ", ".join(map(str, allowed)) or "no others"
            raise ConfigurationError(
                f"dimensions = {asked}: {known.provider}:{known.model} gives {choices}{own}"
            )
        return asked

    def question(self, texts: list[str], input_type: str | None) -> dict[str, object]:
        """The request as JSON. ``input_type``: the service's word; None: the model has none."""
        raise NotImplementedError(f"{type(self).__name__} must define question(texts, input_type)")

    def headers(self, key: str) -> Mapping[str, str]:
        """What carries the key."""
        return {"Authorization": f"Bearer {key}"}

    @http.without_frames
    def embed(self, request: EmbedRequest) -> EmbedReply:
        """Send one request. What it may have cost, the errors of ``http`` and ``refusals`` say."""
        from embedcore.provider import replies

        if not request.texts:
            return replies.nothing(self.info.dimensions)
        body = self._body(request)
        key = self.options.key()
        asked = self._asked(request.texts, key)
        with self.session.send(self._call(body, key, request), asked) as answer:
            try:
                reply = replies.read(
                    answer.status,
                    answer.headers,
                    answer.body,
                    asked,
                    dimensions=self.info.dimensions,
                    form=self.form or replies.OPENAI,
                    into=request.into,
                )
            except ProviderError as error:
                error.again = self._otherwise(error)
                raise
        if self.normalises:
            unit_length(reply.vectors)
        return reply

    def close(self) -> None:
        """Close the connections. A later ``embed`` opens new ones."""
        self.session.close()

    def open_session(self, base_url: str) -> http.Session:
        """Another session as these options say, for a service with more than one address."""
        return http.Session(
            base_url,
            headers={"Accept": "application/json"},
            verify=self.options.verify,
            connect_timeout=self.options.connect_timeout,
        )

    def word_of(self, input_type: str | None) -> str | None:
        """The service's word for an input type; None: for the model's default."""
        kind = input_type or self.info.default_input_type
        return None if kind is None else self.words[kind]

    def __repr__(self) -> str:
        name, info = type(self).__name__, self.info
        return f"{name}({info.model!r}, endpoint={info.endpoint!r})"

    def _body(self, request: EmbedRequest) -> bytes:
        from embedcore.provider import replies

        question = self.question(list(request.texts), self.word_of(request.input_type))
        return replies.json_body(question, request.texts)

    def _call(self, body: bytes, key: str | None, request: EmbedRequest) -> http.Call:
        from embedcore.provider import replies

        timeout = http.seconds_for(self.options.timeout, request.timeout)
        most = replies.most_bytes(len(request.texts), self.info.dimensions)
        headers = {"Content-Type": "application/json"}
        return http.Call(
            path=self.path,
            headers=headers if key is None else {**headers, **self.headers(key)},
            body=body,
            timeout=timeout,
            max_bytes=most + _ECHO * len(body),
        )

    def _asked(self, texts: Sequence[str], key: str | None) -> Asked:
        from embedcore.provider.refusals import Asked

        options = self.options
        return Asked(
            model=self.info.model,
            endpoint=self.info.endpoint,
            path=self.path,
            texts=texts,
            secrets=[] if key is None else [key],
            reply_models=self.info.reply_models,
            key_hint=f"check {options.key_variable}, or the option api_key",
            refusals_billed=options.refusals_billed,
            server_errors_billed=options.server_errors_billed,
        )

    def _otherwise(self, error: ProviderError) -> str | None:
        """A callable may give another key for one that has ended."""
        refused = isinstance(error, AuthenticationFailed | PermissionDenied) or error.status == 403
        return "key" if refused and callable(self.options.api_key) else None


class HttpStartup:
    """Implements ``embedcore.provider.protocol.Startup``: imports, and no connection."""

    def __init__(self, session: http.Session, info: ModelInfo) -> None:
        self._session = session
        self._info = info

    @http.without_frames
    def load(self) -> None:
        from embedcore.provider.refusals import Asked

        for name in _MODULES:
            import_module(name)
        self._session.prepare(Asked(model=self._info.model, endpoint=self._info.endpoint))

    def connect(self) -> None:
        """The first request connects: no service here has an address that is free to ask."""
