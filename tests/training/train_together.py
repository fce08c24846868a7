"""One of several workers that train the same generators, each described by a name: see `test_workers.py`.

    python train_together.py SHARDS ROOT RANK RUNS [cuda]

RUNS is JSON: lists of a run's name, its number of workers, the name of the run to go on from or "", and its
scenarios. One after another, those whose number of workers is above RANK are taken part in; the first worker
writes ROOT/NAME/SCENARIO/history.json and the states. With `cuda` each worker has the GPU of its rank.
"""

import dataclasses
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from rpg.collection.shards import ShardedCollection
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    DenoiserKind,
    DiffusionConfig,
    GeneratorConfig,
    Optimiser,
    Precision,
    Prediction,
    RecurrentConfig,
    RecurrentKind,
    Sharding,
    TrainConfig,
)
from rpg.training import exchange
from rpg.training.fit import fit, new_trainer
from rpg.training.progress import TrainingProgress
from rpg.training.trainer import Trainer

# Gradients are clipped in some of the steps.
TRAIN = TrainConfig(
    steps=12,
    checkpoints_per_step=7,
    tokens_per_checkpoint=5,
    warmup_steps=3,
    weight_decay=0.1,
    gradient_clip=0.7,
    ema_decay=0.9,
    precision=Precision.float32,
    save_every=5,
    log_every=1,
)
FAST = GeneratorConfig(
    recurrent=RecurrentConfig(width=16, depth=2, state_size=8, head_size=8),
    denoiser=DenoiserConfig(width=64, depth=2),
    condition=ConditionConfig(width=8, dropout=0.3),
    diffusion=DiffusionConfig(prediction=Prediction.v),
)
UNET = GeneratorConfig(
    recurrent=RecurrentConfig(kind=RecurrentKind.lstm, width=16, depth=1),
    denoiser=DenoiserConfig(kind=DenoiserKind.unet, channels=[1, 4, 6, 4, 1]),
    condition=ConditionConfig(kind=ConditionKind.permutation, width=8),
)
TRANSFORMER = GeneratorConfig(
    recurrent=RecurrentConfig(kind=RecurrentKind.transformer, width=16, depth=1, head_size=8),
    denoiser=DenoiserConfig(width=64, depth=1),
    condition=ConditionConfig(kind=ConditionKind.none),
)
# Wide enough for 8-bit moments, also of each worker's half.
WIDE = replace(FAST, denoiser=DenoiserConfig(width=128, depth=1), condition=ConditionConfig(width=8))
SHARDED = replace(TRAIN, sharding=Sharding.fsdp)
HALF = replace(TRAIN, precision=Precision.bfloat16)
EIGHT_BITS = replace(SHARDED, optimiser=Optimiser.adamw8bit)
SCENARIOS = {
    "fast": (FAST, TRAIN),
    "unet": (UNET, TRAIN),
    "transformer": (TRANSFORMER, TRAIN),
    "fast_sharded": (FAST, SHARDED),
    "unet_sharded": (UNET, SHARDED),
    "transformer_sharded": (TRANSFORMER, SHARDED),
    "half": (FAST, HALF),
    "half_sharded": (FAST, replace(HALF, sharding=Sharding.fsdp)),
    "wide": (WIDE, TRAIN),
    "eight_bits": (WIDE, EIGHT_BITS),
}


def train(
    shards: ShardedCollection, scenario: str, output: Path, resume: Path | None, device: torch.device
) -> None:
    generator, config = SCENARIOS[scenario]
    trainer = new_trainer(shards, generator, config, 0, device)
    if resume:
        trainer.load(resume / scenario / "step_5")
    logged: list[TrainingProgress] = []

    def save(trainer: Trainer, progress: TrainingProgress) -> None:
        trainer.save(output / scenario / f"step_{progress.step}")
        if (average := trainer.whole_average()) and progress.step == config.steps:
            average.save_pretrained(output / scenario / "generator")

    fit(trainer, shards, 0, logged.append, save)
    if trainer.workers.rank == 0:
        rows = [dataclasses.asdict(progress) for progress in logged]
        (output / scenario / "history.json").write_text(json.dumps(rows))


def main() -> None:
    shards, rank = ShardedCollection.open(Path(sys.argv[1])), int(sys.argv[3])
    root, runs = Path(sys.argv[2]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if sys.argv[5:] == ["cuda"]:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    # These generators are small, and are to be exchanged in several buckets as large ones are.
    exchange._BUCKET_BYTES = 4096
    for name, workers, resume, scenarios in runs:
        if rank >= workers:
            continue
        if workers > 1:
            store = f"file://{root / name}/store"
            backend = "gloo" if device.type == "cpu" else "nccl"
            dist.init_process_group(backend, init_method=store, rank=rank, world_size=workers)
        for scenario in scenarios:
            train(shards, scenario, root / name, root / resume if resume else None, device)
        if workers > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
