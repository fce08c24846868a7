"""The application on Ray Serve: a small HTTP front, and the dispatcher, which starts the generators.

serve run serve.app:app config=serve.yaml
"""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import ray
from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from rpg.errors import RPGError
from rpg.storage.locations import location
from rpg.storage.locks import LockedError, exclusive_lock, lock_path
from serve.config import ConfigFile, ServeConfig
from serve.dispatch.api import DispatcherAPI
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.store import JobStore
from serve.http.application import http_app
from serve.http.front_deadline import ANSWER_SECONDS
from serve.metrics import JobMetrics, prometheus_text
from serve.ray_proxy import RayProxy
from serve.replicas.apps import DEPLOYMENT_OPTIONS, GeneratorApps, check_capacity
from serve.replicas.reconciler import Reconciler, generator_configs


class DispatcherDeployment(DispatcherAPI):
    """The dispatcher in its process. There is one, because one place has to know all jobs."""

    async def __init__(self, config: ServeConfig, file: ConfigFile) -> None:  # type: ignore[misc]
        # A process that was killed may take its time to end.
        self._lock = lock_storage(config, seconds=20)
        dispatcher = Dispatcher(
            JobStore(location(config.storage)), config.limits, config.retention, JobMetrics()
        )
        super().__init__(dispatcher)
        await dispatcher.start()
        apps = GeneratorApps(ray_serve.get_replica_context().app_name)
        self._reconciler = Reconciler(dispatcher, apps, file, config)
        await self._reconciler.start()

    def check_health(self) -> None:
        """Raise if the dispatcher has stopped: Ray Serve then starts another process for it."""
        if (failure := self.dispatcher.failure) is not None:
            raise RuntimeError(f"the dispatcher has stopped: {failure}")


@ray_serve.ingress()
class Front:
    """The HTTP front in its process. It keeps nothing: it asks the dispatcher, or reads a model's file."""

    def __init__(self, config: ServeConfig, dispatcher: DeploymentHandle[Any]) -> None:
        self._config = config
        self._dispatcher = dispatcher

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Ray Serve runs in this process."""
        store = JobStore(location(self._config.storage))
        api = cast(DispatcherAPI, RayProxy(self._dispatcher, timeout_seconds=ANSWER_SECONDS))
        return http_app(api, store, self._config, prometheus_text)


def app(args: Mapping[str, str]) -> Application:
    """The application of the YAML file that the argument `config` names, for `serve run` and `serve deploy`.

    Raises:
        RPGError: naming what is wrong with it, or what the cluster lacks.
    """
    if set(args) != {"config"}:
        raise RPGError(f"expected config=FILE, got {', '.join(args) or 'nothing'}")
    return application(ConfigFile.here(Path(args["config"])))


def application(file: ConfigFile) -> Application:
    """The application of a configuration file.

    Raises:
        RPGError: if the file is not valid, a generator does not exist, or the cluster lacks what it needs.
    """
    config = file.read()
    if ray.is_initialized():
        check_capacity(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
    generator_configs(config)
    options = {**DEPLOYMENT_OPTIONS, "ray_actor_options": {"num_cpus": 0}}
    dispatcher = ray_serve.deployment(name="jobs", **options)(DispatcherDeployment).bind(config, file)
    return ray_serve.deployment(name="front", **options)(Front).bind(config, dispatcher)


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
