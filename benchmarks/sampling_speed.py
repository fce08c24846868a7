"""Speed, memory and rounding of sampling on one GPU, side by side with eager PyTorch.

    python benchmarks/sampling_speed.py                 # all of it on a GPU, a few minutes; prints tables
    python benchmarks/sampling_speed.py --step          # a step of the AdaLN MLP alone, against torch.compile
    python benchmarks/sampling_speed.py --tiny          # on a CPU: shows that it runs, measures nothing

The eager side is `rpg.sampling.plain_loop` under bfloat16 autocast; the other is what `rpg generate` runs.
Weights are random and none is zero, since products of zeros run faster. Times are medians after warm-up. A
whole model is prototypes, every denoising step, decoding, and all weights in the host's memory.
"""

import argparse
import copy
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import convnext_large, resnet18

from rpg.collection.layout import Layout
from rpg.collection.tensor_spec import TensorKind, TensorSpec
from rpg.collection.tokens import count_tokens
from rpg.config import (
    ConditionConfig,
    DenoiserConfig,
    DenoiserKind,
    DiffusionConfig,
    GeneratorConfig,
    Normalisation,
    Prediction,
    RecurrentConfig,
    SamplingConfig,
    SamplingPrecision,
    Solver,
)
from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.generator.generator import Generator
from rpg.sampling.batch_sampler import BatchSampler
from rpg.sampling.generate import run_job
from rpg.sampling.job import GenerationJob
from rpg.sampling.plain_loop import PlainLoop
from rpg.sampling.rows import Rows
from rpg.sampling.solvers import solver_steps

CONDITION_WIDTH = 16


def vit_giant() -> dict[str, Tensor]:
    """Tensors of the sizes of a ViT-g/14 (arXiv 2106.04560): 1.01 billion values."""
    width, hidden, depth = 1408, 6144, 40
    shapes = {"patch.weight": (width, 3, 14, 14), "position": (1, 257, width), "head.weight": (1000, width)}
    for i in range(depth):
        shapes[f"{i:02d}.norm.weight"] = (width,)
        shapes[f"{i:02d}.qkv.weight"] = (3 * width, width)
        shapes[f"{i:02d}.out.weight"] = (width, width)
        shapes[f"{i:02d}.up.weight"] = (hidden, width)
        shapes[f"{i:02d}.down.weight"] = (width, hidden)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def layout_of(template: dict[str, Tensor], token_size: int) -> Layout:
    """The layout that a collection of networks would have whose weights differ from `template` by 0.01."""
    specs, first = [], 0
    for name, value in template.items():
        changes = value.is_floating_point()
        kind = TensorKind.running_var if name.endswith("running_var") else TensorKind.weight
        tokens = count_tokens(value.numel(), token_size) if changes else 0
        specs.append(
            TensorSpec(
                name,
                tuple(value.shape),
                value.dtype,
                kind if changes else TensorKind.constant,
                scale=0.01,
                first_token=first,
                tokens=tokens,
            )
        )
        first += tokens
    return Layout(Normalisation.residual, token_size, specs, template)


def random_generator(config: GeneratorConfig, layout: Layout, device: torch.device) -> Generator:
    """A generator in which no weight is zero."""
    torch.manual_seed(0)
    with torch.device(device):
        generator = Generator(config, layout)
    generator.to(device).eval()
    for parameter in generator.denoiser.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return generator


def seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `action`, its GPU work included, after a warm-up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    action()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        action()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def batches(sampler: BatchSampler, models: int) -> Iterator[Rows]:
    """The rows of so many models of random conditions, in batches that are full but for the last."""
    rest: list[Rows] = []
    for model in range(models):
        for rows in sampler.rows(model, torch.rand(CONDITION_WIDTH), seed=1):
            joined = Rows.joined([*rest, rows])
            while len(joined.tokens) >= sampler.size:
                batch, joined = joined.split(sampler.size)
                yield batch
            rest = [joined] if len(joined.tokens) else []
    yield from rest


def product_rate(device: torch.device, size: int) -> float:
    """Operations per second of a large bfloat16 product."""
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    return 2 * size**3 / seconds(lambda: a @ b, device, 20)


def denoiser_flops(generator: Generator, rows: int) -> float:
    """Operations of the AdaLN MLP's products for one step."""
    kept = {"input", "output", "blocks"}
    weights = sum(
        parameter.numel()
        for name, parameter in generator.denoiser.named_parameters()
        if name.split(".")[0] in kept and parameter.ndim == 2
    )
    return 2.0 * rows * weights


def whole_models(
    name: str, template: dict[str, Tensor], token_size: int, rows: int, peak: float, device: torch.device,
    tiny: bool,
) -> None:  # fmt: skip
    """A line for each precision: a whole network of the `fast` generator."""
    began = time.perf_counter()
    layout = layout_of(template, token_size)
    config = GeneratorConfig(
        recurrent=RecurrentConfig(width=1024, depth=1, expand=1, state_size=64),
        denoiser=DenoiserConfig(width=4096, depth=4),
        condition=ConditionConfig(width=1024, size=CONDITION_WIDTH),
    )
    if tiny:
        config = GeneratorConfig(
            recurrent=RecurrentConfig(width=16, head_size=8, state_size=8),
            denoiser=DenoiserConfig(width=32, depth=1),
            condition=ConditionConfig(width=16, size=CONDITION_WIDTH),
        )
    generator = random_generator(config, layout, device)
    print(f"{name}: ready after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    size = sum(tensor.numel() for tensor in template.values()) / 1e6
    for precision in (SamplingPrecision.bfloat16, SamplingPrecision.float8):
        columns = _whole_model(
            generator, SamplingConfig(token_batch=rows, precision=precision), peak, device, tiny
        )
        print(
            f"| {name}, {size:.1f} M | {layout.tokens:,} x {token_size} | {rows:,} | {precision} | {columns}",
            flush=True,
        )


def _whole_model(
    generator: Generator, sampling: SamplingConfig, peak: float, device: torch.device, tiny: bool
) -> str:
    """The table's columns for one precision."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    sampler = BatchSampler(generator, sampling)

    def model() -> None:
        for batch in batches(sampler, 1):
            sampler.sample(batch)

    model()
    first = time.perf_counter() - began
    whole = seconds(model, device, 2 if tiny else 10)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    # The loop alone: one batch, full of rows.
    batch = next(batches(sampler, 40))
    loop = seconds(lambda: sampler.denoise(batch), device, 2 if tiny else 20)
    steps = solver_steps(generator.diffusion.alpha_bar, sampling)
    rate = denoiser_flops(generator, sampling.token_batch) * len(steps) / loop
    plain = PlainLoop(generator, steps, 1.0, 1.0)

    def eager() -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            return plain(batch)

    eagerly = seconds(eager, device, 2 if tiny else 5)
    few = Rows(*(part[:64] for part in batch))
    with torch.inference_mode():
        exact = plain(few)
        error = (sampler.denoise(batch)[:64] - exact).norm() / exact.norm()
        half = (eager()[:64] - exact).norm() / exact.norm()
    files = 0.0
    if generator.layout.tokens < 5000:
        few_models, many = (2, 4) if tiny else (10, 110)
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as out:
            spent = []
            for count in (few_models, many):
                job = GenerationJob([[0.5] * CONDITION_WIDTH], count, count, sampling)
                start = time.perf_counter()
                run_job(generator, job, range(count), Path(out) / str(count))
                spent.append(time.perf_counter() - start)
            # What every job begins with, once, is no part of a model.
            files = (many - few_models) / (spent[1] - spent[0])
    return (
        f"{first:.1f} s | {whole * 1e3:.1f} ms | {memory:.1f} GB | {loop / len(steps) * 1e3:.2f} ms | "
        f"{eagerly / len(steps) * 1e3:.2f} ms | {rate / 1e12:.0f} TFLOP/s, {rate / peak:.0%} | "
        f"{error:.1e} ({half:.1e}) | {f'{files:.0f}' if files else '–'} |"
    )


def compared_step(name: str, token_size: int, rows: int, device: torch.device, tiny: bool) -> None:
    """One line: a step of the AdaLN MLP by this project's kernels, and by `torch.compile` in default mode.

    Both have weights in bfloat16 and the timestep's part of the modulation computed beforehand, and both are
    replayed as a CUDA graph. "Ready" is the first call, with all that is compiled for it.
    """
    width, depth = (32, 1) if tiny else (4096, 4)
    denoiser = AdaLNMLP(token_size, width, depth, 32 if tiny else 1024).to(device).eval()
    for parameter in denoiser.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    prototypes = torch.randn(rows, 32 if tiny else 1024, device=device)
    x = torch.randn(rows, token_size, device=device).bfloat16()
    with torch.inference_mode():
        exact = denoiser(x[:64].float(), torch.tensor([500], device=device), prototypes[:64])
        by_time = denoiser.timestep_modulation(F.silu(denoiser.timestep(torch.tensor([500], device=device))))
    half = copy.deepcopy(denoiser).bfloat16()
    with torch.inference_mode():
        modulation = half.prepare(prototypes.bfloat16())

    def plain(x: Tensor) -> Tensor:
        parts = (modulation + by_time.bfloat16()).split(width, dim=-1)
        x = half.input(x)
        for i, block in enumerate(half.blocks):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            x = x + gate * block(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        shift, scale = parts[-2:]
        prediction: Tensor = half.output(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        return prediction

    # To show on a CPU that it runs, no code need be built.
    backend = "eager" if tiny else "inductor"
    ways = {"eager": plain, "compiled": torch.compile(plain, dynamic=False, backend=backend)}
    if device.type == "cuda":
        from rpg.sampling.gpu.adaln_mlp import AdaLNMLPOnGPU

        fast = AdaLNMLPOnGPU(denoiser, [500], torch.bfloat16)
        with torch.inference_mode():
            ours = fast.prepare(prototypes)
        ways["here"] = lambda x: fast.denoise(x, 0, ours)
    columns = []
    for way in ("here", "compiled", "eager"):
        if way not in ways:
            columns += ["–", "–", "–"]
            continue
        with torch.inference_mode():
            began = time.perf_counter()
            found = ways[way](x)
            error = float((found[:64].float() - exact).norm() / exact.norm())
            first = time.perf_counter() - began
            action = graphed(lambda way=way: ways[way](x), device)  # type: ignore[misc]
            spent = seconds(action, device, 2 if tiny else 30)
        columns += [f"{spent * 1e3:.3f} ms", f"{first:.1f} s", f"{error:.1e}"]
    print(f"| {name} | {rows:,} x {token_size} | " + " | ".join(columns) + " |", flush=True)


def graphed(action: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`action` as a CUDA graph, on a GPU."""
    if device.type != "cuda":
        return action
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def unet(rows: int, token_size: int, device: torch.device, tiny: bool) -> None:
    """One line: a denoising step of the published U-Net."""
    layout = layout_of({"weight": torch.zeros(token_size * rows)}, token_size)
    config = GeneratorConfig(
        recurrent=RecurrentConfig(width=64, depth=1, expand=1, state_size=16),
        denoiser=DenoiserConfig(kind=DenoiserKind.unet),
        condition=ConditionConfig(width=64, size=CONDITION_WIDTH),
        diffusion=DiffusionConfig(prediction=Prediction.noise),
    )
    generator = random_generator(config, layout, device)
    for name, buffer in generator.denoiser.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 1.5)
    sampling = SamplingConfig(solver=Solver.ddim, steps=2 if tiny else 60, token_batch=rows)
    sampler = BatchSampler(generator, sampling)
    batch = next(batches(sampler, 1))
    steps = solver_steps(generator.diffusion.alpha_bar, sampling)
    ours = seconds(lambda: sampler.denoise(batch), device, 2 if tiny else 5) / len(steps)
    denoiser = generator.denoiser
    x = torch.randn(rows, token_size, device=device)
    prototypes, t = batch.prototypes, torch.tensor([500], device=device)

    def eager() -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            return denoiser(x, t, prototypes)

    eagerly = seconds(eager, device, 2 if tiny else 10)
    error = half = float("nan")
    if device.type == "cuda":
        from rpg.sampling.gpu.unet import UNetOnGPU

        fast = UNetOnGPU(denoiser, [500], torch.bfloat16)  # type: ignore[arg-type]
        with torch.inference_mode():
            exact = denoiser(x[:16], t, prototypes[:16])
            got = fast.denoise(x.bfloat16(), 0, fast.prepare(prototypes))[:16]
            error = float((got - exact).norm() / exact.norm())
            half = float((eager()[:16] - exact).norm() / exact.norm())
    print(
        f"| {rows} x {token_size} | {ours * 1e3:.2f} ms | {eagerly * 1e3:.2f} ms | {error:.1e} ({half:.1e}) |"
    )


def main() -> None:
    """Measure, and print the tables as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to see that it runs")
    parser.add_argument("--step", action="store_true", help="a step of the AdaLN MLP alone")
    given = parser.parse_args()
    tiny = given.tiny
    device = torch.device("cpu" if tiny else "cuda")
    peak = product_rate(device, 256 if tiny else 8192)
    where = "CPU" if tiny else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    print(
        f"{where}; PyTorch {torch.__version__}, Python {platform.python_version()}; a bfloat16 product of "
        f"8192 x 8192 x 8192 runs at {peak / 1e12:.0f} TFLOP/s\n"
    )
    print(
        "| AdaLN MLP, one step | rows | here | ready | error | compiled, default mode | ready | error | "
        "eager, bfloat16 | ready | error |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    sizes = [("small", 128, 32)] if tiny else [("ResNet-18", 8192, 1536), ("ConvNeXt-L", 16384, 2048)]
    for size in sizes:
        compared_step(*size, device, tiny)
    if given.step:
        return
    print("\n| U-Net, one step | here | eager, bfloat16 | error here (eager bfloat16) |")
    print("| --- | ---: | ---: | ---: |")
    unet(8 if tiny else 512, 128 if tiny else 8192, device, tiny)
    print(
        "\n| `fast`, network | tokens | rows a batch | products | first model | whole model | peak memory | "
        "a step here | a step, eager bfloat16 | products in the loop | "
        "error here (eager bfloat16) | models/s to files |"
    )
    print("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    small = {"weight": torch.zeros(50, 90), "norm.running_var": torch.ones(90)}
    if tiny:
        whole_models("small", small, 128, 32, peak, device, tiny)
        return
    whole_models("ResNet-18", resnet18().state_dict(), 8192, 1536, peak, device, tiny)
    whole_models("ConvNeXt-L", convnext_large().state_dict(), 16384, 2048, peak, device, tiny)
    whole_models("ViT-g sizes", vit_giant(), 16384, 2048, peak, device, tiny)


if __name__ == "__main__":
    main()
