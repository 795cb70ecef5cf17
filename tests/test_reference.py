"""Do the reference pages still say what the code does?"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import tomllib
import typing
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from embedcore import Config, TokenTracker, errors, events
from embedcore.choice import as_config
from embedcore.config import VARIABLES
from embedcore.prices import table_of
from embedcore.provider import http
from embedcore.provider.hookspecs import Provider
from embedcore.provider.http import Call
from embedcore.provider.options import environment_options
from embedcore.provider.registry import GROUP, LOAD_PLUGINS_VARIABLE, OBSERVERS, load
from embedcore.provider.types import (
    BatchItem,
    BatchLimits,
    BatchOutcome,
    BatchStatus,
    EmbedReply,
    EmbedRequest,
    FoundJob,
    ModelInfo,
    Price,
    RateLimits,
)
from embedcore.settings import (
    DEFAULTS,
    BatchSettings,
    Budget,
    ModelFacts,
    Profile,
    RetrySettings,
)
from embedcore.storage.database import driver
from embedcore.storage.schema import STATE, VECTOR_INDEX
from embedcore.storage.vectors import VectorStore
from embedcore.testing.contract.base import KIT, ContractBase, KitBase

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = DOCS / "reference"


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def rows(name: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first heading this is, without their backquotes."""
    text = page(name)
    table = text[text.index(f"| {heading} |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table]


def name_in(cell: str) -> str:
    return cell.strip("`")


# What stands in the place of a default that needs more than a word.
WORDS = {
    ("Config", "budget"): "no limits",
    ("Config", "retry"): "see below",
    ("Config", "overlong"): 'none: `"truncate"`',
    ("Config", "on_empty"): 'none: `"reject"`',
    ("Config", "on_zero"): 'none: `"warn"`',
    ("Config", "concurrency"): "none: the model's",
    ("Config", "cache"): "none: if it costs",
    ("Config", "cache_dir"): "none: `home`",
    ("Config", "cache_cap"): 'none: `"10 GB"`',
    ("Config", "strategy"): 'none: `"batch"`',
    ("Config", "batch"): "see below",
    ("Profile", "budget"): "no limits",
    ("Budget", "all_scopes"): "no limits",
}


def shown(model: type[BaseModel], name: str) -> str:
    default = model.model_fields[name].default
    if (model.__name__, name) in WORDS:
        return WORDS[model.__name__, name]
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default}`"


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("Setting", Config),
        ("Profile", Profile),
        ("Model", ModelFacts),
        ("Budget", Budget),
        ("Retry", RetrySettings),
        ("Batch", BatchSettings),
    ],
)
def test_every_setting_is_listed_with_its_default(heading, model):
    listed = {name_in(name): default for name, default, _ in rows("configuration.md", heading)}
    assert listed == {name: shown(model, name) for name in model.model_fields}
    assert all(meaning for _, _, meaning in rows("configuration.md", heading))


def test_defaults_that_are_words_are_what_they_say():
    config = Config()
    assert config.budget == Budget()
    assert not any(
        isinstance(value, int | Decimal) for value in vars(config.budget.all_scopes).values()
    )
    assert (config.overlong, config.on_empty, config.on_zero, config.concurrency) == (None,) * 4
    assert (config.cache, config.cache_dir, config.cache_cap) == (None,) * 3
    assert Config(cache_cap="10 GB").cache_cap == DEFAULTS.cache_cap


def test_every_variable_is_listed_with_what_it_sets():
    listed = {name_in(name): meaning for name, meaning in rows("configuration.md", "Variable")}
    of_openai = {variable for _, variable in environment_options(load("openai").options)}
    assert set(listed) == {*VARIABLES, LOAD_PLUGINS_VARIABLE} | of_openai
    for variable, meaning in listed.items():
        path = name_in(meaning)
        if variable.startswith("EMBEDCORE_") and re.fullmatch(r"[a-z_.]+", path):
            assert variable == "EMBEDCORE_" + path.removeprefix("budget.").upper().replace(".", "_")
            holder: type[BaseModel] = Config
            *outer, last = path.split(".")
            for part in outer:
                holder = typing.cast("type[BaseModel]", holder.model_fields[part].annotation)
            assert last in holder.model_fields
    for option, variable in environment_options(load("openai").options):
        assert listed[variable] == f"`options.openai.{option}`"


def test_the_sample_of_settings_is_valid():
    sample, *others = re.findall(r"```toml\n(.*?)```", page("configuration.md"), re.S)
    of_a_model, of_prices = others
    (facts,) = as_config(tomllib.loads(of_a_model)).models.values()
    assert facts.stated() == {"price": Decimal("0.1"), "max_input_tokens": 4096}
    (price,) = table_of(of_prices.encode(), origin="page", read_on=date.max).values()
    assert (price.batch, price.as_of) == (Decimal("0.06"), date(2026, 11, 29))
    config = as_config(tomllib.loads(sample))
    assert config.profile(None).model == "openai:text-embedding-3-small"
    assert config.budget.query_share == 0.1


def test_every_error_is_listed_under_its_parent():
    listed = {name_in(row[0]): name_in(row[1]) for row in rows("errors.md", "Error")}
    tree = {
        name: value.__bases__[0].__name__
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.EmbeddingError)
    }
    assert listed == tree


def test_the_tree_is_drawn_as_it_is():
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"([│├└─ ]*)([A-Z][A-Za-z]+)(\s|$)", line)
        if found is None or not hasattr(errors, found[2]):
            continue
        depth = len(found[1]) // 4
        path = [*path[:depth], found[2]]
        drawn[found[2]] = path[-2] if depth else "Exception"
    listed = {name_in(row[0]): name_in(row[1]) for row in rows("errors.md", "Error")}
    assert drawn == listed


def test_the_attributes_that_are_named_are_there():
    error = errors.EmbeddingError("x")
    assert {name_in(row[0]) for row in rows("errors.md", "Attribute")} == {
        *vars(error),
        "retryable",
        "billed",
    }
    for name, _, when, _ in rows("errors.md", "Error"):
        made = getattr(errors, name_in(name))("x")
        for attribute in re.findall(r"`\.([a-z_]+)`", when):
            assert hasattr(made, attribute), (name, attribute)


def test_every_event_is_listed_with_its_fields():
    listed = {
        name_in(row[0]): re.findall(r"`([a-z_]+)`", row[1]) for row in rows("events.md", "Event")
    }
    assert listed == {
        event.__name__: [field.name for field in dataclasses.fields(event)]
        for event in typing.get_args(events.Event)
    }


@pytest.mark.fault(114)
def test_the_state_file_is_as_described(state_home):
    tracker = TokenTracker()
    tracker.record_usage(1)
    tracker.close()
    connection = driver().connect(state_home / "state.db")
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT GLOB '[_s]*'"
    ).fetchall()
    columns = [
        f"{table}.{row[1]}"
        for (table,) in tables
        for row in connection.execute(f'PRAGMA table_info("{table}")')
    ]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    connection.close()
    assert sorted(columns) == sorted(name_in(row[0]) for row in rows("state-file.md", "Column"))
    assert version == STATE.version
    assert f"`PRAGMA user_version` is {version}." in page("state-file.md")
    assert "state.db-wal" in page("state-file.md"), "how to copy it whole"


def test_the_store_of_billed_vectors_is_as_described(tmp_path):
    store = VectorStore(tmp_path / "vectors", cap=1)
    store.database.open()
    store.close()
    connection = driver().connect(tmp_path / "vectors" / "index.db")
    columns = [
        f"{table}.{row[1]}"
        for table in ("origin", "vector", "tally", "segment", "claim", "claimant")
        for row in connection.execute(f'PRAGMA table_info("{table}")')
    ]
    tables = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE type = 'table' "
        "AND name NOT GLOB '_*' AND name NOT GLOB 'sqlite_*'"
    ).fetchone()
    version, pages, vacuum = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("user_version", "page_size", "auto_vacuum")
    )
    connection.close()
    listed = [name_in(row[0]) for row in rows("state-file.md", "Column of `index.db`")]
    assert (sorted(columns), tables) == (sorted(listed), (6,))
    assert version == VECTOR_INDEX.version
    assert f"`PRAGMA user_version` is {version} here" in page("state-file.md")
    assert (pages, vacuum) == (4096, 2)


def test_the_lines_of_the_log_are_those_that_are_written():
    text = page("logging.md")
    for level in ("INFO", "WARNING", "ERROR"):
        assert f"| {level} |" in text
    for logger in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        assert f"`{logger}`" in text


def test_every_logger_is_listed():
    root = DOCS.parent
    sources = [*root.glob("embedcore/**/*.py"), *root.glob("providers/*/src/**/*.py")]
    found = {
        name
        for source in sources
        for name in re.findall(r'getLogger\("(embedcore[\w.]*)"\)', source.read_text("utf-8"))
    }
    assert {"embedcore", "embedcore.batches"} <= found
    assert {row[0].strip("`") for row in rows("logging.md", "Logger")} == found


@pytest.mark.parametrize(
    "kind",
    [
        ModelInfo,
        Price,
        EmbedRequest,
        EmbedReply,
        RateLimits,
        BatchLimits,
        BatchItem,
        BatchOutcome,
        BatchStatus,
        FoundJob,
        Provider,
        Call,
    ],
)
def test_every_field_of_a_providers_values_is_listed_with_its_default(kind):
    def default(field):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            return "required"
        return f"`{repr(value).translate({39: 34})}`"

    page = "provider-http.md" if kind is Call else "provider-values.md"
    listed = {name_in(row[0]): row[1] for row in rows(page, kind.__name__)}
    assert listed == {field.name: default(field) for field in dataclasses.fields(kind)}


def test_every_name_of_the_session_is_on_its_page():
    text = page("provider-http.md")
    assert [name for name in http.__all__ if name not in text] == []


def links() -> list[tuple[Path, str]]:
    """Every link of every page to a place in this repository."""
    return [
        (path, target)
        for path in sorted(DOCS.rglob("*.md"))
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
        if "://" not in target
    ]


@pytest.mark.parametrize(("path", "target"), links())
def test_every_link_leads_somewhere(path, target):
    file, _, heading = target.partition("#")
    there = (path.parent / file).resolve() if file else path
    assert there.exists()
    if heading:
        slugs = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.M)
        assert heading in [re.sub(r"[^\w -]", "", slug).lower().replace(" ", "-") for slug in slugs]


def test_every_decision_says_what_was_given_up():
    pages = sorted((DOCS / "decisions").glob("*.md"))
    numbers = [path.name[:4] for path in pages]
    # Each number once; those of work that has not arrived yet are left out.
    assert len(set(numbers)) == len(numbers)
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert re.match(rf"# {path.name[:4]}: .+\n", text), path
        for heading in ("## Context", "## Choice", "## What we gave up"):
            assert text.count(heading) == 1, (path, heading)
        for successor in re.findall(r"Superseded by \[?(\d{4})", text):
            assert successor in numbers, (path, successor)
            assert successor > path.name[:4], (path, successor)


def test_every_assumption_names_its_switch():
    text = (DOCS / "assumptions.md").read_text(encoding="utf-8")
    table = text[text.index("| Name | Assumption |") :].partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 10
    for row in table:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5
        assert all(cells), row
        for name in re.findall(r"`options\.openai\.([a-z_]+)", cells[4]):
            assert name in load("openai").options.model_fields


def public_names(module: str) -> set[str]:
    """What a module defines or lists, without what begins with an underscore."""
    found = importlib.import_module(module)
    listed = getattr(found, "__all__", None)
    if listed is not None:
        return set(listed)
    names: set[str] = set()
    for node in ast.parse(inspect.getsource(found)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        names |= {one.id for one in targets if isinstance(one, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("row", rows("plugin-api.md", "Stable module"), ids=lambda row: row[0])
def test_what_is_stable_is_what_there_is(row):
    module, listed, meaning = row
    assert set(re.findall(r"`(\w+)`", listed)) == public_names(module.strip("`"))
    assert meaning


def test_the_page_of_the_plugin_api_names_versions_as_they_are():
    text = page("plugin-api.md")
    assert f'`kit = "{KIT}"`' in text
    assert {KitBase.kit, ContractBase.kit} == {"1"}
    for group in (GROUP, OBSERVERS):
        assert f"`{group}`" in text
    root = DOCS.parent
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    major, minor, _ = map(int, version.split("."))
    assert f"`embedcore>={major}.{minor},<{major}.{minor + 1}`" in text
    template = root / "embedcore" / "cli" / "templates" / "common" / "pyproject.toml.txt"
    assert f"embedcore>={major}.{minor},<{major}.{minor + 1}" in template.read_text()
