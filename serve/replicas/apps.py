"""Generators as applications of their own on Ray Serve: one comes, goes or is replaced while the others run.

An application's name tells what it runs: `rpg.digits.1f0e9c2a` is the generator `digits` of the service `rpg`
in one version, a digest of its entry in the configuration and of its files. What is to be changed is so seen
from the names alone, and survives whatever is killed.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from rpg.generator.saving import CONFIG_FILE, WEIGHTS_FILE
from rpg.storage.locations import identity, location
from serve.config import GeneratorEntry, ServeConfig
from serve.ray_metrics import batch_metrics
from serve.replicas.replica import Replica

DEPLOYMENT = "generator"

MANY = 10_000
"""Calls of a replica at a time. They wait for news or for models, not for a processor."""
REPLICA_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": MANY,
    "max_constructor_retry_count": 3,
    "health_check_period_s": 2.0,
    "health_check_timeout_s": 30.0,
    # Whatever is cut off is made again.
    "graceful_shutdown_timeout_s": 3.0,
    "graceful_shutdown_wait_loop_s": 0.2,
}
_LEASES_WANTED = 4.0
"""Leases a replica that autoscaling aims at: more wait, and another replica is started."""

_log = logging.getLogger("ray.serve")


class GeneratorApps:
    """The generators' applications of the service `service`. Methods block."""

    def __init__(self, service: str) -> None:
        self._prefix = f"{service}."

    def running(self) -> set[str]:
        """The names of all that there are, whoever started them."""
        return {name for name in ray_serve.status().applications if name.startswith(self._prefix)}

    def wanted(self, config: ServeConfig) -> dict[str, str]:
        """By generator, the name of the application that runs it as it is now.

        Raises:
            RPGError: naming a URI, if its storage cannot be asked.
        """
        return {
            entry.name: f"{self._prefix}{entry.name}.{_version(entry, config)}" for entry in config.generators
        }

    def handle(self, application: str) -> DeploymentHandle[Any]:
        """A handle to the replicas of an application that is there."""
        return ray_serve.get_deployment_handle(DEPLOYMENT, application)

    def remove_others(self, wanted: Collection[str]) -> None:
        """End those not `wanted`, and wait until they have gone: their GPUs are free then."""
        self._remove(self.running() - set(wanted))

    def remove_all(self) -> None:
        """End all of them."""
        self._remove(self.running())

    def add(self, config: ServeConfig, wanted: Mapping[str, str]) -> None:
        """Begin those of `wanted` (see there) that are not there; does not wait for their replicas."""
        # One that is being ended is gone soon: it may have taken longer than was waited for.
        statuses = ray_serve.status().applications
        there = {name for name, each in statuses.items() if each.status != ApplicationStatus.DELETING}
        entries = {entry.name: entry for entry in config.generators}
        targets = [
            ray_serve.RunTarget(_application(entries[generator], config), name, route_prefix=None)
            for generator, name in wanted.items()
            if name not in there
        ]
        for target in targets:
            _log.info("begins: %s", target.name)
        if targets:
            ray_serve.run_many(targets, wait_for_applications_running=False)

    def _remove(self, applications: set[str]) -> None:
        for name in sorted(applications):
            _log.info("ends: %s", name)
            ray_serve.delete(name)


def _version(entry: GeneratorEntry, config: ServeConfig) -> str:
    path = location(entry.path)
    files = [repr(identity(path / name)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    asked = json.dumps([asdict(entry), asdict(config.cache), config.storage, files])
    return hashlib.sha256(asked.encode()).hexdigest()[:8]


def _application(entry: GeneratorEntry, config: ServeConfig) -> ray_serve.Application:
    options: dict[str, Any] = {
        **REPLICA_OPTIONS,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": entry.num_gpus},
    }
    if entry.max_replicas > entry.replicas:
        options["autoscaling_config"] = {
            "min_replicas": entry.replicas,
            "max_replicas": entry.max_replicas,
            "target_ongoing_requests": _LEASES_WANTED,
        }
    else:
        options["num_replicas"] = entry.replicas
    deployment = ray_serve.deployment(name=DEPLOYMENT, **options)(Replica)
    return deployment.bind(entry, config.storage, config.cache, batch_metrics)
