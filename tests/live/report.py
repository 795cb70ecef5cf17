"""The one file that a run leaves: what to send back, without a key."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

# A shorter piece of a key may stand in a report by chance.
_PIECE: Final = 10


class KeyInReport(Exception):
    """The report has a key, or a piece of one, in it. Nothing was written."""


def write(report: Mapping[str, Any], path: Path, secrets: Iterable[str]) -> None:
    """The report as JSON, complete or not at all. Raises ``KeyInReport``."""
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"
    if has_secret(text, secrets):
        raise KeyInReport
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def has_secret(text: str, secrets: Iterable[str]) -> bool:
    """Whether a key is in the text: a piece of 10 characters, in plain, in base64 or quoted."""
    read = text.lower()
    for secret in secrets:
        packed = base64.b64encode(secret.encode()).decode().rstrip("=")
        for form in (secret, packed, quote(secret, safe=""), json.dumps(secret)[1:-1]):
            low = form.lower()
            if len(low) < _PIECE:
                # As a word of its own.
                if re.search(rf"(?<!\w){re.escape(low)}(?!\w)", read):
                    return True
            elif any(low[at : at + _PIECE] in read for at in range(len(low) - _PIECE + 1)):
                return True
    return False


def summary(report: Mapping[str, Any]) -> str:
    """The report for a terminal of 80 columns."""
    lines = [f"{report['provider']}:{report['model']}", ""]
    for verdict in ("contradicted", "confirmed", "not testable"):
        found = {
            name: each for name, each in report["assumptions"].items() if each["verdict"] == verdict
        }
        if not found:
            continue
        lines.append(f"{verdict}: {len(found)}")
        if verdict != "not testable":
            lines += [f"  {name}\n    {_short(each['seen'])}" for name, each in found.items()]
    lines += [f"NOT KEPT: {name}" for name, kept in report["checks"].items() if not kept]
    lines += [f"{name}: {_short(said)}" for name, said in report["problems"].items()]
    bill = report["bill"]
    if bill:
        agrees = {True: "agree", False: "DO NOT AGREE", None: "cannot be compared"}[bill["agrees"]]
        lines += [
            "",
            f"ledger:  {bill['ledger_tokens']:,} tokens, ${bill['ledger_cost']}",
            f"answers: {_count(bill['immediate'])} tokens, in batches {_count(bill['batch'])}",
            f"They {agrees}.",
        ]
    return "\n".join(lines)


def _count(tokens: int | None) -> str:
    return "an unknown number of" if tokens is None else f"{tokens:,}"


def _short(text: str) -> str:
    return text if len(text) <= 74 else text[:73] + "…"
