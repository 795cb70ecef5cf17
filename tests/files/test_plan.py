"""A plan says what the run then does, and changes nothing."""

from __future__ import annotations

import io
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from embedcore.errors import ConfigurationError, InputRejected, ProviderUnavailable
from embedcore.files.run import embed_files, plan_files

TEXTS = st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "eeeee", ""]), max_size=12)


@given(
    before=TEXTS,
    stopped=TEXTS,
    texts=TEXTS,
    block=st.integers(1, 5),
    suffix=st.sampled_from(["jsonl", "npy", "parquet"]),
)
def test_the_plan_is_what_the_run_does(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[str],
    stopped: list[str],
    texts: list[str],
    block: int,
    suffix: str,
    new_client: Any,
) -> None:
    output = tmp_path_factory.mktemp("plan") / f"v.{suffix}"
    embed_files(new_client(), [iter(before)], output, on_empty="keep")
    down = new_client(stop_after=lambda call: (1, ProviderUnavailable("down")))
    if {*stopped} - {*before, ""}:
        with pytest.raises(ProviderUnavailable):
            embed_files(down, [iter(stopped)], output, on_empty="keep")
    state = {path: path.read_bytes() for path in output.parent.iterdir()}
    client = new_client(longest=3)
    plan = plan_files(client, [iter(texts)], output, block=block, on_empty="keep")
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == state
    assert not client.calls
    assert plan.rows == plan.empty + plan.duplicates + plan.reused + plan.to_embed == len(texts)
    report = embed_files(client, [iter(texts)], output, block=block, on_empty="keep")
    assert (report.embedded, report.reused) == (plan.to_embed, plan.reused)
    assert (report.duplicates, report.empty) == (plan.duplicates, plan.empty)
    assert report.usage.tokens == plan.tokens
    assert report.usage.cost == plan.cost
    assert plan.requests == -(-plan.to_embed // block) == len(client.calls)
    assert plan.truncated == sum(len(text) > 3 for text in client.billed)


def test_without_an_output_all_is_missing(client: Any) -> None:
    plan = plan_files(client, ["-"], stdin=io.BytesIO(b"a\nbb\na\n"))
    assert (plan.rows, plan.to_embed, plan.duplicates, plan.reused) == (3, 2, 1, 0)
    assert (plan.tokens, plan.exact, plan.cost) == (3, False, Decimal("6E-8"))


def test_an_unknown_price_stays_unknown(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    honest = client.plan
    monkeypatch.setattr(client, "plan", lambda texts, **options: replace(honest(texts), cost=None))
    plan = plan_files(client, [iter(["a", "b"])], block=1)
    assert plan.cost is None


def test_a_plan_raises_what_the_run_would(tmp_path: Path, client: Any, new_client: Any) -> None:
    output = tmp_path / "a.jsonl"
    embed_files(client, [iter(["a"])], output)
    with pytest.raises(ConfigurationError, match="must not mix"):
        plan_files(new_client(model="other"), [iter(["a"])], output)
    with pytest.raises(InputRejected, match="empty"):
        plan_files(client, [iter([""])], output)
    plan = plan_files(new_client(model="other"), [iter(["a"])], output, overwrite=True)
    assert plan.to_embed == 1
