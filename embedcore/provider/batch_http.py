"""How a batch API is asked by a provider that is an ``HttpEmbedder``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from embedcore.provider import http
from embedcore.provider.batch_calls import FilesApi, Terms

if TYPE_CHECKING:
    from embedcore.provider.batch_errors import Context
    from embedcore.provider.batch_spool import Spool
    from embedcore.provider.http_embedder import HttpEmbedder, HttpOptions

_TRANSFER_SECONDS: Final = 3600.0


def terms_of(options: HttpOptions) -> tuple[Terms, int | None]:
    """What options say of batches, and the tokens that may be enqueued, if they say that."""
    from embedcore.provider.batch_options import BatchOptions

    own = options if isinstance(options, BatchOptions) else None
    terms = Terms(
        timeout=options.timeout,
        transfer_timeout=_TRANSFER_SECONDS if own is None else own.transfer_timeout,
        refusals_billed=options.refusals_billed,
        errors_billed="no" if own is None else own.batch_errors_billed,
    )
    return terms, None if own is None else own.max_enqueued_tokens


class HttpWire:
    """Implements ``batch_calls.Wire`` over the session of an embedder."""

    def __init__(self, embedder: HttpEmbedder, api: FilesApi) -> None:
        self._embedder = embedder
        self._api = api

    def key(self) -> str | None:
        return self._embedder.options.key()

    def secrets(self, key: str | None) -> list[str]:
        return [] if key is None else [key]

    def send(
        self, call: http.Call, key: str | None, context: Context, file: tuple[str, Spool] | None
    ) -> http.Answer:
        headers = {} if key is None else self._embedder.headers(key)
        if file is None:
            call = replace(call, headers={**call.headers, **headers})
            return self._embedder.session.send(call, context)
        form = self._api.upload_form(*file)
        call = replace(call, headers={**call.headers, **form.headers, **headers}, body=form)
        root = self._embedder.options.base_url
        address = self._api.upload_root(root)
        if address == root:
            return self._embedder.session.send(call, context)
        session = self._embedder.open_session(address)
        try:
            return session.send(call, context)
        finally:
            session.close()
