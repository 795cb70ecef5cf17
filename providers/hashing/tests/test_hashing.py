"""Is a hashed vector a function of its text alone, the same everywhere, and close to its like?"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
import tomllib
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from embedcore_hashing.embedder import HashingEmbedder, name_features, split_words
from embedcore_hashing.plugin import HashingOptions, create
from hypothesis import example, given, strategies as st
from numpy.typing import NDArray

from embedcore.errors import ConfigurationError
from embedcore.provider import registry
from embedcore.provider.types import EmbedRequest
from embedcore.testing import EmbedderContract, ProviderContract

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
GOLDEN_TEXTS = (
    "Return a shallow copy of the list.",
    "parse_url HTTPServer os.path.join utf8",
    "the of and",
    "Größe, naïve café; ﬁne № 5",
    "हिन्दी भाषा ภาษาไทย",
    "東京都に住んでいます。한국어",
    "👩‍👩‍👧 ☀️",
    "!!!",
    " ",
    "",
    "word " * 1000 + "x" * 1000,
)
GOLDEN = "2a3760f776b4fcfb12a16d07ab13ba00e4705e364ec9a81907f05c471f54732b"


def vectors(texts: list[str], width: int = 512) -> NDArray[np.float32]:
    return create(str(width), HashingOptions()).embed(EmbedRequest(texts=texts)).vectors


def golden(width: int = 64) -> str:
    little_endian = vectors(list(GOLDEN_TEXTS), width).astype("<f4")
    return hashlib.sha256(little_endian.tobytes()).hexdigest()


@given(st.lists(TEXTS, max_size=6), st.sampled_from([8, 9, 64, 512]))
@example([" ", "!!!", "", "\n\t", "·—…", "\u200d", "a", "\ufe0f"], 8)
@example(["\ud800"], 8)
def test_every_text_has_a_finite_float32_vector_of_length_one(texts: list[str], width: int) -> None:
    found = vectors(texts, width)
    assert found.shape == (len(texts), width)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    lengths = np.linalg.norm(found.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


@given(st.lists(TEXTS, min_size=1, max_size=6), st.sampled_from([8, 100, 512]))
def test_a_row_depends_on_its_own_text_alone(texts: list[str], width: int) -> None:
    alone = np.concatenate([vectors([text], width) for text in texts])
    shared = create(str(width), HashingOptions())
    twice = [shared.embed(EmbedRequest(texts=texts)).vectors for _ in range(2)]
    np.testing.assert_array_equal(twice[0], alone)
    np.testing.assert_array_equal(twice[1], alone)


def test_the_vectors_are_those_of_this_version() -> None:
    """If this fails on purpose, raise ``plugin.ALGORITHM``: stored vectors are of the old one."""
    assert golden() == GOLDEN


@pytest.mark.parametrize("seed", ["0", "4711"])
def test_the_vectors_do_not_depend_on_the_seed_of_hash(seed: str) -> None:
    program = (
        "import hashlib, sys\n"
        "from embedcore_hashing.plugin import HashingOptions, create\n"
        "from embedcore.provider.types import EmbedRequest\n"
        "reply = create('64', HashingOptions()).embed(EmbedRequest(texts=eval(sys.argv[1])))\n"
        "print(hashlib.sha256(reply.vectors.astype('<f4').tobytes()).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, ascii(GOLDEN_TEXTS)],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == golden()


def test_threads_that_share_an_embedder_get_the_same_vectors() -> None:
    texts = [f"word{number} shared text number {number % 7}" for number in range(200)]
    expected = vectors(texts)
    shared = create("512", HashingOptions())
    found: list[NDArray[np.float32]] = []

    def work() -> None:
        found.append(shared.embed(EmbedRequest(texts=texts)).vectors)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        np.testing.assert_array_equal(each, expected)


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        (
            "Open the file for reading and return a handle.",
            "Opens files for reading, returning a handle",
            "The cat sat quietly beside the river.",
        ),
        ("Return the current time zone.", "time zones", "copy an array"),
        ("parseHttpHeader", "parse_http_header", "format_sql_query"),
        ("os.path.join", "join a path", "split the bill"),
        ("COLOUR", "colours", "shapes"),
        ("東京都の天気予報", "東京の天気", "猫が好きです"),
        ("한국어를 배웁니다", "한국어", "바다가 넓다"),
    ],
)
@pytest.mark.parametrize("width", [256, 512, 2048])
def test_a_near_text_is_clearly_closer_than_a_far_one(
    text: str, near: str, far: str, width: int
) -> None:
    own, close, away = vectors([text, near, far], width)
    assert own @ close > own @ away + 0.15


def test_function_words_weigh_little() -> None:
    own, same_subject, same_frame = vectors(
        ["what is the size of the queue", "queue size", "what is the colour of the sea"]
    )
    assert own @ same_subject > 2 * (own @ same_frame)


def test_repetition_is_damped() -> None:
    once, often = vectors(["apple pear", "apple " * 1000 + "pear"])
    assert 0.7 < once @ often < 0.99


def test_texts_without_words_are_told_apart() -> None:
    marks = ["!", "!!", "?", " ", "  ", "\n", "...", "—", "", "()"]
    found = vectors(marks)
    assert np.all(np.triu(found @ found.T, 1) < 0.95)


def test_features_that_cancel_out_leave_no_zero_vector() -> None:
    pairs = ["a an", "a as", "a had", "a no", "a what"]  # each cancels out at this width
    marks = ["!" * count + "?" * other for count in range(60) for other in range(60)]
    for texts in (pairs, marks):
        lengths = np.linalg.norm(vectors(texts, 8).astype(np.float64), axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_wider_vectors_collide_less() -> None:
    unrelated = [f"{word} alone" for word in ("apple", "stone", "river", "cloud", "engine")]

    def error(width: int) -> float:
        exact = vectors(unrelated, 65_536)
        narrow = vectors(unrelated, width)
        return float(np.abs(narrow @ narrow.T - exact @ exact.T).mean())

    assert error(4096) < error(256) < error(16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snake_case CamelCase dotted.name", ["snake", "case", "camel", "case", "dotted", "name"]),
        ("HTTPServer parseURL utf8Text", ["http", "server", "parse", "url", "utf8", "text"]),
        ("STRASSE Straße ﬁle", ["strasse", "strasse", "file"]),
        ("हिन्दी, ไทย!", ["हिन्दी", unicodedata.normalize("NFKC", "ไทย")]),
        ("«naïve» — “quoted”…", ["naïve", "quoted"]),
        ("  !?;:-_\n", []),
        ("x" * 150, ["x" * 64, "x" * 64, "x" * 22]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@given(TEXTS)
def test_no_word_has_more_features_than_its_bounded_length_allows(text: str) -> None:
    assert all(len(list(name_features(word))) <= 1 + 3 * 66 for word in split_words(text))


@given(st.integers(8, 65_536))
def test_the_models_name_is_its_width(width: int) -> None:
    embedder = create(str(width), HashingOptions())
    assert isinstance(embedder, HashingEmbedder)
    assert embedder.info.dimensions == width
    assert embedder.info.local
    assert embedder.info.price is not None
    assert embedder.info.price.free


@pytest.mark.parametrize(
    "model",
    ["", "7", "0", "-512", "65537", "0512", "5e2", "512.0", " 512", "٥١٢", "large", "9" * 99],
)
def test_another_name_is_refused(model: str) -> None:
    with pytest.raises(ConfigurationError, match=r"from 8 to 65536, for instance hashing:512"):
        create(model, HashingOptions())


def test_it_is_found_by_name_and_refuses_options() -> None:
    provider = registry.load("hashing")
    assert provider.default_model in provider.models
    assert all(
        registry.create("hashing", name, {}).info == info for name, info in provider.models.items()
    )
    with pytest.raises(ConfigurationError, match="widht: unknown key"):
        registry.create("hashing", "512", {"widht": 3})


def test_the_readmes_config_names_the_default_model() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    (block,) = re.findall(r"```toml\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    provider = registry.load("hashing")
    assert tomllib.loads(block) == {"model": f"hashing:{provider.default_model}"}


def test_loading_the_plugin_does_not_load_numpy() -> None:
    program = "import sys, embedcore_hashing.plugin; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_closing_twice_forgets_words_and_nothing_else() -> None:
    embedder = create("64", HashingOptions())
    before = embedder.embed(EmbedRequest(texts=["still here"])).vectors
    embedder.close()
    embedder.close()
    np.testing.assert_array_equal(
        embedder.embed(EmbedRequest(texts=["still here"])).vectors, before
    )


class TestHashing(EmbedderContract):
    """What every provider promises. It cannot fail, so there is no broken one to show."""

    tolerance = 0.0

    def make_embedder(self) -> HashingEmbedder:
        return create("512", HashingOptions())


class TestHashingProvider(ProviderContract):
    provider = "hashing"
