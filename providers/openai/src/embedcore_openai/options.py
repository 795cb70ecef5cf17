"""Options of the provider, and the endpoint they name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationInfo,
    computed_field,
    field_validator,
    model_validator,
)

from embedcore.provider import access
from embedcore.provider.hookspecs import FromEnvironment, KeepsVectors
from embedcore.provider.types import Truncation
from embedcore_openai import presets

DEFAULT_BASE_URL: Final = "https://api.openai.com/v1"

KEY_VARIABLE: Final = "OPENAI_API_KEY"

_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE: Final = re.compile(r"[\x21-\x7e](?:[\x20-\x7e\t]*[\x21-\x7e])?")
# The layer below sets these itself; a second value would change how the body is read.
_RESERVED_HEADERS: Final = frozenset(
    {"accept-encoding", "connection", "content-encoding", "content-length", "content-type"}
    | {"host", "transfer-encoding"}
)

# What carries the key of the API, by whatever name: "Authorization", "api-key", "x-goog-api-key",
# "Ocp-Apim-Subscription-Key", "PRIVATE-TOKEN", "X-RapidAPI-Key" …
_CREDENTIAL: Final = re.compile(
    r"(?:x-)?(?:authorization|auth)|(?:[a-z0-9]+[-_])*[a-z0-9]*(?:key|token)"
)
# Of gateways that want a key of their own beside that of the API; and what is no key.
_BESIDE: Final = ("cf-aig-", "cf-access-", "helicone-", "modal-", "x-portkey-", "proxy-")
_NO_KEY: Final = re.compile(
    r"(?:^|[-_])(?:idempotency|cache|partition|routing|session|csrf|xsrf|request)[-_]?(?:key|token)$"
)
_SECRET_NAME: Final = re.compile(
    r"(?:^|[_-])(?:api[_-]?)?(?:key|secret|password|token|sig|signature|credential)s?$", re.I
)
_OWN_FIELDS: Final = {
    "model": "the model's name",
    "input": "the texts",
    "encoding_format": "the option encoding",
    "dimensions": "the option dimensions",
}
# Who asks, and in which dialect: no vector depends on it.
_NEUTRAL: Final = frozenset({"user", "api-version"})

Price = Annotated[Decimal, Field(ge=0, allow_inf_nan=False)]


class OpenAIOptions(BaseModel):
    """Options of ``openai:<model>``. Those marked ``KeepsVectors`` stay out of the fingerprint.

    ``api_key``: a string, or a callable that is asked before each request, for tokens that expire.
    Without one, only servers on loopback or private addresses are called (no key is sent), and
    those for which ``headers`` carries a key.

    ``timeout`` is in seconds, for one attempt as a whole; ``connect_timeout`` for reaching the
    server. ``headers`` are sent with each request; their values are treated as secrets.

    A header that carries a key is the only one that does: ``api_key`` is then not sent.

    ``preset``: a row of ``embedcore_openai.presets``, which sets what is not set here.

    ``query`` and ``body``: parameters of the address and further fields of the request, as they
    are. They count for the fingerprint, but for those that ``neutral_fields`` lists (and ``user``
    and ``api-version``). ``verify``: a file or folder with the certificates to trust, or False to
    trust any.

    ``dimensions`` is sent only when set, as the field ``dimensions_field``; "none": it is not sent,
    and only expected. ``truncation``: what the server does with a text that is too long; unset:
    as the model's table says. ``encoding``: how vectors are asked for; lists of numbers
    are understood either way. What the server refuses is asked for otherwise: as "float", then
    without the field ("omit"). ``trust_order``: where a reply does not number its vectors, they
    are in the order of the texts.

    ``base_model``: the OpenAI model behind a deployment's name; gives price, tokenizer, limits and
    the name expected in replies. ``price`` and ``batch_price``: US dollars per million tokens,
    instead of the table's; 0 for an own server. ``max_…`` replace the model's limits.
    ``tokenizer``: a ``tokenizer.json``, or a model on the Hugging Face hub whose file is in the
    local cache: counts are then exact. ``max_input_tokens`` is the server's limit, with the marks
    that it puts around a text.
    ``reply_models``: further model names that a reply may carry; ``["*"]`` for any.

    ``refusals_billed`` and ``server_errors_billed`` are assumptions, since no document says it: a
    request that was refused (4xx), and a 500, 503 or 529 with the server's own error body, was not
    billed ("no"). Set "unknown" to charge such requests to the budget.

    ``batch``: whether the server has a batch API; unset: only OpenAI's own is taken to have one.
    ``batch_encoding``: how vectors travel in a batch's output; "base64" inside a batch is allowed
    by the API reference and was never seen here, so "float" unless it is known to work.
    ``batch_errors_billed``: whether lines of a batch that were answered with an error cost
    anything; an assumption, too. ``batch_output_expiry``: ask that results be kept for 30 days;
    switch it off for a server that refuses the parameter. ``max_enqueued_tokens``: the account's
    limit of tokens in all batches that have not ended. ``transfer_timeout``: seconds for one file
    up or down, counting only the time spent on waiting; each wait for more is up to ``timeout``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    api_key: Annotated[
        SecretStr | Callable[[], str] | None,
        Field(repr=False),
        FromEnvironment(KEY_VARIABLE),
        KeepsVectors(),
    ] = None
    preset: Annotated[str | None, KeepsVectors()] = None
    base_url: Annotated[str, FromEnvironment("OPENAI_BASE_URL")] = DEFAULT_BASE_URL
    organization: Annotated[str | None, FromEnvironment("OPENAI_ORG_ID"), KeepsVectors()] = None
    project: Annotated[str | None, FromEnvironment("OPENAI_PROJECT_ID"), KeepsVectors()] = None
    headers: Annotated[Mapping[str, SecretStr], Field(repr=False), KeepsVectors()] = Field(
        default_factory=dict
    )

    query: Annotated[Mapping[str, str] | None, KeepsVectors()] = None
    body: Annotated[Mapping[str, JsonValue] | None, KeepsVectors()] = None
    neutral_fields: Annotated[tuple[str, ...], KeepsVectors()] = ()
    verify: Annotated[bool | str, KeepsVectors()] = True

    dimensions: PositiveInt | None = None
    # The width of every reply is checked, so that by whatever name it was asked for changes none.
    dimensions_field: Annotated[
        Literal["dimensions", "output_dimension", "none"], KeepsVectors()
    ] = "dimensions"
    truncation: Annotated[Truncation | None, KeepsVectors()] = None
    encoding: Annotated[Literal["base64", "float", "omit"], KeepsVectors()] = "base64"
    trust_order: bool | None = None

    base_model: str | None = None
    tokenizer: str | None = None
    reply_models: Annotated[tuple[str, ...], KeepsVectors(counted_as=())] = ()
    max_input_tokens: PositiveInt | None = None
    max_texts_per_request: Annotated[PositiveInt | None, KeepsVectors()] = None
    max_tokens_per_request: Annotated[PositiveInt | None, KeepsVectors()] = None
    max_concurrency: Annotated[PositiveInt | None, KeepsVectors()] = None
    price: Annotated[Price | None, KeepsVectors()] = None
    batch_price: Annotated[Price | None, KeepsVectors()] = None
    refusals_billed: Annotated[Literal["no", "unknown"], KeepsVectors()] = "no"
    server_errors_billed: Annotated[Literal["no", "unknown"], KeepsVectors()] = "no"

    batch: Annotated[bool | None, KeepsVectors()] = None
    batch_encoding: Annotated[Literal["float", "base64", "omit"], KeepsVectors()] = "float"
    batch_errors_billed: Annotated[Literal["no", "unknown"], KeepsVectors()] = "no"
    batch_output_expiry: Annotated[bool, KeepsVectors()] = True
    max_enqueued_tokens: Annotated[PositiveInt | None, KeepsVectors()] = None

    timeout: Annotated[PositiveFloat, Field(allow_inf_nan=False), KeepsVectors()] = 60.0
    transfer_timeout: Annotated[PositiveFloat, Field(allow_inf_nan=False), KeepsVectors()] = 3600.0
    connect_timeout: Annotated[PositiveFloat, Field(allow_inf_nan=False), KeepsVectors()] = 5.0
    allow_plaintext: Annotated[bool, KeepsVectors()] = False

    @property
    def encoding_of_lines(self) -> Literal["base64", "float", "omit"]:
        """``batch_encoding``; where only ``encoding`` says to leave the field out, it is left out
        of the lines of a batch as well."""
        if self.encoding == "omit" and "batch_encoding" not in self.model_fields_set:
            return "omit"
        return self.batch_encoding

    @property
    def fields(self) -> dict[str, JsonValue] | None:
        """Of each request, beside model, texts and encoding."""
        width: dict[str, JsonValue] = {}
        if self.dimensions is not None and self.dimensions_field != "none":
            width[self.dimensions_field] = self.dimensions
        return {**width, **(self.body or {})} or None

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        # Not kept in a variable: a traceback with variables would show the key.
        return {**given, **presets.filled(given)} if isinstance(given, Mapping) else given

    @field_validator("base_url", mode="before")
    @classmethod
    def _normalise(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        # An exported but empty variable means that none was set.
        if not value.strip():
            return DEFAULT_BASE_URL
        return access.parse(value.strip(), such_as=DEFAULT_BASE_URL).url

    @field_validator("organization", "project")
    @classmethod
    def _sendable(cls, value: str | None) -> str | None:
        if value is not None and value.strip() and not _HEADER_VALUE.fullmatch(value):
            raise ValueError("must be printable ASCII without line breaks: it is sent as a header")
        return value if value and value.strip() else None

    @field_validator("headers")
    @classmethod
    def _safe_headers(cls, value: Mapping[str, SecretStr]) -> Mapping[str, SecretStr]:
        for name, secret in value.items():
            if not _HEADER_NAME.fullmatch(name) or name.lower() in _RESERVED_HEADERS:
                raise ValueError(f"{name!r} is not a header that can be set here")
            if not _HEADER_VALUE.fullmatch(secret.get_secret_value()):
                raise ValueError(
                    f"the value of {name!r} must be printable ASCII without line breaks"
                )
        return value

    @field_validator("query", "body")
    @classmethod
    def _no_secrets(
        cls, value: Mapping[str, JsonValue] | None, info: ValidationInfo
    ) -> Mapping[str, JsonValue] | None:
        for name in value or {}:
            if _SECRET_NAME.search(name):
                raise ValueError(
                    f"{name!r} looks like a key, which would be written to logs there: pass it as "
                    "api_key or in headers"
                )
            if info.field_name == "body" and name in _OWN_FIELDS:
                raise ValueError(f"{name!r} is set by {_OWN_FIELDS[name]}")
        return value or None

    @model_validator(mode="after")
    def _plaintext_only_nearby(self) -> Self:
        access.refuse_plaintext(self.endpoint, allowed=self.allow_plaintext)
        return self

    @property
    def endpoint(self) -> access.Endpoint:
        return access.parse(self.base_url, such_as=DEFAULT_BASE_URL)

    @property
    def is_openai(self) -> bool:
        """Whether requests go to OpenAI itself."""
        host = self.endpoint.host
        return host == "api.openai.com" or host.endswith(".api.openai.com")

    @property
    def own_authentication(self) -> bool:
        """True when ``headers`` carries a key of its own: then it is the only one that is sent."""
        return any(map(_is_credential, self.headers))

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def fields_of_vectors(self) -> dict[str, dict[str, Any]] | None:
        """What of ``query`` and ``body`` counts for the fingerprint; None: nothing."""
        neutral = {*_NEUTRAL, *self.neutral_fields}
        counted = {
            part: {name: value for name, value in (given or {}).items() if name not in neutral}
            for part, given in (("query", self.query), ("body", self.body))
        }
        return {part: given for part, given in counted.items() if given} or None

    def __getstate__(self) -> dict[Any, Any]:
        # Pickles end up in caches, queues and files: no secret goes into one.
        state = super().__getstate__()
        public = {**state["__dict__"], "api_key": None, "headers": {}}
        return {**state, "__dict__": public}


def _is_credential(header: str) -> bool:
    name = header.lower()
    if name.startswith(_BESIDE) or _NO_KEY.search(name):
        return False
    return _CREDENTIAL.fullmatch(name) is not None
