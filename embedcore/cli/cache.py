"""``embedcore cache``: the size of the vector cache, and making room in it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import click

from embedcore import money
from embedcore.assembly import STATE_FILE, open_ledger, vector_store
from embedcore.choice import Choice
from embedcore.cli.doctor import chosen, whether_on
from embedcore.cli.estimate import agree, estimated
from embedcore.cli.options import (
    Group,
    age,
    model_option,
    quiet_option,
    scope_option,
    talking,
    yes_option,
)
from embedcore.cli.process import FAILED, USAGE
from embedcore.cli.progress import LINE_SECONDS
from embedcore.cli.screen import Screen
from embedcore.cli.session import opened
from embedcore.cli.text import facts, plural, shown_path, size
from embedcore.config import Config, state_folder
from embedcore.errors import ConfigurationError
from embedcore.files.types import FilePlan
from embedcore.policy.cache import PROBE_TEXT, probe
from embedcore.storage import usage, vector_upkeep as housekeeping
from embedcore.storage.vector_migration import Moved, migrate
from embedcore.storage.vector_upkeep import Contents

if TYPE_CHECKING:
    from embedcore.client import EmbeddingClient
    from embedcore.storage.vectors import VectorStore


_MOVES: Final = "they are found there; embedcore cache migrate moves them"


def _bytes(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """``5GB``, as bytes."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return None if value is None else int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError as error:
        raise click.BadParameter(f"{value!r}: write it like 500MB or 5GB") from error


@click.group(cls=Group, name="cache", invoke_without_command=True)
@model_option
@talking
@click.pass_context
def command(ctx: click.Context, model: str | None) -> None:
    """The cache: how large it is, and how often it helped.

    A text that was paid for is not paid for again while its vector is cached.
    """
    if ctx.invoked_subcommand is not None:
        return
    screen: Screen = ctx.obj
    choice = chosen(model)
    _, on = whether_on(choice)
    store = vector_store(choice.config, choice.settings)
    there = bool(store.files)
    found = Contents(cap=store.cap)
    if there:
        with closing(store):
            found = housekeeping.contents(store)
    free = _disk_free(store)
    screen.json(
        {"path": str(store.path), "exists": there, "on": on, "disk_free": free, **asdict(found)}
    )
    screen.result(facts(list(_lines(store, found, on, free, there))))
    if found.vectors:
        rows = [(name, f"{count:,}") for name, count in found.vectors.items()]
        screen.table(("MODEL", "VECTORS"), rows, numbers={1}, title="\n")


@command.command(name="where")
@model_option
@talking
@click.pass_obj
def where(screen: Screen, model: str | None) -> None:
    """The path of its folder, whether or not it is there yet."""
    choice = chosen(model)
    path = vector_store(choice.config, choice.settings).path
    screen.json({"path": str(path)})
    screen.result(str(path), whole=True)


@command.command(name="prune")
@click.option(
    "--older-than", callback=age, metavar="AGE", help="Only those kept since before, 90d."
)
@click.option(
    "--model", "-m", metavar="MODEL", help="Only those of one provider:model, or of a profile."
)
@click.option("--down-to", callback=_bytes, metavar="SIZE", help="No more than that needs, 5GB.")
@click.option("--all", "everything", is_flag=True, help="All of them.")
@click.option("--even-needed", is_flag=True, help="Also those that a batch still needs.")
@click.option("--dry-run", is_flag=True, help="Show what would go, and stop.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@quiet_option
@talking
@click.pass_obj
def prune(
    screen: Screen,
    older_than: float | None,
    model: str | None,
    down_to: int | None,
    everything: bool,
    even_needed: bool,
    dry_run: bool,
    yes: bool,
) -> int:
    """Delete vectors, the oldest first, and give their space back.

    Their texts are paid for again when they are embedded again. What a batch still needs stays, for
    keep_days, unless --even-needed is given: its rows are then without vectors.
    """
    if older_than is None and model is None and down_to is None and not everything:
        raise click.UsageError("say which: --older-than, --model, --down-to, or --all")
    choice, name = _choice(model)
    rule: dict[str, Any] = {
        "older_than": older_than or 0.0,
        "model": name,
        "down_to": down_to,
        "even_needed": even_needed,
    }
    with _there(screen, choice) as store:
        if store is None:
            return 0
        going = housekeeping.prunable(store, **rule)
        cost = _cost_to_embed_again(choice.config, going)
        if not going or dry_run:
            answer = {"deleted": 0, "prunable": going, "cost_to_embed_again": cost}
            screen.json(answer)
            screen.result(_what_goes(going, cost, down_to) if going else "nothing is to be pruned")
            return 0
        if not _agreed(screen, _what_goes(going, cost, down_to), yes=yes):
            screen.error("Nothing was deleted.")
            return USAGE
        deleted = housekeeping.prune(store, **rule)
        used = store.used
    screen.json({"deleted": deleted, "prunable": going, "cost_to_embed_again": cost, "used": used})
    screen.report(f"{plural(deleted, 'vector')} deleted; {size(used)} in use")
    return 0


@command.command(name="verify")
@model_option
@quiet_option
@talking
@click.pass_obj
def verify(screen: Screen, model: str | None) -> int:
    """Read every vector, and delete the damaged ones.

    Those are embedded again when they are needed. Ends with 1 if any was damaged.
    """
    seen = damaged = 0
    with _there(screen, chosen(model)) as store:
        if store is None:
            return 0
        total = sum(housekeeping.contents(store).vectors.values())
        following = time.monotonic() + LINE_SECONDS
        for seen, damaged in housekeeping.verify(store):
            if time.monotonic() >= following:
                screen.info(f"{seen:,} of {plural(total, 'vector')} read, {damaged:,} damaged")
                following = time.monotonic() + LINE_SECONDS
    screen.json({"read": seen, "damaged": damaged})
    ending = f"{damaged:,} were damaged, and are deleted" if damaged else "none is damaged"
    screen.report(f"{plural(seen, 'vector')} read: {ending}", failed=bool(damaged))
    return FAILED if damaged else 0


@command.command(name="migrate")
@click.option("--dry-run", is_flag=True, help="Show what would be moved, and stop.")
@model_option
@quiet_option
@talking
@click.pass_obj
def migrating(screen: Screen, dry_run: bool, model: str | None) -> int:
    """Move the vectors of vectors.db into the folder of the cache.

    That file is removed at the end. Until then its vectors are found where they are, and an
    interrupted run is continued by the next. Calls and batches can go on meanwhile.
    """
    choice = chosen(model)
    store = vector_store(choice.config, choice.settings)
    with closing(store):
        if not store.has_old:
            screen.json({"path": str(store.old.path), "exists": False})
            screen.result(f"nothing is to be moved: there is no {shown_path(store.old.path)}")
            return 0
        total = housekeeping.contents(store).not_moved or 0
        if dry_run:
            screen.json({"to_move": total, "moved": 0})
            screen.result(
                f"{plural(total, 'vector')} would be moved from {shown_path(store.old.path)} to "
                f"{shown_path(store.path)}"
            )
            return 0
        done, following = Moved(), time.monotonic() + LINE_SECONDS
        for done in migrate(store):
            if time.monotonic() >= following:
                screen.info(f"{done.moved + done.there:,} of {plural(total, 'vector')} moved")
                following = time.monotonic() + LINE_SECONDS
    screen.json(done._asdict())
    screen.result(_what_was_moved(store, done))
    return 0


def _what_was_moved(store: VectorStore, done: Moved) -> str:
    there = f", {done.there:,} were there already" if done.there else ""
    bad = f", {done.damaged:,} were damaged and are deleted" if done.damaged else ""
    ending = (
        f"{shown_path(store.old.path)} is removed"
        if done.removed
        else f"{shown_path(store.old.path)} is empty, and open in another program: the next "
        "embedcore cache migrate removes it"
    )
    return f"{plural(done.moved, 'vector')} moved{there}{bad}; {ending}"


@command.command(name="probe")
@click.argument("model", required=False)
@scope_option
@yes_option
@quiet_option
@talking
@click.pass_obj
def probing(screen: Screen, model: str | None, scope: str | None, yes: bool) -> int:
    """Ask whether a provider has put another model behind a name.

    Embeds one short text, whatever is cached, and compares it with the one of the first probe. Ends
    with 1 if it is another. The cost is shown first, and asked about as by other commands that pay.
    """
    screen.paying = False
    with opened(model, scope) as ready:
        client = ready.client
        estimate = estimated(ready, _plan_of_probe(client))
        screen.info(estimate.text(ready, brief=True))
        if not agree(screen, ready, estimate, yes=yes, ask_above=ready.config.confirm_above):
            screen.error("Nothing was sent.")
            return USAGE
        screen.paying = True
        result = client.embed([PROBE_TEXT], cache=False)
        screen.paying = None
        choice = chosen(model, ready.config)
        with closing(vector_store(choice.config, choice.settings)) as store:
            found = probe(store, client.info, client.fingerprint, result.vectors)
    screen.json({"model": ready.name, "cosine": found.cosine, "changed": found.changed})
    if found.cosine is None:
        screen.report(f"{ready.name}: its vector is kept; the next probe compares with it")
    elif not found.changed:
        screen.report(f"{ready.name}: the same model as before (cosine {found.cosine:.6f})")
    else:
        screen.result(
            f"{ready.name}: another model than before (cosine {found.cosine:.6f}). Its vectors do "
            f"not belong to those that are kept:\n  embedcore cache prune --model {ready.name}"
        )
    return FAILED if found.changed else 0


def _plan_of_probe(client: EmbeddingClient) -> FilePlan:
    """One text, which is never taken from the cache."""
    plan = client.plan([PROBE_TEXT], cache=False)
    return FilePlan(
        rows=plan.rows,
        to_embed=plan.to_embed,
        tokens=plan.tokens,
        exact=plan.exact,
        cost=plan.cost,
        requests=plan.requests,
    )


@contextmanager
def _there(screen: Screen, choice: Choice) -> Iterator[VectorStore | None]:
    """The cache, to be closed after the block; None if there is none, which is said."""
    store = vector_store(choice.config, choice.settings)
    if not store.files:
        screen.json({"path": str(store.path), "exists": False})
        screen.result(f"nothing is kept yet in {shown_path(store.path)}")
        yield None
        return
    with closing(store):
        yield store


def _lines(
    store: VectorStore, found: Contents, on: str, free: int | None, there: bool
) -> Iterator[tuple[str, str]]:
    yield "vectors", on
    yield "place", str(store.path) if there else f"{store.path} (not there yet)"
    disk = "" if free is None else f"; {size(free)} free on the disk"
    yield "size", f"{size(found.used)} of at most {size(found.cap)}{disk}"
    if found.not_moved is not None:
        yield "not moved", f"{plural(found.not_moved, 'vector')} in {store.old.path}: {_MOVES}"
    asked = found.hits + found.misses
    if asked:
        share = f"{found.hits / asked:.1%}"
        yield "cached", f"{share} of {plural(asked, 'text')} were found and not paid for again"


def _disk_free(store: VectorStore) -> int | None:
    folder = next(one for one in store.path.absolute().parents if one.exists())
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _choice(model: str | None) -> tuple[Choice, str | None]:
    """Where to look, and for which ``provider:model``; None: for all."""
    if model is None:
        return chosen(None), None
    try:
        choice = chosen(model)
    except ConfigurationError:
        # A provider that is not installed any more may have left vectors.
        if ":" in model:
            return chosen(None), model
        raise
    return choice, f"{choice.provider}:{choice.model}"


def _cost_to_embed_again(config: Config, going: dict[str, int]) -> Decimal | None:
    """By what the texts of these models cost on average, by the ledger; None if it does not say."""
    if not os.path.lexists(state_folder(config) / STATE_FILE):
        return None
    ledger = open_ledger(config, ())
    with closing(ledger.database):
        each = usage.cost_of_texts(ledger)
    if any(model not in each for model in going):
        return None
    return money.in_dollars(sum(count * each[model] for model, count in going.items()))


def _what_goes(going: dict[str, int], cost: Decimal | None, down_to: int | None) -> str:
    about = "about " if down_to is not None else ""
    price = (
        "what they would cost again is not known"
        if cost is None
        else f"to embed them again would cost about {money.shown(cost)}"
    )
    return f"{about}{plural(sum(going.values()), 'vector')} would be deleted; {price}."


def _agreed(screen: Screen, question: str, *, yes: bool) -> bool:
    if yes:
        return True
    if not screen.interactive:
        raise click.UsageError(f"{question} Without a terminal to ask: add --yes")
    return screen.ask(f"{question} Go on?")
