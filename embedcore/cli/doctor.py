"""``embedcore doctor``: what is installed and set here, and what is wrong or unusual about it?"""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby

import click

from embedcore.cli.checks import Finding, findings
from embedcore.cli.options import talking
from embedcore.cli.screen import Screen
from embedcore.cli.text import facts, plural

_MARKS = {"ok": "", "note": "  (note)", "problem": "  (PROBLEM)"}


@click.command(name="doctor")
@talking
@click.pass_obj
def command(screen: Screen) -> int:
    """Versions, providers, settings, keys (never their values), proxies, state and clock.

    Sends nothing. Ends with 1 if it found a problem.
    """
    found = list(findings())
    problems = [one for one in found if one.level == "problem"]
    screen.answer({"problems": len(problems), "findings": [asdict(one) for one in found]})
    for section, group in groupby(found, key=lambda one: one.section):
        screen.show(f"{section}\n{facts([_line(one) for one in group], indent='  ')}")
    screen.show(plural(len(problems), "problem") if problems else "no problem found")
    return int(bool(problems))


def _line(one: Finding) -> tuple[str, str]:
    return one.name, f"{one.value}{_MARKS[one.level]}"
