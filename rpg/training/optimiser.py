"""The optimiser: AdamW with moments in 32 or 8 bits, its saved state, and the learning rate's schedule."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rpg.config import Optimiser, OptimiserConfig
from rpg.errors import RPGError
from rpg.gpu_compiler import has_gpu_compiler
from rpg.training.sharding import local, sharded_as, shards_evenly, share, whole


def build_optimiser(module: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters of `module`, as `train.optimiser` asks.

    `adamw8bit` quantises the moments of large tensors in blocks of 256 values (arXiv 2110.02861; torchao).

    Raises:
        RPGError: if torchao is needed and missing.
    """
    groups = _parameter_groups(module, config)
    if config.optimiser == Optimiser.adamw:
        first = groups[0]["params"][0]
        if not first.is_cuda or isinstance(first, DTensor):
            return torch.optim.AdamW(groups, fused=True)
        # A step can then be captured in a CUDA graph, and its rate changed afterwards.
        rate = torch.zeros((), device=first.device)
        return torch.optim.AdamW(groups, lr=rate, fused=True, capturable=True)
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-untyped]
    except ImportError as error:
        raise RPGError("train.optimiser: adamw8bit needs torchao: pip install 'rpg[eightbit]'") from error
    optimiser: torch.optim.Optimizer = AdamW8bit(groups)
    return optimiser


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Take the next steps with the learning rate `rate`."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def can_be_captured(optimiser: torch.optim.Optimizer) -> bool:
    """Whether a step can be part of a CUDA graph."""
    return all(group.get("capturable", False) for group in optimiser.param_groups)


def step(optimiser: torch.optim.Optimizer) -> None:
    """Take one step."""
    with nullcontext() if _can_compile(optimiser) else torch.compiler.set_stance("force_eager"):
        optimiser.step()


def optimiser_state(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The state by parameter name, whole on the first worker's CPU; all workers must call this."""
    state = {}
    for name, parameter in module.named_parameters():
        if values := optimiser.state.get(parameter):
            state[name] = {key: _whole_moment(value) for key, value in values.items()}
    return state


@torch.no_grad()
def load_optimiser_state(
    module: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, dict[str, Any]]
) -> None:
    """Set the state to what `optimiser_state` returned, whatever the number of workers was then.

    Raises:
        ValueError: naming the parameter that does not fit.
    """
    parameters = dict(module.named_parameters())
    if unknown := sorted(set(state) - set(parameters)):
        raise ValueError(f"optimiser: unexpected parameter '{unknown[0]}'")
    # A step of length zero creates the state's tensors in the optimiser's own format.
    for name, parameter in parameters.items():
        parameter.grad = torch.zeros_like(parameter) if name in state else None
    set_rate(optimiser, 0.0)
    step(optimiser)
    optimiser.zero_grad(set_to_none=True)
    for name, values in state.items():
        own = optimiser.state[parameters[name]]
        if set(own) != set(values):
            raise ValueError(f"optimiser: '{name}': expected {sorted(own)}, found {sorted(values)}")
        for key, value in values.items():
            _load_moment(own[key], value)


def learning_rate(config: OptimiserConfig, step: int) -> float:
    """The learning rate of a step: linear warm-up, then a half cosine to zero at `config.steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _parameter_groups(module: nn.Module, config: OptimiserConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases, norms and the decay rates of Mamba-2 without."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _can_compile(optimiser: torch.optim.Optimizer) -> bool:
    """Whether torchao may compile its step.

    On a GPU this saves memory traffic and needs a C compiler. On a CPU compiling takes minutes and gains
    nothing.
    """
    on_gpu = optimiser.param_groups[0]["params"][0].is_cuda
    return on_gpu and has_gpu_compiler()


def _whole_moment(moment: Tensor) -> Any:
    """A moment for a checkpoint: a tensor, or the codes, scale and levels of 8-bit values, each a tensor.

    torchao's optimisers keep 8 bits a value: a block of 256 values has one scale, and a value's code names
    one of 256 levels of it (arXiv 2110.02861). If the workers' shares are unequal, their blocks do not line
    up, and the moment is saved as float32.
    """
    part: Any = local(moment)
    if not hasattr(part, "codes"):
        return whole(moment)
    if not shards_evenly(moment):
        return whole(sharded_as(part.dequantize(), moment))
    return {
        "codes": whole(sharded_as(part.codes, moment)),
        "scale": whole(sharded_as(part.scale, moment)),
        "levels": whole(part.qmap),
    }


@torch.no_grad()
def _load_moment(moment: Tensor, saved: Any) -> None:
    """Set this worker's share of a moment from what `_whole_moment` returned, for any number of workers."""
    part: Any = local(moment)
    if isinstance(saved, Tensor):
        part.copy_(local(share(saved, moment)))
    elif hasattr(part, "codes") and shards_evenly(moment):
        part.codes.copy_(local(share(saved["codes"], moment)))
        scale = saved["scale"]
        if isinstance(moment, DTensor):
            scale = scale.chunk(moment.device_mesh.size())[moment.device_mesh.get_local_rank()]
        part.scale.copy_(scale)
    else:
        codes, scale = saved["codes"], saved["scale"]
        blocks = saved["levels"][codes.int()].view(len(scale), -1) * scale[:, None]
        part.copy_(local(share(blocks.view(codes.shape), moment)))
