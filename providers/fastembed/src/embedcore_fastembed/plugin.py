"""FastEmbed's models on this machine: ONNX Runtime, no torch, no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, PositiveInt

from embedcore.errors import ConfigurationError
from embedcore.provider.hookspecs import KeepsVectors, Provider, hookimpl
from embedcore.provider.local import LocalEmbedder
from embedcore.provider.prefixes import prefixed, prefixes_of
from embedcore.provider.tokenizer_files import is_path
from embedcore.provider.types import ModelInfo, Price

if TYPE_CHECKING:
    from fastembed import TextEmbedding

    from embedcore.provider.types import Vectors

PROVIDER: Final = "fastembed"
DEFAULT_MODEL: Final = "BAAI/bge-small-en-v1.5"


class Known(NamedTuple):
    """Where the hub has it, which of the files there it is, and its width."""

    repository: str
    file: str
    width: int


# As fastembed 0.9.1 lists them. Others of its list are looked up there.
KNOWN: Final = {
    DEFAULT_MODEL: Known("Qdrant/bge-small-en-v1.5-onnx-Q", "model_optimized.onnx", 384),
    "BAAI/bge-base-en-v1.5": Known("Qdrant/bge-base-en-v1.5-onnx-Q", "model_optimized.onnx", 768),
    "BAAI/bge-large-en-v1.5": Known("Qdrant/bge-large-en-v1.5-onnx", "model.onnx", 1024),
    "mixedbread-ai/mxbai-embed-large-v1": Known(
        "mixedbread-ai/mxbai-embed-large-v1", "onnx/model.onnx", 1024
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Known(
        "Qdrant/all-MiniLM-L6-v2-onnx", "model.onnx", 384
    ),
    "nomic-ai/nomic-embed-text-v1.5": Known(
        "nomic-ai/nomic-embed-text-v1.5", "onnx/model.onnx", 768
    ),
    "intfloat/multilingual-e5-large": Known(
        "Qdrant/multilingual-e5-large-onnx", "model.onnx", 1024
    ),
}


class FastEmbedOptions(BaseModel):
    """Options of ``fastembed:<model>``; the model is one of fastembed's list or a folder.

    ``pooling``: how a folder's model makes one vector of those of its tokens; fastembed knows it
    of its own. ``file``: the ONNX file in a folder. ``normalize``: vectors get length 1.
    ``prefixes``: put what the model was trained with before each text, by its name. ``threads``:
    of ONNX Runtime; None: as many as there are cores.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Literal["mean", "cls", "last_token", "disabled"] | None = None
    file: str | None = None
    normalize: bool = True
    prefixes: bool = True
    threads: Annotated[PositiveInt | None, KeepsVectors()] = None
    max_texts_per_request: Annotated[PositiveInt, KeepsVectors()] = 64


class FastEmbedEmbedder(LocalEmbedder["TextEmbedding"]):
    """Implements ``Embedder``."""

    package = "fastembed"
    marker = "tokenizer.json"

    def __init__(self, model: str, options: FastEmbedOptions) -> None:
        """Raises ``ConfigurationError`` for a folder without ``pooling``, and for a name that
        fastembed does not list."""
        if is_path(model) and options.pooling is None:
            raise ConfigurationError(
                f'{PROVIDER}:{model} is a folder: set pooling = "mean", or "cls", "last_token" or '
                '"disabled"; the page of the model says which'
            )
        self.options = options
        known = Known(model, "model.onnx", 0) if is_path(model) else _known(model)
        self._file = options.file or known.file
        self.files = (f"{self._file}*", "*.json")
        super().__init__(
            info_of(model, known.width or None, options),
            repository=known.repository,
            normalises=options.normalize,
            prefixes=options.prefixes,
            **options.model_dump(include={"pooling", "threads"}),
        )

    def longest(self, folder: Path) -> int:
        """Where fastembed cuts in silence, without the marks around a text."""
        path = folder / "tokenizer_config.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            limits = [told.get(name) for name in ("model_max_length", "max_length")]
            limit = min(one for one in limits if isinstance(one, int) and 0 < one < 2**31)
        except (OSError, ValueError, AttributeError):
            raise ConfigurationError(
                f"{path} must say model_max_length: fastembed cuts longer texts in silence"
            ) from None
        return limit - self.counting().marks

    def read(self, folder: Path) -> TextEmbedding:
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        name, pooling = self.info.model, self.options.pooling
        if pooling is not None:
            name = f"{PROVIDER}/{pooling}/{folder.resolve()}/{self._file}"
            listed = {one["model"].lower() for one in TextEmbedding.list_supported_models()}
            if name.lower() not in listed:
                TextEmbedding.add_custom_model(
                    name,
                    pooling=PoolingType(pooling.upper()),
                    normalization=False,
                    sources=ModelSource(hf=self.repository),
                    dim=self.info.dimensions or 0,
                    model_file=self._file,
                )
        return TextEmbedding(name, threads=self.options.threads, specific_model_path=str(folder))

    def vectors(self, model: TextEmbedding, texts: list[str]) -> Vectors:
        """One by one: what else is in a batch changes the numbers of a quantised model."""
        import numpy as np

        return np.array(list(model.embed(texts, batch_size=1)))


def _known(model: str) -> Known:
    if model in KNOWN:
        return KNOWN[model]
    try:
        from fastembed import TextEmbedding
    except ImportError:
        raise ConfigurationError(
            f"{PROVIDER}:{model} is looked up in the package fastembed: pip install fastembed"
        ) from None
    for one in TextEmbedding.list_supported_models():
        if one["model"] == model and one["sources"]["hf"]:
            return Known(one["sources"]["hf"], one["model_file"], one["dim"])
    raise ConfigurationError(
        f"{PROVIDER}:{model}: fastembed lists no such model; for another one give the path of its "
        "folder, which begins with . or / or ~"
    )


def info_of(model: str, width: int | None, options: FastEmbedOptions) -> ModelInfo:
    """Free and local. ONNX Runtime takes all cores for one text."""
    return ModelInfo(
        provider=PROVIDER,
        model=model,
        dimensions=width,
        max_texts_per_request=options.max_texts_per_request,
        max_concurrency=1,
        price=Price(),
        truncation="error",
    )


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=FastEmbedOptions,
        create=FastEmbedEmbedder,
        models={
            name: prefixed(info_of(name, known.width, FastEmbedOptions()), prefixes_of(name))
            for name, known in KNOWN.items()
        },
        default_model=DEFAULT_MODEL,
    )
