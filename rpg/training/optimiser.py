"""The optimiser: AdamW, its moments in 32 or in 8 bits, and the learning rate's schedule."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rpg.config import Optimiser, TrainConfig
from rpg.errors import RPGError
from rpg.gpu_compiler import has_gpu_compiler
from rpg.training.eight_bits import load_moment, whole_moment


def build_optimiser(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters of `module`, as `train.optimiser` asks.

    `adamw8bit` quantises the moments of large tensors in blocks of 256 values (arXiv 2110.02861; torchao).

    Raises:
        RPGError: if torchao is needed and missing.
    """
    groups = _parameter_groups(module, config)
    if config.optimiser == Optimiser.adamw:
        return torch.optim.AdamW(groups, fused=True)
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-untyped]
    except ImportError as error:
        raise RPGError("train.optimiser: adamw8bit needs torchao: pip install 'rpg[eightbit]'") from error
    optimiser: torch.optim.Optimizer = AdamW8bit(groups)
    return optimiser


def step(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Take one step with the learning rate `rate`."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    with nullcontext() if _can_compile(optimiser) else torch.compiler.set_stance("force_eager"):
        optimiser.step()


def optimiser_state(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimiser's state by parameter name, as `whole` gives each tensor; see `eight_bits` for those."""
    state = {}
    for name, parameter in module.named_parameters():
        if values := optimiser.state.get(parameter):
            state[name] = {key: whole_moment(value) for key, value in values.items()}
    return state


@torch.no_grad()
def load_optimiser_state(
    module: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, dict[str, Any]]
) -> None:
    """Go on from what `optimiser_state` gathered, whatever the number of workers was."""
    parameters = dict(module.named_parameters())
    if unknown := sorted(set(state) - set(parameters)):
        raise ValueError(f"optimiser: unexpected parameter '{unknown[0]}'")
    # A step of length zero makes the state's tensors, in the optimiser's own format.
    for name, parameter in parameters.items():
        parameter.grad = torch.zeros_like(parameter) if name in state else None
    step(optimiser, 0.0)
    optimiser.zero_grad(set_to_none=True)
    for name, values in state.items():
        own = optimiser.state[parameters[name]]
        if set(own) != set(values):
            raise ValueError(f"optimiser: '{name}': expected {sorted(own)}, found {sorted(values)}")
        for key, value in values.items():
            load_moment(own[key], value)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a half cosine to zero at `config.steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _parameter_groups(module: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Weight decay is for matrices alone: not for biases, norms and the decay rates of Mamba-2."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _can_compile(optimiser: torch.optim.Optimizer) -> bool:
    """Whether torchao may compile its step: it saves memory traffic on a GPU, and needs a C compiler there.

    On a CPU compiling takes minutes of a C++ compiler's time and gains nothing.
    """
    on_gpu = optimiser.param_groups[0]["params"][0].is_cuda
    return on_gpu and has_gpu_compiler()
