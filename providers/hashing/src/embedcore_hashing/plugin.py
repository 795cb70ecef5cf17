"""The entry point of the provider: the model's name is its width; numpy is not loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ConfigDict

from embedcore.errors import ConfigurationError
from embedcore.provider.hookspecs import Provider, hookimpl
from embedcore.provider.types import ModelInfo, Price

if TYPE_CHECKING:
    from embedcore_hashing.embedder import HashingEmbedder

DEFAULT_WIDTH: Final = 512
SMALLEST_WIDTH: Final = 8
LARGEST_WIDTH: Final = 65_536

# Goes up whenever a text's vector changes, so that old and new vectors are never mixed.
ALGORITHM: Final = "1"


class HashingOptions(BaseModel):
    """This provider has no options: the width is the model's name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def describe(width: int) -> ModelInfo:
    """The model of that width. Free and local; a text may have any length."""
    return ModelInfo(
        provider="hashing",
        model=str(width),
        dimensions=width,
        max_texts_per_request=256,
        max_concurrency=1,  # it holds the interpreter's lock: a second thread gains nothing
        price=Price(),
        local=True,
        variant=f"algorithm={ALGORITHM}",
    )


def parse_width(model: str) -> int:
    """The width that a model's name stands for, in plain decimal digits."""
    # "0512" and other spellings would be second names for the same vectors.
    width = int(model) if model.isascii() and model.isdigit() and len(model) <= 5 else 0
    if str(width) != model or not SMALLEST_WIDTH <= width <= LARGEST_WIDTH:
        raise ConfigurationError(
            f"model 'hashing:{model}': the model's name is the width of its vectors, a whole "
            f"number from {SMALLEST_WIDTH} to {LARGEST_WIDTH}, for instance hashing:{DEFAULT_WIDTH}"
        )
    return width


def create(model: str, options: HashingOptions) -> HashingEmbedder:
    """An embedder of the width ``model``. Raises ``ConfigurationError`` if it is no width."""
    del options  # it has none
    info = describe(parse_width(model))
    from embedcore_hashing.embedder import HashingEmbedder

    return HashingEmbedder(info)


@hookimpl
def embedcore_provider() -> Provider:
    """The provider ``hashing``."""
    return Provider(
        name="hashing",
        options=HashingOptions,
        create=create,
        models={str(width): describe(width) for width in (256, 512, 1024, 2048)},
        default_model=str(DEFAULT_WIDTH),
    )
