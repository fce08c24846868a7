"""Shards give back any tokens, read only the pages that contain them, and name damaged files."""

import ctypes
import gc
import json
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from rpg.collection.collection import Entry
from rpg.collection.layout import CENTRE_FILE, LAYOUT_FILE, Layout
from rpg.collection.manifest import ENTRIES_FILE, MANIFEST_FILE, write_manifest
from rpg.collection.shard_file import open_shard, write_shard
from rpg.collection.shards import ShardedCollection
from rpg.collection.statistics import LayoutStatistics
from rpg.collection.verified import VERIFIED_FILE
from rpg.config import Normalisation, TokenDtype
from rpg.errors import RPGError
from rpg.storage.files import sha256

StateDict = dict[str, Tensor]


def make(count: int, token_size: int = 8, width: int = 37) -> tuple[Layout, list[tuple[str, StateDict]]]:
    generator = torch.Generator().manual_seed(0)
    checkpoints = [
        (
            f"models/{i:04d}.pt",
            {
                "fc.weight": torch.randn(5, width, generator=generator),
                "fc.bias": torch.randn(5, generator=generator),
                "steps": torch.tensor(i),
            },
        )
        for i in range(count)
    ]
    statistics = LayoutStatistics(checkpoints[0][1])
    for _, state_dict in checkpoints:
        statistics.update(state_dict)
    return statistics.layout(token_size, Normalisation.residual), checkpoints


def write(
    directory: Path, dtype: TokenDtype = TokenDtype.float32
) -> tuple[Layout, list[tuple[str, StateDict]]]:
    """Seven checkpoints in shards of 3, 3 and 1, with conditions of width 2."""
    layout, checkpoints = make(7)
    shards = [
        write_shard(directory / f"{i:05d}.arrow", layout, checkpoints[3 * i : 3 * i + 3], dtype)
        for i in range(3)
    ]
    entries = [Entry(name, "", [float(i), i / 3], {}, "train") for i, (name, _) in enumerate(checkpoints)]
    write_manifest(directory, layout, shards, entries[::-1], dtype)
    return layout, checkpoints


@pytest.mark.parametrize("dtype", list(TokenDtype))
def test_tokens_come_back_rounded_to_the_storage_type(tmp_path: Path, dtype: TokenDtype) -> None:
    layout, checkpoints = write(tmp_path, dtype)
    collection = ShardedCollection.open(tmp_path)
    collection.verify()
    assert len(collection) == 7
    assert collection.names == [name for name, _ in checkpoints]
    assert collection.conditions is not None
    assert collection.conditions.dtype == torch.float32
    torch.testing.assert_close(collection.conditions, torch.tensor([[i, i / 3] for i in range(7)]))
    assert collection.layout.digest() == layout.digest()
    encoded = torch.stack([layout.encode(state_dict).tokens for _, state_dict in checkpoints])
    expected = encoded.to(getattr(torch, dtype)).float()
    for checkpoint in range(7):
        assert torch.equal(collection.read(checkpoint, range(layout.tokens)), expected[checkpoint])
    indices = torch.tensor([3, 0, 3])
    assert torch.equal(collection.read(4, indices), expected[4][indices])
    generator = np.random.default_rng(0)
    chosen, tokens = generator.integers(0, 7, 20), generator.integers(0, layout.tokens, (20, 5))
    found = collection.read_batch(chosen.tolist(), tokens)
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found.float(), expected[torch.from_numpy(chosen)[:, None], torch.from_numpy(tokens)])


@pytest.mark.parametrize(
    ("dtype", "arrow_type"),
    [
        (TokenDtype.float32, pa.float32()),
        (TokenDtype.float16, pa.float16()),
        (TokenDtype.bfloat16, pa.uint16()),
    ],
)
def test_a_shard_is_plain_arrow(tmp_path: Path, dtype: TokenDtype, arrow_type: Any) -> None:
    layout, checkpoints = write(tmp_path, dtype)
    with pa.memory_map(str(tmp_path / "00000.arrow")) as source:
        reader = pa.ipc.open_file(source)
        assert reader.num_record_batches == 3
        column = reader.schema.field("tokens")
        assert (column.type.value_type, column.type.list_size) == (arrow_type, layout.token_size)
        assert reader.schema.metadata[b"rpg.token_dtype"] == dtype.encode()
        rows = reader.get_batch(1).column("tokens").to_pylist()
    if dtype == TokenDtype.float32:
        assert torch.equal(torch.tensor(rows), layout.encode(checkpoints[1][1]).tokens)


def test_a_collection_may_have_no_conditions(tmp_path: Path) -> None:
    layout, checkpoints = make(2)
    shard = write_shard(tmp_path / "a.arrow", layout, checkpoints, TokenDtype.float32)
    entries = [Entry(name, "") for name, _ in checkpoints]
    write_manifest(tmp_path, layout, [shard], entries, TokenDtype.float32)
    collection = ShardedCollection.open(tmp_path)
    assert collection.conditions is None


def test_indices_out_of_range_are_refused(tmp_path: Path) -> None:
    layout, _ = write(tmp_path)
    collection = ShardedCollection.open(tmp_path)
    for checkpoint, token in ((7, 0), (-1, 0), (0, layout.tokens), (0, -1)):
        with pytest.raises(IndexError):
            collection.read(checkpoint, [token])
    assert collection.read(0, []).shape == (0, layout.token_size)


def large(directory: Path) -> ShardedCollection:
    """Eight checkpoints of 4 MB in one shard, in tokens of 1 KB."""
    layout, checkpoints = make(8, token_size=256, width=210_000)
    shard = write_shard(directory / "large.arrow", layout, checkpoints, TokenDtype.float32)
    entries = [Entry(name, "") for name, _ in checkpoints]
    write_manifest(directory, layout, [shard], entries, TokenDtype.float32)
    return ShardedCollection.open(directory)


FEW = [(1, [0, 2000, 4000]), (6, [17, 3999])]
LIMIT_BYTES = 40 * 4096
"""Five tokens lie on at most ten pages; the rest is for Arrow's own headers and footer."""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mincore")
def test_reading_a_few_tokens_reads_only_their_pages_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "large.arrow"
    # The collection is not kept, because the pages of a mapped file cannot be dropped.
    large(tmp_path)
    drop_from_cache(path)
    if resident_bytes(path) > 0:
        pytest.skip("this file system keeps pages that it is asked to drop")
    collection = ShardedCollection.open(tmp_path)
    opened = resident_bytes(path)
    assert opened <= LIMIT_BYTES
    for checkpoint, tokens in FEW:
        collection.read(checkpoint, tokens)
    read = resident_bytes(path) - opened
    assert 0 < read <= LIMIT_BYTES < path.stat().st_size / 100
    collection.read(0, range(collection.layout.tokens))
    whole = resident_bytes(path) - opened - read
    assert whole >= 0.9 * collection.layout.tokens * 1024


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def resident_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), pages)
        del start
        if failed:
            pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


def refused(message: str, action: Callable[[], Any]) -> None:
    with pytest.raises(RPGError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "00001.arrow").unlink(), "00001.arrow: not found"),
        (
            lambda d: os.truncate(d / "00001.arrow", 1000),
            r"00001.arrow: cut short: expected \d+ bytes, found 1000",
        ),
        (lambda d: garble(d / "00001.arrow"), "00001.arrow: damaged: its SHA-256"),
        (lambda d: (d / "00002.arrow").replace(d / "00001.arrow"), "00001.arrow: cut short"),
        (lambda d: (d / MANIFEST_FILE).unlink(), f"{MANIFEST_FILE}: not found"),
        (lambda d: (d / MANIFEST_FILE).write_text("{"), f"{MANIFEST_FILE}: cannot be read"),
        (lambda d: (d / LAYOUT_FILE).unlink(), f"{LAYOUT_FILE}: not found"),
        (lambda d: (d / CENTRE_FILE).unlink(), f"{CENTRE_FILE}: not found"),
        (lambda d: (d / ENTRIES_FILE).unlink(), f"{ENTRIES_FILE}: cannot be read"),
        (lambda d: garble(d / ENTRIES_FILE), f"{ENTRIES_FILE}: damaged"),
        (lambda d: move(d, "shard", 3), f"{ENTRIES_FILE}: 'models/0006.pt': no record batch 0 in shard 3"),
        (lambda d: move(d, "shard", -1), f"{ENTRIES_FILE}: 'models/0006.pt': no record batch 0 in shard -1"),
        (lambda d: move(d, "batch", 1), f"{ENTRIES_FILE}: 'models/0006.pt': no record batch 1 in shard 2"),
        (lambda d: move(d, "batch", -1), f"{ENTRIES_FILE}: 'models/0006.pt': no record batch -1 in shard 2"),
        (lambda d: make(3)[0].save(d), f"{MANIFEST_FILE}: the shards were made with another layout"),
        (lambda d: change(d, version=9), f"{MANIFEST_FILE}: version: expected 2, got 9"),
        (lambda d: change(d, dtype="int8"), f"{MANIFEST_FILE}: dtype: expected one of float32"),
        (lambda d: change(d, dtype="float16"), "00000.arrow: expected float16 tokens"),
        (lambda d: change(d, shards=[]), f"{MANIFEST_FILE}: shards: expected a list"),
        (
            lambda d: change(d, shards=[{"file": "00000.arrow"}]),
            f"{MANIFEST_FILE}: shard 0: expected the keys",
        ),
        (
            lambda d: change(d, shards=[{"file": "../x", "bytes": 1, "sha256": "", "checkpoints": 1}]),
            f"{MANIFEST_FILE}: shard 0: file: expected a name without a directory",
        ),
        *(
            (
                lambda d, name=name: change_shard(d, file=name),
                f"{MANIFEST_FILE}: shard 0: file: expected a name without a directory",
            )
            for name in ("a\0b", "\ud800", "..", "")
        ),
        (
            lambda d: change_shard(d, checkpoints=10**18),
            f"{MANIFEST_FILE}: shards: expected 7 checkpoints in all, as {ENTRIES_FILE} has, found 10+4",
        ),
        (lambda d: vouched(d, b"no Arrow"), f"{ENTRIES_FILE}: not an Arrow file"),
        (
            lambda d: vouched(d, (d / ENTRIES_FILE).read_bytes()[:-20]),
            f"{ENTRIES_FILE}: not an Arrow file",
        ),
        (
            lambda d: change_column(d, "name", None),
            f"{ENTRIES_FILE}: column 'name': expected one of",
        ),
        (
            lambda d: change_column(d, "shard", pa.array(["0"] * 7)),
            f"{ENTRIES_FILE}: column 'shard': expected one of type int32",
        ),
        (
            lambda d: change_column(d, "batch", pa.array([None] * 7, pa.int32())),
            f"{ENTRIES_FILE}: column 'batch': expected a value in every row",
        ),
        (
            lambda d: change_column(d, "condition", pa.array([1.0] * 7)),
            f"{ENTRIES_FILE}: column 'condition': expected nulls, or float32 lists",
        ),
        *(
            (
                lambda d, states=states: change_column(d, "state", states),
                f"{ENTRIES_FILE}: column 'state': expected 0 or more in every row",
            )
            for states in (
                pa.array([0] * 7),
                pa.array([-1] * 7, pa.int32()),
                pa.array([None] * 7, pa.int32()),
            )
        ),
    ],
)
def test_damaged_directories_are_refused_by_file(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    write(tmp_path)
    damage(tmp_path)
    refused(message, lambda: ShardedCollection.open(tmp_path))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_changed_byte_is_found_on_opening(tmp_path: Path) -> None:
    write(tmp_path)
    for _ in range(2):
        ShardedCollection.open(tmp_path)
        flip_a_bit(tmp_path / "00002.arrow")
        # It is found each time until it is repaired.
        for _ in range(2):
            refused("00002.arrow: damaged", lambda: ShardedCollection.open(tmp_path))
        flip_a_bit(tmp_path / "00002.arrow")


def test_an_unchanged_file_is_read_for_its_checksum_once(tmp_path: Path) -> None:
    """Damage with the same size, time and inode passes, since the file is not read; `verify` reads it."""
    write(tmp_path)
    path = tmp_path / "00002.arrow"
    ShardedCollection.open(tmp_path)
    status = path.stat()
    flip_a_bit(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    collection = ShardedCollection.open(tmp_path)
    refused("00002.arrow: damaged", collection.verify)
    refused("00002.arrow: damaged", lambda: ShardedCollection.open(tmp_path))


def test_shards_are_verified_each_time_if_no_record_can_be_written(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / VERIFIED_FILE).mkdir()
    path = tmp_path / "00002.arrow"
    status = path.stat()
    for _ in range(2):
        ShardedCollection.open(tmp_path)
    flip_a_bit(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused("00002.arrow: damaged", lambda: ShardedCollection.open(tmp_path))
    ShardedCollection.open(tmp_path, verify=False)


def garble(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def move(directory: Path, column: str, value: int) -> None:
    """Give the last checkpoint another place, in entries with the digest that the manifest expects."""
    table = pa.ipc.open_file((directory / ENTRIES_FILE).read_bytes()).read_all()
    places = table.column(column).to_pylist()
    places[-1] = value
    change_column(directory, column, pa.array(places, pa.int32()))


def change_column(directory: Path, column: str, values: Any) -> None:
    table = pa.ipc.open_file((directory / ENTRIES_FILE).read_bytes()).read_all()
    index = table.schema.get_field_index(column)
    if index >= 0:
        table = table.remove_column(index)
    if values is not None:
        table = table.append_column(column, values)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    vouched(directory, sink.getvalue().to_pybytes())


def vouched(directory: Path, entries: bytes) -> None:
    """Write entries, and their digest into the manifest."""
    (directory / ENTRIES_FILE).write_bytes(entries)
    change(directory, entries_sha256=sha256(directory / ENTRIES_FILE))


def change_shard(directory: Path, **values: Any) -> None:
    shards = json.loads((directory / MANIFEST_FILE).read_text())["shards"]
    change(directory, shards=[{**shards[0], **values}, *shards[1:]])


def change(directory: Path, **values: Any) -> None:
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_checkpoints_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    layout, checkpoints = make(3)
    path = tmp_path / "a.arrow"
    name, good = checkpoints[0]
    short = {**good, "fc.bias": torch.zeros(4)}
    broken = {**good, "fc.bias": torch.full((5,), torch.nan)}
    big = {**good, "fc.bias": torch.full((5,), 1e9)}

    def written(state_dict: StateDict, dtype: TokenDtype) -> Callable[[], Any]:
        return lambda: write_shard(path, layout, [checkpoints[1], (name, state_dict)], dtype)

    refused(f"{name}: tensor 'fc.bias': expected float32", written(short, TokenDtype.float32))
    refused(f"{name}: tensor 'fc.bias': expected values that are finite", written(broken, TokenDtype.float32))
    refused(f"{name}: tensor 'fc.bias': .* finite as float16 tokens", written(big, TokenDtype.float16))
    written(big, TokenDtype.bfloat16)()
    refused("expected at least one checkpoint", lambda: write_shard(path, layout, [], TokenDtype.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["a.arrow"]
    same = LayoutStatistics(good)
    same.update(good)
    same.update(good)
    empty = same.layout(8, Normalisation.residual)
    refused("no tensor differs", lambda: write_shard(path, empty, checkpoints, TokenDtype.float32))


def test_manifests_that_do_not_match_the_shards_are_refused(tmp_path: Path) -> None:
    layout, checkpoints = make(3)
    other, _ = make(3, token_size=9)
    shard = write_shard(tmp_path / "a.arrow", layout, checkpoints, TokenDtype.float32)
    entries = [Entry(name, "", [0.0, 1.0]) for name, _ in checkpoints]
    wider = [*entries[:2], Entry(checkpoints[2][0], "", [0.0])]

    def written(layout: Layout, shards: list[Any], entries: list[Entry]) -> Callable[[], None]:
        return lambda: write_manifest(tmp_path, layout, shards, entries, TokenDtype.float32)

    refused("at least one shard", written(layout, [], entries))
    refused("a.arrow: was written with another layout", written(other, [shard], entries))
    refused("'models/0002.pt' is in the shards but not", written(layout, [shard], entries[:2]))
    refused("'models/0000.pt' is in the shards twice", written(layout, [shard, shard], entries))
    refused("'models/0002.pt': expected a condition of width 2", written(layout, [shard], wider))
    some = [*entries[:2], replace(entries[2], state=1)]
    refused("'models/0000.pt': expected a permutation state", written(layout, [shard], some))
    assert not (tmp_path / MANIFEST_FILE).exists()


def test_a_full_disk_is_reported_in_one_line_and_changes_nothing(tmp_path: Path) -> None:
    """The file size limit RLIMIT_FSIZE stands for the full disk."""
    write(tmp_path)
    before = (tmp_path / "00000.arrow").read_bytes()
    script = """
        import resource, sys, torch
        from pathlib import Path
        from rpg.collection.layout import Layout
        from rpg.collection.shard_file import write_shard
        from rpg.config import TokenDtype
        from rpg.errors import RPGError
        directory = Path(sys.argv[1])
        layout = Layout.load(directory)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoints = ((str(i), layout.centre) for i in range(1000))
            write_shard(directory / "00000.arrow", layout, checkpoints, TokenDtype.float32)
        except RPGError as error:
            print(error)
            sys.exit(2)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == f"{tmp_path / '00000.arrow'}: cannot be written: File too large\n"
    assert result.stderr == ""
    assert (tmp_path / "00000.arrow").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    layout, checkpoints = make(60)
    shards = [
        write_shard(tmp_path / f"{i:05d}.arrow", layout, [checkpoint], TokenDtype.float32)
        for i, checkpoint in enumerate(checkpoints)
    ]
    entries = [Entry(name, "") for name, _ in checkpoints]
    write_manifest(tmp_path, layout, shards, entries, TokenDtype.float32)
    script = """
        import os, resource, sys
        from pathlib import Path
        from rpg.collection.shards import ShardedCollection
        opened = max(int(each) for each in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 30, opened + 30))
        collection = ShardedCollection.open(Path(sys.argv[1]))
        print(sum(collection.read(i, [0]).shape[0] for i in range(60)))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (result.returncode, result.stdout) == (0, "60\n"), result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_deleted_collection_is_unmapped(tmp_path: Path) -> None:
    write(tmp_path)
    collection = ShardedCollection.open(tmp_path)
    read = collection.read(0, [0])
    assert str(tmp_path / "00000.arrow") in Path("/proc/self/maps").read_text()
    del collection
    gc.collect()
    assert str(tmp_path / "00000.arrow") not in Path("/proc/self/maps").read_text()
    assert read.isfinite().all()


def test_an_empty_file_is_no_shard(tmp_path: Path) -> None:
    layout, _ = write(tmp_path)
    (tmp_path / "00000.arrow").write_bytes(b"")
    refused(
        "00000.arrow: not an Arrow file",
        lambda: open_shard(tmp_path / "00000.arrow", layout, TokenDtype.float32, 3),
    )


@pytest.mark.parametrize("kind", [int, float])
def test_conditions_are_rounded_to_float32_whether_they_are_integers_or_not(
    tmp_path: Path, kind: type[int] | type[float]
) -> None:
    layout, checkpoints = make(2)
    shard = write_shard(tmp_path / "a.arrow", layout, checkpoints, TokenDtype.float32)
    entries = [Entry(name, "", [kind(20240131), kind(1)]) for name, _ in checkpoints]
    write_manifest(tmp_path, layout, [shard], entries, TokenDtype.float32)
    conditions = ShardedCollection.open(tmp_path).conditions
    assert conditions is not None
    assert torch.equal(conditions, torch.tensor([[20240131.0, 1.0]] * 2))
