"""What a stage asks of the cluster: it is refused, or waited for, before any work is done."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.autoscaler.sdk import request_resources

from rpg.commands.progress import console
from rpg.config import Config
from rpg.errors import RPGError

Resources = dict[str, float]
"""Amounts by kind, such as CPU and GPU: what one node has, or what one worker reserves."""

_POLL_SECONDS = 1.0
_SECONDS_BETWEEN_NOTES = 30.0


@dataclass(frozen=True)
class ResourceRequest:
    """The workers that a stage needs at least, and what each of them takes of one node."""

    purpose: str
    """What the workers do, as error messages say it."""
    workers: int
    settings: str
    """Where the number comes from, as `key=value`, the key that decides first."""
    use_gpu: bool
    """Whether each worker needs a GPU."""
    cpus: int = 1
    """Of each worker; where no node has as many, all that a node has."""


def training_request(config: Config) -> ResourceRequest:
    """All training workers, or as many as an elastic run starts with."""
    key = "min_train_workers" if config.ray.min_train_workers else "train_workers"
    workers, threads = getattr(config.ray, key), config.ray.train_threads
    settings = f"ray.{key}={workers}" + (f", ray.train_threads={threads}" if threads else "")
    return ResourceRequest("training", workers, settings, config.ray.use_gpu, max(1, threads))


def generation_request(config: Config) -> ResourceRequest:
    """One worker: Ray Data makes do with as many of `ray.generate_workers` as there is room for."""
    settings = f"ray.generate_workers={config.ray.generate_workers}, at least one"
    return ResourceRequest("generation", 1, settings, config.ray.use_gpu)


def generation_workers(config: Config) -> int:
    """How many workers generate: as many as the config says, or as the cluster has room for; at least 1."""
    return config.ray.generate_workers or max(1, _workers_with_room(generation_request(config)))


def require_resources(requests: Sequence[ResourceRequest], wait_seconds: float) -> None:
    """Check that the cluster has what each request asks for, whoever is using it now; where it has not, ask
    an autoscaler for it and wait up to `wait_seconds`.

    Raises:
        RPGError: naming the setting, what it asks for and what is there.
    """
    # Stages run one after another, so each may have the whole cluster.
    for request in requests:
        if _workers_with_room(request) < request.workers:
            if wait_seconds > 0:
                _wait(request, wait_seconds)
            if _workers_with_room(request) < request.workers:
                raise RPGError(_refusal(request, wait_seconds))


def node_resources() -> list[Resources]:
    """What each living node of the cluster has, whoever is using it now."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def worker_resources(nodes: Sequence[Resources], cpus: int, use_gpu: bool) -> Resources:
    """What one worker of `cpus` CPUs reserves.

    More CPUs than any of `nodes` has are no reason to wait for such a node for ever: the worker then
    reserves all that the largest has.
    """
    most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    reserved = max(1, min(cpus, most))
    return {"CPU": reserved, "GPU": 1} if use_gpu else {"CPU": reserved}


def cpus_per_worker(nodes: Sequence[Resources], workers: int, use_gpu: bool) -> int:
    """The most CPUs that each of `workers` can have on `nodes`; at least 1."""
    for cpus in range(int(max((node.get("CPU", 0) for node in nodes), default=1)), 1, -1):
        room = (min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if use_gpu else workers) for node in nodes)
        if sum(room) >= workers:
            return cpus
    return 1


def _wait(request: ResourceRequest, seconds: float) -> None:
    began = time.monotonic()
    noted = -_SECONDS_BETWEEN_NOTES
    bundle = worker_resources(node_resources(), request.cpus, request.use_gpu)
    request_resources(bundles=[bundle] * request.workers)
    try:
        while (
            _workers_with_room(request) < request.workers and (waited := time.monotonic() - began) < seconds
        ):
            if waited - noted >= _SECONDS_BETWEEN_NOTES:
                noted = waited
                console.print(f"waited {waited:.0f} of {seconds:.0f} s: {_shortage(request)}")
            time.sleep(_POLL_SECONDS)
    finally:
        # A request to the autoscaler stands until it is withdrawn, and would keep idle nodes from going.
        request_resources(bundles=[])


def _workers_with_room(request: ResourceRequest) -> int:
    """How many of the request's workers the cluster has room for."""
    nodes = node_resources()
    bundle = worker_resources(nodes, request.cpus, request.use_gpu)
    return sum(min(int(node.get(kind, 0) // amount) for kind, amount in bundle.items()) for node in nodes)


def _refusal(request: ResourceRequest, waited: float) -> str:
    key = "ray.use_gpu" if _scarce_kind(request) == "GPU" else request.settings.partition("=")[0]
    after = f", after {waited:g} s (ray.wait_seconds)" if waited else ""
    return f"{key}: {_shortage(request)}{after}"


def _shortage(request: ResourceRequest) -> str:
    nodes, kind = node_resources(), _scarce_kind(request)
    each = worker_resources(nodes, request.cpus, request.use_gpu)[kind]
    asked = _counted(request.workers * each, kind)
    if each > 1:
        asked += f", {each:g} on a node for each of {request.workers} workers"
    there = _counted(sum(node.get(kind, 0) for node in nodes), kind)
    return (
        f"{request.purpose} asks for {asked} ({request.settings}), "
        f"the cluster has {there} on {_counted(len(nodes), 'node')}"
    )


def _scarce_kind(request: ResourceRequest) -> str:
    gpus = sum(int(node.get("GPU", 0)) for node in node_resources())
    return "GPU" if request.use_gpu and gpus < request.workers else "CPU"


def _counted(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"
