"""The application on Ray Serve: a small HTTP front, one dispatcher, and a deployment for each generator.

serve run serve.app:app config=serve.yaml
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from rpg.config import GeneratorConfig, generator_config_from_yaml
from rpg.errors import RPGError
from rpg.generator.generator import CONFIG_FILE
from rpg.storage import fetched, location
from serve.config import CacheConfig, GeneratorEntry, ServeConfig, load_serve_config
from serve.desk import DispatcherDesk
from serve.dispatcher import Dispatcher
from serve.handles import HandleDesk, HandleMaker
from serve.job_store import JobStore
from serve.lease import Description, Lease
from serve.local_maker import LocalMaker
from serve.only_service import only_service
from serve.placement import check_room
from serve.ray_metrics import BatchMeters, RayMeters, prometheus_text
from serve.records import Made
from serve.routes import http_app

_MANY = 10_000
"""Calls at a time. They wait for news or for models, not for a processor."""
_LEASES_WANTED = 4.0
"""Leases a replica that autoscaling aims at: more wait, and another replica is started."""
_DEPLOYMENT: dict[str, Any] = {
    "max_ongoing_requests": _MANY,
    "max_constructor_retry_count": 3,
    "health_check_period_s": 2.0,
    "health_check_timeout_s": 30.0,
    # Whatever is cut off is made again.
    "graceful_shutdown_timeout_s": 3.0,
    "graceful_shutdown_wait_loop_s": 0.2,
}


class GeneratorReplica:
    """One generator on one GPU, or on a CPU."""

    def __init__(self, entry: GeneratorEntry, storage: str, cache: CacheConfig) -> None:
        torch.set_num_threads(1)
        meters = BatchMeters(entry.name)
        self._maker = LocalMaker(entry, JobStore(location(storage)), cache, meters.batch)

    async def make(self, lease: Lease) -> AsyncIterator[list[Made] | str]:
        """See `serve.lease.Maker`."""
        async with aclosing(self._maker.make(lease)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    async def describe(self) -> Description:
        """See `serve.lease.Maker`."""
        return await self._maker.describe()

    def check_health(self) -> None:
        """Raise where Ray Serve is to start another replica instead."""
        if self._maker.engine.broken is not None:
            raise RuntimeError(f"sampling ended with {self._maker.engine.broken!r}")


class Jobs(DispatcherDesk):
    """The dispatcher. There is one, since one place has to know all jobs."""

    async def __init__(  # type: ignore[misc]
        self,
        config: ServeConfig,
        generators: Mapping[str, GeneratorConfig],
        handles: Mapping[str, DeploymentHandle[Any]],
    ) -> None:
        storage = location(config.storage)
        self._lock = only_service(storage, Path(config.cache.directory))
        dispatcher = Dispatcher(
            JobStore(storage),
            generators,
            {name: HandleMaker(handle) for name, handle in handles.items()},
            {entry.name: max(entry.replicas, entry.max_replicas) for entry in config.generators},
            config.limits,
            config.retention,
            RayMeters(),
        )
        super().__init__(dispatcher)
        await dispatcher.start()

    def check_health(self) -> None:
        """Raise where Ray Serve is to start it anew."""
        if (failure := self.dispatcher.failed_task) is not None:
            raise RuntimeError(f"the dispatcher has stopped: {failure}")


@ray_serve.ingress()
class Front:
    """The HTTP front. It keeps nothing: whatever it is asked for it asks the dispatcher, or reads a file."""

    def __init__(self, config: ServeConfig, jobs: DeploymentHandle[Any]) -> None:
        self._config = config
        self._jobs = jobs

    def __serve_build_asgi_app__(self) -> FastAPI:
        """What Ray Serve asks for once this is built."""
        store = JobStore(location(self._config.storage))
        return http_app(HandleDesk(self._jobs), store, self._config, prometheus_text)


def app(args: Mapping[str, str]) -> Application:
    """The application of the YAML file `config`, for `serve run` and `serve deploy`.

    Raises:
        RPGError: naming what is wrong with it, or what the cluster lacks.
    """
    if set(args) != {"config"}:
        raise RPGError(f"expected config=FILE, got {', '.join(args) or 'nothing'}")
    return application(load_serve_config(Path(args["config"])))


def application(config: ServeConfig) -> Application:
    """The application of a validated configuration.

    Raises:
        RPGError: if a generator is not there, or the cluster has no room for it.
    """
    if ray.is_initialized():
        check_room(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
    generators = generator_configs(config)
    # Relative to here, where it was written, not to wherever a worker runs.
    config.storage = str(location(config.storage))
    handles = {entry.name: _generator(entry, config) for entry in config.generators}
    plain = {**_DEPLOYMENT, "ray_actor_options": {"num_cpus": 0}}
    jobs = ray_serve.deployment(name="jobs", **plain)(Jobs).bind(config, generators, handles)
    return ray_serve.deployment(name="front", **plain)(Front).bind(config, jobs)


def generator_configs(config: ServeConfig) -> dict[str, GeneratorConfig]:
    """The configurations of the generators to serve, by name.

    Raises:
        RPGError: naming the file of a generator that is not there.
    """
    configs = {}
    for entry in config.generators:
        with fetched(location(entry.path) / CONFIG_FILE) as local:
            configs[entry.name] = generator_config_from_yaml(local)
    return configs


def _generator(entry: GeneratorEntry, config: ServeConfig) -> Application:
    options: dict[str, Any] = {
        **_DEPLOYMENT,
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
    entry.path = str(location(entry.path))
    deployment = ray_serve.deployment(name=f"generator-{entry.name}", **options)(GeneratorReplica)
    return deployment.bind(entry, config.storage, config.cache)
