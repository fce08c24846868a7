"""Packs: other programs read them, members are found where they were written, damage ends the search."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpg.errors import RPGError
from rpg.sampling.pack import MemberFile, members_of, write_pack

FILES = [("a.safetensors", b"1" * 512), ("b.safetensors", b""), ("c.safetensors", b"23" * 700)]


def test_a_pack_is_a_tar_file_whose_members_are_where_it_says(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pack.tar"
    members = write_pack(path, FILES)
    with tarfile.open(path) as tar:
        read = [(each.name, tar.extractfile(each).read()) for each in tar]  # type: ignore[union-attr]
    assert read == FILES
    content = path.read_bytes()
    assert [content[m.offset : m.offset + m.size] for m in members] == [each for _, each in FILES]
    with path.open("rb") as pack:
        assert list(members_of(pack)) == members
    assert [each.name for each in path.parent.iterdir()] == ["pack.tar"]


@given(at=st.integers(0, 10_000), content=st.binary(max_size=600), cut=st.integers(0, 10_000))
def test_members_of_a_damaged_pack_lie_within_it(
    tmp_path_factory: pytest.TempPathFactory, at: int, content: bytes, cut: int
) -> None:
    path = tmp_path_factory.mktemp("packs") / "pack.tar"
    write_pack(path, FILES)
    whole = path.read_bytes()
    damaged = (whole[:at] + content + whole[at + len(content) :])[:cut]
    found = list(members_of(io.BytesIO(damaged)))
    assert all(0 <= m.offset <= m.offset + m.size <= len(damaged) for m in found)
    assert len(found) <= len(damaged) // 512


def test_what_is_no_pack_has_no_members() -> None:
    for content in (b"", b"x" * 511, b"x" * 5000, bytes(10_000), os.urandom(4096)):
        assert not list(members_of(io.BytesIO(content)))


@given(
    content=st.binary(max_size=40),
    offset=st.integers(0, 50),
    size=st.integers(0, 50),
    reads=st.lists(st.tuples(st.integers(0, 60), st.integers(-1, 60))),
)
def test_a_member_reads_like_a_file_of_its_own(
    content: bytes, offset: int, size: int, reads: list[tuple[int, int]]
) -> None:
    part = content[offset : offset + size]
    own, member = io.BytesIO(part), io.BufferedReader(MemberFile(io.BytesIO(content), offset, size))
    assert member.seek(0, os.SEEK_END) == own.seek(0, os.SEEK_END)
    for place, count in reads:
        assert member.seek(place) == own.seek(place)
        assert member.read(count) == own.read(count)
        assert member.tell() == own.tell()


def test_a_pack_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "pack.tar").mkdir()
    with pytest.raises(RPGError, match=r"pack\.tar: cannot be written: Is a directory"):
        write_pack(tmp_path / "pack.tar", FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["pack.tar"]
