"""Models on this machine: a folder of files, one model in a process, and texts that are whole.

A model is a folder, by a path that begins with ".", "/" or "~", or a repository of Hugging Face
that was downloaded before. Nothing here downloads anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar
from weakref import WeakValueDictionary

from embedcore.errors import ConfigurationError, EmbeddingError, InputTooLong
from embedcore.forksafe import Lazy, Lock
from embedcore.provider.base import BaseEmbedder, unit_length
from embedcore.provider.prefixes import prefixed, prefixes_of
from embedcore.provider.tokenizer_files import FILE, HubTokenizer, hub_file, is_path
from embedcore.provider.tokens import utf8_length
from embedcore.provider.types import EmbedReply, EmbedRequest, ModelInfo

if TYPE_CHECKING:
    from embedcore.provider.types import Vectors

Model = TypeVar("Model")
Thing = TypeVar("Thing")

TOKENS_PER_BYTE: Final = 16
"""A bound for any tokenizer of a model that costs nothing: one ligature can be a sentence."""

# What is read is shared by equal embedders for as long as there is one.
_places: WeakValueDictionary[tuple[object, ...], Lazy[Any]] = WeakValueDictionary()
_places_lock: Final = Lock()


def content_of(folder: Path, patterns: Sequence[str]) -> str:
    """A name for what these files hold, with their own names."""
    digest = hashlib.sha256()
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    for path in sorted(found):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{_sum(path)}\n".encode())
    return digest.hexdigest()[:32]


def _sum(path: Path) -> str:
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs":
        return target.name  # the hub's cache names a file by what it holds
    found = target.stat()
    return _read_sum(str(target), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@lru_cache(maxsize=256)
def _read_sum(path: str, *_: int) -> str:
    """Read once, for as long as the file has the same size, times and number."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_in(folder: Path) -> Path:
    """At its usual place, or beside the weights of the one module that has any."""
    usual = folder / FILE
    return usual if usual.is_file() else next(folder.glob(f"*/{FILE}"), usual)


def _place(key: tuple[object, ...], *, shared: bool) -> Lazy[Any]:
    with _places_lock:
        place = _places.get(key)
        if place is None:
            place = _places[key] = Lazy(shared=shared)
        return place


class LocalEmbedder(BaseEmbedder, Generic[Model]):
    """An embedder whose model is a folder of files. Equal ones share one model in a process.

    A subclass says what it reads, and how::

        class AcmeEmbedder(LocalEmbedder[AcmeModel]):
            files = ("model.bin", "tokenizer.json")

            def read(self, folder):
                return AcmeModel(folder)

            def vectors(self, model, texts):
                return model.encode(texts)

    ``files``: patterns of what decides the vectors. ``marker``: a file of a repository that is
    always there. ``survives_fork``: the model is plain memory, of which a child may use its copy;
    other models are read again there. ``package``: what must be installed for ``read``.

    What the files hold is part of ``info.variant``, and so of the fingerprint: a folder with other
    content is another model. It is looked at when the embedder is made, and again when the model is
    read. Building one without its files works; what needs them raises ``ConfigurationError``.
    """

    files: Sequence[str] = ("*",)
    marker: ClassVar[str] = "config.json"
    survives_fork: ClassVar[bool] = False
    package: ClassVar[str] = ""

    def __init__(
        self,
        info: ModelInfo,
        *,
        repository: str | None = None,
        normalises: bool = True,
        prefixes: bool = False,
        **deciding: object,
    ) -> None:
        """``repository``: where the hub has it. ``normalises``: vectors get length 1.
        ``prefixes``: texts get what the model was trained to find before them. ``deciding``: what
        else ``read`` depends on.
        """
        self.info, self.repository = info, repository or info.model
        self.folder = self._found(info.model)
        self._content = "" if self.folder is None else content_of(self.folder, self.files)
        self._normalises = normalises
        self._before = prefixes_of(info.model) if prefixes else {}
        key = (type(self), str(self.folder), self._content, repr(sorted(deciding.items())))
        self._model: Lazy[Model] = _place(key, shared=self.survives_fork)
        self._read_tokenizer: Lazy[HubTokenizer] = _place((*key, "tokens"), shared=True)
        self.tokenizer = _LocalTokenizer(self)
        self.startup = _LocalStartup(self)
        self.info = prefixed(self._described(), self._before)

    def longest(self, folder: Path) -> int | None:  # noqa: ARG002
        """``info.max_input_tokens``, by the files of the model."""
        return self.info.max_input_tokens

    def read(self, folder: Path) -> Model:
        raise NotImplementedError(f"{type(self).__name__} must define read(folder)")

    def vectors(self, model: Model, texts: list[str]) -> Vectors:
        """Row i for text i, of shape (n, d). Called from several threads."""
        raise NotImplementedError(f"{type(self).__name__} must define vectors(model, texts)")

    def model(self) -> Model:
        """The model, read by the first who needs it. Raises ``ConfigurationError``."""
        return self._model.get(lambda: self._checked(self.read))

    def counting(self) -> HubTokenizer:
        """The model's own tokenizer. Raises ``ConfigurationError``."""
        return self._read_tokenizer.get(
            lambda: self._checked(lambda folder: HubTokenizer(str(_tokenizer_in(folder))))
        )

    def embed(self, request: EmbedRequest) -> EmbedReply:
        """The vectors of texts that are whole, or ``InputTooLong`` with the first that is not."""
        import numpy as np

        from embedcore.provider.replies import nothing

        if not request.texts:
            return nothing(self.info.dimensions)
        self._refuse_long(request.texts)
        before = self._before.get(request.input_type or self.info.default_input_type or "", "")
        found = self.vectors(self.model(), [before + text for text in request.texts])
        vectors = np.array(found, dtype=np.float32, order="C")
        if self._normalises:
            unit_length(vectors)
        return EmbedReply(vectors=vectors, model=self.info.model)

    def _refuse_long(self, texts: Sequence[str]) -> None:
        """No library here says what it cuts: nothing that it would cut gets there."""
        most = self.info.max_input_tokens
        for place, text in enumerate(texts):
            if most is None or utf8_length(text) * self.info.tokens_per_byte <= most:
                continue
            (tokens,) = self.tokenizer.count([text])
            if tokens > most:
                raise InputTooLong(
                    f"{self._name} takes {most} tokens, and text {place} has {tokens}",
                    position=place,
                    max_tokens=most,
                    tokens=tokens,
                    billed="no",
                )

    def _described(self) -> ModelInfo:
        info = replace(self.info, local=True, tokens_per_byte=TOKENS_PER_BYTE)
        if self.folder is None:
            return info
        variant, longest = f"files={self._content}", self.longest(self.folder)
        return replace(info, variant=variant, max_input_tokens=longest)

    @property
    def _name(self) -> str:
        return f"{self.info.provider}:{self.info.model}"

    def _found(self, model: str) -> Path | None:
        if is_path(model):
            path = Path(model).expanduser()
            return path if path.is_dir() else None
        found = hub_file(self.repository, self.marker)
        return None if found is None else found.parents[self.marker.count("/")]

    def _checked(self, read: Callable[[Path], Thing]) -> Thing:
        """What ``read`` makes of the folder as it was when this embedder was made."""
        if self.folder is None:
            raise ConfigurationError(self._how_to_get_it())
        try:
            made = read(self.folder)
        except EmbeddingError:
            raise
        except ImportError as error:
            raise ConfigurationError(
                f"{self._name} needs the package {self.package} ({error}): pip install "
                f"{self.package}"
            ) from error
        except Exception as error:
            raise ConfigurationError(
                f"{self._name} cannot be read from {self.folder} ({type(error).__name__}: "
                f"{str(error)[:200]}): download it again, or give the folder of another"
            ) from error
        if content_of(self.folder, self.files) != self._content:
            raise ConfigurationError(
                f"the files of {self._name} in {self.folder} have changed since this client was "
                "made: make a new one, which keeps their vectors apart"
            )
        return made

    def _how_to_get_it(self) -> str:
        if is_path(self.info.model):
            return f"{self._name}: there is no such folder; give the path of a model's"
        return (
            f"{self._name} is not on this machine, and nothing is downloaded by itself. Download "
            f"it once: hf download {self.repository}; or give the path of its folder, which begins "
            "with . or / or ~"
        )


class _LocalTokenizer:
    """The model's own tokenizer, read when something is counted."""

    exact = True

    def __init__(self, embedder: LocalEmbedder[Model]) -> None:
        self._embedder = embedder

    def count(self, texts: Sequence[str]) -> list[int]:
        # Of some texts nothing is left, and the kit of tests wants to see one token at least.
        return [max(tokens, 1) for tokens in self._embedder.counting().count(texts)]

    def prefix(self, text: str, max_tokens: int) -> str:
        return self._embedder.counting().prefix(text, max_tokens)


class _LocalStartup:
    """Implements ``embedcore.provider.protocol.Startup``: reads the model."""

    def __init__(self, embedder: LocalEmbedder[Model]) -> None:
        self._embedder = embedder

    def load(self) -> None:
        self._embedder.model()

    def connect(self) -> None:
        """There is nothing to connect to."""
