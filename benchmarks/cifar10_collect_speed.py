"""How fast networks of the CIFAR-10 family are fine-tuned side by side.

    python benchmarks/cifar10_collect_speed.py                  # a GPU: prints a table
    python benchmarks/cifar10_collect_speed.py --profile 146    # what a step's time goes into
    python benchmarks/cifar10_collect_speed.py --tiny           # a CPU: shows that it runs, measures nothing

Noise instead of images: the speed does not depend on them. Every row trains twice, and the second time
counts, so that compiling is left out of the rate and told apart.
"""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from rpg.tasks.binary_cifar10 import Cifar10Net
from rpg.tasks.cifar10_net import stacked
from rpg.tasks.fine_tuning import binary_loss, with_fresh_heads
from rpg.tasks.images.image_set import Images
from rpg.tasks.shared_batches import train_on_shared_batches

FLOPS_AN_IMAGE = 17.5e6
"""Operations of a network's convolutions, forward and backward; the first has no gradient by its input."""


def seconds_of(models: int, batch_size: int, steps: int, device: torch.device) -> float:
    """Measurements of `steps` steps of so many models."""
    torch.manual_seed(0)
    count = batch_size * steps
    pixels = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, device=device)
    images = Images(pixels, torch.randint(10, (count,), device=device))
    start = with_fresh_heads(
        {name: value[0] for name, value in stacked([Cifar10Net(10).state_dict()], device).items()}, models
    )
    answers = torch.randint(2, (models, 10), device=device).bool()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    began = time.perf_counter()
    trained = train_on_shared_batches(
        start,
        images,
        lambda patches, classes: answers[:, classes],
        binary_loss,
        0,
        1,
        batch_size,
        3e-3,
        dtype,
    )
    float(trained["head.bias"].sum())
    return time.perf_counter() - began


def main() -> None:
    """Measure, and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", type=int, metavar="MODELS", help="list kernels instead")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to see that it runs")
    given = parser.parse_args()
    device = torch.device("cpu" if given.tiny else "cuda")
    if not given.tiny and not torch.cuda.is_available():
        parser.error("needs a GPU; --tiny runs on a CPU")
    if given.profile:
        seconds_of(given.profile, 128, 5, device)
        activities = [ProfilerActivity.CPU] if given.tiny else [ProfilerActivity.CUDA]
        with profile(activities=activities) as profiled:
            seconds_of(given.profile, 128, 10, device)
        order = "self_cpu_time_total" if given.tiny else "self_cuda_time_total"
        print(profiled.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=110))
        return
    rows = [(1, 512), (73, 128), (146, 128), (146, 256), (511, 128)]
    steps = 40
    if given.tiny:
        rows, steps = [(1, 16), (2, 8)], 2
    print(f"{'CPU' if given.tiny else torch.cuda.get_device_name()}; PyTorch {torch.__version__}\n")
    print("| models | batch | first, s | model-steps/s | images/s | TFLOP/s | peak memory, GB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for models, batch_size in rows:
        if not given.tiny:
            torch.cuda.reset_peak_memory_stats()
        first = seconds_of(models, batch_size, steps, device)
        rate = models * steps / seconds_of(models, batch_size, steps, device)
        memory = 0.0 if given.tiny else torch.cuda.max_memory_allocated() / 1e9
        print(
            f"| {models} | {batch_size} | {first:.1f} | {rate:,.0f} | {rate * batch_size:,.0f} | "
            f"{rate * batch_size * FLOPS_AN_IMAGE / 1e12:.1f} | {memory:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
