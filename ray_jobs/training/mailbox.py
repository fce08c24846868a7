"""What training tells the driver while it runs."""

import ray

from rpg.training.progress import TrainingProgress


@ray.remote(num_cpus=0)
class Board:
    """Where the first worker writes how far it is, or any worker why it cannot go on, for the driver."""

    def __init__(self) -> None:
        self._latest: TrainingProgress | None = None
        self._refusal: str | None = None
        self._stopped = False

    def post(self, progress: TrainingProgress) -> None:
        """Say how far training is."""
        self._latest = progress

    def refuse(self, reason: str) -> None:
        """Say that trying again is no use, and why."""
        self._refusal = self._refusal or reason

    def stop(self) -> None:
        """Ask the workers to end well, where they are."""
        self._stopped = True

    def stopped(self) -> bool:
        """Whether they are asked to."""
        return self._stopped

    def latest(self) -> TrainingProgress | None:
        """How far training is."""
        return self._latest

    def refusal(self) -> str | None:
        """Why it cannot go on; the first reason that was given."""
        return self._refusal
