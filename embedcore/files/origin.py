"""Was a set of vectors made by the model that is asked for?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedcore.errors import ConfigurationError
from embedcore.files.types import Origin

if TYPE_CHECKING:
    from embedcore import EmbeddingClient


def origin_of(client: EmbeddingClient, input_type: str | None) -> Origin:
    """What vectors made with this client now will carry."""
    return Origin(
        model=f"{client.provider}:{client.model}",
        fingerprint=client.fingerprint,
        input_type=input_type,
        dimensions=client.dimensions,
    )


def describe(origin: Origin) -> str:
    """An origin in a message."""
    width = f", {origin.dimensions} dimensions" if origin.dimensions else ""
    kind = f", input type {origin.input_type}" if origin.input_type else ""
    return f"{origin.model} (fingerprint {origin.fingerprint[:12]}{width}{kind})"


def same_space(found: Origin, client: EmbeddingClient) -> bool:
    """Whether the client's vectors may be compared with those found: same model, options and width.

    The same options had another fingerprint while more of them counted for it.
    """
    fingerprint = found.fingerprint
    widths = {found.dimensions, client.dimensions} - {None, 0}
    return (
        found.model == f"{client.provider}:{client.model}"
        and (fingerprint == client.fingerprint or client.made_before(fingerprint))
        and len(widths) <= 1
    )


def require_same_maker(
    name: str, found: Origin, client: EmbeddingClient, input_type: str | None
) -> None:
    """Raise ``ConfigurationError`` unless ``found`` may go on with what the client makes now."""
    if same_space(found, client) and found.input_type == input_type:
        return
    asked = origin_of(client, input_type)
    raise ConfigurationError(
        f"{name} holds vectors of {describe(found)}, and this run would add those of "
        f"{describe(asked)}: the two must not mix. Choose another output, or replace it with "
        "overwrite=True (--overwrite)"
    )
