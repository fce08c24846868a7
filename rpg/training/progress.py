"""How far training is. Jobs only pass this on, so the module does without PyTorch, which loads slowly."""

from dataclasses import dataclass
from typing import NamedTuple

NOISE_LEVELS = 4
"""Equal ranges of timesteps whose losses are reported apart."""


class Validation(NamedTuple):
    """What networks of the generator, as trained so far, are worth."""

    metric: str
    """Name of the metric that counts."""
    score: float | None
    """Its mean; None if a network could not be measured."""
    failure: str | None = None
    """Why a network could not be measured."""


@dataclass
class TrainingProgress:
    """Where training stands; losses and norms are means over all workers since the last report."""

    step: int
    steps: int
    loss: float
    loss_by_noise: list[float | None]
    """From the least noise to the most; None where no timestep fell into the range. Empty in refining."""
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    waiting_share: float
    """Share of the time spent waiting for data."""
    memory_bytes: int
    """The most memory that the first worker has held: on its GPU, or of its process if it has none."""
    workers: int
    seconds: float
    """Spent on training since step 0, without saving and validation, over all runs."""
    validation_score: float | None = None
    """Of networks generated for the validation tasks; None if none were generated at this step, or one of
    them could not be measured."""
    validation_note: str = ""
    """The name of the score's metric, or why a network could not be measured."""
