"""Does embedcore stay light without its adapters, and is it said what one of them needs?"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

ADAPTERS = {
    "langchain": ("langchain_core", "EmbedcoreEmbeddings"),
    "opentelemetry": ("opentelemetry", "OpenTelemetryObserver"),
}
PROGRAM = """
import sys
import embedcore, embedcore.adapters
embedcore.EmbeddingClient("hashing:64").embed_text("a")
print([name for name in {names!r} if name in sys.modules])
"""


def test_embedcore_alone_loads_neither():
    names = [library for library, _ in ADAPTERS.values()]
    program = PROGRAM.format(names=names)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_absent_library_is_named_with_what_installs_it(adapter, monkeypatch):
    library, _ = ADAPTERS[adapter]
    module = f"embedcore.adapters.{adapter}"
    for name in list(sys.modules):
        if name == module or name.partition(".")[0] == library:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {library.split('_')[0]}-") as why:
        importlib.import_module(module)
    assert why.value.name.partition(".")[0] == library


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_offers_its_class(adapter):
    library, name = ADAPTERS[adapter]
    pytest.importorskip(library, reason=f"needs the extra {adapter}: make test-integrations")
    kind = getattr(importlib.import_module(f"embedcore.adapters.{adapter}"), name)
    assert kind.__doc__
