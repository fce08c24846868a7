"""How PyTorch asks a GPU for memory while a generator is trained."""

import os

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def allocator_settings() -> dict[str, str]:
    """Environment for processes that train: their blocks of GPU memory grow.

    Otherwise PyTorch leaves small blocks behind when it needs larger ones. A step of the published generator
    at ResNet-18's size then takes 35.8 GB of the card, not 30.4 (benchmarks/training_speed.md). Where the
    user has settings of PyTorch's allocator, these stay. They are read when a process first uses its GPU.
    """
    if any(variable in os.environ for variable in _VARIABLES):
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
