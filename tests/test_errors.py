"""Is the error tree what its docstring says, and does each error survive a process pool?"""

from __future__ import annotations

import copy
import inspect
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest

from embedcore import errors
from embedcore.errors import BatchEmbeddingFailed, BudgetExceeded, EmbeddingError, InputRejected
from embedcore.provider.types import RateLimits

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, EmbeddingError)
}
EXTRA: dict[str, dict[str, Any]] = {
    "UnknownProvider": {"installed": ["fake", "openai"]},
    "PluginError": {"distribution": "embedcore-fake"},
    "InputRejected": {"position": 3, "reason": "empty"},
    "BudgetExceeded": {
        "limit": 100,
        "spent": 60,
        "held": 30,
        "asked": 20,
        "resets_at": datetime(2026, 2, 1, tzinfo=UTC),
        "never_fits": True,
        "period": "month",
        "scope": "s",
    },
    "ProviderError": {"billed": "yes", "status": 418, "code": "teapot", "request_id": "req-1"},
    "TransientProviderError": {"retry_after": 1.5, "limits": RateLimits(remaining_tokens=7)},
    "BatchEmbeddingFailed": {"jobs": ["batch-1"], "failures": {4: "empty"}, "result": None},
}


def parents_drawn() -> dict[str, str]:
    """Class → parent, read from the tree in the module's docstring."""
    drawn: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip("│├└─ ").split(" ")[0]
        if not name.isidentifier() or (above and line[:1] not in "│├└ "):
            continue
        depth = len(line) - len(line.lstrip("│├└─ "))
        if above and not depth:
            continue
        if name not in CLASSES:
            continue
        while above and above[-1][0] >= depth:
            above.pop()
        drawn[name] = above[-1][1] if above else "Exception"
        above.append((depth, name))
    return drawn


def arguments_of(kind: type[EmbeddingError]) -> dict[str, Any]:
    """Something for every argument of the class's constructor."""
    accepted = inspect.signature(kind).parameters
    found: dict[str, Any] = {"retryable": True, "billed": "unknown"}
    for parent in reversed(kind.__mro__):
        found |= EXTRA.get(parent.__name__, {})
    return {name: value for name, value in found.items() if name in accepted}


def test_the_tree_that_is_drawn_is_the_tree_that_is_there() -> None:
    assert parents_drawn() == {name: kind.__base__.__name__ for name, kind in CLASSES.items()}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("through", [lambda one: pickle.loads(pickle.dumps(one)), copy.copy])
def test_every_error_survives_pickling_whole(name: str, through: Any) -> None:
    error = CLASSES[name]("what happened", **arguments_of(CLASSES[name]))
    error.budget_blocked = True
    error.add_note("seen on the way")
    again = through(error)
    assert type(again) is type(error)
    assert str(again) == "what happened"
    assert again.args == error.args
    assert vars(again) == vars(error)
    for argument, value in arguments_of(CLASSES[name]).items():
        kept = getattr(again, argument)
        assert kept == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("name", "retryable", "billed"),
    [
        ("ConfigurationError", False, "no"),
        ("UnknownProvider", False, "no"),
        ("PluginError", False, "no"),
        ("InputRejected", False, "no"),
        ("InputTooLong", False, "no"),
        ("TokenBudgetExceeded", True, "no"),
        ("CostBudgetExceeded", True, "no"),
        ("ProviderError", False, "unknown"),
        ("TransientProviderError", True, "unknown"),
        ("RateLimited", True, "no"),
        ("ProviderUnavailable", True, "unknown"),
        ("InputNotReady", True, "no"),
        ("OutcomeUnknown", True, "unknown"),
        ("TimedOut", True, "unknown"),
        ("PermanentProviderError", False, "unknown"),
        ("AuthenticationFailed", False, "no"),
        ("PermissionDenied", False, "no"),
        ("ModelNotFound", False, "no"),
        ("QuotaExhausted", False, "no"),
        ("RequestRejected", False, "unknown"),
        ("RequestTooLarge", False, "no"),
        ("InvalidResponse", False, "yes"),
        ("ReplyMismatch", False, "yes"),
        ("BatchEmbeddingFailed", False, "no"),
        ("StorageBusy", True, "no"),
        ("StorageFull", False, "no"),
        ("StorageReadOnly", False, "no"),
        ("StorageCorrupt", False, "no"),
        ("StorageTooNew", False, "no"),
        ("UnsafeStorage", False, "no"),
    ],
)
def test_what_an_error_says_without_being_told(name: str, retryable: bool, billed: str) -> None:
    error = CLASSES[name]("what happened")
    assert (error.retryable, error.billed) == (retryable, billed)
    assert error.partial is None
    assert error.budget_blocked is False


def test_what_never_fits_is_not_worth_a_retry() -> None:
    assert BudgetExceeded("no", never_fits=False).retryable
    assert not BudgetExceeded("no", never_fits=True).retryable


def test_the_reason_of_a_rejected_text_is_never_empty() -> None:
    assert InputRejected("text 3 is empty", position=3).reason == "text 3 is empty"


def test_a_failed_batch_offers_what_did_arrive_under_both_names() -> None:
    result: Any = object()
    error = BatchEmbeddingFailed("2 of 5", failures={1: "empty", 4: "too long"}, result=result)
    assert error.partial is error.result is result
    assert error.failures == {1: "empty", 4: "too long"}
