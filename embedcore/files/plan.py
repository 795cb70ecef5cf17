"""What would a run over files cost? Reads everything, sends nothing, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embedcore.files.inputs import Inputs
from embedcore.files.origin import origin_of
from embedcore.files.resume import Bought, Target, require_free_names
from embedcore.files.scan import Scan, blocks, rows_at, scan
from embedcore.files.types import Columns, FilePlan, InputFormat, OnError, Source

if TYPE_CHECKING:
    from embedcore import EmbeddingClient

DEFAULT_BLOCK = 8192


def plan_files(
    client: EmbeddingClient,
    inputs: Sequence[Source],
    output: str | PathLike[str] | None = None,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    keep: Sequence[str] = (),
    input_type: str | None = None,
    input_format: InputFormat | None = None,
    on_empty: OnError = "raise",
    overwrite: bool = False,
    block: int = DEFAULT_BLOCK,
    stdin: BinaryIO | None = None,
) -> FilePlan:
    """What ``embed_files`` with the same arguments would do now. ``output`` None: all is missing.

    Raises what ``embed_files`` would raise before it sends anything. Standard input is used up: to
    plan and run in one go, give ``on_plan`` to ``embed_files``.
    """
    columns = Columns(text=text_column, id=id_column, keep=tuple(keep))
    require_free_names(columns.keep)
    target = None if output is None else Target.at(Path(output))
    with Inputs(inputs, columns=columns, input_format=input_format, stdin=stdin) as rows:
        if target is None:
            found = scan(rows, on_empty=on_empty)
            return planned(client, rows, found, found.firsts, input_type=input_type, block=block)
        target.require_apart_from(rows)
        bought = Bought(target, origin_of(client, input_type), overwrite=overwrite)
        found = scan(rows, on_empty=on_empty)
        missing = bought.missing(found)
        return planned(client, rows, found, missing, input_type=input_type, block=block)


def planned(
    client: EmbeddingClient,
    inputs: Inputs,
    found: Scan,
    missing: NDArray[np.intp],
    *,
    input_type: str | None,
    block: int,
) -> FilePlan:
    """The plan for embedding the rows at the positions ``missing``, summed block by block."""
    tokens = requests = truncated = picodollars = 0
    exact = priced = True
    for rows in blocks(rows_at(inputs, found, missing), max_rows=block):
        plan = client.plan([row.text for row in rows], input_type=input_type)
        tokens += plan.tokens
        requests += plan.requests
        truncated += plan.truncated
        exact = exact and plan.exact
        priced = priced and plan.picodollars is not None
        picodollars += plan.picodollars or 0
    empty = int(found.empty.sum())
    texts = len(found.firsts)
    return FilePlan(
        rows=found.rows,
        empty=empty,
        duplicates=found.rows - empty - texts,
        reused=texts - len(missing),
        missing=len(missing),
        tokens=tokens,
        exact=exact,
        picodollars=picodollars if priced else None,
        requests=requests,
        truncated=truncated,
    )
