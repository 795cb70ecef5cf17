"""What can be done before the first request: imports, connections, the tokenizer's engines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

from embedcore.errors import EmbeddingError
from embedcore_openai import vocabulary

if TYPE_CHECKING:
    from embedcore.provider.types import ModelInfo
    from embedcore_openai.errorcontext import Context
    from embedcore_openai.session import Session

# What a request imports where it needs it; the last by the socket, for the name of a host.
_MODULES: Final = (
    "embedcore.provider.replies",
    "embedcore_openai.errorcontext",
    "embedcore_openai.errors",
    "embedcore_openai.transport",
    "encodings.idna",
)
_ENGINES: Final = ("tiktoken", "splintr")


class OpenAIStartup:
    """Implements ``embedcore.provider.protocol.Startup``. ``exact``: it counts with an engine."""

    def __init__(self, info: ModelInfo, session: Session, *, exact: bool) -> None:
        self._info = info
        self._session = session
        self._exact = exact

    def load(self) -> None:
        for name in _MODULES:
            import_module(name)
        if self._exact and vocabulary.present():
            for name in _ENGINES:
                _import_if_sound(name)
        self._raise(self._session.prepare(self._context()))

    def connect(self) -> None:
        """One request without a key and without a body; any answer to it will do."""
        self._raise(self._session.connect(self._context()))

    def _context(self) -> Context:
        from embedcore_openai.errorcontext import Context

        return Context(
            model=self._info.model,
            endpoint=self._info.endpoint,
            secrets=self._session.secrets(None),
        )

    def _raise(self, failure: EmbeddingError | None) -> None:
        if failure is not None:
            # Raised here and without the way it came: frames down there hold the headers.
            raise failure.with_traceback(None)


def _import_if_sound(name: str) -> None:
    try:
        import_module(name)
    except Exception:  # noqa: BLE001 - whoever counts says what is wrong with it, and does without
        return
