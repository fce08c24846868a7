"""Moments in 8 bits a value, as torchao's optimisers hold them, in checkpoints.

A block of 256 values has one scale; a value's code names one of 256 levels of it (arXiv 2110.02861).
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rpg.training.sharding import local, sharded_as, shards_evenly, share, whole


def whole_moment(moment: Tensor) -> Any:
    """A moment as `whole` gives it: a tensor, or codes, scale and levels, each a tensor.

    Where workers hold unequal shares, blocks do not line up: then it is float32.
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
def load_moment(moment: Tensor, saved: Any) -> None:
    """Set this worker's share of a moment from what `whole_moment` gave, for any number of workers."""
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
