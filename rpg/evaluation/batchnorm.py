"""BatchNorm's running statistics computed anew from training data, for networks whose weights were generated.

A generated network has generated statistics too, which may not suit its weights quite. The usual remedy
measures them on training data once the weights are there (as p-diff, arXiv 2402.13144, and others do). It
needs the data, which a generator alone does not.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rpg.errors import RPGError
from rpg.tasks.families import calling
from rpg.tasks.predictions import load_network

BATCHES = 16
BATCH_SIZE = 256


def batchnorm_modules(network: nn.Module) -> dict[str, _BatchNorm]:
    """The modules of a network that keep running statistics of their inputs, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def recompute_batchnorm(
    network: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Replace the network's running statistics by the means of those of the batches.

    Only BatchNorm is in training mode while the batches pass; dropout, for instance, stays off. Afterwards
    the whole network is in evaluation mode, and momenta are as they were.

    Args:
        network: whose statistics are replaced, on the device of the batches.
        batches: training data.
        run: runs the network on a batch; None: on its first element, as `network(batch[0])`.
    """
    modules = batchnorm_modules(network).values()
    momenta = [module.momentum for module in modules]
    network.eval()
    for module in modules:
        module.reset_running_stats()
        # Without a momentum the running statistics are the means over all batches.
        module.momentum = None
        module.train()
    try:
        for batch in batches:
            if run is None:
                network(batch[0])
            else:
                run(network, batch)
    finally:
        for module, momentum in zip(modules, momenta, strict=True):
            module.momentum = momentum
        network.eval()


def training_batches(
    family: Any, name: str, random: torch.Generator, batches: int = BATCHES, batch_size: int = BATCH_SIZE
) -> list[Any]:
    """Batches of the training data of a task family.

    Args:
        family: has a method `batch(size, random)`.
        name: of the family, for messages.
        random: a generator on the CPU; the same state gives the same batches.
        batches: how many.
        batch_size: inputs of each.

    Raises:
        RPGError: if the family's code fails.
    """
    with calling(name, "batch"):
        return [family.batch(batch_size, random) for _ in range(batches)]


def recomputed_batchnorm(
    family: Any, name: str, state_dict: dict[str, Tensor], batches: Sequence[Any]
) -> dict[str, Tensor]:
    """A checkpoint with the running statistics that its weights have on training data.

    Args:
        family: runs its networks by `outputs(network, batch)`, or, where it has no such method, as
            `network(batch[0])`.
        name: of the family, for messages.
        state_dict: of a network of the family; not changed.
        batches: of training data (`training_batches`).

    Returns:
        The same names, shapes and dtypes, on the CPU.

    Raises:
        RPGError: if the checkpoint does not fit, does not hold the statistics by the names that they have in
            the network, or the family's code fails.
    """
    with calling(name, "build_network"):
        network: nn.Module = family.build_network()
    load_network(family, name, network, state_dict)
    network.to(_device(batches))
    with calling(name, "outputs"):
        recompute_batchnorm(network, batches, getattr(family, "outputs", None))
    result = dict(state_dict)
    for module_name, module in batchnorm_modules(network).items():
        for buffer, value in module.named_buffers(recurse=False):
            key = f"{module_name}.{buffer}" if module_name else buffer
            if key not in state_dict or state_dict[key].shape != value.shape:
                raise RPGError(f"tensor '{key}': expected shape {list(value.shape)} in the checkpoint")
            result[key] = value.to("cpu", state_dict[key].dtype)
    return result


def _device(batches: Sequence[Any]) -> torch.device:
    """Where the first tensor of the first batch lies."""
    for batch in batches:
        for part in batch:
            if isinstance(part, Tensor):
                return part.device
    return torch.device("cpu")
