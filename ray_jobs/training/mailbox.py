"""What training and the driver tell each other while it runs."""

import ray

from rpg.training.progress import TrainingProgress


@ray.remote(num_cpus=0)
class TrainingMailbox:
    """An actor that keeps the last message of each kind.

    The first worker writes how far training is, and any worker why it cannot go on; the driver reads both.
    The driver of a search writes that training is to end early; the workers read it.
    """

    def __init__(self) -> None:
        self._progress: TrainingProgress | None = None
        self._refusal: str | None = None
        self._is_stop_requested = False

    def report(self, progress: TrainingProgress) -> None:
        """Say how far training is."""
        self._progress = progress

    def progress(self) -> TrainingProgress | None:
        """How far training is; None before the first report."""
        return self._progress

    def refuse(self, reason: str) -> None:
        """Say why training cannot go on, so that starting it again would be in vain."""
        self._refusal = self._refusal or reason

    def refusal(self) -> str | None:
        """Why training cannot go on: the first reason that was given."""
        return self._refusal

    def request_stop(self) -> None:
        """Ask the workers to end at their next log entry, without an error."""
        self._is_stop_requested = True

    def is_stop_requested(self) -> bool:
        """Whether the workers are asked to end."""
        return self._is_stop_requested
