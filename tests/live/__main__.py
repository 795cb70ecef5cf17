"""A provider against its real service, for at most $0.05: which of docs/assumptions.md are true.

    make live PROVIDER=openai    # and MODEL=…, MINUTES=30, OPTIONS="dimensions=256"
    make live PROVIDER=openai RESUME=live-openai.json

Ends with 0 if all that was tested is confirmed, 1 if not, 2 if it was called wrongly or has no
key, 3 if the limit was reached, 4 if a batch has not ended yet, 5 if the report had a key in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from embedcore import errors
from embedcore.provider import registry
from live import report as reports, steps
from live.assumptions import Seen, judge

OK: Final = 0
CONTRADICTED: Final = 1
USAGE: Final = 2
BUDGET: Final = 3
NOT_ENDED: Final = 4
HAD_KEY: Final = 5
INTERRUPTED: Final = 130


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        earlier = _earlier(given)
        run = _run(given, earlier)
    except (errors.EmbeddingError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return USAGE
    path = given.resume or given.report or Path(f"live-{run.provider}.json")
    code, stopped = OK, None
    with run.wire.listening(), run.wire.named(run.model):
        try:
            ended = _go(run, given, earlier)
        except errors.BudgetExceeded as error:
            code, stopped, ended = BUDGET, str(error), run.batch is None
        except KeyboardInterrupt:
            code, stopped, ended = INTERRUPTED, "interrupted", run.batch is None
        except (errors.ConfigurationError, errors.AuthenticationFailed) as error:
            if not run.wire.answered:
                print(error, file=sys.stderr)
                shutil.rmtree(run.state, ignore_errors=True)
                return USAGE
            code, stopped, ended = CONTRADICTED, str(error), run.batch is None
        except errors.EmbeddingError as error:
            code, stopped = CONTRADICTED, f"{type(error).__name__}: {error}"
            ended = run.batch is None
        found = _report(run, given, earlier, stopped)
    try:
        reports.write(found, path, _secrets(run))
    except reports.KeyInReport:
        shutil.rmtree(run.state, ignore_errors=True)
        print("The report had a key, or a piece of one, in it: it was not written.")
        return HAD_KEY
    print(f"\n{reports.summary(found)}")
    if stopped is not None:
        print(f"Stopped: {stopped}")
    if ended:
        shutil.rmtree(run.state, ignore_errors=True)
    else:
        print(f"The batch has not ended. Later: make live PROVIDER={run.provider} RESUME={path}")
    print(f"Report: {path}")
    if code == OK and not ended:
        return NOT_ENDED
    return code or (OK if _all_confirmed(found) else CONTRADICTED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make live", description=__doc__)
    parser.add_argument("provider")
    parser.add_argument("--model")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--resume", type=Path, metavar="REPORT")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--poll", type=float, default=30.0, help=argparse.SUPPRESS)
    return parser


def _earlier(given: argparse.Namespace) -> dict[str, Any]:
    if given.resume is None:
        return {}
    found: dict[str, Any] = json.loads(given.resume.read_text(encoding="utf-8"))
    if found.get("provider") != given.provider or not found.get("batch"):
        raise ValueError(f"{given.resume} has no batch of {given.provider} to go on with")
    if not _state_of(given.resume).is_dir():
        raise ValueError(f"the folder {_state_of(given.resume)} of this report is gone")
    return found


def _run(given: argparse.Namespace, earlier: Mapping[str, Any]) -> steps.Run:
    provider = registry.load(given.provider)
    path = given.resume or given.report or Path(f"live-{given.provider}.json")
    state = _state_of(path)
    if not earlier and state.exists():
        raise ValueError(
            f"{state} is there, from a run whose batch has not ended: RESUME={path} goes on with "
            "it, or delete the folder"
        )
    model = earlier.get("model") or given.model or provider.default_model
    if model is None:
        raise ValueError(f"{given.provider} has no model of its own choice: say MODEL=…")
    run = steps.Run(
        provider=given.provider,
        model=model,
        options=dict(_options(given.option)),
        state=state.absolute(),
        poll=given.poll,
    )
    if earlier:
        run.seen = Seen(**earlier["seen"])
        run.checks = dict(earlier["checks"])
        run.problems = dict(earlier["problems"])
        run.failed = list(earlier["refused"])
        run.beginnings = list(earlier["beginnings"])
        run.batch = earlier["batch"]
    return run


def _state_of(report: Path) -> Path:
    return report.with_name(report.stem + ".state")


def _options(given: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for each in given:
        name, equals, value = each.partition("=")
        if not equals:
            raise ValueError(f"{each!r} is no NAME=VALUE")
        try:
            yield name, json.loads(value)
        except ValueError:
            yield name, value


def _go(run: steps.Run, given: argparse.Namespace, earlier: Mapping[str, Any]) -> bool:
    """All steps; False if a batch has not ended."""
    if not earlier:
        steps.immediate(run)
    with run.client() as client:
        if not client._running.offers_batches():
            return True
        if run.batch is None:
            steps.submit(run, client)
        return run.batch is None or steps.follow(run, client, given.minutes * 60)


def _report(
    run: steps.Run, given: argparse.Namespace, earlier: Mapping[str, Any], stopped: str | None
) -> dict[str, Any]:
    answers = dict(earlier.get("tokens_by_model", {}))
    for model, tokens in run.wire.tokens_by_model().items():
        so_far = answers.get(model, 0)
        answers[model] = None if so_far is None or tokens is None else so_far + tokens
    bill: dict[str, Any] = {}
    try:
        found = steps.bill(run, answers, steps.batch_lines(run.wire))
        bill = {**asdict(found), "agrees": found.agrees}
    except errors.EmbeddingError as error:
        run.problems["the bill"] = str(error)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "report": 1,
        "provider": run.provider,
        "model": run.model,
        "options": sorted(run.options.keys() - {"api_key"}),
        "from": earlier.get("from", now),
        "until": now,
        "versions": _versions(run.provider),
        "limit": str(Decimal(run.limit)),
        "minutes": given.minutes,
        "stopped": stopped,
        "assumptions": {
            name: {"verdict": verdict, "seen": seen}
            for name, (verdict, seen) in judge(run.provider, run.seen).items()
        },
        "checks": run.checks,
        "problems": run.problems,
        "refused": run.failed,
        "bill": bill,
        "tokens_by_model": answers,
        "beginnings": run.beginnings,
        "batch": run.batch,
        "batch_state": run.batch_state,
        "seen": run.seen.as_json(),
    }


def _versions(provider: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("embedcore", f"embedcore-{provider}", "openai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _secrets(run: steps.Run) -> list[str]:
    with run.client() as client:
        return list(client._engine.secrets)


def _all_confirmed(report: Mapping[str, Any]) -> bool:
    confirmed = all(each["verdict"] != "contradicted" for each in report["assumptions"].values())
    kept = all(report["checks"].values()) and not report["problems"]
    return confirmed and kept and report["bill"].get("agrees") is not False


if __name__ == "__main__":
    sys.exit(main())
