"""``embedcore similar``: the rows of an output that are nearest to a question."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embedcore.choice import full_name
from embedcore.cli.options import model_option, scope_option, talking
from embedcore.cli.screen import Screen
from embedcore.cli.session import opened
from embedcore.cli.text import one_line, plural, shown_path, wrapped
from embedcore.client import EmbeddingClient
from embedcore.config import Config
from embedcore.errors import ConfigurationError
from embedcore.files.formats import output_format
from embedcore.files.resume import same_space
from embedcore.files.search import search

if TYPE_CHECKING:
    from embedcore.files.search import Hit
    from embedcore.files.types import Origin

_LINES = 3
_LONGEST_ID = 1000
_NARROWEST, _WIDEST = 40, 100


@click.command(name="similar")
@click.option(
    "-c",
    "--question",
    "questions",
    required=True,
    multiple=True,
    metavar="TEXT",
    help="Repeatable.",
)
@click.option(
    "-i",
    "--vectors",
    required=True,
    type=click.Path(path_type=Path),
    help="A file that embedcore embed wrote.",
)
@click.option(
    "-k", "--limit", type=click.IntRange(min=1), default=5, show_default=True, help="How many rows."
)
@click.option("--input-type", metavar="TYPE", default="query", show_default=True)
@model_option
@scope_option
@talking
@click.pass_obj
def command(
    screen: Screen,
    questions: tuple[str, ...],
    vectors: Path,
    limit: int,
    input_type: str,
    model: str | None,
    scope: str | None,
) -> None:
    """Find the rows nearest to a question, by exact cosine, best first.

    The question is embedded with the model of the file. Another one (-m) is refused: distances
    between vectors of two models mean nothing.
    """
    if not vectors.is_file():
        raise click.UsageError(f"{shown_path(vectors)}: there is no such file.")
    # Outside of what follows: what is no output names no model either.
    origin = output_format(vectors).origin(vectors)
    try:
        with opened(model or _model_of(origin), scope) as ready:
            found = search(ready.client, questions, vectors, limit=limit, input_type=input_type)
            name = ready.name
    except ConfigurationError as error:
        if model is None:
            error.add_note(
                f"the model is the one that {shown_path(vectors)} names; -m names another"
            )
        raise
    pairs = list(zip(questions, found, strict=True))
    if found.damaged:
        screen.error(
            f"warning: {plural(found.damaged, 'row')} of {shown_path(vectors)} damaged and left "
            "out; embed the input again into it: what is damaged is embedded anew"
        )
    fields = [_fields(*pair) for pair in pairs]
    screen.json({"model": name, "damaged": found.damaged, "questions": fields})
    for question, hits in pairs:
        screen.result(_text(question, hits, name_question=len(questions) > 1))


def _model_of(origin: Origin | None) -> str | None:
    """The model, or the profile, that makes vectors like those of a file."""
    if origin is None:
        return None
    return next(_alike(origin), origin.model)


def _alike(origin: Origin) -> Iterator[str]:
    """Names whose settings give the same fingerprint: options may be set under any profile."""
    config = Config.load()
    for name in dict.fromkeys([origin.model, config.model, *config.profiles]):
        model = ":".join(full_name(config.profile(name).model, config))
        if model == origin.model:
            with EmbeddingClient(name, config=config) as client:
                if same_space(origin, client):
                    yield name


def _fields(question: str, hits: Sequence[Hit]) -> dict[str, object]:
    return {"question": question, "hits": [asdict(hit) for hit in hits]}


def _text(question: str, hits: Sequence[Hit], *, name_question: bool) -> str:
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    lines = [one_line(question, width)] if name_question else []
    for number, hit in enumerate(hits, 1):
        lines.append(f"{number:>2}. {hit.score:.4f}  {one_line(hit.id, _LONGEST_ID)}")
        if hit.text is not None:
            lines.append(wrapped(hit.text, width=width, lines=_LINES, indent="    "))
    if not hits:
        lines.append("the file has no rows")
    return "\n".join(lines)
