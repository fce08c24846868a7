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
    has_test: bool = False
    """Whether the configuration names a task family or a command that measures networks."""

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
        """Whether jobs may ask for evaluation. A collection alone names the task family, but without a
        condition nothing says which answers are right."""
        return self.has_test or (self.has_collection and self.takes_conditions)


def why_not_evaluated(generator: str) -> str:
    """Why networks of a generator are not evaluated."""
    return (
        f"evaluate: generator '{generator}' is served without a test: with neither a task family, nor a "
        "command, nor a collection whose conditions say what is right"
    )
