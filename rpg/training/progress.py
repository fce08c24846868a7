"""How far training is. Without PyTorch: whoever only passes it on need not load that."""

from dataclasses import dataclass

NOISE_LEVELS = 4
"""Equal ranges of timesteps whose losses are reported apart."""


@dataclass
class Progress:
    """Where training stands: means since the last report, over all workers."""

    step: int
    steps: int
    loss: float
    loss_by_noise: list[float | None]
    """From the least noise to the most; None where no timestep fell into the range."""
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    waiting_share: float
    """Share of the time spent waiting for data."""
    memory_bytes: int
    """The most that the first worker has held: on its GPU, or in all where it has none."""
    workers: int
    seconds: float
    """Spent on training since step 0, without saving and validation."""
    validation_accuracy: float | None = None
    """Of networks generated for the validation tasks, where they were at this step."""
