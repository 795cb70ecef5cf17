"""Writes docs/reference/providers.md from the providers of this repository: run it as a script."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic.fields import FieldInfo

from embedcore.provider import registry
from embedcore.provider.hookspecs import Provider
from embedcore.provider.options import environment_options
from embedcore.provider.types import ModelInfo

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "providers.md"

_HEAD = """\
# Providers

Every provider of this repository, and the models that it knows. Others may still work: a name is
passed on as it is. Prices have the date of the table that they were taken from, and a provider's
option `price` replaces them. This page is written by `tests/docs/providers_page.py`.

"""
_CUTS = {
    "error": "refused, then shortened",
    "silent": "cut in silence",
    "reported": "cut, and said",
    "unknown": "not known",
}


def written() -> str:
    """The page as it must be."""
    folders = sorted(path.parent for path in ROOT.glob("providers/*/pyproject.toml"))
    providers = {folder: registry.load(folder.name) for folder in folders}
    return "".join((_HEAD, *_overview(providers), *_models(providers.values())))


def _overview(providers: dict[Path, Provider]) -> Iterator[str]:
    yield from _row("Provider", "What it is", "Key", "Address")
    yield from _row("---", "---", "---", "---")
    for folder, provider in providers.items():
        told = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        variables = dict(environment_options(provider.options))
        fields = provider.options.model_fields
        yield from _row(
            f"[`{provider.name}`](../../providers/{folder.name}/README.md)",
            told["description"].rstrip("."),
            _key(fields, variables),
            _address(fields),
        )
    yield "\n"


def _key(fields: Mapping[str, FieldInfo], variables: Mapping[str, str]) -> str:
    if "api_key" in variables:
        return f"`${variables['api_key']}`"
    return "the service's" if "api_key" in fields else "none"


def _address(fields: Mapping[str, FieldInfo]) -> str:
    if "base_url" not in fields:
        return "this machine"
    default = fields["base_url"].default
    return "the service's" if default is None else f"`{default}`"


def _models(providers: Iterable[Provider]) -> Iterator[str]:
    heads = ("Model", "Dimensions", "Longest text", "Texts in a request", "Input types")
    heads += ("Long texts", "$ per million tokens", "In a batch", "As of")
    yield from _row(*heads)
    yield from _row("---", *("---:",) * 3, "---", "---", "---:", "---:", "---")
    for provider in providers:
        for info in provider.models.values():
            exact = provider.create(info.model, provider.options()).tokenizer.exact
            yield from _row(*_facts(info, exact=exact))


def _facts(info: ModelInfo, *, exact: bool) -> tuple[str, ...]:
    price = info.price
    batch = None if price is None else price.batch
    return (
        f"`{info.provider}:{info.model}`",
        str(info.dimensions or "?"),
        f"{info.max_input_tokens:,}" if info.max_input_tokens else "any",
        f"{info.max_texts_per_request:,}",
        ", ".join(info.input_types) or "no difference",
        _long_texts(info, exact=exact),
        "?" if price is None else f"{price.immediate.normalize():f}" if not price.free else "free",
        "" if batch is None else f"{batch.normalize():f}",
        "" if price is None or price.as_of is None else price.as_of.isoformat(),
    )


def _long_texts(info: ModelInfo, *, exact: bool) -> str:
    if info.max_input_tokens is None and info.local:
        return "whole"
    return "counted, then cut" if exact else _CUTS[info.truncation]


def _row(*cells: str) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
