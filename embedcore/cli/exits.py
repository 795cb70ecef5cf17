"""Which exit code says what? The one table of them, for ``--help`` and for ``main``."""

from __future__ import annotations

from typing import Final

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
BUDGET: Final = 3
TRY_AGAIN: Final = 4
STORAGE: Final = 5
FAULT: Final = 70
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141
TERMINATED: Final = 143

MEANINGS: Final = {
    OK: "all is done",
    FAILED: "rows failed, the provider refused, or a check found a problem",
    USAGE: "wrong arguments, settings or input, or not confirmed; nothing was sent",
    BUDGET: "a limit of the budget refused",
    TRY_AGAIN: "the provider cannot serve now: the same again may succeed",
    STORAGE: "a file of ours cannot be read or written",
    FAULT: "a fault in embedcore itself",
    INTERRUPTED: "Ctrl-C; what was bought is kept",
    BROKEN_PIPE: "nobody reads the output any more",
    TERMINATED: "terminated; what was bought is kept",
}


def code_of(error: BaseException) -> int:
    """The exit code for an error of ours."""
    from embedcore import errors

    codes: tuple[tuple[type[BaseException], int], ...] = (
        (errors.BudgetExceeded, BUDGET),
        (errors.StorageError, STORAGE),
        (errors.ConfigurationError, USAGE),
        (errors.InputRejected, USAGE),
        (errors.TransientProviderError, TRY_AGAIN),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), FAILED)


def table() -> str:
    """Every code with its meaning, one a line."""
    return "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANINGS.items())
