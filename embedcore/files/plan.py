"""What would a run over files cost? Reads everything, sends nothing, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from embedcore.files.inputs import Inputs
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
        target.require_free()
        target.require_apart_from(rows)
        if rows.are_empty():
            return FilePlan()
        bought = Bought(target, client, input_type=input_type, overwrite=overwrite)
        found = scan(rows, on_empty=on_empty)
        missing = bought.missing(found)
        plan = planned(client, rows, found, missing, input_type=input_type, block=block)
        return replace(plan, damaged=bought.damaged)


def planned(
    client: EmbeddingClient,
    inputs: Inputs,
    found: Scan,
    missing: NDArray[np.intp],
    *,
    input_type: str | None,
    block: int,
    batch: bool = False,
) -> FilePlan:
    """The plan for the rows at the positions ``missing``, summed block by block.

    ``missing``: those whose vectors are not at hand; what the cache has of them costs nothing.
    ``batch``: what a batch would submit, and its price.
    """
    plans = [
        client.plan([row.text for row in rows], input_type=input_type, batch=batch)
        for rows in blocks(rows_at(inputs, found, missing), max_rows=block)
    ]
    reused = len(found.firsts) - len(missing)
    plan = FilePlan(
        rows=found.rows,
        empty=int(found.empty.sum()),
        reused=reused,
        rejected=sum(one.rejected for one in plans),
        cached=sum(one.cached for one in plans),
        in_flight=sum(one.in_flight for one in plans),
        to_embed=sum(one.to_embed for one in plans),
        tokens=sum(one.tokens for one in plans),
        exact=all(one.exact for one in plans),
        picodollars=_total([one.picodollars for one in plans]),
        requests=sum(one.requests for one in plans),
        truncated=sum(one.truncated for one in plans),
        perhaps_long=sum(one.perhaps_long for one in plans),
    )
    # Two texts that are equal only once they are cut are sent once as well.
    return replace(plan, duplicates=plan.rows - plan.empty - plan.rejected - plan.texts)


def _total(costs: Sequence[int | None]) -> int | None:
    return None if None in costs else sum(cost or 0 for cost in costs)
