"""Training many copies of `Cifar10Net` at once on the same images, each to give its own answers.

All models of a call see the same augmented images in the same order, so images are read, augmented and cut
into the first layer's patches only once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rpg.captured import CapturedStep
from rpg.gpu_compiler import has_gpu_compiler
from rpg.tasks.adam import SideBySideAdam
from rpg.tasks.cifar10_net import (
    StateDict,
    Statistics,
    first_patches,
    is_first_layer,
    is_trained,
    normalised,
    shared_first_layer,
    training_logits,
    update_running_statistics,
)
from rpg.tasks.images.image_set import Images

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits [M, N, outputs] and answers [M, N] to one loss a model, [M]."""
Answers = Callable[[Tensor, Tensor], Tensor]
"""A batch's patches (`first_patches`) and classes [N] to what is right for each model, [M, N]."""

_FEWEST_COMPILED = 64
"""Models whose step is compiled. With fewer it is so short that compiling takes longer than it saves, and it
is captured in a CUDA graph instead."""
_COMPILED_MULTIPLE = 8
"""Of what the number of models is where a step is compiled: collections are cut into parts that differ by one
model, and compiling for another number takes longer than training some models in vain."""

_SHIFT_SHARE = 8
"""Augmentation moves an image by at most its shorter side through this, in each direction: 4 of 32 pixels."""


def train_on_shared_batches(
    start: StateDict, images: Images, answers: Answers, loss: Loss, seed: int, epochs: int, batch_size: int,
    learning_rate: float, dtype: torch.dtype, first_layer: StateDict | None = None,
) -> StateDict:  # fmt: skip
    """Minimise the loss of each of M models with Adam (warm-up, then a half cosine), BatchNorm in training
    mode.

    A model's result depends only on its start, its answers and the seed, up to the rounding of sums.

    Args:
        start: state dicts of `Cifar10Net` with a leading dimension M, on the device of `images`.
        images: the training images.
        answers: what is right.
        loss: of a batch.
        seed: of the order of images and their augmentation; a GPU and a CPU draw different ones.
        epochs: passes over the images.
        batch_size: images a step; the rest of an epoch is dropped.
        learning_rate: at its peak.
        dtype: of matrix products and activations; weights keep the type they start with.
        first_layer: state dict of one model, whose first layer all models have and keep; None: it is trained
            as well.

    Returns:
        The trained state dicts.
    """

    def is_kept(name: str) -> bool:
        return first_layer is not None and is_first_layer(name)

    models, on_gpu = len(start["head.bias"]), images.pixels.is_cuda
    is_compiled = _is_compiled(models, images.pixels.device)
    added = -models % _COMPILED_MULTIPLE if is_compiled else 0
    start = {name: _with_copies(value, added) for name, value in start.items()}
    weights = {
        name: value.clone().requires_grad_()
        for name, value in start.items()
        if is_trained(name) and not is_kept(name)
    }
    buffers = {name: value.clone() for name, value in start.items() if name not in weights}
    leaves = list(weights.values())
    batch_size = min(batch_size, len(images.classes))
    adam = SideBySideAdam(leaves, learning_rate, epochs * (len(images.classes) // batch_size))
    total_loss = _compiled_total_loss() if is_compiled else _total_loss

    def gradients(batch: _Batch) -> tuple[Tensor, ...]:
        patches = first_patches(normalised(batch.pixels).to(dtype))
        with torch.no_grad():
            right = _with_copies(answers(patches, batch.classes), added)
            inputs = patches if first_layer is None else shared_first_layer(first_layer, patches, dtype)
        total, statistics = total_loss(weights, inputs, right, loss, dtype)
        found = torch.autograd.grad(total, leaves)
        update_running_statistics(buffers, statistics, batch_size)
        return found

    step = CapturedStep(gradients, images.pixels.device) if on_gpu and not is_compiled else gradients
    for pixels, classes in batches(images, seed, epochs, batch_size):
        adam.step(step(_Batch(pixels, classes)))
    return {name: (weights if name in weights else buffers)[name].detach()[:models] for name in start}


def _is_compiled(models: int, device: torch.device) -> bool:
    return device.type == "cuda" and models >= _FEWEST_COMPILED and has_gpu_compiler()


@dataclass
class _Batch:
    pixels: Tensor
    classes: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.pixels, self.classes]


def _with_copies(values: Tensor, number: int) -> Tensor:
    """Rows of models, with copies of the last one behind them."""
    return torch.cat([values, values[-1:].expand(number, *values.shape[1:])]) if number else values


def _total_loss(
    weights: StateDict, inputs: Tensor, right: Tensor, loss: Loss, dtype: torch.dtype
) -> tuple[Tensor, Statistics]:
    logits, statistics = training_logits(weights, inputs, dtype)
    # In the gradient of the sum, each model has the gradient of its own loss.
    return loss(logits, right).sum(), statistics


@cache
def _compiled_total_loss() -> Callable[..., tuple[Tensor, Statistics]]:
    """`_total_loss`, compiled for each shape: normalisation, ReLU and patches become one kernel."""
    return torch.compile(_total_loss, dynamic=False)


def batches(images: Images, seed: int, epochs: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented pixels, uint8 [batch_size, height, width, 3], and classes of every step, on the images'
    device."""
    device = images.pixels.device
    random = torch.Generator(device)
    random.manual_seed(seed)
    count = len(images.classes)
    for _ in range(epochs):
        order = torch.randperm(count, generator=random, device=device)
        for chosen in torch.split(order[: count // batch_size * batch_size], batch_size):
            yield augmented(images.pixels[chosen], random, images.mirrored), images.classes[chosen]


def random_batch(images: Images, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augmented pixels, uint8 [size, height, width, 3], and their classes; `random` is on the CPU."""
    device = images.pixels.device
    chosen = torch.randint(len(images.classes), (size,), generator=random).to(device)
    moves = torch.Generator(device)
    moves.manual_seed(int(torch.randint(2**62, (), generator=random)))
    return augmented(images.pixels[chosen], moves, images.mirrored), images.classes[chosen]


def augmented(pixels: Tensor, random: torch.Generator, mirrored: bool = True) -> Tensor:
    """Images, uint8 [N, height, width, 3], each moved by up to an eighth of the shorter side, and
    half of them mirrored if they may be.

    Pixels that a move uncovers are copies of the image's edge.
    """
    count, device = len(pixels), pixels.device
    height, width = pixels.shape[1:3]
    most = min(height, width) // _SHIFT_SHARE
    down, right = torch.randint(-most, most + 1, (2, count, 1), generator=random, device=device)
    rows = (torch.arange(height, device=device) + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + right).clamp(0, width - 1)
    if mirrored:
        chosen = torch.randint(2, (count, 1), generator=random, device=device).bool()
        columns = torch.where(chosen, columns.flip(1), columns)
    return pixels[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None]]
