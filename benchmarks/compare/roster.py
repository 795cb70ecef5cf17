"""Who takes part, in the order of the table?"""

from __future__ import annotations

from importlib import import_module
from typing import Final

from compare.clients.contract import Client, Row

NAMES: Final = (
    "limit",
    "embedcore",
    "openai_sdk",
    "langchain",
    "llama_index",
    "haystack",
    "chroma",
    "litellm",
    "simonw_llm",
)


def clients() -> list[Client]:
    return [import_module(f"compare.clients.{name}").CLIENT for name in NAMES]


def chosen(only: str | None) -> list[tuple[Client, list[Row]]]:
    """The clients and rows that ``--only`` asks for by either's name; the limit always takes part,
    since everything is measured against it, over TLS too where a row is. Raises ``ValueError`` for
    a name that is none."""
    wanted = {name.strip() for name in only.split(",")} if only else None
    found, known = [], set()
    for client in clients():
        known |= {client.name, *(row.name for row in client.rows)}
        rows = [
            row
            for row in client.rows
            if wanted is None or row.name == "limit" or wanted & {client.name, row.name}
        ]
        if rows:
            found.append((client, rows))
    if wanted is not None and wanted - known:
        raise ValueError(
            f"no client {', '.join(sorted(wanted - known))}; there are: {', '.join(sorted(known))}"
        )
    own, others = found[0][1], [row for _, rows in found[1:] for row in rows]
    if any(row.tls for row in others) and not any(row.tls for row in own):
        own += [row for row in found[0][0].rows if row.tls]
    return found


def row(name: str) -> tuple[Client, Row]:
    """One row and whose it is. Raises ``ValueError`` for a name that is none."""
    for client in clients():
        for one in client.rows:
            if one.name == name:
                return client, one
    raise ValueError(f"no row {name}")
