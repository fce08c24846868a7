"""The node's cache of remote files: downloaded once, evicted to keep the limit, but never while in use."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpg.collection.shards import ShardedCollection
from rpg.errors import RPGError
from rpg.storage import node_cache
from rpg.storage.files import copy_file, write_text
from rpg.storage.locations import location
from rpg.storage.node_cache import local_copy
from tests.storage.node_cache_user import bring, bring_with_others, hold, read, tell

LARGE = 10**9
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def bucket(s3):
    return s3.bucket(f"cache-{uuid.uuid4().hex[:12]}")


def in_process(uri: str, cache: Path, limit: int) -> str:
    """`read` in another process, whose locks are released when it ends; errors are returned as text."""
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=tell, args=(sender, uri, cache, limit))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def read_and_end(uri: str, cache: Path, limit: int) -> str:
    """`in_process` without starting a process, which is slow; the locks are released as at its end."""
    try:
        return read(uri, cache, limit)
    except RPGError as error:
        return f"error: {error}"
    finally:
        while node_cache._in_use:
            node_cache._in_use.popitem()[1].close()


def cached(cache: Path) -> set[str]:
    return {json.loads(source.read_text())["uri"] for source in cache.glob("*/source.json")}


def downloads(requests: list[tuple[str, str]]) -> int:
    """The requests for content. Listings of a bucket have a query instead of a key."""
    return sum(method == "GET" and "list-type" not in path for method, path in requests)


def test_local_paths_are_returned_unchanged(tmp_path):
    assert local_copy(tmp_path / "a", tmp_path / "cache", 0) == tmp_path / "a"
    assert not (tmp_path / "cache").exists()


def test_a_file_is_downloaded_once_and_again_when_it_changes(bucket, proxy, tmp_path):
    uri = f"{bucket}/a.txt"
    write_text(location(uri), "one")
    proxy.requests.clear()
    paths = {local_copy(location(uri), tmp_path / "cache", LARGE) for _ in range(3)}
    assert [path.read_text() for path in paths] == ["one"]
    assert downloads(proxy.requests) == 1
    write_text(location(uri), "two")
    assert read(uri, tmp_path / "cache", LARGE) == "two"
    # A process that has the earlier copy open can still read it.
    assert [path.read_text() for path in paths] == ["one"]


def test_of_a_directory_only_changed_files_are_downloaded(bucket, proxy, tmp_path):
    directory, cache = location(bucket) / "d", tmp_path / "cache"
    for name in ("a", "b/c", "d"):
        write_text(directory / name, name * 100)
    first = local_copy(directory, cache, LARGE)
    write_text(directory / "e", "new")
    write_text(directory / "a", "changed")
    proxy.requests.clear()
    second = local_copy(directory, cache, LARGE)
    assert downloads(proxy.requests) == 2
    assert {p.relative_to(second).as_posix(): p.read_text() for p in second.rglob("*") if p.is_file()} == {
        "a": "changed", "b/c": "b/c" * 100, "d": "d" * 100, "e": "new",
    }  # fmt: skip
    assert (first / "a").read_text() == "a" * 100


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(1, 70), min_size=5, max_size=5), picks=st.lists(st.integers(0, 4), max_size=8)
)
def test_the_entry_that_was_used_longest_ago_is_evicted(tmp_path, sizes, picks):
    """Compared with a list whose last element is the one used last."""
    cache = tmp_path / uuid.uuid4().hex
    uris = [f"memory://bucket/{uuid.uuid4().hex}" for _ in sizes]
    for uri, size in zip(uris, sizes, strict=True):
        write_text(location(uri), "x" * size)
    limit, model = 60, []
    for pick in picks:
        found = read_and_end(uris[pick], cache, limit)
        if sizes[pick] > limit:
            assert found.startswith(f"error: {uris[pick]}: {sizes[pick]} bytes do not fit into the cache")
            continue
        assert found == "x" * sizes[pick]
        if pick in model:
            model.remove(pick)
        while sum(sizes[i] for i in model) + sizes[pick] > limit:
            model.pop(0)
        model.append(pick)
        assert cached(cache) == {uris[i] for i in model}
    locks = {path.name for path in cache.glob("*.lock")}
    assert len(locks) <= len(sizes) + 1


def test_entries_that_a_living_process_uses_stay(bucket, tmp_path):
    cache = tmp_path / "cache"
    held, other = f"{bucket}/held", f"{bucket}/other"
    write_text(location(held), "h" * 50)
    write_text(location(other), "o" * 50)
    receiver, sender = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=hold, args=(sender, held, cache, 80))
    process.start()
    assert receiver.recv() == "h" * 50
    refused = in_process(other, cache, 80)
    assert refused.startswith(f"error: {other}: 50 bytes do not fit") and "50 of them used by" in refused
    assert cached(cache) == {held}
    process.kill()
    process.join()
    assert in_process(other, cache, 80) == "o" * 50
    assert cached(cache) == {other}


def test_processes_that_ask_at_once_download_once(bucket, proxy, tmp_path):
    for i in range(3):
        write_text(location(f"{bucket}/d/{i}"), f"{i}" * 100_000)
    proxy.requests.clear()
    start = SPAWN.Event()
    pipes = [SPAWN.Pipe(duplex=False) for _ in range(4)]
    where = (start, f"{bucket}/d", tmp_path / "cache", LARGE)
    processes = [SPAWN.Process(target=bring_with_others, args=(sender, *where)) for _, sender in pipes]
    for process in processes:
        process.start()
    assert [receiver.recv() for receiver, _ in pipes] == ["ready"] * len(processes)
    start.set()
    sizes = {str(i): 100_000 for i in range(3)}
    assert [receiver.recv() for receiver, _ in pipes] == [sizes] * len(processes)
    for process in processes:
        process.join()
    assert downloads(proxy.requests) == 3


def test_an_unfinished_download_is_never_used(bucket, proxy, tmp_path):
    cache, uri = tmp_path / "cache", f"{bucket}/d"
    write_text(location(uri) / "a", "a" * 1000)
    write_text(location(uri) / "b", "b" * 1000)
    reached = threading.Event()

    def stall(method: str, path: str) -> bool:
        if method == "GET" and path.endswith("/b") and not reached.is_set():
            reached.set()
            time.sleep(2)
        return False

    proxy.damages = stall
    process = SPAWN.Process(target=bring, args=(uri, cache, LARGE))
    process.start()
    assert reached.wait(30)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert list(cache.glob("*.partial"))
    assert cached(cache) == set()
    # The room that it had reserved is free again.
    write_text(location(f"{bucket}/other"), "o" * 2000)
    assert in_process(f"{bucket}/other", cache, 2000) == "o" * 2000
    assert not list(cache.glob("*.partial"))
    path = local_copy(location(uri), cache, LARGE)
    assert (path / "b").read_text() == "b" * 1000


@pytest.mark.parametrize("times, tells_checksums", [(1, True), (1, False), (100, False)])
def test_shards_that_are_damaged_in_transfer_are_downloaded_again(
    bucket, proxy, tmp_path, make_collection, times, tells_checksums
):
    proxy.tells_checksums = tells_checksums
    make_collection(tmp_path / "local")
    for file in (tmp_path / "local").iterdir():
        copy_file(file, location(f"{bucket}/shards/{file.name}"))
    left = iter(range(times))
    proxy.damages = lambda method, path: (
        method == "GET" and "00004.arrow" in path and next(left, None) is not None
    )

    def bring() -> Path:
        directory = location(f"{bucket}/shards")
        return local_copy(
            directory, tmp_path / "cache", LARGE, lambda copy: ShardedCollection.open(copy).verify()
        )

    if times == 1:
        ShardedCollection.open(bring()).verify()
    else:
        with pytest.raises(RPGError, match=rf"^{bucket}/shards/00004.arrow: damaged"):
            bring()
        assert cached(tmp_path / "cache") == set()
        assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    path = location(f"memory://bucket/{uuid.uuid4().hex}")
    write_text(path, "a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RPGError, match=rf"^{tmp_path}/file: cannot hold a copy of {path}: "):
        local_copy(path, tmp_path / "file", LARGE)


@pytest.mark.parametrize("record", ["", "{", "[]", '{"uri": 1, "files": [2]}', None])
def test_an_entry_without_a_readable_record_is_downloaded_again(tmp_path, record):
    cache = tmp_path / "cache"
    uri, other = (f"memory://bucket/{uuid.uuid4().hex}" for _ in range(2))
    write_text(location(uri), "one")
    write_text(location(other), "two")
    assert read_and_end(uri, cache, LARGE) == "one"
    (source,) = cache.glob("*/source.json")

    def spoil() -> None:
        source.unlink() if record is None else source.write_text(record)

    spoil()
    assert read_and_end(uri, cache, LARGE) == "one"
    assert cached(cache) == {uri}
    spoil()
    assert read_and_end(other, cache, LARGE) == "two"
    assert [path for path in cache.iterdir() if path.is_dir()] == [
        path.parent for path in cache.glob("*/source.json")
    ]


def test_files_are_synced_before_an_entry_is_renamed_into_place(tmp_path, monkeypatch):
    uri = location(f"memory://bucket/{uuid.uuid4().hex}")
    write_text(uri / "a", "one")
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), fsync(fd)))
    copy = local_copy(uri, tmp_path / "cache", LARGE)
    files = [copy / "a", copy.parents[1] / "source.json"]
    assert {file.stat().st_ino for file in files} <= set(synced)


def test_a_living_process_downloads_a_cleared_entry_again(tmp_path):
    cache, uri = tmp_path / "cache", f"memory://bucket/{uuid.uuid4().hex}"
    write_text(location(uri), "one")
    for _ in range(2):
        assert read(uri, cache, LARGE) == "one"
        shutil.rmtree(cache)
    assert read(uri, cache, LARGE) == "one"
    # Its lock is on the file that keeps others from evicting.
    (entry,) = (source.parent for source in cache.glob("*/source.json"))
    assert os.path.samestat(os.fstat(node_cache._in_use[entry].fileno()), entry.with_suffix(".lock").stat())


def test_other_directories_in_the_cache_stay(tmp_path):
    uri = f"memory://bucket/{uuid.uuid4().hex}"
    write_text(location(uri), "x" * 50)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "source.json").write_text("{}")
    assert read_and_end(uri, tmp_path, 60) == "x" * 50
    assert (tmp_path / "mine" / "source.json").exists()


@pytest.mark.parametrize("planted", ["entry", "content", "lock", "source", "reserved", "large source"])
def test_what_others_put_into_the_cache_leads_nowhere(bucket, tmp_path, planted):
    uri, cache, outside = f"{bucket}/a.txt", tmp_path / "cache", tmp_path / "outside"
    write_text(location(uri), "right")
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    assert read_and_end(uri, cache, LARGE) == "right"
    (entry,) = cache.glob("*/")
    # What could be taken for a copy, were links followed.
    shutil.copytree(entry, outside / "entry")
    (outside / "entry" / "content" / "a.txt").write_text("wrong")
    before = {path: path.read_text() for path in outside.rglob("*") if path.is_file()}
    if planted == "entry":
        shutil.rmtree(entry)
        entry.symlink_to(outside / "entry")
    elif planted == "content":
        shutil.rmtree(entry / "content")
        (entry / "content").symlink_to(outside / "entry" / "content")
    elif planted == "lock":
        entry.with_suffix(".lock").unlink()
        entry.with_suffix(".lock").symlink_to(outside / "kept.txt")
    elif planted == "source":
        (entry / "source.json").unlink()
        os.mkfifo(entry / "source.json")
    elif planted == "large source":
        with (entry / "source.json").open("r+b") as file:
            file.truncate(2**40)
    else:
        shutil.rmtree(entry)
        for number in range(3):
            partial = cache / f"{number:032x}.partial"
            partial.mkdir()
            (partial / "reserved").write_text("many")
            (partial / "link").symlink_to(outside)
    found = read_and_end(uri, cache, LARGE)
    refused = f"error: {entry}.lock: is a link; expected a lock's regular file"
    assert found == (refused if planted == "lock" else "right")
    assert {path: path.read_text() for path in outside.rglob("*") if path.is_file()} == before
