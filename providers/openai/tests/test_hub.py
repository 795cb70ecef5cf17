"""Exact counts by a tokenizer of Hugging Face's form, and cuts that are as long as they can be."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from embedcore_openai.options import OpenAIOptions
from embedcore_openai.plugin import create
from hypothesis import given, strategies as st

from embedcore import EmbeddingClient
from embedcore.errors import ConfigurationError, InputTooLong
from embedcore.provider import tokenizer_files as hub
from embedcore.provider.tokenizer_files import HubTokenizer
from embedcore.provider.types import EmbedRequest
from embedcore.testing import vector_of

tokenizers = pytest.importorskip("tokenizers")

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Pack my box with five dozen liquor jugs, said the judge.",
    "tokens, tokenizers and tokenization: unbelievable counts",
    "naïve café, 12345 and 67890; über-groß",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
MARKED = [("[CLS]", 2), ("[SEP]", 3)]


def wordpiece() -> Any:
    """As BERT and its kin: drops white space, marks both ends, carries limits of its own."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=MARKED
    )
    made.enable_truncation(8)
    made.enable_padding(length=8)
    return made


def byte_level() -> Any:
    """As Qwen and GPT-2: bytes, so that a character may be several tokens; a mark at the end."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=MARKED[1:]
    )
    return made


def unigram() -> Any:
    """As XLM-R and bge-m3: a mark before each word, and compatibility forms taken apart."""
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.normalizer = tokenizers.normalizers.NFKC()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="[UNK]"
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def whole_text() -> Any:
    """As Llama and Mistral: nothing is cut before merging, unknown characters become bytes."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend("▁"),
            tokenizers.normalizers.Replace(" ", "▁"),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *bytes_])
    made.train_from_iterator(CORPUS, trainer)
    return made


KINDS = {
    "wordpiece": (wordpiece, 2, 1),
    "byte level": (byte_level, 1, 1),
    "unigram": (unigram, 0, None),
    "whole text": (whole_text, 0, 2),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, (made, *_) in KINDS.items():
        found[name] = folder / name / "tokenizer.json"
        found[name].parent.mkdir()
        made().save(str(found[name]))
    return found


@pytest.fixture(scope="module")
def of(files: dict[str, Path]) -> Callable[[str], HubTokenizer]:
    made = {name: HubTokenizer(str(path)) for name, path in files.items()}
    return made.__getitem__


words = st.sampled_from([word for line in CORPUS for word in line.split()])
odd = st.sampled_from(
    ["\ufdfa", "\x01", "\u200b", "½", "[SEP]", "ﬃ", "한국어", "e\u0301", "\U0001f469"]
)
lines = st.lists(words | odd | st.text(max_size=4), max_size=12).map(" ".join)
texts = lines | st.text(max_size=40)


@pytest.mark.case("A9")
@pytest.mark.parametrize("name", KINDS)
@given(text=texts)
def test_counts_are_those_of_the_library(
    of: Callable[[str], HubTokenizer], files: dict[str, Path], name: str, text: str
) -> None:
    ours = of(name)
    reference = tokenizers.Tokenizer.from_file(str(files[name]))
    reference.no_truncation()
    reference.no_padding()
    (count,) = ours.count([text])
    # What the server bills: the count and the marks.
    assert count + ours.marks == len(reference.encode(text).ids)
    assert count <= ours.tokens_per_byte * len(text.encode())


@pytest.mark.case("A9")
@pytest.mark.parametrize("name", KINDS)
@given(text=texts, limit=st.integers(-1, 12))
def test_a_prefix_fits_and_no_longer_one_does(
    of: Callable[[str], HubTokenizer], name: str, text: str, limit: int
) -> None:
    ours = of(name)
    prefix = ours.prefix(text, limit)
    assert text.startswith(prefix)
    assert not prefix or ours.count([prefix])[0] <= limit
    if limit <= 0:
        assert prefix == ""
        return
    longer = [text[:end] for end in range(len(prefix) + 1, len(text) + 1)]
    assert all(count > limit for count in ours.count(longer)), "a longer prefix fits"


@pytest.mark.case("A9")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("limit", [1, 100, 2_000])
def test_a_long_text_is_cut_close_to_the_limit(
    of: Callable[[str], HubTokenizer], name: str, limit: int
) -> None:
    ours = of(name)
    text = " ".join(CORPUS) * 400
    prefix = ours.prefix(text, limit)
    assert text.startswith(prefix)
    assert limit - 3 <= ours.count([prefix])[0] <= limit
    assert ours.prefix(CORPUS[0], 1_000) == CORPUS[0]


def test_what_is_known_of_each(of: Callable[[str], HubTokenizer]) -> None:
    for name, (_, marks, per_byte) in KINDS.items():
        assert of(name).marks == marks
        assert per_byte is None or of(name).tokens_per_byte == per_byte
        assert of(name).exact


def test_a_lone_surrogate_is_counted_and_not_raised(of: Callable[[str], HubTokenizer]) -> None:
    for name in KINDS:
        assert of(name).count(["a \ud800 b"]) == of(name).count(["a \ufffd b"])


def test_threads_share_one_tokenizer(of: Callable[[str], HubTokenizer]) -> None:
    ours = of("byte level")
    found: list[list[int]] = []

    def work() -> None:
        found.extend(ours.count(CORPUS) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ours.count(CORPUS)] * 200


# The option


def options(**more: Any) -> OpenAIOptions:
    return OpenAIOptions(base_url="http://localhost:1/v1", **more)


@pytest.mark.case("A9")
def test_the_limit_is_the_servers_with_its_marks(files: dict[str, Path]) -> None:
    path = files["wordpiece"]
    for given_path in (path, path.parent):
        embedder = create("m", options(tokenizer=str(given_path), max_input_tokens=512))
        info = embedder.info
        assert (info.max_input_tokens, info.overhead_tokens_per_text) == (510, 2)
        assert embedder.tokenizer.exact
    assert create("m", options(tokenizer=str(path))).info.max_input_tokens is None
    assert create("m", options(max_input_tokens=512)).info.max_input_tokens == 512


@pytest.mark.case("A9")
def test_a_name_is_looked_up_in_the_local_cache_only(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    hub.tokenizer_of.cache_clear()
    with pytest.raises(ConfigurationError, match=r"hf download BAAI/bge-m3 tokenizer\.json"):
        create("m", options(tokenizer="BAAI/bge-m3"))
    snapshot = tmp_path / "models--BAAI--bge-m3" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes(files["unigram"].read_bytes())
    refs = tmp_path / "models--BAAI--bge-m3" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    embedder = create("m", options(tokenizer="BAAI/bge-m3"))
    assert embedder.tokenizer.count(["the fox"]) == HubTokenizer(str(files["unigram"])).count(
        ["the fox"]
    )
    hub.tokenizer_of.cache_clear()


@pytest.mark.case("A9")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./none.json", "there is no such file"),
        ("/nowhere/at/all", "there is no such file"),
        ("~/none/tokenizer.json", "there is no such file"),
        ("not a name at all", "local cache"),
        ("a/b/c", "local cache"),
    ],
)
def test_what_cannot_be_found_is_a_setting(name: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        create("m", options(tokenizer=name))
    assert caught.value.billed == "no"


def test_what_is_no_tokenizer_is_a_setting(tmp_path: Path) -> None:
    wrong = tmp_path / "tokenizer.json"
    for content in ("", "{}", json.dumps({"model": {"type": "Nonsense"}})):
        wrong.write_text(content)
        with pytest.raises(ConfigurationError, match=r"is no tokenizer\.json"):
            create("m", options(tokenizer=str(wrong)))


def test_without_the_package_the_error_names_it(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    hub.tokenizer_of.cache_clear()
    with pytest.raises(ConfigurationError, match="pip install tokenizers"):
        create("m", options(tokenizer=str(files["unigram"])))


def test_beside_base_model_it_is_a_contradiction(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigurationError, match="base_model and tokenizer"):
        create("m", options(tokenizer=str(files["unigram"]), base_model="text-embedding-3-small"))


@pytest.mark.case("A9")
def test_it_counts_for_the_fingerprint_only_when_set(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EMBEDCORE_HOME", str(tmp_path))

    def fingerprint(**more: Any) -> str:
        config = {"model": "openai:m", "options": {"openai": {"price": 0, **more}}}
        return EmbeddingClient(config=config).fingerprint

    names = [fingerprint(tokenizer=str(path)) for path in files.values()]
    assert len({fingerprint(), *names}) == 1 + len(names)


@pytest.mark.case("A9")
@pytest.mark.parametrize("name", ["wordpiece", "byte level"])
def test_texts_are_cut_to_what_the_server_takes(
    api: Any, files: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server that counts by the same tokenizer never sees a text that is too long."""
    monkeypatch.setenv("EMBEDCORE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    limit = 16
    server = tokenizers.Tokenizer.from_file(str(files[name]))
    server.no_truncation()
    server.no_padding()
    counted: list[int] = []

    def reply(asked: Any) -> Any:
        sizes = [len(server.encode(text).ids) for text in asked.json()["input"]]
        counted.extend(sizes)
        if max(sizes) > limit:
            return 400, {"error": {"message": "too long", "code": "context_length_exceeded"}}
        data = [
            {"index": index, "embedding": vector_of(text, 3).tolist()}
            for index, text in enumerate(asked.json()["input"])
        ]
        return {"data": data, "model": "m", "usage": {"prompt_tokens": sum(sizes)}}

    api.routes["POST /v1/embeddings"] = reply
    config = {
        "model": "openai:m",
        "options": {
            "openai": {
                "base_url": api.base_url,
                "tokenizer": str(files[name]),
                "max_input_tokens": limit,
            }
        },
    }
    rows = [" ".join(CORPUS), CORPUS[0], "fox"]
    with EmbeddingClient(config=config) as client:
        result = client.embed(rows)
    assert len(api.asked) == 1
    assert result.ok.all()
    assert counted[0] in (limit - 1, limit)
    assert result.tokens_cut[0] > 0
    assert result.usage.tokens == sum(counted)
    with pytest.raises(InputTooLong):
        create("m", OpenAIOptions(base_url=api.base_url)).embed(EmbedRequest(texts=rows[:1]))
