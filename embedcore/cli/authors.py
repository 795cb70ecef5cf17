"""``embedcore provider new`` and ``check``: for who writes a provider."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from embedcore.cli.options import scope_option, talking
from embedcore.cli.screen import Screen
from embedcore.cli.text import plural
from embedcore.errors import ConfigurationError, EmbeddingError
from embedcore.provider import registry
from embedcore.provider.known import IN_REPOSITORY

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from embedcore.choice import Choice
    from embedcore.config import Config
    from embedcore.provider.protocol import Embedder
    from embedcore.testing.checking import Verdict

_NAME: Final = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")
_LONGEST_NAME: Final = 40
# What the templates say in place of the name.
_PLACES: Final = re.compile("embedcore_acme|ACME|Acme|acme")
_SUFFIX: Final = ".txt"
_COMMON: Final = "common"
_LIVE_TOKENS: Final = 100_000


@click.command()
@click.argument("name")
@click.option("--http", "kind", flag_value="http", help="A service that answers JSON with JSON.")
@click.option("--local", "kind", flag_value="local", help="A model on this machine.")
@click.option("--batch", "kind", flag_value="batch", help="As --http, with jobs at half the price.")
@click.option(
    "--plain",
    "kind",
    flag_value="plain",
    help="Everything by hand, over the standard library: for an SDK, or another protocol.",
)
@click.option(
    "--into",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    metavar="FOLDER",
    help="The folder to make it in; default: the working directory.",
)
@talking
@click.pass_obj
def new(screen: Screen, name: str, kind: str | None, into: Path) -> None:
    """Write a provider as a package with its tests.

    The package is embedcore-NAME, and its tests pass. NAME stands before the colon of a model's
    name. Nothing that exists is written over.
    """
    if kind is None:
        raise click.UsageError("say what it is for: --http, --local, --batch or --plain.")
    _check_name(name)
    folder = into / f"embedcore-{name}"
    written = write(name, kind, folder)
    screen.json({"folder": str(folder), "kind": kind, "files": written})
    screen.result(f"{folder} is written: {plural(len(written), 'file')}. Its tests pass:")
    for line in (f"cd {folder}", 'pip install -e ".[dev]"', "pytest"):
        screen.result(f"  {line}")
    screen.result("Then put your service in the place of the one that is made up there.")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise click.UsageError(
            f"{name!r} cannot be a provider's name: use small letters, digits and single hyphens, "
            f"with a letter first, at most {_LONGEST_NAME}."
        )
    if name in IN_REPOSITORY or name in [found.name for found in registry.installed()]:
        raise click.UsageError(f"there is a provider {name!r} already: choose another name.")


def write(name: str, kind: str, folder: Path) -> list[str]:
    """Write the distribution; the names of its files. Raises ``ConfigurationError`` where there is
    something already: then nothing was written."""
    templates = files("embedcore.cli") / "templates"
    found = {
        _named(place, name): _filled(text, name)
        for part in (_COMMON, kind)
        for place, text in _texts(templates / part, "")
    }
    if folder.exists() or folder.is_symlink():
        raise ConfigurationError(f"{folder} is there already: nothing was written")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # All of it or nothing.
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for place, text in found.items():
                path = unfinished / place
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", newline="\n")
            unfinished.chmod(0o755)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be written: {error.strerror}") from error
    return sorted(found)


def _texts(folder: Traversable, place: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _texts(entry, f"{place}{entry.name}/")
        elif entry.name.endswith(_SUFFIX):
            yield place + entry.name.removesuffix(_SUFFIX), entry.read_text(encoding="utf-8")


def _named(place: str, name: str) -> str:
    # A file with a dot in front of its name may be left out of a package.
    return _filled(place, name).replace("dot-", ".")


def _filled(text: str, name: str) -> str:
    words = {
        "embedcore_acme": f"embedcore_{name.replace('-', '_')}",
        "ACME": name.replace("-", "_").upper(),
        "Acme": "".join(part.capitalize() for part in name.split("-")),
        "acme": name,
    }
    return _PLACES.sub(lambda found: words[found[0]], text)


@click.command()
@click.argument("name")
@click.option("-m", "--model", metavar="MODEL", help="Of the provider; default: its default model.")
@click.option("--live", is_flag=True, help="Ask the service itself, with your key. This costs.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before a service is asked.")
@scope_option
@talking
@click.pass_obj
def check(
    screen: Screen, name: str, model: str | None, live: bool, yes: bool, scope: str | None
) -> int:
    """Run the tests of the kit for an installed provider.

    Without --live nothing is sent: what needs an answer is tested for models on this machine alone.
    With it, at most 100,000 tokens are sent, which are reserved first and count for the budget.
    """
    from embedcore.choice import choose
    from embedcore.config import Config

    provider = registry.load(name)
    if model is None and provider.default_model is None:
        raise click.UsageError(f"{name} has no default model: name one by --model.")
    config = Config.load()
    choice = choose(
        f"{name}:{model or provider.default_model}", config=config, scope=scope, options={}
    )
    verdict = _checked(screen, choice, config, live=live, yes=yes)
    _show(screen, choice, verdict, live=live)
    return int(not verdict.passed)


def _checked(screen: Screen, choice: Choice, config: Config, *, live: bool, yes: bool) -> Verdict:
    from embedcore.assembly import create_embedder
    from embedcore.testing import checking

    problem: EmbeddingError | None = None
    try:
        embedder, *_ = create_embedder(choice)
    except EmbeddingError as error:
        # The tests of the declaration may say why.
        problem = error
    if problem is not None:
        if live:
            raise problem
        screen.info(f"Only the declaration is tested: {problem}")
        return checking.run(choice.provider, choice.model, None)
    with closing(embedder):
        if embedder.info.local:
            return checking.run(choice.provider, choice.model, lambda: create_embedder(choice)[0])
        if not live:
            meter = checking.Meter(0)
            return checking.run(
                choice.provider, choice.model, lambda: meter.over(create_embedder(choice)[0])
            )
        return _live(screen, choice, config, embedder, yes=yes)


def _live(
    screen: Screen, choice: Choice, config: Config, embedder: Embedder, *, yes: bool
) -> Verdict:
    from embedcore import money
    from embedcore.assembly import create_embedder
    from embedcore.policy.planning import priced
    from embedcore.testing import checking

    price = embedder.info.price
    most = priced(_LIVE_TOKENS, price)
    cost = (
        "at a price that is not known"
        if price is None
        else money.shown(money.in_dollars(most.cost))
    )
    where = embedder.info.endpoint or choice.provider
    question = f"Send at most {_LIVE_TOKENS:,} tokens to {where} ({cost})?"
    if not yes and not (screen.interactive and screen.ask(question)):
        raise click.UsageError(
            f"not confirmed, so that nothing was sent. {question} --yes does not ask."
        )
    meter = checking.Meter(_LIVE_TOKENS)
    with _reserved(choice, config, most, meter, price):
        return checking.run(
            choice.provider,
            choice.model,
            lambda: meter.over(create_embedder(choice)[0]),
            examples=3,
        )


@contextmanager
def _reserved(choice: Choice, config: Config, most: Any, meter: Any, price: Any) -> Iterator[None]:
    """With the most that it can cost reserved before anything is sent."""
    from embedcore.cli.session import state_ledger
    from embedcore.policy.planning import priced

    limits, _ = choice.budget
    with state_ledger(config, limits) as ledger:
        label = f"{choice.provider}:{choice.model}"
        attempt = ledger.hold_and_send(
            choice.scope, most, limits, loose=True, model=label, inputs=1
        )
        try:
            yield
        finally:
            ledger.settle(attempt, priced(meter.sent, price), reported=False, close=True)


def _show(screen: Screen, choice: Choice, verdict: Verdict, *, live: bool) -> None:
    name = f"{choice.provider}:{choice.model}"
    counts = verdict.counts()
    screen.json(
        {
            "model": name,
            "passed": verdict.passed,
            "counts": counts,
            "tests": [one.as_json() for one in verdict.tests],
        }
    )
    for one in verdict.tests:
        if one.outcome == "failed":
            screen.result(f"{one.name}\n  {one.why}\n")
        elif one.outcome == "known":
            screen.result(f"{one.name}: known to fail: {one.why}\n")
    unsent = verdict.unsent
    rows = [f"{name}: {plural(counts['passed'], 'test')} passed, {counts['failed']} failed"]
    if counts["known"]:
        rows.append(f"{counts['known']} known to fail")
    screen.result(", ".join(rows) + ".")
    if unsent and not live:
        screen.result(f"{plural(unsent, 'test')} would send a request: --live runs them.")
    elif unsent:
        screen.result(f"{plural(unsent, 'test')} not run: they would send too much.")
    if counts["not run"] - unsent:
        rest = plural(counts["not run"] - unsent, "test")
        screen.result(f"{rest} not run: they need the hooks of a test class of its own.")
