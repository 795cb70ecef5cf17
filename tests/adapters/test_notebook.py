"""Progress in the kernel of a notebook: shown below the cell, as one line."""

from __future__ import annotations

import pytest

WHY = "needs the extra integrations: make test-integrations"
pytest.importorskip("ipykernel", reason=WHY)
nbclient = pytest.importorskip("nbclient", reason=WHY)
nbformat = pytest.importorskip("nbformat", reason=WHY)

CELL = """
from embedcore import EmbeddingClient
from embedcore.testing import FakeEmbedder
with EmbeddingClient(embedder=FakeEmbedder()) as client:
    {call}
"""


@pytest.mark.case("G3")
@pytest.mark.parametrize(
    "call",
    [
        'client.embed([f"text {n}" for n in range(300)], progress=True);',
        'list(client.embed_iter([f"text {n}" for n in range(300)], progress=True));',
        'await client.aembed([f"text {n}" for n in range(300)], progress=True);',
    ],
    ids=["embed", "embed_iter", "aembed"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_progress_is_shown_below_the_cell(call: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.format(call=call))])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = "".join(
        output["text"]
        for output in notebook.cells[0].outputs
        if output["output_type"] == "stream" and output["name"] == "stderr"
    )
    assert "\r300 of 300 texts" in shown
    assert shown.count("\n") == 1
