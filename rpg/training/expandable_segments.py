"""How PyTorch asks a GPU for memory while a generator is trained."""

import os

_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def use_expandable_segments() -> None:
    """Have PyTorch extend its blocks of GPU memory, instead of leaving small ones behind for larger ones.

    A step of the published generator at ResNet-18's size then takes 30.4 GB of the card, not 35.8
    (benchmarks/training_speed.md). Call it before the process first uses its GPU; the user's own settings of
    PyTorch's allocator stay as they are.
    """
    if not any(variable in os.environ for variable in _VARIABLES):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
