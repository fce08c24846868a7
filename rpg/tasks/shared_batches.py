"""Training many copies of `Cifar10Net` at once on the same images, each for answers of its own.

All models of a call see the same augmented images in the same order, so that images are read, augmented and
cut into the first layer's patches once for all of them.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from rpg.gpu_compiler import has_gpu_compiler
from rpg.tasks.adam import SideBySideAdam
from rpg.tasks.cifar10_images import SIZE, Images
from rpg.tasks.cifar10_net import (
    StateDict,
    Statistics,
    first_patches,
    is_trained,
    normalised,
    training_logits,
    update_running_statistics,
)

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits [M, N, outputs] and answers [M, N] to one loss a model, [M]."""

SHIFT = 4
"""Most pixels that augmentation moves an image by, in each direction."""


def train_on_shared_batches(
    start: StateDict, images: Images, answers: Tensor, loss: Loss, seed: int, epochs: int, batch_size: int,
    learning_rate: float, dtype: torch.dtype,
) -> StateDict:  # fmt: skip
    """Minimise every model's own loss with Adam (warm-up, then a half cosine), in BatchNorm's training mode.

    A model's result depends on its start, answers and the seed alone, up to the rounding of sums.

    Args:
        start: state dicts of `Cifar10Net` with a leading dimension M, on the device of `images`.
        images: the training images.
        answers: by model and class, [M, 10]: what `loss` takes for an image of the class.
        loss: of a batch.
        seed: of the order of images and their augmentation; kinds of device draw different ones.
        epochs: passes over the images.
        batch_size: images a step; the rest of an epoch is dropped.
        learning_rate: at its peak.
        dtype: of matrix products and activations; weights keep the type they start with.

    Returns:
        The trained state dicts.
    """
    weights = {name: value.clone().requires_grad_() for name, value in start.items() if is_trained(name)}
    buffers = {name: value.clone() for name, value in start.items() if not is_trained(name)}
    leaves = list(weights.values())
    batch_size = min(batch_size, len(images.classes))
    adam = SideBySideAdam(leaves, learning_rate, epochs * (len(images.classes) // batch_size))
    total_loss = _total_loss
    # Compiling takes longer than it saves where a step of one model is over at once.
    if images.pixels.is_cuda and len(answers) > 1 and has_gpu_compiler():
        total_loss = _compiled_total_loss()
    for pixels, classes in batches(images, seed, epochs, batch_size):
        patches = first_patches(normalised(pixels).to(dtype))
        total, statistics = total_loss(weights, patches, answers[:, classes], loss, dtype)
        adam.step(torch.autograd.grad(total, leaves))
        update_running_statistics(buffers, statistics, batch_size)
    return {name: (weights if is_trained(name) else buffers)[name].detach() for name in start}


def _total_loss(
    weights: StateDict, patches: Tensor, right: Tensor, loss: Loss, dtype: torch.dtype
) -> tuple[Tensor, Statistics]:
    logits, statistics = training_logits(weights, patches, dtype)
    # Summing over models keeps each model's gradient its own.
    return loss(logits, right).sum(), statistics


@cache
def _compiled_total_loss() -> Callable[..., tuple[Tensor, Statistics]]:
    """Normalisation, ReLU and cutting into patches become one kernel; compiled once a process and shape."""
    return torch.compile(_total_loss, dynamic=False)


def batches(images: Images, seed: int, epochs: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented pixels, uint8 [batch_size, 32, 32, 3], and classes of every step, on the images' device."""
    device = images.pixels.device
    random = torch.Generator(device)
    random.manual_seed(seed)
    count = len(images.classes)
    for _ in range(epochs):
        order = torch.randperm(count, generator=random, device=device)
        for chosen in torch.split(order[: count // batch_size * batch_size], batch_size):
            yield augmented(images.pixels[chosen], random), images.classes[chosen]


def augmented(pixels: Tensor, random: torch.Generator) -> Tensor:
    """Images, uint8 [N, 32, 32, 3], each moved by up to `SHIFT` pixels and half of them mirrored.

    What a move uncovers repeats the image's edge.
    """
    count, device = len(pixels), pixels.device
    moves = torch.randint(-SHIFT, SHIFT + 1, (2, count, 1), generator=random, device=device)
    mirrored = torch.randint(2, (count, 1), generator=random, device=device).bool()
    places = torch.arange(SIZE, device=device)
    rows, columns = (places + moves).clamp(0, SIZE - 1)
    columns = torch.where(mirrored, columns.flip(1), columns)
    return pixels[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None]]
