"""The command: a Ray of its own, or the one at RAY_ADDRESS, that serves until it is told to stop.

python -m serve CONFIG
"""

import argparse
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from rpg.commands.exit_status import run_command
from rpg.errors import RPGError
from serve.config import ConfigFile

APPLICATION = "rpg"

_DESCRIPTION = "serve generators over HTTP, on Ray Serve"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the service and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m serve", description=_DESCRIPTION)
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: options.run(options), "serve")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `serve` to the commands of `rpg`."""
    _add_arguments(commands.add_parser("serve", help=_DESCRIPTION))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file")
    parser.set_defaults(run=lambda options: serve(ConfigFile.here(options.config)))


def serve(file: ConfigFile) -> None:
    """Serve until SIGINT or SIGTERM comes.

    Raises:
        RPGError: if it cannot be deployed, with the reason in one line.
    """
    # The config is read before Ray is imported, so that a mistake in it is told at once.
    config = file.read()
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    from ray_jobs.cluster import ray_cluster
    from rpg.config import RayConfig
    from serve.app import application, lock_storage
    from serve.http.front_deadline import PROXY_ENVIRONMENT
    from serve.replicas.apps import GeneratorApps
    from serve.replicas.reconciler import generator_configs

    generator_configs(config)
    for name, value in PROXY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS"):
        # This only tells early that another service runs: the lock is released, and the dispatcher's process
        # takes it. In a cluster the service that holds it may be the one that is to be replaced.
        lock_storage(config, seconds=5).close()
    stop = threading.Event()
    with ray_cluster(RayConfig(num_cpus=config.num_cpus)):
        # The handlers are set after Ray has started, because Ray sets handlers of its own.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda *_: stop.set())
        built = application(file)
        ray_serve.start(http_options=HTTPOptions(host=config.http.host, port=config.http.port))
        try:
            try:
                # The dispatcher would start the generators as well. Started here, they load while it starts.
                apps = GeneratorApps(APPLICATION)
                apps.add(config, apps.wanted(config))
                ray_serve.run(built, name=APPLICATION, route_prefix="/")
            except RuntimeError as error:
                raise RPGError(_why_not_deployed(APPLICATION) or str(error).splitlines()[0]) from error
            _wait_for_generators(stop)
            if not stop.is_set():
                print(f"http://{config.http.host}:{config.http.port}", flush=True)
            stop.wait()
        finally:
            if os.environ.get("RAY_ADDRESS"):
                # The cluster may serve other applications, so only this one ends.
                ray_serve.delete(APPLICATION)
                GeneratorApps(APPLICATION).remove_all()
            else:
                ray_serve.shutdown()  # type: ignore[no-untyped-call]


def _wait_for_generators(stop: threading.Event) -> None:
    """Return when all generators have started, or `stop` is set.

    Raises:
        RPGError: with the reason of the first that cannot start.
    """
    from ray import serve as ray_serve
    from ray.serve.schema import ApplicationStatus

    while not stop.is_set():
        statuses = {
            name: each.status
            for name, each in ray_serve.status().applications.items()
            if name.startswith(f"{APPLICATION}.")
        }
        for name, status in statuses.items():
            if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise RPGError(_why_not_deployed(name) or f"{name} could not be started")
        if all(status == ApplicationStatus.RUNNING for status in statuses.values()):
            return
        stop.wait(0.2)


def _why_not_deployed(application: str) -> str | None:
    """The `RPGError` that Ray Serve reports of an application; None if it reports none."""
    from ray import serve as ray_serve

    status = ray_serve.status().applications.get(application)
    if status is None:
        return None
    messages = [status.message, *(each.message for each in status.deployments.values())]
    for line in "\n".join(messages).splitlines():
        _, found, why = line.partition("RPGError: ")
        if found:
            return why
    return None
