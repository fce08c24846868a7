"""Small files that are written together: each whole, none outside of the root."""

from pathlib import Path

import pytest

from rpg.errors import RPGError
from rpg.storage.small_files import write_files


def test_each_file_is_whole_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    write_files(out, [("a", b"1"), ("b", b"")])
    write_files(out, [("a", b"22"), ("c", b"3" * 10**6)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        "a": b"22",
        "b": b"",
        "c": b"3" * 10**6,
    }


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_bytes(b"kept")
    out = tmp_path / "root" / "out"
    out.mkdir(parents=True)
    (out / "a").symlink_to(kept)
    write_files(out, [("a", b"1")], root=tmp_path / "root")
    assert (kept.read_bytes(), (out / "a").read_bytes()) == (b"kept", b"1")
    assert not (out / "a").is_symlink()


def test_a_link_on_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path / "outside")
    with pytest.raises(RPGError, match="root/out: is a link; expected a directory"):
        write_files(root / "out", [("a", b"1")], root=root)
    assert not list((tmp_path / "outside").iterdir())


def test_the_file_that_cannot_be_written_is_named_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    """A directory stands in its place."""
    (tmp_path / "b" / "inside").mkdir(parents=True)
    with pytest.raises(RPGError, match=r"/b: cannot be written: Is a directory"):
        write_files(tmp_path, [("a", b"1"), ("b", b"2"), ("c", b"3")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").read_bytes() == b"1"
