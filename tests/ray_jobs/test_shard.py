"""Stage `shard`: limits, resuming, appending, repairing; its output depends on the collection alone."""

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ray_jobs import shard
from ray_jobs.sharding.resume import PENDING
from ray_jobs.stage import fingerprint
from ray_jobs.train import TRAIN
from rpg.collection.checkpoint import read_checkpoint, write_checkpoint
from rpg.collection.collection import Collection, Entry
from rpg.collection.layout import CENTRE_FILE, LAYOUT_FILE, Encoded
from rpg.collection.manifest import ENTRIES_FILE, MANIFEST_FILE
from rpg.collection.register import register
from rpg.collection.shards import ShardedCollection
from rpg.collection.statistics import LayoutStatistics
from rpg.config import Config, load_config
from rpg.errors import RPGError
from rpg.storage.files import read_json, sha256

ROOT = Path(__file__).parents[2]
OWN = ROOT / "configs" / "own_checkpoints.yaml"

StateDict = dict[str, Tensor]


def make(index: int, width: int = 40) -> StateDict:
    random = torch.Generator().manual_seed(index)
    return {
        "fc.weight": torch.randn(50, width, generator=random),
        "norm.running_var": 1 + torch.rand(50, generator=random),
        "frozen": torch.arange(7.0),
        "steps": torch.tensor(index),
    }


def add(collection: Path, first: int, count: int, change: Callable[[StateDict], object] = len) -> None:
    """Register further checkpoints, with their index as the condition."""
    collection.mkdir(exist_ok=True)
    entries = Collection.load(collection).entries if first else []
    for i in range(first, first + count):
        path = collection / f"{i:04d}.safetensors"
        state_dict = make(i)
        change(state_dict)
        write_checkpoint(path, state_dict, {})
        entries.append(Entry(path.name, sha256(path), [float(i)]))
    Collection(collection, {}, entries).save()


def configured(collection: Path, output: Path, *overrides: str) -> Config:
    settings = [f"collect.directory={collection}", f"output={output}", "shard.token_size=64", *overrides]
    return load_config(OWN, settings)


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    add(tmp_path / "collection", 0, 10)
    return tmp_path / "collection"


def decoded(opened: ShardedCollection, index: int) -> StateDict:
    tokens = opened.read(index, range(opened.layout.tokens))
    return opened.layout.decode(Encoded(tokens, opened.layout.constants))


def check_holds(shards: Path, collection: Path) -> ShardedCollection:
    """Check that the shards give back every checkpoint, except its integers, which are not stored."""
    opened = ShardedCollection.open(shards)
    opened.verify()
    entries = Collection.load(collection).entries
    assert sorted(opened.names) == sorted(entry.file for entry in entries)
    conditions = {entry.file: entry.condition for entry in entries}
    assert opened.conditions is not None
    for i, name in enumerate(opened.names):
        assert opened.conditions[i].tolist() == conditions[name]
        found, expected = decoded(opened, i), read_checkpoint(collection / name)
        del found["steps"], expected["steps"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    return opened


def marks(shards: Path) -> dict[str, tuple[int, int]]:
    """Values that differ once a shard is written again."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in shards.glob("shard-*.arrow")}


def stored(shards: Path) -> dict[str, bytes]:
    """The files of a directory of shards, except the local record of what was verified."""
    return {path.name: path.read_bytes() for path in shards.iterdir() if not path.name.startswith(".")}


def test_shards_hold_the_collection_and_depend_on_it_alone(
    local_ray: None, collection: Path, tmp_path: Path
) -> None:
    serial = LayoutStatistics(make(0))
    for i in range(10):
        serial.update(make(i))
    expected = serial.layout(64, shard.ShardConfig().normalisation)
    found: list[dict[str, bytes]] = []
    for run, part in enumerate((256, 3, 3)):
        config = configured(collection, tmp_path / str(run), "shard.checkpoints_per_shard=4")
        shard.run(config, part_limits=(part, part))
        shards = tmp_path / str(run) / "shards"
        opened = check_holds(shards, collection)
        torch.testing.assert_close(opened.layout.centre, expected.centre, rtol=1e-6, atol=1e-7)
        for ours, theirs in zip(opened.layout.specs, expected.specs, strict=True):
            assert ours.scale == pytest.approx(theirs.scale, rel=1e-9)
        found.append(stored(shards))
        assert not (shards / PENDING).exists()
        counts = [entry["checkpoints"] for entry in read_json(shards / MANIFEST_FILE, "")["shards"]]
        assert counts == [4, 4, 2]
    assert found[1] == found[2]
    assert len(found[0]) == 3 + len((LAYOUT_FILE, CENTRE_FILE, MANIFEST_FILE, ENTRIES_FILE))


def test_shards_are_sized_by_bytes(local_ray: None, tmp_path: Path) -> None:
    def widen(state_dict: StateDict) -> None:
        # 300 kB of tokens: three to a megabyte.
        state_dict["fc.weight"] = state_dict["fc.weight"].repeat(1, 37)

    add(tmp_path / "collection", 0, 7, widen)
    shard.run(configured(tmp_path / "collection", tmp_path / "run", "shard.megabytes_per_shard=1"))
    manifest = read_json(tmp_path / "run" / "shards" / MANIFEST_FILE, "")
    assert [entry["checkpoints"] for entry in manifest["shards"]] == [3, 3, 1]
    assert max(entry["bytes"] for entry in manifest["shards"]) < 1_000_000


def test_new_checkpoints_are_appended_until_refit(
    local_ray: None, collection: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(collection, tmp_path / "run", "shard.checkpoints_per_shard=4")
    shards = tmp_path / "run" / "shards"
    shard.run(config)
    old, before = ShardedCollection.open(shards), marks(shards)
    capsys.readouterr()

    add(collection, 10, 5)
    shard.run(config)
    said = "shard: 5 new checkpoints appended; centre and scales stay those of the first 10: --refit"
    assert said in capsys.readouterr().err
    assert len(marks(shards)) == 5
    assert before.items() <= marks(shards).items()
    opened = check_holds(shards, collection)
    assert opened.layout.digest() == old.layout.digest()
    assert opened.names[:10] == old.names
    everything = range(old.layout.tokens)
    assert all(opened.read(i, everything).equal(old.read(i, everything)) for i in range(10))

    before, trained = marks(shards), fingerprint(TRAIN, config)
    shard.run(config)
    assert marks(shards) == before
    assert fingerprint(TRAIN, config) == trained
    assert "centre and scales stay those of the first 10" in capsys.readouterr().err

    shard.run(config, refit=True)
    assert not marks(shards).keys() & before.keys()
    assert check_holds(shards, collection).layout.digest() != old.layout.digest()
    # What is trained on other tokens is another generator, though its inputs are the same.
    assert fingerprint(TRAIN, config) != trained
    fresh = configured(collection, tmp_path / "fresh", "shard.checkpoints_per_shard=4")
    shard.run(fresh)
    assert stored(shards) == stored(tmp_path / "fresh" / "shards")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["frozen"].add_(1), "tensor 'frozen': expected the values that all earlier checkpoints"),
        (lambda s: s["norm.running_var"].fill_(0.5), "'norm.running_var': expected running variances of at"),
        (lambda s: s["fc.weight"].fill_(torch.nan), "tensor 'fc.weight' holds 2000 NaN"),
        (lambda s: s.update(frozen=torch.ones(8)), "tensor 'frozen': expected float32"),
    ],
)
def test_checkpoints_that_do_not_fit_are_not_appended(
    local_ray: None, collection: Path, tmp_path: Path, change: Callable[[StateDict], object], message: str
) -> None:
    config = configured(collection, tmp_path / "run")
    shards = tmp_path / "run" / "shards"
    shard.run(config)
    before = stored(shards)
    add(collection, 10, 1, change)
    with pytest.raises(RPGError, match=message) as caught:
        shard.run(config)
    assert "0010.safetensors" in str(caught.value)
    assert ("--refit" in str(caught.value)) == ("NaN" not in message)
    assert stored(shards) == before | {path.name: path.read_bytes() for path in shards.glob("shard-*")}
    ShardedCollection.open(shards).verify()


def test_refit_keeps_values_that_vary_only_in_new_checkpoints(
    local_ray: None, collection: Path, tmp_path: Path
) -> None:
    config = configured(collection, tmp_path / "run")
    shard.run(config)
    add(collection, 10, 2, lambda s: (s["frozen"].add_(1), s["norm.running_var"].fill_(0.5)))
    shard.run(config, refit=True)
    check_holds(tmp_path / "run" / "shards", collection)


@pytest.mark.parametrize("change", ["removed", "replaced", "config"])
def test_shards_are_made_anew_after_any_other_change(
    local_ray: None, collection: Path, tmp_path: Path, change: str
) -> None:
    shards = tmp_path / "run" / "shards"
    shard.run(configured(collection, tmp_path / "run"))
    before = marks(shards)
    entries = Collection.load(collection).entries
    if change == "removed":
        del entries[3]
    elif change == "replaced":
        write_checkpoint(collection / entries[3].file, make(77), {})
        entries[3].sha256 = sha256(collection / entries[3].file)
    Collection(collection, {}, entries).save()
    overrides = ["shard.checkpoints_per_shard=3"] if change == "config" else []
    shard.run(configured(collection, tmp_path / "run", *overrides))
    assert not marks(shards).keys() & before.keys()
    opened = check_holds(shards, collection)
    serial = LayoutStatistics(read_checkpoint(collection / entries[0].file))
    for entry in entries:
        serial.update(read_checkpoint(collection / entry.file))
    torch.testing.assert_close(
        opened.layout.centre, serial.layout(64, opened.layout.normalisation).centre, rtol=1e-6, atol=1e-7
    )


def test_a_damaged_shard_is_refused_and_written_again(
    local_ray: None, collection: Path, tmp_path: Path
) -> None:
    config = configured(collection, tmp_path / "run", "shard.checkpoints_per_shard=4")
    shards = tmp_path / "run" / "shards"
    shard.run(config)
    whole, before = stored(shards), marks(shards)
    victim = sorted(shards.glob("shard-*.arrow"))[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(RPGError, match=f"{victim.name}: damaged"):
        ShardedCollection.open(shards)
    shard.run(config)
    assert stored(shards) == whole
    after = marks(shards)
    assert {name for name in after if after[name] != before[name]} == {victim.name}
    ShardedCollection.open(shards)


def processes(session: int) -> dict[int, bytes]:
    """The processes of a session and their titles."""
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session:
                    found[int(directory.name)] = (directory / "cmdline").read_bytes()
            except OSError:
                continue
    return found


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> object:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if found := condition():
            return found
        time.sleep(0.005)
    raise AssertionError("did not come about" if process.poll() is None else process.communicate()[0])


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A worker is killed in the first pass, then everything in the second: driver, workers, Ray itself."""
    add(tmp_path / "collection", 0, 60, lambda s: s.update({"fc.weight": s["fc.weight"].repeat(10, 50)}))
    settings = [
        str(OWN), f"collect.directory={tmp_path / 'collection'}", f"output={tmp_path / 'run'}",
        "shard.token_size=64", "shard.checkpoints_per_shard=1", "ray.num_cpus=2",
    ]  # fmt: skip
    shards = tmp_path / "run" / "shards"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.shard", *settings], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        worker = wait_for(
            lambda: next((p for p, title in processes(process.pid).items() if b"ray::Map" in title), 0),
            process,
        )
        assert isinstance(worker, int)
        os.kill(worker, signal.SIGKILL)
        assert not (shards / PENDING / LAYOUT_FILE).exists()
        wait_for(lambda: len(list((shards / PENDING).glob("shard-*.json"))) >= 3, process)
    finally:
        for victim in processes(process.pid):
            os.kill(victim, signal.SIGKILL)
        process.wait()
    with pytest.raises(RPGError, match=f"{MANIFEST_FILE}: not found"):
        ShardedCollection.open(shards)
    finished = {path.stem for path in (shards / PENDING).glob("shard-*.json")}
    before = {name: mark for name, mark in marks(shards).items() if name in finished}
    assert 3 <= len(before) < 60

    capsys.readouterr()
    shard.run(configured(tmp_path / "collection", tmp_path / "run", "shard.checkpoints_per_shard=1"))
    assert before.items() <= marks(shards).items()
    assert not (shards / PENDING).exists()
    assert not list(shards.glob(".*.partial"))
    # The first pass was not made again, and nothing differs from a run that nobody killed.
    printed = capsys.readouterr().err
    assert " tokens" in printed
    assert " layout" not in printed
    shard.run(configured(tmp_path / "collection", tmp_path / "whole", "shard.checkpoints_per_shard=1"))
    ours, whole = stored(shards), stored(tmp_path / "whole" / "shards")
    # Not compared as a whole: pytest would take minutes to describe what differs in megabytes.
    assert [name for name in ours.keys() | whole.keys() if ours.get(name) != whole.get(name)] == []


def test_what_was_decided_at_register_holds_for_the_shards(local_ray: None, tmp_path: Path) -> None:
    root = tmp_path / "collection"
    root.mkdir()
    for i in range(6):
        network = {f"module.{name}": tensor for name, tensor in make(i).items()}
        average = {name: tensor * 2 for name, tensor in network.items()}
        torch.save({"state_dict": network, "ema": average, "args": Namespace(lr=1)}, root / f"{i}.ckpt")
    config = configured(root, tmp_path / "run")
    for key, factor in (("ema", 2), ("state_dict", 1)):
        register(root, key=key, ignore=["steps"])
        shard.run(config)
        opened = ShardedCollection.open(tmp_path / "run" / "shards")
        assert opened.names == [f"{i}.ckpt" for i in range(6)]
        for i in range(6):
            expected = {name: tensor * factor for name, tensor in make(i).items() if name != "steps"}
            torch.testing.assert_close(decoded(opened, i), expected, rtol=1e-5, atol=1e-5)
