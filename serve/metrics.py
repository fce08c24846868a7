"""Figures for Prometheus, by way of Ray: the names that the service counts under."""

from typing import Protocol

from rpg.client.schema import JobState


class Meters(Protocol):
    """What the dispatcher tells of its work."""

    def waiting(self, generator: str, models: int) -> None:
        """Models asked for and not made."""

    def made(self, generator: str, models: int) -> None:
        """Models finished."""

    def first_model(self, generator: str, seconds: float) -> None:
        """From a job's acceptance to its first model."""

    def ended(self, generator: str, state: JobState, seconds: float) -> None:
        """A job has ended, so long after it was accepted."""
