"""What somebody else put beside an output stops a run before it pays, and stays as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from embedcore.errors import ConfigurationError
from embedcore.files import disk as own
from embedcore.files.disk import random_name, replacing, sweep
from embedcore.files.resume import Target
from embedcore.files.run import embed_files, plan_files
from embedcore.files.search import search

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links, owners and pipes of POSIX")

PRECIOUS = b"two years of work\n"
COMPANIONS = [".lock", ".journal", ".failed.jsonl"]


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious.txt"
    path.write_bytes(PRECIOUS)
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(kind: str, path: Path, precious: Path) -> None:
    """Something under a name that a run needs."""
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "dangling link":
        path.symlink_to(precious.with_name("nothing"))
    elif kind == "hard link":
        os.link(precious, path)
    elif kind == "file":
        path.write_bytes(PRECIOUS)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.case("F7")
@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
def test_what_only_another_user_may_replace_stops_a_run_before_it_pays(
    tmp_path: Path, client: Any, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for instance in /tmp."""
    output = tmp_path / f"v.{suffix}"
    embed_files(client, [iter(["a"])], output)
    client.calls.clear()
    somebody = os.geteuid() + 4711
    monkeypatch.setattr(os, "geteuid", lambda: somebody)
    Target.at(output)
    tmp_path.chmod(0o1777)
    for overwrite in (False, True):
        with pytest.raises(ConfigurationError, match="who alone may replace it"):
            embed_files(client, [iter(["b"])], output, overwrite=overwrite)
    assert not client.calls
    Target.at(tmp_path / f"free.{suffix}")


@pytest.mark.case("F7")
def test_a_folder_in_the_place_of_the_rows_stops_a_run_before_it_pays(
    tmp_path: Path, client: Any
) -> None:
    (tmp_path / "v.npy.rows.jsonl").mkdir()
    with pytest.raises(ConfigurationError, match=r"rows\.jsonl is a folder"):
        embed_files(client, [iter(["b"])], tmp_path / "v.npy", overwrite=True)
    assert not client.calls


@pytest.mark.case("D4")
@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
@pytest.mark.parametrize("companion", COMPANIONS)
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "file", "pipe", "folder"])
def test_what_is_no_file_of_ours_stops_a_run_before_it_pays(
    tmp_path: Path, precious: Path, client: Any, suffix: str, companion: str, kind: str
) -> None:
    output = tmp_path / f"v.{suffix}"
    path = tmp_path / f"v.{suffix}{companion}"
    put(kind, path, precious)
    before = os.lstat(path)
    for run in (embed_files, plan_files):
        with pytest.raises(ConfigurationError, match=r"move it away|not a journal") as refused:
            run(client, [iter(["a"])], output)
        assert str(path) in str(refused.value)
    assert not client.calls
    assert not output.exists()
    assert precious.read_bytes() == PRECIOUS
    assert not precious.with_name("nothing").exists()
    assert os.path.samestat(os.lstat(path), before)
    if kind == "file":
        assert path.read_bytes() == PRECIOUS


@pytest.mark.case("D4")
@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
def test_names_of_files_that_take_a_place_cannot_be_taken_before(
    tmp_path: Path, precious: Path, client: Any, suffix: str, check_rows: Any
) -> None:
    output = tmp_path / f"v.{suffix}"
    for name in (f"v.{suffix}.partial", f"v.{suffix}.rows.jsonl.partial"):
        (tmp_path / name).symlink_to(precious)
    embed_files(client, [iter(["a", "b"])], output)
    check_rows(output, ["a", "b"])
    assert precious.read_bytes() == PRECIOUS
    assert (tmp_path / f"v.{suffix}.partial").is_symlink()


@pytest.mark.case("D4")
@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
def test_an_output_may_be_a_link_and_stays_one(
    tmp_path: Path, client: Any, suffix: str, check_rows: Any
) -> None:
    real, link = tmp_path / "elsewhere", tmp_path / f"v.{suffix}"
    real.mkdir()
    link.symlink_to(real / f"real.{suffix}")
    for texts in (["a"], ["a", "b"]):
        embed_files(client, [iter(texts)], link)
        assert link.is_symlink()
        check_rows(real / f"real.{suffix}", texts)


@pytest.mark.case("D4")
def test_a_link_that_leads_nowhere_is_refused(tmp_path: Path, client: Any) -> None:
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.symlink_to(two)
    two.symlink_to(one)
    with pytest.raises(ConfigurationError):
        embed_files(client, [iter(["a"])], one)
    assert not client.calls


@pytest.mark.case("D4")
def test_rows_of_the_users_own_beside_a_matrix_are_not_replaced(
    tmp_path: Path, client: Any, check_rows: Any
) -> None:
    output, rows = tmp_path / "v.npy", tmp_path / "v.npy.rows.jsonl"
    rows.write_bytes(b'{"mine": 1}\n')
    with pytest.raises(ConfigurationError, match=r"v\.npy\.rows\.jsonl"):
        embed_files(client, [iter(["a"])], output)
    assert not client.calls
    assert rows.read_bytes() == b'{"mine": 1}\n'
    embed_files(client, [iter(["a"])], output, overwrite=True)
    check_rows(output, ["a"])
    output.unlink()
    embed_files(client, [iter(["a", "b"])], output)
    check_rows(output, ["a", "b"])


@pytest.mark.case("D4")
def test_a_list_of_ours_is_replaced_and_one_that_was_added_to_is_not(
    tmp_path: Path, new_client: Any
) -> None:
    output, failed = tmp_path / "v.jsonl", tmp_path / "v.jsonl.failed.jsonl"
    for bad in (["b"], ["c"]):
        embed_files(new_client(bad=bad), [iter(["a", *bad])], output, on_error="keep")
        assert failed.read_text().count("\n") == 1
    failed.write_text(failed.read_text() + "a note of mine\n")
    client = new_client()
    with pytest.raises(ConfigurationError, match=r"failed\.jsonl is not a list"):
        embed_files(client, [iter(["a", "d"])], output)
    assert not client.calls


@pytest.mark.case("D4")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives away")
@pytest.mark.parametrize("companion", COMPANIONS)
def test_a_file_of_another_user_stops_a_run(tmp_path: Path, client: Any, companion: str) -> None:
    path = tmp_path / f"v.npy{companion}"
    path.touch()
    os.chown(path, 12_345, 12_345)
    with pytest.raises(ConfigurationError, match="belongs to another user"):
        embed_files(client, [iter(["a"])], tmp_path / "v.npy")
    assert not client.calls


def test_where_all_files_belong_to_one_user_they_are_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network drive that maps every user to one."""
    path = tmp_path / "v.npy.lock"
    path.touch()
    monkeypatch.setattr(os, "geteuid", lambda: 54_321)
    os.close(own.open_own(path, os.O_RDWR))
    assert names_in(tmp_path) == ["v.npy.lock"]


@pytest.mark.case("D4")
def test_a_lock_put_in_place_of_ours_is_not_deleted(tmp_path: Path) -> None:
    target = Target.at(tmp_path / "v.jsonl")
    with target.claimed():
        target.lock.unlink()
        target.lock.write_bytes(PRECIOUS)
    assert target.lock.read_bytes() == PRECIOUS


def test_what_a_killed_run_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    left = [tmp_path / random_name(output) for _ in range(3)]
    others = [tmp_path / random_name(tmp_path / "w.npy"), tmp_path / "v.npy.partial"]
    for path in (*left, *others):
        path.touch()
    sweep(output)
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


@pytest.mark.parametrize("broken", ["open", "link"])
def test_files_that_take_a_place_have_new_names_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Where a file cannot be without a name, or could not be given one."""
    if broken == "open":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    else:
        monkeypatch.setattr(os, "link", lambda *_, **__: Path("/nowhere/at/all").stat())
    seen = set()
    for _ in range(3):
        with replacing(tmp_path / "v.npy", tmp_path / "v.npy.rows.jsonl") as files:
            seen |= {Path(file.name).name for file in files}
    assert len(seen) == 6
    assert names_in(tmp_path) == ["v.npy", "v.npy.rows.jsonl"]


@pytest.mark.case("D7")
@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="no files without a name")
def test_files_that_take_a_place_have_no_name_until_then(tmp_path: Path) -> None:
    one, two = tmp_path / "v.npy", tmp_path / "v.npy.rows.jsonl"
    one.write_bytes(b"old")
    with replacing(one, two) as files:
        for number, file in enumerate(files):
            file.write(b"%d" % number)
            file.flush()
        assert names_in(tmp_path) == ["v.npy"]
        assert one.read_bytes() == b"old"
    assert (one.read_bytes(), two.read_bytes()) == (b"0", b"1")
    assert one.stat().st_mode & 0o777 == two.stat().st_mode & 0o777
    with pytest.raises(KeyError), replacing(one, two) as files:
        raise KeyError
    assert names_in(tmp_path) == ["v.npy", "v.npy.rows.jsonl"]
    assert one.read_bytes() == b"0"


@pytest.mark.parametrize("suffix", ["jsonl", "npy", "parquet"])
def test_a_name_that_leaves_no_room_for_those_beside_it_is_refused_first(
    tmp_path: Path, client: Any, suffix: str, check_rows: Any
) -> None:
    most = os.pathconf(tmp_path, "PC_NAME_MAX") - len(".failed.jsonl")
    for length, fits in ((most, True), (most + 1, False)):
        output = tmp_path / ("v" * (length - len(suffix) - 1) + f".{suffix}")
        if fits:
            embed_files(client, [iter(["a"])], output)
            check_rows(output, ["a"])
            client.calls.clear()
            continue
        with pytest.raises(ConfigurationError, match="choose a shorter name"):
            embed_files(client, [iter(["b"])], output)
        assert not client.calls


@pytest.mark.case("D4")
@pytest.mark.parametrize("kind", ["pipe", "endless"])
@pytest.mark.parametrize("name", ["v.npy", "v.npy.rows.jsonl", "v.jsonl", "v.parquet"])
def test_a_pipe_or_a_device_in_the_place_of_an_output_is_not_read(
    tmp_path: Path, client: Any, kind: str, name: str
) -> None:
    """To open the one waits for ever, and the other has no end."""
    output = tmp_path / name.removesuffix(".rows.jsonl")
    embed_files(client, [iter(["a"])], output)
    client.calls.clear()
    (tmp_path / name).unlink()
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigurationError, match=r"regular file|is a folder"):
        embed_files(client, [iter(["b"])], output)
    with pytest.raises(ConfigurationError, match=r"regular file|no such file"):
        search(client, ["a"], output)
    assert not client.calls
