"""Training many small networks of one architecture at once, each on its own task and data order."""

from collections.abc import Callable

import torch
from torch import Tensor

from rpg.tasks.adam import SideBySideAdam

Forward = Callable[[dict[str, Tensor], Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def train_side_by_side(
    parameters: dict[str, Tensor], forward: Forward, loss: Loss, inputs: Tensor, targets: Tensor,
    seeds: list[int], epochs: int, batch_size: int, learning_rate: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Minimise every model's own loss with Adam (warm-up, then a half cosine).

    A model's result depends on its own start, targets and seed alone, up to the rounding of sums.

    Args:
        parameters: starting points, a leading dimension M on every tensor.
        forward: (parameters, inputs [M, batch, ...]) to outputs [M, batch, ...].
        loss: (outputs, targets [M, batch]) to losses [M].
        inputs: [N, ...], shared by all models.
        targets: [M, N].
        seeds: M seeds, each for one model's data order.
        epochs: passes over the data.
        batch_size: samples a step and model; the rest of an epoch is dropped.
        learning_rate: at its peak.

    Returns:
        The trained parameters.
    """
    weights = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    leaves = list(weights.values())
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    count = len(inputs)
    batch_size = min(batch_size, count)
    batches = count // batch_size
    adam = SideBySideAdam(leaves, learning_rate, epochs * batches)
    rows = torch.arange(len(seeds))[:, None]
    for _ in range(epochs):
        order = torch.stack([torch.randperm(count, generator=generator) for generator in generators])
        for batch in torch.split(order[:, : batches * batch_size], batch_size, dim=1):
            # Summing over models keeps each model's gradient its own.
            total = loss(forward(weights, inputs[batch]), targets[rows, batch]).sum()
            adam.step(torch.autograd.grad(total, leaves))
    return {name: value.detach() for name, value in weights.items()}
