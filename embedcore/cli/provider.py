"""``embedcore provider``; ``probe``: which options fit a server with OpenAI's API."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from embedcore.cli.authors import check, new
from embedcore.cli.options import Group, scope_option, talking
from embedcore.cli.screen import Screen
from embedcore.cli.text import facts, one_line
from embedcore.errors import ConfigurationError
from embedcore.provider import registry

if TYPE_CHECKING:
    from embedcore.provider.hookspecs import Probing
    from embedcore.provider.types import Price

_PROVIDER: Final = "openai"
_LONGEST_NAME: Final = 80
_MOST_PRESETS: Final = 5
_MOST_NAMES: Final = 5


@click.group(name="provider", cls=Group)
def group() -> None:
    """Write a provider, test one, or find the options that fit a server."""


group.add_command(new)
group.add_command(check)


@group.command()
@click.argument("url")
@click.option("-m", "--model", metavar="NAME", help="The model to ask, as the server calls it.")
@click.option(
    "--key-env",
    metavar="VARIABLE",
    help="The variable with the key to send. Without it no key is sent.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask before texts are sent elsewhere.")
@scope_option
@talking
@click.pass_obj
def probe(
    screen: Screen, url: str, model: str | None, key_env: str | None, yes: bool, scope: str | None
) -> None:
    """Find the options that fit a server.

    Sends at most 21 small requests to the server at URL. Asks for vectors of short texts, two long
    ones and an empty one, and prints a profile to paste. No key of the environment is sent but that
    of --key-env. Where the model has a price, the cost is reserved first and counts for the budget.
    """
    make = registry.load(_PROVIDER).probe
    if make is None:
        raise ConfigurationError(f"the provider {_PROVIDER!r} that is installed is too old for it")
    probing = make(url, model=model, key=_key(key_env))
    if probing.reach == "public" and key_env is None:
        raise click.UsageError(
            f"{probing.address} is a public address, which wants a key: name the variable that "
            "has it by --key-env."
        )
    most = f"at most {probing.most_requests} requests and {probing.most_tokens:,} tokens"
    if probing.reach != "loopback" and not yes:
        question = f"Send {most} to {probing.address}?"
        if not (screen.interactive and screen.ask(question)):
            raise click.UsageError(
                f"not confirmed, so that nothing was sent: {most} to {probing.address}. "
                "--yes does not ask."
            )
    screen.info(f"Asking {probing.address}: {most}.")
    name, listed = probing.choose_model()
    if model is None and len(listed) > 1:
        screen.info(_that_are_listed(name, listed))
    price = probing.price_of(name)
    found = probing.run() if price is None else _reserved(probing, name, price, scope)
    _show(screen, found, listed, key_env, price)


def _that_are_listed(chosen: str, listed: Sequence[str]) -> str:
    others = [shown(one) for one in listed if one != chosen]
    more = f" and {len(others) - _MOST_NAMES} more" if len(others) > _MOST_NAMES else ""
    named = ", ".join(others[:_MOST_NAMES])
    return (
        f"It lists {len(listed)} models. Asking {shown(chosen)}; --model takes another: "
        f"{named}{more}."
    )


def shown(name: str) -> str:
    return one_line(name, _LONGEST_NAME)


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise click.UsageError(f"the variable {variable} of --key-env is not set.")
    return key


def _reserved(probing: Probing, name: str, price: Price, scope: str | None) -> Mapping[str, Any]:
    """The probe, with the most that it can cost reserved before anything is sent."""
    from embedcore.cli.session import state_ledger
    from embedcore.config import Config
    from embedcore.policy.planning import priced

    config = Config.load()
    profile = config.profile(None)
    whose = scope or profile.scope or config.scope
    limits = config.limits(profile, whose)
    most = priced(probing.most_tokens, price)
    with state_ledger(config, limits) as ledger:
        label = f"{_PROVIDER}:{name}"
        attempt = ledger.hold_and_send(whose, most, limits, loose=True, model=label, inputs=1)
        try:
            found = probing.run()
        except BaseException:
            ledger.settle(attempt, priced(probing.tokens, price), reported=False, close=True)
            raise
        reported = bool(found["tokens_reported"])
        ledger.settle(attempt, priced(found["tokens"], price), reported=reported, close=True)
    return found


def _show(
    screen: Screen,
    found: Mapping[str, Any],
    listed: list[str],
    key_env: str | None,
    price: Price | None,
) -> None:
    profile = toml_of(found, key_env)
    screen.json({**found, "models": listed, "toml": profile, "priced": price is not None})
    rows = [("model", shown(str(found["model"])))]
    rows += [(name, shown(value)) for name, value in found["findings"].items()]
    rows.append(("preset", found["preset"] or _that_fit(found["presets_that_fit"])))
    said = "" if found["tokens_reported"] else " or fewer: not all were reported"
    rows.append(("it took", f"{found['requests']} requests, {found['tokens']:,} tokens{said}"))
    if price is None:
        rows.append(("cost", "no price is known for this model: nothing was counted"))
    else:
        rows.append(("cost", "counted as spent: embedcore usage"))
    screen.result(facts(rows))
    screen.result(f"\n{profile}", whole=True)


def _that_fit(presets: list[str]) -> str:
    """Of many no one is of use: nothing was found that tells them apart."""
    if len(presets) > _MOST_PRESETS:
        return f"not told by the server; {len(presets)} would fit"
    return f"not told by the server; these would fit: {', '.join(presets) or 'none'}"


def toml_of(found: Mapping[str, Any], key_env: str | None) -> str:
    """A profile with these options, to paste."""
    preset, model = found["preset"], f"{_PROVIDER}:{found['model']}"
    lines = [
        "[profiles.probed]",
        f"model = {_quoted(model)}",
        "",
        "[profiles.probed.options]",
    ]
    if preset:
        lines.append(f"# as preset = {_quoted(preset)}, but for what differs here")
    lines += [f"{name} = {_toml(value)}" for name, value in found["options"].items()]
    if key_env is not None:
        lines.append(f"api_key = {_quoted('$' + key_env)}")
    lines.append("# price = 0   # of a server of your own; else dollars for a million tokens")
    return "\n".join(lines)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return _quoted(value) if isinstance(value, str) else str(value)


def _quoted(text: str) -> str:
    # A basic string of TOML is one of JSON, but for a character that JSON leaves as it is.
    return json.dumps(text).replace("\x7f", "\\u007f")
