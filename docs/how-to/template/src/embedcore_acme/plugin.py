"""Acme's service for embedcore: POST /embed, a model and texts in, vectors and tokens out."""

import json
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, HttpUrl, SecretStr

from embedcore import errors
from embedcore.provider.base import BaseEmbedder
from embedcore.provider.hookspecs import FromEnvironment, KeepsVectors, Provider, hookimpl
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo, Price

LATER = {429: errors.RateLimited, 503: errors.ProviderUnavailable}
NEVER = {401: errors.AuthenticationFailed, 403: errors.PermissionDenied, 404: errors.ModelNotFound}


class AcmeOptions(BaseModel, extra="forbid", frozen=True):
    base_url: HttpUrl = HttpUrl("https://embeddings.acme.internal")
    api_key: Annotated[SecretStr, FromEnvironment("ACME_API_KEY")] = SecretStr("")
    timeout: Annotated[float, Field(gt=0), KeepsVectors()] = 30.0


class AcmeEmbedder(BaseEmbedder):
    def __init__(self, model: str, options: AcmeOptions) -> None:
        host = f"{options.base_url.host}:{options.base_url.port}"
        self.info = ModelInfo(provider="acme", model=model, price=Price(), endpoint=host)
        self.options = options

    def embed(self, request: EmbedRequest) -> EmbedReply:
        question = json.dumps({"model": self.info.model, "texts": list(request.texts)})
        answer = self._post(question, min(self.options.timeout, request.timeout or 3600))
        try:
            fields = json.loads(answer)
            vectors = np.array(fields["vectors"]).astype(np.float32, casting="same_kind")
            return EmbedReply(vectors=vectors, tokens=fields["tokens"], model=fields["model"])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise errors.InvalidResponse("acme's answer holds no vectors", billed="yes") from error

    def _post(self, body: str, timeout: float) -> bytes:
        url, key = self.options.base_url, self.options.api_key.get_secret_value()
        if not (key and key.isascii() and key.isprintable()):
            raise errors.ConfigurationError(f"ACME_API_KEY is {'unusable' if key else 'not set'}")
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connect = HTTPSConnection if url.scheme == "https" else HTTPConnection
        with closing(connect(url.host or "", url.port, timeout=timeout)) as connection:
            billed: errors.Billed = "no"
            try:
                connection.connect()
                billed = "unknown"  # whatever happens from here on, acme may have done the work
                connection.request("POST", (url.path or "").rstrip("/") + "/embed", body, headers)
                with connection.getresponse() as response:
                    if response.status == 200:
                        return response.read()
            except (OSError, HTTPException) as error:
                raise errors.ProviderUnavailable(f"acme: {error!r}", billed=billed) from error
        raise failure(response.status, response.headers.get("Retry-After", ""))


def failure(status: int, wait: str) -> errors.ProviderError:
    message = f"acme answered {status}"
    if status in LATER:
        seconds = float(wait) if wait.replace(".", "", 1).isdecimal() else None
        return LATER[status](message, retry_after=seconds, billed="no", status=status)
    if 300 <= status < 500 and status not in (408, 409):  # redirects too: none is followed
        return NEVER.get(status, errors.RequestRejected)(message, billed="no", status=status)
    return errors.OutcomeUnknown(message, billed="unknown", status=status)


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(name="acme", options=AcmeOptions, create=AcmeEmbedder)
