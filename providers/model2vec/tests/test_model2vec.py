"""Static models: whole texts, one model in a process, and vectors of the files that are there."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from embedcore_model2vec.plugin import (
    DEFAULT_MODEL,
    Model2VecEmbedder,
    Model2VecOptions,
    embedcore_provider,
)

from embedcore import EmbeddingClient, errors
from embedcore.provider.options import options_fingerprint
from embedcore.provider.types import EmbedRequest
from embedcore.testing import EmbedderContract, ProviderContract

WIDTH = 32
# The module whose package ships a real model, in model2vec's layout.
SHIPPED = "static_model"
BLANK = "no token is left of it, so that its vector is all zeros: the core says so"

needs_model2vec = pytest.mark.skipif(
    find_spec("model2vec") is None, reason="model2vec is not installed here: make test-local"
)

needs_shipped = pytest.mark.skipif(
    find_spec("model2vec") is None or find_spec(SHIPPED) is None,
    reason="no package with a model is installed here: make test-local",
)


def shipped() -> Path:
    """Its folder. Nothing is imported."""
    spec = find_spec(SHIPPED)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "model")


def tiny_model(folder: Path, seed: int = 0, width: int = WIDTH, **config: Any) -> Path:
    """A model of bytes in model2vec's layout: every text has tokens, and no two the same sum."""
    import tokenizers
    from safetensors.numpy import save_file
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {sign: number for number, sign in enumerate(sorted(ByteLevel.alphabet()))}
    merges = [("t", "h"), ("e", "r")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.enable_truncation(8)  # as those that are shipped have it
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = np.random.default_rng(seed).normal(size=(len(vocabulary), width)).astype(np.float32)
    save_file({"embeddings": rows}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"normalize": False, "max_length": 4, **config}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("model2vec")
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def embedder(folder: Path | str, **options: Any) -> Model2VecEmbedder:
    return Model2VecEmbedder(str(folder), Model2VecOptions(**options))


def vectors(one: Model2VecEmbedder, *texts: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    return one.embed(EmbedRequest(texts=texts)).vectors


@needs_model2vec
class TestTiny(EmbedderContract):
    option_values: ClassVar = {"max_input_tokens": None}

    @pytest.fixture(autouse=True)
    def _model(self, tiny: Path) -> None:
        self.folder = tiny

    def make_embedder(self) -> Model2VecEmbedder:
        return self.make_variant()

    def make_variant(self, **options: Any) -> Model2VecEmbedder:
        return embedder(self.folder, **options)

    def make_broken_embedder(self) -> Model2VecEmbedder:
        return embedder(self.folder / "not-there")


class TestModel2VecProvider(ProviderContract):
    provider = "model2vec"


@needs_shipped
class TestShipped:
    def test_a_real_model_knows_what_is_near(self) -> None:
        one = embedder(shipped())
        rows = vectors(
            one,
            "How do I reset my password?",
            "I forgot my password and need a new one",
            "The cat sat on the mat",
        )
        assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
        assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2

    def test_an_empty_text_has_zeros(self) -> None:
        assert not vectors(embedder(shipped()), "").any()

    def test_its_count_is_that_of_the_library(self) -> None:
        from model2vec import StaticModel

        one, texts = embedder(shipped()), ["a red apple", "naïve café", "word " * 2_000]
        theirs = StaticModel.from_pretrained(shipped(), max_length=None).tokenizer
        counted = [len(theirs.encode(text, add_special_tokens=False).ids) for text in texts]
        assert one.tokenizer.count(texts) == counted


@needs_shipped
class TestShippedContract(EmbedderContract):
    # A tokenizer of words: white space is no token, and different cases are one.
    known_failures: ClassVar = {
        **{
            f"test_odd_text[{name}]": BLANK
            for name in ("a space", "only white space", "a line feed", "replacement character")
        },
        "test_any_list_of_texts": BLANK,
    }
    option_values: ClassVar = {"max_input_tokens": None, "normalize": None}

    def make_embedder(self) -> Model2VecEmbedder:
        return embedder(shipped())

    def make_broken_embedder(self) -> Model2VecEmbedder:
        return embedder("./not-there")


@needs_model2vec
def test_a_text_is_never_cut_in_silence(tiny: Path) -> None:
    """The file of the tokenizer says 8 tokens, the model's own 4, and the library's default 512."""
    long, longer = "abcdefgh " * 200, "abcdefgh " * 200 + "the end"
    one, other = vectors(embedder(tiny), long, longer)
    assert not np.allclose(one, other, atol=1e-6)


@needs_model2vec
def test_a_limit_of_ones_own_is_kept_and_reported(tiny: Path, tmp_path: Path) -> None:
    one = embedder(tiny, max_input_tokens=10)
    with pytest.raises(errors.InputTooLong) as caught:
        vectors(one, "short", "a text of many bytes")
    assert (caught.value.position, caught.value.tokens, caught.value.billed) == (1, 20, "no")
    options = {"max_input_tokens": 10}
    with EmbeddingClient(f"model2vec:{tiny}", options=options, config={"home": tmp_path}) as client:
        result = client.embed(["short", "a text of many bytes"])
    assert [outcome.cut for outcome in result.outcomes] == ["no", "yes"]
    assert np.allclose(result.vectors[1], vectors(one, "a text of ")[0], atol=1e-6)


@needs_model2vec
def test_vectors_have_length_one_unless_it_is_said(tiny: Path, tmp_path: Path) -> None:
    assert np.linalg.norm(vectors(embedder(tiny), "a", "the fox"), axis=1) == pytest.approx(1)
    plain = embedder(tiny, normalize=False)
    assert (np.abs(np.linalg.norm(vectors(plain, "a", "the fox"), axis=1) - 1) > 0.1).all()
    already = embedder(tiny_model(tmp_path / "unit", normalize=True), normalize=False)
    assert np.linalg.norm(vectors(already, "a", "the fox"), axis=1) == pytest.approx(1)


@needs_model2vec
def test_a_folder_with_other_content_is_another_model(tmp_path: Path) -> None:
    folder, options = tiny_model(tmp_path / "model"), Model2VecOptions()
    config = {"home": tmp_path / "home", "cache": True}
    with EmbeddingClient(f"model2vec:{folder}", config=config) as client:
        before = client.embed(["the fox"]).vectors
        assert client.embed(["the fox"]).reused.all()
    one = Model2VecEmbedder(str(folder), options)
    assert np.allclose(vectors(one, "the fox"), before, atol=1e-6)
    tiny_model(folder, seed=1)
    # What was read stays what its name says.
    assert np.allclose(vectors(one, "the fox"), before, atol=1e-6)
    other = Model2VecEmbedder(str(folder), options)
    names = [options_fingerprint("model2vec", str(folder), options, e.info) for e in (one, other)]
    assert names[0] != names[1]
    with EmbeddingClient(f"model2vec:{folder}", config=config) as client:
        after = client.embed(["the fox"])
    assert not after.reused.any()
    assert not np.allclose(before, after.vectors, atol=1e-3)


@needs_model2vec
def test_files_that_change_before_they_are_read_are_an_error(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    one = embedder(folder)
    tiny_model(folder, seed=1)
    with pytest.raises(errors.ConfigurationError, match="have changed since"):
        vectors(one, "the fox")


@needs_model2vec
def test_a_model_is_read_once_for_equal_embedders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import model2vec

    folder, reads = tiny_model(tmp_path / "once"), list[str]()
    really = model2vec.StaticModel.from_pretrained

    def counted(path: Any, **options: Any) -> Any:
        reads.append(str(path))
        return really(path, **options)

    monkeypatch.setattr(model2vec.StaticModel, "from_pretrained", counted)
    several = [embedder(folder) for _ in range(8)]
    threads = [threading.Thread(target=vectors, args=(one, "the fox")) for one in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == [str(folder)]
    assert several[0].model() is several[7].model()


@needs_model2vec
def test_threads_get_what_one_gets(tiny: Path) -> None:
    texts = [f"text {number} {'x' * (number % 40)}" for number in range(200)]
    expected, found = vectors(embedder(tiny), *texts), list[Any]()

    def work() -> None:
        for _ in range(5):
            found.append(vectors(embedder(tiny), *texts))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(np.allclose(one, expected, atol=1e-6) for one in found)


_FORK = """
import os, sys, threading, numpy as np
sys.path.insert(0, os.environ["HERE"])
from embedcore_model2vec.plugin import Model2VecEmbedder, Model2VecOptions
from embedcore.provider.types import EmbedRequest
one = Model2VecEmbedder(sys.argv[1], Model2VecOptions())
texts = [f"text {n}" for n in range(2000)]
expected = one.embed(EmbedRequest(texts=texts)).vectors
stop = threading.Event()
def busy():
    while not stop.is_set():
        one.embed(EmbedRequest(texts=texts))
threading.Thread(target=busy, daemon=True).start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        found = one.embed(EmbedRequest(texts=texts)).vectors
        os._exit(0 if np.allclose(found, expected, atol=1e-6) else 3)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
stop.set()
"""


@needs_model2vec
@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks on this system")
def test_a_child_of_a_fork_embeds_while_a_thread_was_busy(tiny: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _FORK, str(tiny)],
        env={**os.environ, "HERE": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_missing_is_named_and_nothing_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(socket.socket, "connect", _no_network)
    monkeypatch.setattr(socket, "getaddrinfo", _no_network)
    one = embedder(DEFAULT_MODEL)
    for ask in (lambda: vectors(one, "a"), lambda: one.tokenizer.count(["a"]), one.startup.load):
        with pytest.raises(errors.ConfigurationError, match=f"hf download {DEFAULT_MODEL}"):
            ask()
    with pytest.raises(errors.ConfigurationError, match="there is no such folder"):
        vectors(embedder(tmp_path / "nowhere"), "a")
    assert one.info.dimensions == 256


def _no_network(*_: Any, **__: Any) -> None:
    raise AssertionError("the network was asked")


@needs_model2vec
@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", b"not this"), ("tokenizer.json", b"{}"), ("config.json", b"[")],
)
def test_a_damaged_file_is_a_typed_error(tmp_path: Path, file: str, content: bytes) -> None:
    folder = tiny_model(tmp_path / "damaged")
    (folder / file).write_bytes(content)
    with pytest.raises(errors.ConfigurationError, match=re.escape(str(folder))):
        vectors(embedder(folder), "a")


def test_the_plugin_loads_no_library() -> None:
    program = (
        "import sys, embedcore_model2vec.plugin as p; p.embedcore_provider()\n"
        "found = {'numpy', 'model2vec', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(str(found) if found else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_model_is_free_and_whole() -> None:
    provider = embedcore_provider()
    assert provider.default_model in provider.models
    for info in provider.models.values():
        assert info.price is not None
        assert info.price.free
        assert info.max_input_tokens is None
