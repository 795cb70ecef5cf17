"""The harness that compares clients is a folder of scripts: its modules are found from here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if str(_BENCHMARKS) not in sys.path:
    sys.path.append(str(_BENCHMARKS))

if TYPE_CHECKING:
    from compare.serving import Serving
    from compare.tokens import Counter


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """tiktoken finds its vocabulary without a network, here and in children."""
    from compare.tokens import offer_vocabulary

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        offer_vocabulary(tmp_path_factory.mktemp("vocabulary"))
        yield


@pytest.fixture(scope="session")
def counter(vocabulary: None) -> Counter:
    from compare.tokens import Counter

    return Counter()


@pytest.fixture(scope="session")
def one_server(vocabulary: None) -> Iterator[Serving]:
    from compare.serving import Serving

    with Serving(300, short=50) as serving:
        yield serving


@pytest.fixture
def serving(one_server: Serving) -> Serving:
    """A server that was just reset: no latency, no limit, nothing on the meter."""
    one_server.reset()
    return one_server
