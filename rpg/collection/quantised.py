"""Recognises quantised weights, which are packed into integers: their tokens would mean nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rpg.errors import RPGError
from rpg.state_dicts import dtype_name

_PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)
_MARKS = {
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "nested_absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "W_q": "HQQ",
    "weight_packed": "compressed-tensors",
}
"""Last parts of the names of tensors that lie beside packed weights, or are these, and whose they are."""
_FEW = 16
"""Integers that describe a weight, such as its shape, are fewer than this."""


def check_not_quantised(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> None:
    """Check that no weights are packed into integers.

    Args:
        state_dict: of a checkpoint.
        config: the configuration beside it, if there is one.

    Raises:
        RPGError: naming the tensor, or the configuration's key, and what to do.
    """
    if config is not None and config.get("quantization_config"):
        raise RPGError(_message("quantization_config: the weights are quantised"))
    packed = {
        name: tensor
        for name, tensor in state_dict.items()
        if tensor.dtype in _PACKED and tensor.dim() and tensor.numel() > _FEW
    }
    marks = [
        whose for name in state_dict for mark, whose in _MARKS.items() if name.rpartition(".")[2] == mark
    ]
    for name, tensor in packed.items():
        if marks or "weight" in name.rpartition(".")[2]:
            by = f" by {marks[0]}" if marks else ""
            raise RPGError(_message(f"tensor '{name}' ({dtype_name(tensor.dtype)}): weights quantised{by}"))


def _message(found: str) -> str:
    return (
        f"{found}; expected floating-point weights: dequantise the network, such as by Transformers' "
        "model.dequantize(), or save it before it is quantised"
    )
