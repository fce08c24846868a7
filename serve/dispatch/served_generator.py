"""A generator as the service's configuration offers it: what jobs may ask of it."""

from dataclasses import dataclass

from rpg.config import ConditionKind, GeneratorConfig


@dataclass(frozen=True)
class ServedGenerator:
    """A generator that is served."""

    name: str
    config: GeneratorConfig
    max_replicas: int
    has_collection: bool = False

    @property
    def takes_conditions(self) -> bool:
        """Whether jobs give conditions."""
        return self.config.condition.kind == ConditionKind.vector

    @property
    def takes_descriptions(self) -> bool:
        """Whether jobs may give descriptions in place of conditions."""
        return bool(self.config.condition.encoder)

    @property
    def evaluates(self) -> bool:
        """Whether jobs may ask for evaluation: without a condition nothing says which answers are right."""
        return self.has_collection and self.takes_conditions


def why_not_evaluated(generator: str) -> str:
    """Why networks of a generator without conditions are not evaluated."""
    return f"generator '{generator}' takes no conditions, and without one nothing says what is right"
