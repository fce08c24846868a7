"""A training step at ResNet-18 size on one GPU: as it is taken, and in plain PyTorch.

    python -m benchmarks.training_speed          # prints a table as Markdown
    python -m benchmarks.training_speed --tiny   # on a CPU: shows that it runs, measures nothing

Every run is `rpg.training.fit.fit` on shards of ResNet-18s, with as many tokens a step as the published code
samples (512), or as many as the `fast` generator is trained with. Plain PyTorch is the same step without CUDA
graph and compiler. The first `WARM_UP` steps are left out, and the median of the others counts.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.resnet18_shards import FULL, TINY, write_collection
from rpg.captured import CapturedStep
from rpg.collection.shards import ShardedCollection
from rpg.config import (
    ConditionConfig,
    DenoiserConfig,
    DenoiserKind,
    DiffusionConfig,
    GeneratorConfig,
    Precision,
    Prediction,
    RecurrentConfig,
    TrainConfig,
)
from rpg.training.fit import fit, new_trainer
from rpg.training.progress import TrainingProgress

LOG_EVERY = 10
WARM_UP = 20
STEPS = WARM_UP + 40
PAPER = GeneratorConfig(
    recurrent=RecurrentConfig(width=8192, depth=2, expand=2, state_size=128),
    denoiser=DenoiserConfig(kind=DenoiserKind.unet),
    condition=ConditionConfig(width=1024),
    diffusion=DiffusionConfig(prediction=Prediction.noise),
)
"""The published generator for networks of ResNet-18's size."""
TINY_PAPER = replace(
    PAPER,
    recurrent=TINY.generator.recurrent,
    denoiser=DenoiserConfig(kind=DenoiserKind.unet, channels=[1, 2, 4, 2, 1]),
    condition=TINY.generator.condition,
)


@dataclass(frozen=True)
class Run:
    """One row of the table: the generator that is trained, and how."""

    denoiser: str
    checkpoints: int
    tokens: int
    plain: bool


BATCHES = (("fast", 8, 256), ("paper", 8, 64), ("paper", 2, 256), ("paper", 1, 512))
RUNS = [Run(*batch, plain) for batch in BATCHES for plain in (True, False)]


def measure(run: Run, shards: ShardedCollection, tiny: bool) -> str:
    """Train, and describe it as a row of the table."""
    device = torch.device("cpu" if tiny else "cuda")
    fast, paper = (TINY.generator, TINY_PAPER) if tiny else (FULL.generator, PAPER)
    config = TrainConfig(
        steps=STEPS,
        checkpoints_per_step=run.checkpoints,
        tokens_per_checkpoint=2 if tiny else run.tokens,
        precision=Precision.bfloat16,
        save_every=STEPS,
        log_every=LOG_EVERY,
    )
    if not tiny:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = new_trainer(shards, fast if run.denoiser == "fast" else paper, config, 0, device)
    if run.plain and isinstance(trainer.changing, CapturedStep):
        trainer.changing = trainer.changing.captured
    seen: list[TrainingProgress] = []
    with torch.compiler.set_stance("force_eager" if run.plain else "default"):
        fit(trainer, shards, 0, seen.append, lambda trainer, progress: None)
    counted = [progress for progress in seen if progress.step > WARM_UP]
    sampled = config.checkpoints_per_step * config.tokens_per_checkpoint
    step = statistics.median(1e3 * sampled / progress.tokens_per_second for progress in counted)
    waiting = statistics.median(progress.waiting_share for progress in counted)
    memory = 0.0 if tiny else torch.cuda.max_memory_reserved() / 1e9
    how = "plain PyTorch" if run.plain else "as it trains"
    parameters = sum(parameter.numel() for parameter in trainer.generator.parameters()) / 1e6
    batch = f"{run.checkpoints} x {config.tokens_per_checkpoint}"
    return (
        f"| {run.denoiser}, {parameters:,.0f} M | {batch} | {how} | {step:.1f} ms | {waiting:.2%} | "
        f"{memory:.1f} GB | {seen[-1].loss:.3f} |"
    )


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to see that it runs")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        parser.error("needs a GPU; --tiny runs on a CPU")
    # Jobs set this for their training workers (ray_jobs/training/fitting.py).
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.set_num_threads(1 if tiny else 8)
    with tempfile.TemporaryDirectory() as directory:
        write_collection(Path(directory), TINY if tiny else replace(FULL, checkpoints=16))
        shards = ShardedCollection.open(Path(directory))
        rows = []
        for run in RUNS:
            rows.append(measure(run, shards, tiny))
            print(rows[-1], file=sys.stderr, flush=True)
    where = "CPU" if tiny else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    print(f"{where}; PyTorch {torch.__version__}, Python {platform.python_version()}; bfloat16\n")
    print("| generator | checkpoints x tokens a step | | step | waiting for data | memory | loss |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
