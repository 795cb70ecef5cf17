"""The file of one batch: its rows as they were, and its texts only as long as they are needed."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from embedcore.storage.manifest import Manifest, ManifestRow, Shortened
from embedcore.storage.schema import MANIFEST

Open = Callable[..., Manifest]


@pytest.fixture
def manifest_at(tmp_path: Path) -> Iterator[Open]:
    opened: list[Manifest] = []

    def at(name: str = "batch") -> Manifest:
        opened.append(Manifest(tmp_path / "batches" / f"{name}.db"))
        return opened[-1]

    yield at
    for manifest in opened:
        manifest.close()


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write(
    manifest: Manifest, texts: list[str | None], *, block: int = 100, names: str = "row"
) -> list[str]:
    """Rows of these texts, None for a rejected one; returns those that were new, in order."""
    fresh: list[str] = []
    for start in range(0, len(texts), block):
        some = texts[start : start + block]
        different = list(dict.fromkeys(text for text in some if text is not None))
        rows = [
            ManifestRow(
                start + place,
                None if text is None else different.index(text),
                json.dumps(f"{names} {start + place}"),
                0,
                "rejected" if text is None else None,
            )
            for place, text in enumerate(some)
        ]
        places = manifest.add(rows, [key_of(text) for text in different], different)
        fresh += [different[place] for place in places]
    return fresh


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.none() | st.sampled_from(["a", "b", "c", "é\0", ""]), max_size=25),
    block=st.integers(1, 9),
    size=st.integers(1, 9),
)
def test_rows_come_back_in_their_order_with_their_own_texts(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str | None],
    block: int,
    size: int,
) -> None:
    manifest = Manifest(tmp_path_factory.mktemp("m") / "batch.db")
    fresh = write(manifest, texts, block=block)
    different = list(dict.fromkeys(text for text in texts if text is not None))
    assert fresh == different, "a text is new once, whatever block it comes in"
    assert list(chain.from_iterable(manifest.keys(per_block=2))) == [
        key_of(text) for text in different
    ]
    rows = [row for start in range(0, len(texts), size) for row in manifest.rows(start, size)]
    assert [found.row.number for found in rows] == list(range(len(texts)))
    assert [found.key for found in rows] == [
        text if text is None else key_of(text) for text in texts
    ]
    assert [one.row.key for one in rows] == [json.dumps(f"row {n}") for n in range(len(texts))]
    assert manifest.texts([key_of(text) for text in different]) == {
        key_of(text): text for text in different
    }
    manifest.close()


def test_what_was_billed_before_is_marked_on_its_rows(manifest_at: Open) -> None:
    manifest = manifest_at()
    write(manifest, ["a", "b", "a", None])
    manifest.mark_reused([key_of("a")])
    assert [found.reused for found in manifest.rows(0, 9)] == [True, False, True, False]


@pytest.mark.case("A9")
def test_what_is_known_of_long_texts_is_on_their_rows(manifest_at: Open) -> None:
    manifest = manifest_at()
    write(manifest, ["a", "b", "a", None])
    manifest.mark_long([key_of("a")])
    assert [found.perhaps_long for found in manifest.rows(0, 9)] == [True, False, True, False]
    assert {found.shortened for found in manifest.rows(0, 9)} == {None}
    cut = Shortened(key_of("a bit"), None, 7)
    manifest.shorten(key_of("a"), cut)
    assert [found.shortened for found in manifest.rows(0, 9)] == [cut, None, cut, None]


def test_the_digest_tells_rows_keys_and_order_apart(manifest_at: Open) -> None:
    def digest(name: str, *texts: str | None, block: int = 100, names: str = "row") -> bytes:
        manifest = manifest_at(name)
        write(manifest, list(texts), block=block, names=names)
        return manifest.digest()

    same = digest("1", "a", "b", "a")
    assert digest("2", "a", "b", "a", block=1) == same
    others = [
        digest("3", "b", "a", "a"),
        digest("4", "a", "b"),
        digest("5", "a", "b", "a", names="name"),
        digest("6", "a", "b", None),
    ]
    assert len({same, *others}) == 5


def test_texts_are_gone_from_the_file_once_they_are_not_needed(manifest_at: Open) -> None:
    manifest = manifest_at()
    secret = [f"a very private text, number {number}" for number in range(3000)]
    write(manifest, list(secret), block=1000)
    manifest.forget_texts(per_block=700)
    assert manifest.texts([key_of(secret[7])]) == {}
    assert len(manifest.rows(0, 5000)) == 3000, "rows and keys stay for the result"
    manifest.close()
    for path in manifest.path.parent.iterdir():
        assert b"private text" not in path.read_bytes()


def test_deleting_leaves_no_file_and_may_be_repeated(manifest_at: Open) -> None:
    manifest = manifest_at()
    write(manifest, ["a"])
    assert list(manifest.path.parent.iterdir())
    for _ in range(2):
        manifest.delete()
    assert not list(manifest.path.parent.iterdir())


@pytest.mark.fault(137)
def test_only_its_owner_can_read_it(manifest_at: Open) -> None:
    manifest = manifest_at()
    write(manifest, ["a"])
    modes = {stat.S_IMODE(path.stat().st_mode) for path in manifest.path.parent.iterdir()}
    assert modes == {0o600}
    assert stat.S_IMODE(manifest.path.parent.stat().st_mode) == 0o700


def test_all_tables_are_strict_and_migrations_are_on_record(manifest_at: Open) -> None:
    manifest = manifest_at()
    with manifest.database.read() as connection:
        tables = connection.execute(
            "SELECT name, strict FROM pragma_table_list WHERE schema = 'main'"
            " AND name NOT LIKE 'sqlite%' AND name NOT LIKE '~_sqlite%' ESCAPE '~'"
        ).fetchall()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        names = connection.execute("SELECT name FROM _sqlite_migrations").fetchall()
    assert dict(tables) == {"text": 1, "row": 1}
    assert version == MANIFEST.version == len(names)


def test_its_columns_are_documented(manifest_at: Open) -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "state-file.md"
    _, _, section = page.read_text(encoding="utf-8").partition("| Column of `batches/<name>.db`")
    listed = re.findall(r"^\| `((?:text|row)\.\w+)` \|", section, re.M)
    with manifest_at().database.read() as connection:
        columns = [
            f"{table}.{column[1]}"
            for table in ("text", "row")
            for column in connection.execute(f'PRAGMA table_info("{table}")')
        ]
    assert sorted(listed) == sorted(columns)
