"""Whether the cluster has room for what is to be served: Ray itself would wait for it without a word."""

from collections.abc import Mapping

from rpg.errors import RPGError
from serve.config import ServeConfig


def check_room(config: ServeConfig, resources: Mapping[str, float]) -> None:
    """Compare what the generators need with all that the cluster has, taken or not.

    With `wait_for_nodes` anything may still come.

    Raises:
        RPGError: naming what is needed, by which generators, and what there is.
    """
    if config.wait_for_nodes:
        return
    for resource, name, need in (
        ("GPU", "GPUs", {e.name: e.replicas * e.num_gpus for e in config.generators}),
        ("CPU", "CPUs", {e.name: float(e.replicas) for e in config.generators}),
    ):
        there = resources.get(resource, 0.0)
        if sum(need.values()) > there:
            each = ", ".join(f"{key}: {value:g}" for key, value in need.items() if value)
            hint = "; num_gpus: 0 runs a generator on a CPU" if resource == "GPU" else ""
            raise RPGError(
                f"generators: their replicas need {sum(need.values()):g} {name} ({each}), "
                f"the cluster has {there:g}{hint}"
            )
