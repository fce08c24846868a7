"""Generators too large for one worker's memory: PyTorch's FSDP2, and tensors whole again for checkpoints."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from rpg.config import Precision
from rpg.generator.generator import Generator
from rpg.training.arithmetic import rounds_to_bfloat16
from rpg.training.workers import Workers


def shard(generator: Generator, device: torch.device, workers: int, precision: Precision) -> None:
    """Leave each of `workers` a share of every tensor of `generator`, along its first dimension, on `device`.

    Before the call all workers must have the same weights. FSDP gathers the tensors of one block or linear
    layer after another, each while the one before computes, and sends their gradients while the next ones are
    computed. Where products are in bfloat16, weights of linear layers are gathered in it, and their gradients
    sent in it: rounded before they are gathered, they are what autocast would make of them afterwards.
    """
    mesh = init_device_mesh(device.type, (workers,))
    lists = [module for module in generator.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks]
    layers = [layer for layer in generator.denoiser.children() if isinstance(layer, nn.Linear)]
    rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    wrapped: set[nn.Module] = set()
    for module in [*blocks, *layers, *generator.children(), generator]:
        half = rounds_to_bfloat16(precision, device) and _is_linear(module, wrapped)
        fully_shard(module, mesh=mesh, mp_policy=rounded if half else MixedPrecisionPolicy())
        wrapped.add(module)
    for module in generator.modules():
        # gloo, the backend on CPUs, cannot average.
        if isinstance(module, FSDPModule) and device.type == "cpu":
            module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(generator, "loss")


def _is_linear(module: nn.Module, wrapped: set[nn.Module]) -> bool:
    """Whether all parameters of a module, without its parts that are `wrapped`, are of linear layers."""
    if isinstance(module, nn.Linear):
        return True
    if any(True for _ in module.parameters(recurse=False)):
        return False
    return all(_is_linear(child, wrapped) for child in module.children() if child not in wrapped)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor, sharded or not, whole on the first worker's CPU and empty on others; all must call this."""
    joined = tensor
    if isinstance(tensor, DTensor):
        # Gathered with the process group, because with `DTensor.full_tensor` one run in thirty crashed
        # (PyTorch 2.11).
        part, workers = tensor.to_local(), tensor.device_mesh.size()
        # FSDP2 gives every worker as many rows as the first one until none are left.
        rows = -(-tensor.shape[0] // workers)
        padded = part.new_zeros(rows, *tensor.shape[1:])
        padded[: len(part)] = part
        joined = part.new_empty(rows * workers, *tensor.shape[1:])
        dist.all_gather_into_tensor(joined, padded, group=tensor.device_mesh.get_group())
        joined = joined[: tensor.shape[0]].clone()
    return joined.detach().cpu() if Workers.current().rank == 0 else joined.new_empty(0)


def clip_gradients(module: nn.Module, limit: float) -> Tensor:
    """Scale a module's gradients, sharded or not, to a norm of at most `limit`; return the norm before."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norms = torch._foreach_norm([local(each) for each in gradients])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    if any(isinstance(each, DTensor) for each in gradients):
        norm = Workers.current().sum(norm**2).sqrt()
    torch._foreach_mul_([local(each) for each in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of a module, each tensor made `whole`; all workers must call this."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def share(tensor: Tensor, like: Tensor) -> Tensor:
    """This worker's share of a whole tensor, sharded like `like`; all of it if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return tensor
    device = like.to_local().device
    return distribute_tensor(tensor.to(device), like.device_mesh, like.placements, src_data_rank=None)


def load_state(module: nn.Module, state: dict[str, Any]) -> None:
    """`load_state_dict` of whole tensors into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict(
        {name: share(value, own[name]) if name in own else value for name, value in state.items()}
    )


def shards_evenly(tensor: Tensor) -> bool:
    """Whether all workers hold equally much of a tensor."""
    return not isinstance(tensor, DTensor) or tensor.shape[0] % tensor.device_mesh.size() == 0


def sharded_as(part: Tensor, like: Tensor) -> Tensor:
    """This worker's `part` as its share of a tensor sharded like `like`.

    If the shares of `like` are unequal, the tensor has the shape of `like`; else all shares are as large as
    `part`.
    """
    if not isinstance(like, DTensor):
        return part
    if shards_evenly(like):
        return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False)
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; all of it if it is not sharded."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor
