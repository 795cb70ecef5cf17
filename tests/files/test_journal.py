"""A journal keeps what was appended, and after any damage it holds nothing that was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embedcore.errors import ConfigurationError, InvalidResponse
from embedcore.files import journal as journals
from embedcore.files.journal import Journal, read_journal
from embedcore.files.types import DigestIndex, Origin, as_digests, content_digest

ORIGIN = Origin(model="fake:fake", fingerprint="f" * 32)


def append(journal: Journal, texts: list[str], vector: Any, width: int = 3) -> None:
    journal.append(
        as_digests(b"".join(map(content_digest, texts))),
        np.array([len(text) for text in texts], dtype=np.uint32),
        np.stack([vector(text, width=width) for text in texts]),
    )


def reopened(path: Path) -> Journal:
    return Journal(path, ORIGIN, read_journal(path, ORIGIN))


def found_in(journal: Journal, texts: list[str], vector: Any, width: int = 3) -> set[str]:
    """Which of the texts it has; their vectors must be right."""
    numbers = journal.index().find(as_digests(b"".join(map(content_digest, texts))))
    there = numbers[numbers >= 0]
    known = [text for text, number in zip(texts, numbers.tolist(), strict=True) if number >= 0]
    expected = [vector(text, width=width) for text in known]
    if known:
        cuts, vectors = journal.read(there)
        assert np.array_equal(vectors, np.stack(expected))
        assert cuts.tolist() == [len(text) for text in known]
    return set(known)


@settings(max_examples=50, deadline=None)
@given(
    blocks=st.lists(st.lists(st.text("ab\0é", max_size=6), min_size=1, max_size=5), max_size=5),
    reopen=st.booleans(),
)
def test_what_was_appended_is_found_again(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[list[str]], reopen: bool, vector: Any
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = reopened(path)
    for block in blocks:
        append(journal, block, vector)
        if reopen:
            journal.close()
            journal = reopened(path)
    texts = ["ab\0é", "a", "never appended"] + [text for block in blocks for text in block]
    appended = {text for block in blocks for text in block}
    assert found_in(journal, texts, vector) == appended & set(texts)
    written = set(texts[::2])
    left = journal.settle(as_digests(b"".join(map(content_digest, written))))
    journal = reopened(path)
    assert found_in(journal, texts, vector) == appended - written
    assert left == len(journal)
    append(journal, ["more"], vector)
    assert found_in(reopened(path), [*texts, "more"], vector) == appended - written | {"more"}
    assert journal.settle(as_digests(b"".join(map(content_digest, [*texts, "more"])))) == 0
    assert not path.exists()


@pytest.mark.fault(144)
def test_damage_at_any_byte_loses_that_record_and_nothing_else(tmp_path: Path, vector: Any) -> None:
    texts = [f"text {i}" for i in range(5)]
    path = tmp_path / "j"
    journal = reopened(path)
    append(journal, texts, vector)
    journal.close()
    intact = path.read_bytes()
    header = len(intact) - 5 * (32 + 4 + 12 + 4)
    for at in range(len(intact)):
        damaged = bytearray(intact)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        journal = reopened(path)
        lost = {texts[(at - header) // 52]} if at >= header else set()
        assert found_in(journal, texts, vector) == set(texts) - lost
        journal.close()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("width", [None, 3])
def test_a_damaged_header_is_made_again_and_the_journal_goes_on(
    tmp_path: Path, vector: Any, width: int | None, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "j", replace(ORIGIN, dimensions=width)
    with monkeypatch.context() as patch:
        patch.setattr(journals._packed_header, "__defaults__", (version,))
        journal = reopened(path)
        append(journal, ["a", "b", "c"], vector)
        journal.close()
    intact = path.read_bytes()
    # The first records are damaged as well.
    header = len(intact) - 3 * 52
    damage = bytes(len(intact) - 52 - 4)
    path.write_bytes(damage + intact[len(damage) :])
    journal = Journal(path, asked, read_journal(path, asked))
    assert found_in(journal, ["a", "b", "c"], vector) == {"c"}
    append(journal, ["d"], vector)
    journal.close()
    assert path.read_bytes()[:header] == intact[:header]
    assert found_in(reopened(path), ["a", "b", "c", "d"], vector) == {"c", "d"}


@pytest.mark.parametrize("change", [{"fingerprint": "e" * 32}, {"model": "x"}, {"dimensions": 4}])
def test_a_journal_that_cannot_be_read_is_never_deleted(
    tmp_path: Path, vector: Any, change: dict[str, Any]
) -> None:
    path = tmp_path / "j"
    journal = reopened(path)
    append(journal, ["a"], vector)
    journal.close()
    damaged = bytearray(path.read_bytes())
    damaged[40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ConfigurationError, match="paid for"):
        read_journal(path, replace(ORIGIN, **change))
    assert path.read_bytes() == damaged
    assert found_in(reopened(path), ["a"], vector) == {"a"}


@pytest.mark.fault(144)
def test_a_torn_tail_is_dropped_and_written_over(tmp_path: Path, vector: Any) -> None:
    texts = [f"text {i}" for i in range(4)]
    path = tmp_path / "j"
    journal = reopened(path)
    append(journal, texts, vector)
    journal.close()
    intact = path.read_bytes()
    header = len(intact) - 4 * 52
    for length in range(len(intact)):
        path.write_bytes(intact[:length])
        journal = reopened(path)
        whole = max(length - header, 0) // 52
        assert found_in(journal, texts, vector) == set(texts[:whole])
        append(journal, ["new"], vector)
        journal.close()
        journal = reopened(path)
        assert found_in(journal, [*texts, "new"], vector) == {*texts[:whole], "new"}
        journal.close()


@pytest.mark.fault(144)
@settings(max_examples=50, deadline=None)
@given(tail=st.binary(max_size=200), zeros=st.integers(0, 200))
def test_garbage_after_the_last_record_is_not_a_record(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, zeros: int, vector: Any
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    journal = reopened(path)
    append(journal, ["a"], vector)
    journal.close()
    path.write_bytes(path.read_bytes() + tail + bytes(zeros))
    found = read_journal(path, ORIGIN)
    assert found is not None
    assert [bytes(digest) for digest in found.intact] == [content_digest("a").rstrip(b"\0")]


def test_records_of_another_journal_are_not_taken_for_ones_of_this(
    tmp_path: Path, vector: Any
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    journal = reopened(one)
    append(journal, ["a"], vector)
    journal.close()
    other = Journal(two, replace(ORIGIN, fingerprint="e" * 32), None)
    append(other, ["a", "b"], vector)
    other.close()
    header = len(one.read_bytes()) - 52
    one.write_bytes(one.read_bytes() + two.read_bytes()[header:])
    assert found_in(reopened(one), ["a", "b"], vector) == {"a"}


def test_vectors_of_another_width_are_refused(tmp_path: Path, vector: Any) -> None:
    journal = reopened(tmp_path / "j")
    append(journal, ["a"], vector)
    with pytest.raises(InvalidResponse, match="4 dimensions after 3"):
        append(journal, ["b"], vector, width=4)
    assert found_in(journal, ["a", "b"], vector) == {"a"}
    journal.close()


def test_a_file_that_is_not_a_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.journal"
    path.write_text("Dear diary")
    with pytest.raises(ConfigurationError, match="move it away"):
        read_journal(path, ORIGIN)
    assert path.read_text() == "Dear diary"


@given(
    known=st.lists(st.binary(min_size=32, max_size=32), max_size=20),
    wanted=st.lists(st.binary(min_size=32, max_size=32), max_size=10),
)
def test_the_index_is_a_dictionary(known: list[bytes], wanted: list[bytes]) -> None:
    wanted = wanted + known[::2]
    places = DigestIndex(as_digests(b"".join(known))).find(as_digests(b"".join(wanted)))
    assert places.tolist() == [known.index(d) if d in known else -1 for d in wanted]
