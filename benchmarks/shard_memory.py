"""How much memory stage `shard` needs for a collection that is larger than it: ResNet-50 checkpoints.

python benchmarks/shard_memory.py --gigabytes 20 --directory DIRECTORY [--results FILE.md]
python benchmarks/shard_memory.py --embedding {float32,bfloat16} --directory DIRECTORY

The second form takes three checkpoints of one large tensor in place of ResNet-50s, registers them with
`rpg register`, and prints the peak of each process. Ray gets 2 CPUs, an object store of 2 GiB and 2 GiB of
memory. `/proc` is sampled twice a second, or 20 times for the embedding; Linux only. The directory needs room
for twice the collection, and is removed at the end.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import ray
import torch
import torchvision

from ray_jobs import shard
from ray_jobs.sharding.resume import PENDING, PLAN_FILE
from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import Collection, Entry
from rpg.collection.shards import ShardedCollection
from rpg.config import CollectConfig, Config, ShardConfig
from rpg.storage.files import sha256

GIB = 1 << 30
EMBEDDING = (151_936, 896)
KINDS = {"Pss_Anon": "anonymous", "Pss_Shmem": "object store", "Pss_File": "mapped files"}


def make_collection(directory: Path, total_bytes: int) -> int:
    """Write perturbed ResNet-50 checkpoints and register them; returns how many."""
    network = torchvision.models.resnet50(weights=None).state_dict()
    size = sum(tensor.nbytes for tensor in network.values())
    entries = []
    for i in range(-(-total_bytes // size)):
        random = torch.Generator().manual_seed(i)
        perturbed = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=random).abs()
            if tensor.is_floating_point()
            else tensor
            for name, tensor in network.items()
        }
        path = directory / f"{i:04d}.safetensors"
        write_checkpoint(path, perturbed, {})
        entries.append(Entry(path.name, sha256(path)))
    Collection(directory, {}, entries).save()
    return len(entries)


def run_shard(directory: Path) -> None:
    """Run the stage in a Ray of its own."""
    config = Config(
        output=str(directory / "run"),
        collect=CollectConfig(directory=str(directory / "collection")),
        shard=ShardConfig(token_size=8192),
    )
    ray.init(
        address="local", num_cpus=2, object_store_memory=2 * GIB, _memory=2 * GIB, include_dashboard=False,
        log_to_driver=False,
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    shard.run(config)
    ray.shutdown()


def sample(session: int, peaks: dict[str, float]) -> None:
    """Raise the peaks, in bytes, to what the processes of a session use now."""
    now: dict[str, float] = defaultdict(float)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            title = (process / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
            rollup = (process / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        used = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in rollup[1:]}
        for key, name in KINDS.items():
            now[f"all processes, {name}"] += used[key]
        who = "driver" if int(process.name) == session else "a worker" if title.startswith("ray::") else ""
        if who:
            now["driver and workers, anonymous"] += used["Pss_Anon"]
            now[f"{who}, anonymous"] = max(now[f"{who}, anonymous"], used["Pss_Anon"])
    for name, value in now.items():
        peaks[name] = max(peaks.get(name, 0.0), value)


def make_embeddings(directory: Path, dtype: torch.dtype) -> None:
    """Write three checkpoints of an embedding as large as that of Qwen2.5-0.5B."""
    directory.mkdir()
    for i in range(3):
        random = torch.Generator().manual_seed(i)
        values = torch.empty(EMBEDDING, dtype=dtype).normal_(generator=random)
        write_checkpoint(directory / f"{i}.safetensors", {"embed_tokens.weight": values}, {})


def sample_resident(session: int, peaks: dict[str, int]) -> None:
    """Raise the peaks, in bytes, to what is resident of a session's processes, without the object store."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) != session:
                continue
            is_worker = (process / "cmdline").read_bytes().startswith(b"ray::")
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            resident = sum(1024 * int(status[key].split()[0]) for key in ("RssAnon", "RssFile"))
        except (OSError, KeyError):
            continue
        if is_worker or int(process.name) == session:
            who = "a worker" if is_worker else "the first process"
            peaks[who] = max(peaks.get(who, 0), resident)


def peaks_of(command: list[str]) -> dict[str, int]:
    """Run a command in a session of its own; returns the peaks of its processes."""
    process = subprocess.Popen(command, start_new_session=True)
    peaks: dict[str, int] = {}
    while process.poll() is None:
        sample_resident(process.pid, peaks)
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.returncode)
    return peaks


def measure_embedding(directory: Path, dtype: torch.dtype) -> None:
    """Print the peaks of `rpg register` and of the stage."""
    make_embeddings(directory / "collection", dtype)
    register = [str(Path(sys.executable).with_name("rpg")), "register", str(directory / "collection")]
    stage = [sys.executable, __file__, "--directory", str(directory), "--only-shard"]
    for name, command in (("rpg register", register), ("stage shard", stage)):
        for who, peak in sorted(peaks_of(command).items()):
            print(f"{name}, {who}: {peak / 1e9:.2f} GB")


def measure(directory: Path, checkpoints: int) -> list[tuple[str, str]]:
    """Run the stage in a process of its own; returns the rows of the table."""
    command = [sys.executable, __file__, "--directory", str(directory), "--only-shard"]
    began = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True)
    first: dict[str, float] = {}
    second: dict[str, float] = {}
    layout_seconds = 0.0
    plan = directory / "run" / "shards" / PENDING / PLAN_FILE
    while process.poll() is None:
        sample(process.pid, second if layout_seconds else first)
        if not layout_seconds and plan.exists():
            layout_seconds = time.perf_counter() - began
        time.sleep(0.5)
    seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(process.returncode)
    began = time.perf_counter()
    opened = ShardedCollection.open(directory / "run" / "shards")
    opening = time.perf_counter() - began
    total = sum(path.stat().st_size for path in (directory / "collection").glob("*.safetensors"))
    shards = list((directory / "run" / "shards").glob("*.arrow"))
    assert len(opened) == checkpoints
    return [
        ("collection", f"{checkpoints} ResNet-50 checkpoints, {total / GIB:.1f} GiB"),
        ("shards", f"{len(shards)}, {sum(path.stat().st_size for path in shards) / GIB:.1f} GiB"),
        ("whole stage, with the start of Ray", f"{seconds:.0f} s, {total / 1e6 / seconds:.0f} MB/s"),
        ("first pass: hash, statistics", f"{layout_seconds:.0f} s"),
        ("second pass: hash, encode, write", f"{seconds - layout_seconds:.0f} s"),
        ("opening the shards", f"{opening:.2f} s"),
        *(
            (
                f"peak of {name}",
                f"{first[name] / GIB:.2f} GiB; {second[name] / GIB:.2f} GiB in the second pass",
            )
            for name in sorted(first)
        ),
    ]


def main() -> None:
    """Make the collection, run the stage, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=2.0, help="GiB of checkpoints")
    parser.add_argument("--embedding", choices=["float32", "bfloat16"], help="dtype of one large tensor")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="write the table there, too")
    parser.add_argument("--only-shard", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    directory: Path = arguments.directory.absolute()
    if arguments.only_shard:
        run_shard(directory)
        return
    directory.mkdir(parents=True)
    if arguments.embedding:
        try:
            measure_embedding(directory, getattr(torch, arguments.embedding))
        finally:
            shutil.rmtree(directory)
        return
    try:
        rows = measure(directory, make_collection(directory / "collection", int(arguments.gigabytes * GIB)))
    finally:
        shutil.rmtree(directory)
    processor = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    table = "\n".join(["| what | measured |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}, Ray {ray.__version__}"
    text = (
        "# Memory of stage `shard`\n\n"
        f"`python benchmarks/shard_memory.py --gigabytes {arguments.gigabytes:g} --directory DIRECTORY` ran "
        f"on an {processor} with 2 CPUs; Ray was given 2 GiB of object store and 2 GiB of memory. "
        f"{versions}, Arrow {pa.__version__}.\n\n"
        f"{table}\n\n"
        "Shared pages are counted in equal shares (PSS). Mapped files are page cache, which the system\n"
        "takes back when it needs room; all processes include Ray's own and its idle workers.\n"
    )
    print(text)
    if arguments.results:
        arguments.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
