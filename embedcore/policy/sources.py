"""Sources of texts and rows: what is accepted, and refusals that name a table's columns.

Nothing is imported to find out: a mapping is known by its keys, a table by its columns, an array by
its dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, MappingView, Reversible, Set
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Final

from embedcore.errors import InputRejected

_ARROW_ROWS: Final = 4_096
_SHOWN_NAMES: Final = 10
_SHOWN_NAME: Final = 40
# Of a table in Arrow's memory ``columns`` are the columns themselves.
_NAMES_OF_COLUMNS: Final = ("column_names", "columns")
# Their elements are values, not arrays without dimensions.
_GIVES_VALUES: Final = ("to_list", "__array_interface__")
_TEXTUAL: Final = frozenset({"string", "large_string", "string_view", "null"})


@dataclass(frozen=True, slots=True)
class Choices:
    """What a caller must choose from who gave a mapping or a table: its keys or columns."""

    names: tuple[Any, ...]
    variable: str
    is_mapping: bool = False

    def __str__(self) -> str:
        shown = ", ".join(repr(name)[:_SHOWN_NAME] for name in self.names[:_SHOWN_NAMES])
        more = ", …" if len(self.names) > _SHOWN_NAMES else ""
        return f"{'keys' if self.is_mapping else 'columns'} {shown or '(none)'}{more}"

    @property
    def expression(self) -> str:
        """One of them as it is written in Python, as ``df["text"]``."""
        name = next((name for name in self.names if str(name).lower() == "text"), None)
        if name is None:
            name = self.names[0] if self.names else "…"
        plain_name = isinstance(name, str) and name.isprintable() and not set(name) & {'"', "\\"}
        return f'{self.variable}["{name}"]' if plain_name else f"{self.variable}[{name!r}]"


def in_order(
    given: Iterable[Any], expected: str, *, column: str | int | None = None
) -> Iterable[Any]:
    """The elements of what was given as texts or rows, in their order.

    Arrow arrays give plain values, block by block. ``expected``: what a message calls that which
    should have been given. ``column``: what each element will be asked for; with it a table is
    taken that gives its rows. Raises ``InputRejected`` for a mapping, for a table that gives the
    names of its columns, or the columns, and for what is one text, has no order or has more than
    one dimension.
    """
    if isinstance(given, (list, tuple, Iterator)):
        return given
    if isinstance(plain(given), str):
        raise _not_one(given, expected, ": use embed_text(text), or put it into a list")
    if isinstance(given, (bytes, bytearray, memoryview)):
        raise _not_one(given, expected)
    if isinstance(given, Set) and not isinstance(given, (MappingView, Reversible)):
        raise _not_one(given, expected, ", which has no order for vectors to follow: use sorted(…)")
    choices = choices_in(given)
    if choices is not None:
        rows = _rows(given, choices, column)
        if rows is not None:
            return rows
        way = f"choose one, as in {choices.expression}"
        if column is not None:
            way = f"{way}, or zip({choices.variable}[…], {choices.expression}) with keys"
        if choices.is_mapping:
            way = f"write list(d.values()) for its values, or {choices.expression} for one of them"
        raise _not_one(given, expected, f" with the {choices}: {way}")
    if column is None:
        _check_array(given, expected)
    return _elements(given, expected)


def plain(value: Any) -> Any:
    """The Python value in an Arrow scalar or an array without dimensions; otherwise the value."""
    kind = type(value)
    with suppress(Exception):  # What cannot be read stays as it is, and is no text.
        if hasattr(kind, "as_py"):
            return value.as_py()
        if hasattr(kind, "ndim") and hasattr(kind, "item") and value.ndim == 0:
            return value.item()
    return value


def choices_in(given: Any) -> Choices | None:
    """The keys of a mapping or the columns of a table; None for what is neither."""
    if isinstance(given, Mapping):
        return _choices(given, "d", is_mapping=True)
    fields = getattr(getattr(given, "dtype", None), "names", None)
    if isinstance(fields, tuple):
        return Choices(fields, "table")
    if _dimensions(given) == 1:
        return None
    if any(_names_columns(_static(given, name)) for name in _NAMES_OF_COLUMNS):
        variable = "df" if "Frame" in type(given).__name__ else "table"
        is_lazy = _has(given, "collect_schema") and _has(given, "collect")
        return _choices(given, f"{variable}.collect()" if is_lazy else variable)
    # As dict() decides it: rows of databases, headers of messages.
    if callable(_static(given, "keys")) and _has(given, "__getitem__"):
        return _choices(given, "d", is_mapping=True)
    return None


def _choices(given: Any, variable: str, *, is_mapping: bool = False) -> Choices:
    names: Iterable[Any] = ()
    with suppress(Exception):  # Some do not know them before they have looked into their files.
        if is_mapping:
            names = list(islice(given.keys(), _SHOWN_NAMES + 1))
        elif _has(given, "collect_schema"):
            names = given.collect_schema().names()
        else:
            known = next(name for name in _NAMES_OF_COLUMNS if _has(given, name))
            names = getattr(given, known)
        return Choices(tuple(names), variable, is_mapping)
    return Choices((), variable, is_mapping)


def _rows(given: Any, choices: Choices, column: str | int | None) -> Iterable[Any] | None:
    """The rows of a table that gives rows; None for one that gives columns or their names."""
    if column is None or choices.is_mapping:
        return None
    with suppress(TypeError):  # It cannot be iterated over, which some say only when it begins.
        source = iter(given)
        for first in source:
            return chain([first], source) if choices_in(first) is not None else None
        return () if column in choices.names else None
    return None


def _check_array(given: Any, expected: str) -> None:
    """Raises ``InputRejected`` for one of several dimensions, or an Arrow array of no texts."""
    dimensions = _dimensions(given)
    if dimensions > 1:
        shape = getattr(given, "shape", None)
        if shape is None:
            raise _not_one(given, expected, f" of {dimensions} dimensions: choose a column of it")
        hint = f" of the shape {shape}: choose one column of it, as in array[:, 0]"
        raise _not_one(given, expected, hint)
    arrow_type = getattr(given, "type", None) if _has(given, "to_pylist") else None
    # Other makers of Arrow arrays spell their types otherwise: there each row tells what it is.
    if type(arrow_type).__module__.startswith("pyarrow") and not _is_textual(arrow_type):
        hint = f" of type {arrow_type}: choose one of strings, or cast it to string"
        raise _not_one(given, expected, hint)


def _elements(given: Any, expected: str) -> Iterable[Any]:
    if _has(given, "to_pylist"):
        return chain.from_iterable(_arrow_blocks(given))
    if _dimensions(given) == 1 and not any(_has(given, name) for name in _GIVES_VALUES):
        # Each of its elements would be an array again, as where the axes have labels.
        with suppress(Exception):
            array: Iterable[Any] = given.__array__()
            return iter(array)
    elements: Iterator[Any]
    with suppress(TypeError):
        elements = iter(given)
        return elements
    raise _not_one(given, expected)


def _arrow_blocks(array: Any) -> Iterator[Iterable[Any]]:
    if not _has(array, "slice"):
        yield array.to_pylist()
        return
    for start in range(0, len(array), _ARROW_ROWS):
        part = array.slice(start, min(_ARROW_ROWS, len(array) - start))
        try:
            yield part.to_pylist()
        except Exception:  # noqa: BLE001 - one of them is not what its type says: find out which
            yield part


def _is_textual(arrow_type: Any) -> bool:
    name = str(arrow_type)
    if name.startswith(("dictionary<", "run_end_encoded<")):
        return _is_textual(arrow_type.value_type)
    if name.startswith("extension<"):
        return _is_textual(arrow_type.storage_type)
    return name in _TEXTUAL


def _dimensions(given: Any) -> int:
    """Of an array or a table; 0 for what is neither or does not tell."""
    with suppress(Exception):
        if _has(given, "shape") and isinstance(given.shape, tuple):
            return len(given.shape)
        if _has(given, "ndim"):
            return int(given.ndim)
    return 0


def _names_columns(attribute: Any) -> bool:
    return not (attribute is None or callable(attribute) or isinstance(attribute, (int, str)))


def _has(given: Any, name: str) -> bool:
    return _static(given, name) is not None


def _static(given: Any, name: str) -> Any:
    """An attribute without running its code: some objects have every one that is asked for."""
    return inspect.getattr_static(given, name, None)


def _not_one(given: Any, expected: str, hint: str = "") -> InputRejected:
    message = f"{expected} is expected, not one {type(given).__name__}{hint}"
    return InputRejected(message, reason=f"not {expected}")
