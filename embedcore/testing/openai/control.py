"""Control of the fake from other processes: meter and faults.

- ``GET /_meter``: ``Meter.snapshot()`` as JSON; under ``batches`` the bill of the Batch API.
- ``POST /_faults``: ``{"clear": true, "push": [fault, …], "when": [rule, …], "always": fault}``, in
  this order, each part optional. A fault is ``{"mode": …, "bills": …, "path": …, "effect": …}``
  with its options; a rule may have ``marker``, ``probability`` and ``times`` as well.
- ``/_batches``: see ``batch_endpoints``.

None needs a key, and none shows in the meter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from embedcore.testing.openai.embeddings import json_reply
from embedcore.testing.openai.faults import Fault, Faults, made

if TYPE_CHECKING:
    from embedcore.testing.meter import Meter
    from embedcore.testing.openai.http import HttpReply, HttpRequest


_PARTS = {"clear", "push", "when", "always"}
_RULE = {"marker", "probability", "times"}


def control(
    request: HttpRequest, *, meter: Meter, faults: Faults, bills: Mapping[str, Meter]
) -> HttpReply:
    """The reply to a request below ``/_``. ``bills``: further meters, by name."""
    if (request.method, request.path) == ("GET", "/_meter"):
        further = {name: bill.snapshot() for name, bill in bills.items()}
        return json_reply({**meter.snapshot(), **further})
    if (request.method, request.path) == ("POST", "/_faults"):
        try:
            load(faults, request.json())
        except (TypeError, ValueError) as error:
            return json_reply({"error": str(error)}, status=400)
        return json_reply({"pending": faults.pending})
    return json_reply({"error": "there are GET /_meter and POST /_faults"}, status=404)


def load(faults: Faults, script: object) -> None:
    """Apply a script of faults from JSON; raises ``ValueError`` for one that makes no sense."""
    parts = _object(script)
    unknown = sorted(set(parts) - _PARTS)
    if unknown:
        raise ValueError(f"no part {unknown[0]!r} in a script of faults; there are {_PARTS}")
    if parts.get("clear"):
        faults.clear()
    faults.push(*(_fault(each) for each in _list(parts.get("push"))))
    for each in _list(parts.get("when")):
        _add_rule(faults, _object(each))
    if "always" in parts:
        faults.always(None if parts["always"] is None else _fault(parts["always"]))


def _add_rule(faults: Faults, rule: Mapping[str, object]) -> None:
    marker, times = rule.get("marker"), rule.get("times")
    probability = rule.get("probability", 1.0)
    if not isinstance(probability, int | float):
        raise TypeError("probability must be a number")
    faults.when(
        mode=_fault({name: value for name, value in rule.items() if name not in _RULE}),
        marker=marker if isinstance(marker, str) else None,
        times=times if isinstance(times, int) else None,
        probability=probability,
    )


def _fault(given: object) -> Fault:
    options = dict(_object(given))
    mode, bills = options.pop("mode", None), options.pop("bills", None)
    path = options.pop("path", Fault().path)
    if not isinstance(mode, str) or not isinstance(path, str):
        raise TypeError("a fault has a mode, and its path is a string")
    return made(mode, bills if isinstance(bills, bool) else None, path, options)


def _object(given: object) -> Mapping[str, object]:
    if not isinstance(given, dict):
        raise TypeError(f"a JSON object was expected, not {type(given).__name__}")
    return given


def _list(given: object) -> list[object]:
    if not isinstance(given, list | None):
        raise TypeError(f"a JSON array was expected, not {type(given).__name__}")
    return given or []
