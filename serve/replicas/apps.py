"""Generators as applications of their own on Ray Serve: one comes, goes or is replaced while the others run.

An application's name tells what it runs: `rpg.digits.1f0e9c2a` is the generator `digits` of the service `rpg`
in one version, which is a digest of its entry in the configuration and of its files. From the names of the
applications that run, a dispatcher that has just started knows which of them to keep.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, cast

from ray import serve as ray_serve
from ray.serve.schema import ApplicationStatus

from rpg.errors import RPGError
from rpg.generator.saving import CONFIG_FILE, WEIGHTS_FILE
from rpg.storage.locations import identity, location
from serve.config import GeneratorEntry, ServeConfig
from serve.dispatch.lease import Replicas
from serve.metrics import batch_metrics
from serve.ray_proxy import RayProxy
from serve.replicas.replica import Replica

_DEPLOYMENT = "generator"

DEPLOYMENT_OPTIONS: dict[str, Any] = {
    # Most of a deployment's calls wait for models or for a change of a job, and need no processor meanwhile.
    "max_ongoing_requests": 10_000,
    "max_constructor_retry_count": 3,
    "health_check_period_s": 2.0,
    "health_check_timeout_s": 30.0,
    # Models that a replica had not finished are made again by another.
    "graceful_shutdown_timeout_s": 3.0,
    "graceful_shutdown_wait_loop_s": 0.2,
}
_LEASES_PER_REPLICA = 4.0
"""What autoscaling aims at: where more leases wait, another replica is started."""

_log = logging.getLogger("ray.serve")


class GeneratorApps:
    """The applications of one service's generators. Methods block."""

    def __init__(self, service: str) -> None:
        """`service` is the name of the service's own application."""
        self._prefix = f"{service}."

    def running(self) -> set[str]:
        """The names of the applications that run, whoever started them."""
        return {name for name in ray_serve.status().applications if name.startswith(self._prefix)}

    def wanted(self, config: ServeConfig) -> dict[str, str]:
        """By generator, the name of the application that runs it as the configuration and its files are now.

        Raises:
            RPGError: naming a URI, if its storage cannot be asked.
        """
        return {
            entry.name: f"{self._prefix}{entry.name}.{_version(entry, config)}" for entry in config.generators
        }

    def replicas(self, application: str) -> Replicas:
        """The replicas of an application that runs."""
        handle = ray_serve.get_deployment_handle(_DEPLOYMENT, application)
        return cast(Replicas, RayProxy(handle, streamed=["make"]))

    def remove_others(self, wanted: Collection[str]) -> None:
        """End the applications that are not `wanted`, and wait until they are gone and their GPUs free."""
        self._remove(self.running() - set(wanted))

    def remove_all(self) -> None:
        """End all applications of the service."""
        self._remove(self.running())

    def add(self, config: ServeConfig, wanted: Mapping[str, str]) -> None:
        """Begin the applications of `wanted` that do not run, without waiting for their replicas.

        Args:
            config: of the service, with the generators to serve.
            wanted: names of applications by generator, from the method of that name.
        """
        # An application that is being ended is not taken for one that runs: its end may take long.
        statuses = ray_serve.status().applications
        running = {name for name, each in statuses.items() if each.status != ApplicationStatus.DELETING}
        entries = {entry.name: entry for entry in config.generators}
        targets = [
            ray_serve.RunTarget(_application(entries[generator], config), name, route_prefix=None)
            for generator, name in wanted.items()
            if name not in running
        ]
        for target in targets:
            _log.info("begins: %s", target.name)
        if targets:
            ray_serve.run_many(targets, wait_for_applications_running=False)

    def _remove(self, applications: set[str]) -> None:
        for name in sorted(applications):
            _log.info("ends: %s", name)
            ray_serve.delete(name)


def check_capacity(config: ServeConfig, resources: Mapping[str, float]) -> None:
    """Check that the cluster has what the generators need, whether or not it is in use now.

    Ray itself would wait for it without a word. With `wait_for_nodes` the cluster may grow, and nothing is
    checked.

    Raises:
        RPGError: naming what is needed, by which generators, and what the cluster has.
    """
    if config.wait_for_nodes:
        return
    for resource, name, needs in (
        ("GPU", "GPUs", {entry.name: entry.replicas * entry.num_gpus for entry in config.generators}),
        ("CPU", "CPUs", {entry.name: float(entry.replicas) for entry in config.generators}),
    ):
        has = resources.get(resource, 0.0)
        if sum(needs.values()) > has:
            each = ", ".join(f"{key}: {value:g}" for key, value in needs.items() if value)
            hint = "; num_gpus: 0 runs a generator on a CPU" if resource == "GPU" else ""
            raise RPGError(
                f"generators: their replicas need {sum(needs.values()):g} {name} ({each}), "
                f"the cluster has {has:g}{hint}"
            )


def _version(entry: GeneratorEntry, config: ServeConfig) -> str:
    path = location(entry.path)
    files = [repr(identity(path / name)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    content = json.dumps([asdict(entry), asdict(config.cache), config.storage, files])
    return hashlib.sha256(content.encode()).hexdigest()[:8]


def _application(entry: GeneratorEntry, config: ServeConfig) -> ray_serve.Application:
    options: dict[str, Any] = {
        **DEPLOYMENT_OPTIONS,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": entry.num_gpus},
    }
    if entry.max_replicas > entry.replicas:
        options["autoscaling_config"] = {
            "min_replicas": entry.replicas,
            "max_replicas": entry.max_replicas,
            "target_ongoing_requests": _LEASES_PER_REPLICA,
        }
    else:
        options["num_replicas"] = entry.replicas
    deployment = ray_serve.deployment(name=_DEPLOYMENT, **options)(Replica)
    return deployment.bind(entry, config.storage, config.cache, batch_metrics)
