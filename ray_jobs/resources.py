"""What a stage asks of the cluster: refused, or waited for, before any work is done."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.autoscaler.sdk import request_resources

from rpg.commands.progress import console
from rpg.config import Config
from rpg.errors import RPGError

Resources = dict[str, float]

_POLL_SECONDS = 1.0
_NOTE_SECONDS = 30.0


@dataclass(frozen=True)
class Need:
    """Workers that a stage cannot do without, and what each of them takes of one node."""

    doing: str
    workers: int
    settings: str
    """Where the number comes from, as `key=value`, the key that decides first."""
    use_gpu: bool
    """One GPU each."""
    cpus: int = 1
    """At most all that a node has."""

    def bundle(self, nodes: Sequence[Resources]) -> Resources:
        """What Ray is asked for, for one worker."""
        most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
        cpus = max(1, min(self.cpus, most))
        return {"CPU": cpus, "GPU": 1} if self.use_gpu else {"CPU": cpus}


def training_need(config: Config) -> Need:
    """All training workers, or as many as an elastic run starts with."""
    key = "min_train_workers" if config.ray.min_train_workers else "train_workers"
    workers, threads = getattr(config.ray, key), config.ray.train_threads
    settings = f"ray.{key}={workers}" + (f", ray.train_threads={threads}" if threads else "")
    return Need("training", workers, settings, config.ray.use_gpu, max(1, threads))


def generation_need(config: Config) -> Need:
    """One worker: Ray Data makes do with as many of `ray.generate_workers` as there is room for."""
    settings = f"ray.generate_workers={config.ray.generate_workers}, at least one"
    return Need("generation", 1, settings, config.ray.use_gpu)


def require(needs: Sequence[Need], wait_seconds: float) -> None:
    """Check that the cluster has what is needed, whoever is using it now; ask an autoscaler for it and wait
    up to `wait_seconds`.

    Raises:
        RPGError: naming the setting, what it asks for and what is there.
    """
    # Stages run one after another, so each may have the whole cluster.
    for need in needs:
        if _room(need) < need.workers:
            if wait_seconds > 0:
                _wait(need, wait_seconds)
            if _room(need) < need.workers:
                raise RPGError(_refusal(need, wait_seconds))


def _wait(need: Need, seconds: float) -> None:
    began = time.monotonic()
    noted = -_NOTE_SECONDS
    request_resources(bundles=[need.bundle(_nodes())] * need.workers)
    try:
        while _room(need) < need.workers and (waited := time.monotonic() - began) < seconds:
            if waited - noted >= _NOTE_SECONDS:
                noted = waited
                console.print(f"waited {waited:.0f} of {seconds:.0f} s: {_shortage(need)}")
            time.sleep(_POLL_SECONDS)
    finally:
        # A request stands until it is taken back, and would keep idle nodes from going.
        request_resources(bundles=[])


def _room(need: Need) -> int:
    nodes = _nodes()
    bundle = need.bundle(nodes)
    return sum(min(int(node.get(kind, 0) // amount) for kind, amount in bundle.items()) for node in nodes)


def _refusal(need: Need, waited: float) -> str:
    key = "ray.use_gpu" if _scarce(need) == "GPU" else need.settings.partition("=")[0]
    patience = f", after {waited:g} s (ray.wait_seconds)" if waited else ""
    return f"{key}: {_shortage(need)}{patience}"


def _shortage(need: Need) -> str:
    nodes, kind = _nodes(), _scarce(need)
    each = need.bundle(nodes)[kind]
    asked = _count(need.workers * each, kind)
    if each > 1:
        asked += f", {each:g} on a node for each of {need.workers} workers"
    there = _count(sum(node.get(kind, 0) for node in nodes), kind)
    return (
        f"{need.doing} asks for {asked} ({need.settings}), "
        f"the cluster has {there} on {_count(len(nodes), 'node')}"
    )


def _scarce(need: Need) -> str:
    gpus = sum(int(node.get("GPU", 0)) for node in _nodes())
    return "GPU" if need.use_gpu and gpus < need.workers else "CPU"


def _nodes() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s"
