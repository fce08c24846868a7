"""The application on Ray Serve: a small HTTP front, and the dispatcher, which brings the generators.

serve run serve.app:app config=serve.yaml
"""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from rpg.errors import RPGError
from rpg.storage.locations import location
from rpg.storage.locks import LockedError, exclusive_lock, lock_path
from serve.config import ConfigFile, ServeConfig
from serve.dispatch.api import DispatcherDesk
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.proxies import HandleDesk
from serve.dispatch.store import JobStore
from serve.http.routes import http_app
from serve.ray_metrics import RayMeters, prometheus_text
from serve.replicas.apps import REPLICA_OPTIONS, GeneratorApps
from serve.replicas.capacity import check_room
from serve.replicas.reconciler import Roster, generator_configs


class Jobs(DispatcherDesk):
    """The dispatcher. There is one, since one place has to know all jobs."""

    async def __init__(self, config: ServeConfig, file: ConfigFile) -> None:  # type: ignore[misc]
        # A process that was killed may take its time to end.
        self._lock = lock_storage(config, seconds=20)
        dispatcher = Dispatcher(
            JobStore(location(config.storage)), config.limits, config.retention, RayMeters()
        )
        super().__init__(dispatcher)
        await dispatcher.start()
        apps = GeneratorApps(ray_serve.get_replica_context().app_name)
        self._roster = Roster(dispatcher, apps, file, config)
        await self._roster.start()

    def check_health(self) -> None:
        """Raise where Ray Serve is to start it anew."""
        if (failure := self.dispatcher.failure) is not None:
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
    return application(ConfigFile.here(Path(args["config"])))


def application(file: ConfigFile) -> Application:
    """The application of a configuration file.

    Raises:
        RPGError: if it is not valid, a generator is not there, or the cluster has no room for it.
    """
    config = file.read()
    if ray.is_initialized():
        check_room(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
    generator_configs(config)
    options = {**REPLICA_OPTIONS, "ray_actor_options": {"num_cpus": 0}}
    jobs = ray_serve.deployment(name="jobs", **options)(Jobs).bind(config, file)
    return ray_serve.deployment(name="front", **options)(Front).bind(config, jobs)


def lock_storage(config: ServeConfig, seconds: float) -> IO[bytes]:
    """Lock the service's storage, since two dispatchers would not know of each other's jobs.

    The lock lasts until the file that is returned is closed, or the process ends.

    Raises:
        RPGError: if another service still holds the lock after `seconds`, or the storage cannot be written.
    """
    storage = location(config.storage)
    try:
        return exclusive_lock(lock_path(storage, Path(config.cache.directory) / "services"), seconds)
    except LockedError as error:
        raise RPGError(f"storage: another service is running on {storage}") from error
    except OSError as error:
        raise RPGError(f"storage: {storage} cannot be written: {error.strerror}") from error
