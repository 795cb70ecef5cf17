"""Static models of model2vec: a vector for each token, and their mean. They need no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, PositiveInt

from embedcore.forksafe import Lock
from embedcore.provider.hookspecs import KeepsVectors, Provider, hookimpl
from embedcore.provider.local import LocalEmbedder
from embedcore.provider.types import ModelInfo, Price

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors

PROVIDER: Final = "model2vec"
DEFAULT_MODEL: Final = "minishlab/potion-base-8M"
# Widths as the package's own page has them.
_WIDTHS: Final = {
    "minishlab/potion-base-2M": 64,
    "minishlab/potion-base-4M": 128,
    DEFAULT_MODEL: 256,
    "minishlab/potion-base-32M": 512,
    "minishlab/potion-retrieval-32M": 512,
    "minishlab/potion-multilingual-128M": 256,
}


class Model2VecOptions(BaseModel):
    """Options of ``model2vec:<model>``; the model is a repository of Hugging Face or a folder.

    ``normalize``: vectors get length 1; False: the length that the model gives them.
    ``max_input_tokens``: longer texts are cut there, and reported; the models have no limit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    normalize: bool = True
    max_input_tokens: PositiveInt | None = None
    max_texts_per_request: Annotated[PositiveInt, KeepsVectors()] = 1024


def info_of(model: str, options: Model2VecOptions) -> ModelInfo:
    """Free and local. The tokenizer and the sum take one core: a second thread gains little."""
    return ModelInfo(
        provider=PROVIDER,
        model=model,
        dimensions=_WIDTHS.get(model),
        max_input_tokens=options.max_input_tokens,
        max_texts_per_request=options.max_texts_per_request,
        max_concurrency=1,
        price=Price(),
        truncation="error",
    )


class Model:
    """A static model. The library sets its tokenizer up anew for each call: one at a time."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        from model2vec import StaticModel

        self._lock = Lock()
        self._model = StaticModel.from_pretrained(folder)
        # In half precision the mean would be rounded as well.
        self._model.embedding = self._model.embedding.astype(np.float32)

    def vectors(self, texts: list[str]) -> Vectors:
        # By default it cuts texts in silence, by characters first. Several "processes" are threads
        # that it gets by changing the environment.
        with self._lock:
            found: Vectors = self._model.encode(texts, max_length=None, use_multiprocessing=False)
        return found


class Model2VecEmbedder(LocalEmbedder[Model]):
    """Implements ``Embedder``. A text of which no token is known has a vector of zeros."""

    package = "model2vec"
    survives_fork = True
    files = (
        *("config.json", "config_sentence_transformers.json", "tokenizer.json"),
        *("model.safetensors", "0_StaticEmbedding/*"),
    )

    def __init__(self, model: str, options: Model2VecOptions) -> None:
        self.options = options
        super().__init__(info_of(model, options), normalises=options.normalize)

    def read(self, folder: Path) -> Model:
        return Model(folder)

    def vectors(self, model: Model, texts: list[str]) -> Vectors:
        return model.vectors(texts)


@hookimpl
def embedcore_provider() -> Provider:
    return Provider(
        name=PROVIDER,
        options=Model2VecOptions,
        create=Model2VecEmbedder,
        models={name: info_of(name, Model2VecOptions()) for name in _WIDTHS},
        default_model=DEFAULT_MODEL,
    )
