"""Keys that are functions: each reading of the key calls the function.

For every option that holds a key, whatever the provider declares it as: one that is declared as a
``SecretStr`` gets a ``SecretStr`` whose ``get_secret_value()`` asks the function. A provider that
reads the key for each request has so a new one for each request. None is shown, and none is asked
for where nothing is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import SecretBytes, SecretStr

from embedcore.errors import AuthenticationFailed, ConfigurationError, EmbeddingError
from embedcore.provider.options import HiddenValues, accepts_callables, is_secret

if TYPE_CHECKING:
    from pydantic import BaseModel

_HIDDEN: Final = "**********"
# Keys of so many calls are looked for in what is shown.
_REMEMBERED: Final = 8


class Called:
    """What both kinds share. Equal only to itself: comparing must not ask for a key."""

    _kind: type[str] | type[bytes]

    def __init__(self, function: Callable[[], Any], option: str) -> None:
        self._function = function
        self._option = option
        self.given: deque[str] = deque(maxlen=_REMEMBERED)

    def get_secret_value(self) -> Any:
        """Raises ``AuthenticationFailed`` where the function fails, and ``ConfigurationError``
        where it gives something else; the key is in neither."""
        value = _asked(self._function, self._option)
        if isinstance(value, SecretStr | SecretBytes):
            value = value.get_secret_value()
        if isinstance(value, str) and self._kind is bytes:
            value = value.encode()
        if not isinstance(value, self._kind):
            raise ConfigurationError(
                f"{self._option} gave a {type(value).__name__} instead of a string"
            )
        shown = value if isinstance(value, str) else value.decode("utf-8", "replace")
        if shown and shown not in self.given:
            self.given.append(shown)
        return value

    def _display(self) -> Any:
        return _HIDDEN

    def __len__(self) -> int:
        return len(self.get_secret_value())

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # What the function holds need not be copyable.
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a key that is a function is not pickled: it would be lost, or shown")


def _asked(function: Callable[[], Any], option: str) -> Any:
    try:
        return function()
    except EmbeddingError:
        raise
    except Exception as error:
        raise AuthenticationFailed(
            f"the callable given as {option} failed with {type(error).__name__}"
        ) from error


class CalledStr(Called, SecretStr):
    """A ``SecretStr`` whose value is what a function gives."""

    _kind = str


class CalledBytes(Called, SecretBytes):
    """A ``SecretBytes`` whose value is what a function gives."""

    _kind = bytes


def called(options: type[BaseModel], values: Mapping[str, Any]) -> HiddenValues:
    """The same values, with the callables in options that hold a key made into secrets.

    An option that is declared to take a callable gets it as it is.
    """
    return HiddenValues(
        (name, _wrapped(value, name, options))
        if is_secret(options, name) and not accepts_callables(options, name)
        else (name, value)
        for name, value in values.items()
    )


def _wrapped(value: Any, place: str, options: type[BaseModel]) -> Any:
    if isinstance(value, Mapping):
        return {key: _wrapped(inner, f"{place}.{key}", options) for key, inner in value.items()}
    if not callable(value) or isinstance(value, SecretStr | SecretBytes):
        return value
    declared = str(options.model_fields[place.partition(".")[0]].annotation)
    kind = CalledBytes if "SecretBytes" in declared else CalledStr
    return kind(value, place)


def called_in(options: BaseModel) -> Iterator[Called]:
    """The keys of these options that are functions and were made into secrets."""
    for name in type(options).model_fields:
        value = getattr(options, name)
        for one in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(one, Called):
                yield one
