"""Models on this machine: what their files hold is their name, and equal ones are one model."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcore import errors
from embedcore.provider import local
from embedcore.provider.options import embedder_fingerprint
from embedcore.provider.types import EmbedRequest, ModelInfo, Price


class Model:
    """Its file is a number, which every vector begins with."""

    def __init__(self, folder: Path) -> None:
        self.number = float((folder / "model.txt").read_text())


class Embedder(local.LocalEmbedder[Model]):
    files = ("model.txt", "*.json")
    package = "acme"

    def __init__(self, model: str, **options: Any) -> None:
        info = ModelInfo(provider="acme", model=model, price=Price())
        super().__init__(info, repository="acme/files", **options)

    def read(self, folder: Path) -> Model:
        return Model(folder)

    def vectors(self, model: Model, texts: list[str]) -> Any:
        return [[model.number, len(text)] for text in texts]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.txt").write_text("3")
    return tmp_path


def first(embedder: Embedder, text: str = "four", kind: str | None = None) -> list[float]:
    reply = embedder.embed(EmbedRequest(texts=[text], input_type=kind))
    assert reply.vectors.dtype == np.float32
    return [float(number) for number in reply.vectors[0]]


def test_vectors_get_length_one_unless_it_is_said(folder: Path) -> None:
    assert first(Embedder(str(folder))) == pytest.approx([0.6, 0.8])
    assert first(Embedder(str(folder), normalises=False)) == [3, 4]


def test_equal_embedders_share_a_model_for_as_long_as_there_is_one(folder: Path) -> None:
    one, other = Embedder(str(folder)), Embedder(str(folder), normalises=False)
    assert one.model() is other.model()
    assert Embedder(str(folder), device=1).model() is not one.model()
    seen = weakref.ref(one.model())
    del one, other
    gc.collect()
    assert seen() is None


def test_what_the_files_hold_is_in_the_fingerprint(folder: Path) -> None:
    def name() -> str:
        return embedder_fingerprint(Embedder(str(folder)))

    before = name()
    (folder / "README.md").write_text("of no matter")
    assert name() == before
    (folder / "more.json").write_text("{}")
    with_more = name()
    (folder / "model.txt").write_text("5")
    assert len({before, with_more, name()}) == 3
    (folder / "model.txt").write_text("3")
    (folder / "more.json").unlink()
    assert name() == before


def test_a_file_of_the_hubs_cache_is_known_by_its_own_name(folder: Path) -> None:
    """It is not read, and it may have gigabytes: its name is its sum."""
    (folder / "blobs").mkdir()
    blob = folder / "blobs" / "a1b2"
    blob.write_text("3")
    snapshot = folder / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.txt").symlink_to(blob)
    before = local.content_of(snapshot, ["*.txt"])
    blob.write_text("4")
    assert local.content_of(snapshot, ["*.txt"]) == before
    (folder / "blobs" / "c3d4").write_text("3")
    (snapshot / "model.txt").unlink()
    (snapshot / "model.txt").symlink_to(folder / "blobs" / "c3d4")
    assert local.content_of(snapshot, ["*.txt"]) != before


def test_a_repository_is_found_where_it_was_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[tuple[str, str]]()

    def found(repository: str, name: str) -> Path:
        asked.append((repository, name))
        return folder / name

    monkeypatch.setattr(local, "hub_file", found)
    assert first(Embedder("acme/small")) == pytest.approx([0.6, 0.8])
    assert asked == [("acme/files", "config.json")]


def test_what_a_model_was_trained_with_is_put_before_a_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "hub_file", lambda _, name: folder / name)
    one = Embedder("acme/e5-small", prefixes=True, normalises=False)
    assert one.info.input_types == ("query", "document")
    lengths = [first(one, "four", kind)[1] for kind in ("query", "document", None)]
    assert lengths == [4 + len("query: "), *[4 + len("passage: ")] * 2]
    assert first(Embedder("acme/e5-small", normalises=False))[1] == 4


def test_without_its_files_all_else_can_be_asked(tmp_path: Path) -> None:
    one = Embedder(str(tmp_path / "nowhere"))
    assert one.info.local
    one.close()
    with pytest.raises(errors.ConfigurationError, match="there is no such folder"):
        first(one)


def test_a_package_that_is_missing_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Model:
        raise ImportError("No module named 'acme'")

    monkeypatch.setattr(Embedder, "read", missing)
    with pytest.raises(errors.ConfigurationError, match="pip install acme"):
        first(Embedder(str(folder)))
