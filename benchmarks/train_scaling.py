"""Data-parallel training of the `fast` generator at ResNet-18 size, on one GPU and on two.

    python benchmarks/train_scaling.py          # two GPUs: prints a table
    python benchmarks/train_scaling.py --tiny   # two processes on CPUs: shows that it runs, measures nothing

Every run is `rpg.training.fit.fit` on real shards. Runs alternate, each in fresh processes; the first
`WARM_UP` steps of each are left out, and the median of the others' rates counts.
"""

import argparse
import json
import platform
import socket
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torchvision.models import resnet18

from rpg.collection.collection import Entry
from rpg.collection.manifest import write_manifest
from rpg.collection.shard_file import write_shard
from rpg.collection.shards import ShardedCollection
from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    DenoiserConfig,
    GeneratorConfig,
    Normalisation,
    Precision,
    RecurrentConfig,
    TokenDtype,
    TrainConfig,
)
from rpg.training.fit import fit, new_trainer
from rpg.training.progress import TrainingProgress
from rpg.training.workers import Workers

CONDITION_WIDTH = 16
LOG_EVERY = 10
WARM_UP = 30


@dataclass(frozen=True)
class Size:
    """The generator and collection that are trained, and the number of steps."""

    checkpoints: int
    token_size: int
    tokens_per_checkpoint: int
    rows_per_worker: int
    steps: int
    rounds: int
    generator: GeneratorConfig


FULL = Size(
    checkpoints=32,
    token_size=8192,
    tokens_per_checkpoint=256,
    rows_per_worker=8,
    steps=WARM_UP + 100,
    rounds=3,
    generator=GeneratorConfig(
        recurrent=RecurrentConfig(width=1024, depth=1, expand=1, state_size=64),
        denoiser=DenoiserConfig(width=4096, depth=4),
        condition=ConditionConfig(width=1024),
    ),
)
TINY = Size(
    checkpoints=4,
    token_size=8192,
    tokens_per_checkpoint=2,
    rows_per_worker=1,
    steps=WARM_UP + 2 * LOG_EVERY,
    rounds=1,
    generator=GeneratorConfig(
        recurrent=RecurrentConfig(width=16, head_size=8, state_size=8),
        denoiser=DenoiserConfig(width=32, depth=1),
        condition=ConditionConfig(width=16),
    ),
)


def write_collection(directory: Path, size: Size) -> None:
    """Shards of ResNet-18s with noise on their weights."""
    template = resnet18(weights=None).state_dict()
    random = torch.Generator().manual_seed(0)

    def network() -> dict[str, Tensor]:
        return {
            name: value + 0.01 * torch.rand(value.shape, generator=random)
            if value.is_floating_point()
            else value
            for name, value in template.items()
        }

    found = LayoutStatistics(template)
    for _ in range(2):
        found.update(network())
    layout = found.layout(size.token_size, Normalisation.residual)
    entries = [
        Entry(f"{i:04d}", "", torch.rand(CONDITION_WIDTH, generator=random).tolist())
        for i in range(size.checkpoints)
    ]
    shards = [
        write_shard(directory / f"{i:05d}.arrow", layout, [(entry.file, network())], TokenDtype.float32)
        for i, entry in enumerate(entries)
    ]
    write_manifest(directory, layout, shards, entries, TokenDtype.float32)


def train(rank: int, workers: int, rows: int, tiny: bool, shards: Path, port: int, output: Path) -> None:
    """Run one of `workers`, which share `rows` checkpoints a step; the first writes its rates to `output`."""
    size = TINY if tiny else FULL
    torch.set_num_threads(1 if tiny else 8)
    device = torch.device("cpu" if tiny else f"cuda:{rank}")
    if not tiny:
        torch.cuda.set_device(device)
    if workers > 1:
        dist.init_process_group(
            "gloo" if tiny else "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers
        )
    assert Workers.current().count == workers
    config = TrainConfig(
        steps=size.steps,
        checkpoints_per_step=rows,
        tokens_per_checkpoint=size.tokens_per_checkpoint,
        precision=Precision.bfloat16,
        save_every=size.steps,
        log_every=LOG_EVERY,
    )
    collection = ShardedCollection.open(shards)
    trainer = new_trainer(collection, size.generator, config, 0, device)
    rates, waiting = [], []

    def on_log(progress: TrainingProgress) -> None:
        if progress.step > WARM_UP:
            rates.append(progress.tokens_per_second)
            waiting.append(progress.waiting_share)

    fit(trainer, collection, 0, on_log, lambda trainer, progress: None)
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in trainer.generator.parameters())
        result = {
            "rates": rates,
            "waiting_share": statistics.median(waiting),
            "parameters": parameters,
            "tokens": collection.layout.tokens,
        }
        output.write_text(json.dumps(result))
    if workers > 1:
        dist.destroy_process_group()


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="on CPUs, to see that it runs")
    tiny = parser.parse_args().tiny
    if not tiny and torch.cuda.device_count() < 2:
        parser.error(f"needs two GPUs, this machine has {torch.cuda.device_count()}; --tiny runs on CPUs")
    size = TINY if tiny else FULL
    each = size.rows_per_worker
    runs = [(1, each), (1, 2 * each), (2, 2 * each)]
    rates: dict[tuple[int, int], list[float]] = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as temporary:
        shards, output = Path(temporary) / "shards", Path(temporary) / "rates.json"
        shards.mkdir()
        write_collection(shards, size)
        for _ in range(size.rounds):
            for workers, rows in runs:
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = free.getsockname()[1]
                torch.multiprocessing.spawn(
                    train, (workers, rows, tiny, shards, port, output), nprocs=workers
                )
                result = json.loads(output.read_text())
                rates[workers, rows] += result["rates"]
                rate = statistics.median(result["rates"])
                print(
                    f"workers: {workers}, checkpoints a step: {rows}, tokens/s: {rate:,.0f}, "
                    f"waiting for data {result['waiting_share']:.1%}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    median = {run: statistics.median(found) for run, found in rates.items()}
    where = "CPU" if tiny else torch.cuda.get_device_name()
    cuda = (
        "" if tiny else f", CUDA {torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    )
    print(
        f"{where}; PyTorch {torch.__version__}{cuda}, Python {platform.python_version()}; "
        f"generator of {result['parameters'] / 1e6:.1f} M parameters, networks of {result['tokens']:,} "
        f"tokens x {size.token_size}, {size.tokens_per_checkpoint} of them a checkpoint and step, bfloat16; "
        f"median of {len(rates[runs[0]])} intervals of {LOG_EVERY} steps\n"
    )
    print("| workers | checkpoints a step | tokens/s | least to most | against one worker |")
    print("| ---: | ---: | ---: | ---: | --- |")
    for run in runs:
        workers, rows = run
        factor = ""
        if workers > 1:
            factor = (
                f"{median[run] / median[1, each]:.2f} at the same batch a worker, "
                f"{median[run] / median[1, rows]:.2f} at the same batch"
            )
        spread = f"{min(rates[run]):,.0f} to {max(rates[run]):,.0f}"
        print(f"| {workers} | {rows} | {median[run]:,.0f} | {spread} | {factor} |")


if __name__ == "__main__":
    main()
