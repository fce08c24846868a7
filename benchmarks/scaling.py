"""Training, collecting and generating on one GPU and on several, through Ray as the jobs do it.

    python -m benchmarks.scaling --gpus 1 2 --output DIRECTORY     # about eight minutes; prints a table last
    python -m benchmarks.scaling --gpus 1 2 --output DIRECTORY --tiny     # on CPUs: shows that it runs
    python -m benchmarks.scaling --gpus 1 2 --output DIRECTORY --parts train rivals --seconds 300
    python -m benchmarks.scaling --gpus 2 --output DIRECTORY --parts pipeline

The parts are `train` (the generator of `configs/cifar10-binary.yaml` with a denoiser 1024 wide), `large` (517
million parameters, whole and sharded; 2.8 billion, sharded), `rivals` (other ways to exchange gradients),
`generate`, `collect`, and `pipeline` (the whole preset, wall clock; not among the defaults).

Networks and images are noise, since the speed does not depend on them; `--images` names others for the part
`pipeline`. Training is `ray_jobs`' own worker in Ray Train: one group of workers trains all rows of a part,
one after another, and each row ends after `REPORTS` reports or its time. The first `WARM_UP` reports of a row
are left out, and the median of the others counts. Every part with every number of GPUs is a process of its
own with a time limit, so that one which hangs costs only its own rows. DIRECTORY keeps `rows.jsonl` (what was
measured), logs, and `table.md`.
"""

import argparse
import dataclasses
import gc
import io
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from benchmarks import resnet18_shards
from ray_jobs import collect, generate
from ray_jobs.cluster import ray_cluster
from ray_jobs.resources import cpus_per_worker, node_resources, worker_resources
from ray_jobs.run_paths import RunPaths
from ray_jobs.training.fitting import allocator_settings, ray_train_finds_this_cluster
from ray_jobs.training.worker import WorkerConfig, train_worker
from rpg.collection.collection import Collection, Entry
from rpg.collection.layout import Layout
from rpg.collection.manifest import write_manifest
from rpg.collection.shard_file import write_shard
from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    Config,
    Normalisation,
    Sharding,
    TokenDtype,
    load_config,
)
from rpg.tasks.cifar10_net import Cifar10Net
from rpg.training.progress import TrainingProgress

ROOT = Path(__file__).parents[1]
PRESET = ROOT / "configs" / "cifar10-binary.yaml"
DEFAULT_PARTS = ("train", "large", "rivals", "generate", "collect")
REPORTS, WARM_UP = 16, 4
_SECONDS_A_ROW = 20.0
"""After which a row of training that has begun ends, with the reports that it has."""
_SECONDS = {"train": 100, "large": 170, "rivals": 110, "generate": 75, "collect": 130, "pipeline": 590}
"""Limits of a part with one number of GPUs; `--tiny` may take five times as long."""
_LAST_SECONDS = 30.0
"""Of a call's time, for ending a part and printing the table."""
_HUGE_WIDTH = 10368
"""Of the denoiser that makes a generator of 2.8 billion parameters."""
TO_REACH = {
    "train 128 a worker": {2: 1.85, 4: 3.6},
    "train 256": {2: 1.6},
    "train 64": {2: 1.1},
    "large 8 a worker": {4: 3.6},
    "generate": {2: 1.9, 4: 3.8},
    "collect": {2: 1.9, 4: 3.8},
}
"""By row, how many times the rate of one GPU so many are to reach."""


_TINY_PIPELINE = (
    "ray.num_cpus=2", "collect.checkpoints_per_task=1", "collect.heldout_checkpoints_per_task=1",
    "collect.backbone_epochs=1", "collect.batch_size=8", "collect.models_per_batch=128",
    "generator.denoiser.width=32", "generator.denoiser.depth=1", "generator.recurrent.width=64",
    "train.steps=4", "train.checkpoints_per_step=2", "train.tokens_per_checkpoint=4", "refine.steps=2",
    "refine.tasks_per_step=2", "refine.networks_per_task=2", "refine.samples_per_step=4",
    "refine.validate_every=2", "generate.models_per_task=1", "generate.seen_tasks=1",
    "evaluate.noise_levels=[0.02]",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One training run."""

    name: str
    """What rows of different numbers of GPUs have in common."""
    rows: int
    """Checkpoints a step, of all workers."""
    generator: str = "small"
    sharding: Sharding = Sharding.none
    rival: str = ""
    """The other way of exchanging gradients; empty: the project's own."""


@dataclass(frozen=True)
class Session:
    """What all parts of a call share."""

    output: Path
    images: str
    tiny: bool

    def small(self) -> Path:
        """Shards for the preset's generator."""
        return self.output / "small"

    def large(self) -> Path:
        """Shards of ResNet-18s."""
        return self.output / "large"

    def config(self, gpus: int, changes: Sequence[str] = ()) -> Config:
        """The preset for so many GPUs."""
        settings = [
            f"ray.use_gpu={str(not self.tiny).lower()}",
            f"ray.train_workers={gpus}",
            "refine.steps=0",
            "tracking.tensorboard=false",
            *(["generator.recurrent.width=64", "generator.condition.width=64"] if self.tiny else []),
        ]
        return load_config(PRESET, [*settings, *changes])


@ray.remote(num_cpus=0)
class Recorder:
    """Takes the place of a run's `TrainingMailbox`: keeps every report, and ends the run after enough."""

    def __init__(self, reports: int, seconds: float) -> None:
        self._reports: list[TrainingProgress] = []
        self._wanted, self._seconds = reports, seconds
        self._began = 0.0
        self._refusal: str | None = None

    def report(self, progress: TrainingProgress) -> None:
        """Keep a report."""
        self._began = self._began or time.monotonic()
        self._reports.append(progress)

    def progress(self) -> list[TrainingProgress]:
        """All reports."""
        return self._reports

    def refuse(self, reason: str) -> None:
        """Keep why the run cannot go on."""
        self._refusal = reason

    def refusal(self) -> str | None:
        """Why the run cannot go on."""
        return self._refusal

    def is_stop_requested(self) -> bool:
        """Whether there are enough reports, or the time is over."""
        late = self._began and time.monotonic() - self._began > self._seconds
        return bool(late) or len(self._reports) >= self._wanted


def training_rows(part: str, gpus: int, tiny: bool) -> list[Row]:
    """The rows of a part of training with so many GPUs."""
    each = 2 if tiny else 128
    few, many = (2, 4) if tiny else (64, 256)
    if part == "train":
        rows = [Row(f"train {few}", few), Row(f"train {many}", many)]
        # Where two workers share the larger batch, each has as many rows as the one of the first row.
        return [Row(f"train {each} a worker", each * gpus), *rows]
    if part == "large":
        eight = gpus * (1 if tiny else 8)
        rows = [Row("large 8 a worker", eight, "large")]
        if gpus > 1:
            sharded = Sharding.fsdp
            rows.append(Row("large 8 a worker, sharded", eight, "large", sharded))
            rows.append(Row("2.8 B, 8 a worker, sharded", eight, "huge", sharded))
        return rows
    names = ["kernel by kernel", "DDP, kernel by kernel"]
    if not tiny:
        names += ["exchange after the graph", "DDP in the graph"]
    rows = [Row(f"train {few}", few, rival=name) for name in names]
    if not tiny:
        rows.append(Row("large 8 a worker", 8 * gpus, "large", rival="DDP in the graph"))
    return rows if gpus > 1 else []


def row_config(session: Session, row: Row, gpus: int) -> Config:
    """The configuration of a row."""
    width = 32 if session.tiny else 1024
    log_every = 2 if session.tiny else (20 if row.generator == "small" else 4)
    config = session.config(
        gpus,
        [
            f"generator.denoiser.width={width}",
            f"train.checkpoints_per_step={row.rows}",
            f"train.tokens_per_checkpoint={2 if session.tiny else 101}",
            f"train.sharding={row.sharding.value}",
            f"train.log_every={log_every}",
            "train.steps=1000000",
            "train.save_every=1000000",
        ],
    )
    if row.generator != "small":
        size = resnet18_shards.TINY if session.tiny else resnet18_shards.FULL
        generator = size.generator
        if row.generator == "huge" and not session.tiny:
            denoiser = dataclasses.replace(generator.denoiser, width=_HUGE_WIDTH)
            generator = dataclasses.replace(generator, denoiser=denoiser)
        config.generator = generator
        config.train.tokens_per_checkpoint = 2 if session.tiny else 256
    return config


def train(session: Session, part: str, gpus: int) -> None:
    """Train the rows of a part with one group of Ray Train's workers."""
    rows = training_rows(part, gpus, session.tiny)
    if not rows:
        return
    recorders = [Recorder.remote(WARM_UP + 2 if session.tiny else REPORTS, _SECONDS_A_ROW) for _ in rows]  # type: ignore[attr-defined]
    workers = []
    for row, recorder in zip(rows, recorders, strict=True):
        shards = session.small() if row.generator == "small" else session.large()
        config, storage = row_config(session, row, gpus), session.output / "runs"
        workers.append(WorkerConfig(config, shards, storage, row.name, recorder, None, None, True))
    nodes, use_gpu = node_resources(), not session.tiny
    trainer = ray.train.torch.TorchTrainer(
        _train_rows,
        train_loop_config={"rows": rows, "workers": workers},
        scaling_config=ray.train.ScalingConfig(
            num_workers=gpus,
            use_gpu=use_gpu,
            resources_per_worker=worker_resources(nodes, cpus_per_worker(nodes, gpus, use_gpu), use_gpu),
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train V1
            name=f"{part}-{gpus}-{time.time_ns()}",
            storage_path=str(session.output / "runs"),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": allocator_settings()} if use_gpu else None,
        ),
    )
    waiting = _fit.remote(trainer)
    written = 0
    try:
        while written < len(rows):
            ended, _ = ray.wait([waiting], timeout=0.5)
            counts = [len(ray.get(recorder.progress.remote())) for recorder in recorders]
            # A row is over when the next one has begun.
            while written < len(rows) and (ended or any(counts[written + 1 :])):
                reports = ray.get(recorders[written].progress.remote())
                refusal = ray.get(recorders[written].refusal.remote())
                _write(session, _measured(part, rows[written], gpus, reports, refusal))
                written += 1
    finally:
        ray.get(waiting)


@ray.remote(num_cpus=0)
def _fit(trainer: Any) -> None:
    # In the driver Ray Train would take over the signals that end the process.
    with ray_train_finds_this_cluster():
        trainer.fit()


def _measured(
    part: str, row: Row, gpus: int, reports: list[TrainingProgress], refusal: str | None
) -> dict[str, Any]:
    rates = [report.tokens_per_second for report in reports[WARM_UP:]]
    found: dict[str, Any] = {
        "part": part,
        "row": row.name,
        "gpus": gpus,
        "rows": row.rows,
        "rival": row.rival,
    }
    if refusal or not rates:
        return {**found, "failure": refusal or "no reports"}
    counted = reports[WARM_UP:]
    return {
        **found,
        "rate": statistics.median(rates),
        "least": min(rates),
        "most": max(rates),
        "reports": len(rates),
        "waiting_share": statistics.median(report.waiting_share for report in counted),
        "memory_bytes": counted[-1].memory_bytes,
        "losses": [report.loss for report in reports],
    }


def _train_rows(arguments: dict[str, Any]) -> None:
    """What each of Ray Train's workers runs."""
    for row, worker in zip(arguments["rows"], arguments["workers"], strict=True):
        if row.rival:
            _train_rival(row, worker)
        else:
            train_worker({"worker": worker})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


class _EnoughError(Exception):
    """Raised by all workers at the same step."""


def _train_rival(row: Row, worker: WorkerConfig) -> None:
    """Train as `train_worker` does, with another way of exchanging gradients."""
    from rpg.collection.shards import ShardedCollection
    from rpg.training.fit import fit, new_trainer

    config, device = worker.config, ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shards = ShardedCollection.open(Path(str(worker.shards)))
    trainer = new_trainer(shards, config.generator, config.train, config.seed, device)
    _RIVALS[row.rival](trainer)

    def on_log(progress: TrainingProgress) -> None:
        first = trainer.workers.rank == 0
        if first:
            worker.mailbox.report.remote(progress)
        stop = ray.get(worker.mailbox.is_stop_requested.remote()) if first else False
        if trainer.workers.from_first(float(stop)):
            raise _EnoughError

    with suppress(_EnoughError):
        fit(trainer, shards, config.seed, on_log, lambda trainer, progress: None)


def _kernel_by_kernel(trainer: Any) -> None:
    trainer.changing = trainer._change


def _exchange_after_the_graph(trainer: Any) -> None:
    """One graph computes this worker's gradients, which are then exchanged all at once."""
    from rpg.captured import CapturedStep
    from rpg.training.gradients import Computed, fitting_loss
    from rpg.training.optimiser import step

    exchange, limit = trainer.gradients._exchange, trainer.config.gradient_clip
    found: list[Any] = []

    def own(batch: Any) -> Computed:
        trainer.generator.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            losses, weights = fitting_loss(trainer.generator, batch)
            # As if all workers had equally many values: a sum over them would be part of the graph.
            loss = (losses * weights).sum() / (weights.sum() * trainer.workers.count)
            torch.autograd.backward(loss)
        found[:] = [parameter.grad for parameter in trainer.generator.parameters()]
        return Computed(loss.detach(), loss.detach(), losses.detach(), weights)

    captured = CapturedStep(own, trainer.device)

    def change(batch: Any) -> Computed:
        computed = captured(batch)
        for parameter, gradient in zip(trainer.generator.parameters(), found, strict=True):
            parameter.grad = gradient
        exchange.begin()
        norm = exchange.finish(limit)
        step(trainer.optimiser)
        return computed._replace(gradient_norm=norm)

    trainer.changing = change


def _ddp(trainer: Any) -> None:
    trainer.gradients = _DDPGradients(trainer)
    trainer.changing = trainer._change


def _ddp_in_the_graph(trainer: Any) -> None:
    from rpg.captured import CapturedStep

    captured = CapturedStep(trainer._change, trainer.device)
    # PyTorch's notes on CUDA graphs ask for both: made in a stream of its own, and eleven passes before.
    with torch.cuda.stream(captured._stream):
        trainer.gradients = _DDPGradients(trainer)
    captured._steps = -9
    trainer.changing = captured


class _DDPGradients:
    """PyTorch's DistributedDataParallel, in place of `rpg.training.gradients.Gradients`."""

    def __init__(self, trainer: Any) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self._trainer = trainer
        # The project's own exchange is never begun, so its hooks do nothing.
        self._losses = DistributedDataParallel(
            _Losses(trainer.generator),
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=True,
        )

    def __call__(self, batch: Any) -> Any:
        from rpg.training.arithmetic import arithmetic
        from rpg.training.gradients import Computed
        from rpg.training.sharding import clip_gradients

        trainer = self._trainer
        trainer.generator.zero_grad(set_to_none=True)
        with arithmetic(trainer.config.precision, trainer.device):
            losses, weights = self._losses(batch)
            loss = (losses * weights).sum() / trainer.workers.sum(weights.sum())
            # PyTorch averages the workers' gradients, but the batch's gradient is their sum.
            torch.autograd.backward(loss * trainer.workers.count)
        norm = clip_gradients(trainer.generator, trainer.config.gradient_clip)
        return Computed(loss.detach(), norm, losses.detach(), weights)


class _Losses(nn.Module):
    """The fitting loss as the module call that DistributedDataParallel expects."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        from rpg.training.gradients import fitting_loss

        return fitting_loss(self.generator, batch)  # type: ignore[arg-type]


_RIVALS: dict[str, Callable[[Any], None]] = {
    "kernel by kernel": _kernel_by_kernel,
    "exchange after the graph": _exchange_after_the_graph,
    "DDP, kernel by kernel": _ddp,
    "DDP in the graph": _ddp_in_the_graph,
}


def generated(session: Session, gpus: int) -> None:
    """Networks a second that stage `generate` writes once its workers are at work."""
    from rpg.collection.shards import ShardedCollection
    from rpg.generator.generator import Generator

    number = 4 if session.tiny else 600
    config = session.config(
        gpus,
        [
            f"output={session.output / f'generate-{gpus}'}",
            f"generate.models_per_task={number}",
            f"generate.models_per_batch={2 if session.tiny else 100}",
            f"generate.seen_tasks={0 if session.tiny else 4 * gpus}",
            f"ray.generate_workers={gpus}",
            f"generator.denoiser.width={32 if session.tiny else 1024}",
        ],
    )
    paths = RunPaths.of(config)
    shards = ShardedCollection.open(session.small())
    Path(str(paths.collection)).mkdir(parents=True, exist_ok=True)
    entries = _entries(12)
    entries[-1].split = "heldout"
    Collection(paths.collection, {}, entries).save()
    generator = Generator.for_collection(
        config.generator, shards.layout, shards.conditions, len(shards), states=shards.states
    )
    generator.save_pretrained(paths.generator)
    generate.run(config)
    times = sorted(path.stat().st_mtime for path in Path(str(paths.generated)).glob("model_*"))
    _write_rate(session, "generate", gpus, times)


def collected(session: Session, gpus: int) -> None:
    """Networks a second that stage `collect` writes once its workers are at work."""
    images = session.output / "images"
    if not images.exists():
        _write_images(images, 200 if session.tiny else 9_000)
    config = session.config(
        gpus,
        [
            f"output={session.output / f'collect-{gpus}'}",
            f"collect.images={images}",
            "collect.checkpoints_per_task=1",
            "collect.heldout_checkpoints_per_task=0",
            "collect.backbone_epochs=1",
            f"collect.models_per_batch={128 if session.tiny else 86}",
            f"collect.epochs={1 if session.tiny else 3}",
            *(["collect.batch_size=8"] if session.tiny else []),
        ],
    )
    collect.run(config)
    paths = Path(str(RunPaths.of(config).collection))
    _write_rate(session, "collect", gpus, sorted(path.stat().st_mtime for path in paths.glob("task*")))


def _write_rate(session: Session, part: str, gpus: int, times: list[float]) -> None:
    """The rate after a third of the files, when every worker has compiled and loaded what it needs."""
    first = len(times) // 3
    rate = (len(times) - 1 - first) / max(times[-1] - times[first], 1e-9)
    found = {"part": part, "row": part, "gpus": gpus, "rows": len(times), "rival": "", "rate": rate}
    _write(session, {**found, "seconds": times[-1] - times[0]})


def piped(session: Session, gpus: int) -> None:
    """Seconds of the whole preset, as one job."""
    images = Path(session.images) if session.images else session.output / "all-images"
    if not images.exists():
        _write_images(images, 20 if session.tiny else 50_000)
    settings = [
        f"output={session.output / f'pipeline-{gpus}'}",
        f"collect.images={images.absolute()}",
        f"ray.train_workers={gpus}",
        f"ray.use_gpu={str(not session.tiny).lower()}",
        *(_TINY_PIPELINE if session.tiny else ()),
    ]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ray_jobs.pipeline", str(PRESET), *settings],
        cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout)
    found = {"part": "pipeline", "row": "pipeline", "gpus": gpus, "rows": 0, "rival": ""}
    if done.returncode:
        _write(session, {**found, "failure": done.stdout.strip().splitlines()[-1][:200]})
        return
    stages = [line.partition(": done in ") for line in done.stdout.splitlines() if ": done in " in line]
    seconds = {name: float(rest.split()[0]) for name, _, rest in stages}
    _write(session, {**found, "seconds": time.perf_counter() - began, "stages": seconds})


def _entries(count: int) -> list[Entry]:
    bits = itertools.cycle(list(itertools.product([0.0, 1.0], repeat=10))[1:-1])
    return [
        Entry(f"{i:04d}.safetensors", "", list(condition), state=i % 3)
        for i, condition in zip(range(count), bits, strict=False)
    ]


def write_small(directory: Path, count: int) -> None:
    """Shards of networks as the preset has them, with noise for weights."""
    template, random = Cifar10Net().state_dict(), torch.Generator().manual_seed(0)

    found = LayoutStatistics(template)
    for _ in range(2):
        found.update(resnet18_shards.noised(template, random))
    layout: Layout = found.layout(768, Normalisation.residual)
    entries = _entries(count)
    directory.mkdir(parents=True)
    networks = [(entry.file, resnet18_shards.noised(template, random)) for entry in entries]
    shard = write_shard(directory / "00000.arrow", layout, networks, TokenDtype.float32)
    write_manifest(directory, layout, [shard], entries, TokenDtype.float32)


def _write_images(directory: Path, count: int) -> None:
    """Noise in the form of CIFAR-10's Parquet files."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name, rows in (("train", count), ("test", count // 5)):
        images = []
        for _ in range(rows):
            content = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(content, "PNG")
            images.append({"bytes": content.getvalue()})
        table = pa.table({"img": images, "label": random.integers(0, 10, rows)})
        pq.write_table(table, directory / f"{name}.parquet")


def _write(session: Session, row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)
    with (session.output / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


PARTS: dict[str, Callable[[Session, int], None]] = {
    "train": lambda session, gpus: train(session, "train", gpus),
    "large": lambda session, gpus: train(session, "large", gpus),
    "rivals": lambda session, gpus: train(session, "rivals", gpus),
    "generate": generated,
    "collect": collected,
}


def run_part(session: Session, part: str, gpus: int) -> None:
    """Measure one part with one number of GPUs, in this process."""
    if part == "pipeline":
        piped(session, gpus)
        return
    with ray_cluster(session.config(gpus).ray):
        PARTS[part](session, gpus)


def in_process(session: Session, part: str, gpus: int, rest: list[str], left: float) -> None:
    """Measure a part in a process of its own, which ends with its time, or when `left` seconds are over."""
    name, limit = f"{part}-{gpus}", min(left, _SECONDS[part] * (5 if session.tiny else 1))
    command = [sys.executable, "-m", "benchmarks.scaling", "--part", part, "--gpus", str(gpus), *rest]
    environment = dict(os.environ)
    if not session.tiny:
        # Collecting takes all GPUs that there are.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
    began = time.perf_counter()
    with (session.output / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"ended after {limit:.0f} s"
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        finally:
            # What it has started ends with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"{name}: {time.perf_counter() - began:.0f} s, status {status}", file=sys.stderr, flush=True)
    if status != 0:
        lines = (session.output / f"{name}.log").read_text().splitlines()
        print("\n".join(line[:300] for line in lines[-12:]), file=sys.stderr, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown; the last column says how far the losses of the same global batch are apart."""
    alone = {row["row"]: row for row in rows if row["gpus"] == 1 and not row["rival"] and "rate" in row}
    whole = {(row["row"], row["gpus"]): row for row in rows if not row["rival"] and "rate" in row}
    lines = [
        "| row | GPUs | a step | rate | least to most | against one GPU | to reach | waiting | memory | "
        "losses apart |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        name, count = row["row"], row["gpus"]
        title = name + (f"; {row['rival']}" if row["rival"] else "")
        if "failure" in row:
            lines.append(f"| {title} | {count} | {row['rows']} | {row['failure']} | | | | | | |")
            continue
        if row["part"] == "pipeline":
            stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in row["stages"].items())
            lines.append(f"| {title} | {count} | | {row['seconds']:.0f} s | {stages} | | | | | |")
            continue
        factor = ""
        if count > 1 and name in alone:
            factor = f"{row['rate'] / alone[name]['rate']:.2f} ×"
        unsharded = whole.get((name.removesuffix(", sharded"), count))
        if name.endswith(", sharded") and unsharded and unsharded is not row:
            factor = f"{row['rate'] / unsharded['rate']:.2f} × unsharded"
        apart = ""
        same_batch = alone.get(name) or unsharded
        if "losses" in row and same_batch and same_batch is not row and same_batch["rows"] == row["rows"]:
            pairs = zip(row["losses"], same_batch["losses"], strict=False)
            apart = f"{max(abs(one / other - 1) for one, other in pairs):.1e}"
        target = TO_REACH.get(name, {}).get(count)
        spread = f"{row['least']:,.0f} to {row['most']:,.0f}" if "least" in row else ""
        waiting = f"{row['waiting_share']:.1%}" if "waiting_share" in row else ""
        memory = f"{row['memory_bytes'] / 1e9:.1f} GB" if "memory_bytes" in row else ""
        lines.append(
            f"| {title} | {count} | {row['rows']} | {row['rate']:,.0f} | {spread} | {factor} | "
            f"{f'{target} ×' if target and not row['rival'] else ''} | {waiting} | {memory} | {apart} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--output", type=Path, required=True, help="directory for rows, logs and table")
    parser.add_argument("--parts", nargs="+", choices=list(_SECONDS), default=list(DEFAULT_PARTS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="all is over after so many")
    parser.add_argument("--images", default="", help="CIFAR-10, for the part pipeline")
    parser.add_argument("--tiny", action="store_true", help="on CPUs, to see that it runs")
    parser.add_argument("--part", choices=list(_SECONDS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    session = Session(given.output.absolute(), given.images, given.tiny)
    if given.part:
        run_part(session, given.part, given.gpus[0])
        return
    if not given.tiny and torch.cuda.device_count() < max(given.gpus):
        parser.error(f"--gpus: this machine has {torch.cuda.device_count()}; --tiny runs on CPUs")
    ends = time.monotonic() + given.seconds
    session.output.mkdir(parents=True, exist_ok=True)
    if not session.small().exists():
        write_small(session.small(), 16 if given.tiny else 512)
    if "large" in given.parts or "rivals" in given.parts:
        size = resnet18_shards.TINY if given.tiny else resnet18_shards.FULL
        if not session.large().exists():
            session.large().mkdir()
            resnet18_shards.write_collection(session.large(), size)
    rest = ["--output", str(session.output), *(["--tiny"] if given.tiny else [])]
    rest += ["--images", given.images] if given.images else []
    for part in given.parts:
        for gpus in given.gpus:
            left = ends - time.monotonic() - _LAST_SECONDS
            if left > 0 and (part != "rivals" or gpus > 1):
                in_process(session, part, gpus, rest, left)
    found = session.output / "rows.jsonl"
    rows = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    where = "CPU" if given.tiny else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    text = (
        f"{where}; PyTorch {torch.__version__}, Ray {ray.__version__}, Python {platform.python_version()}\n\n"
    )
    text += table(rows)
    (session.output / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
