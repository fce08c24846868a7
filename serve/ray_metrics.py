"""The service's figures in Ray's metrics, and Ray's metrics as one text for Prometheus."""

import asyncio
import contextlib
import urllib.request
from collections.abc import Callable

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from rpg.client.schema import JobState

_SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200]
_SHOWN = ("ray_rpg_", "ray_serve_", "ray_node_gpus_", "ray_node_gram_")
_TIMEOUT = 5.0


class RayMeters:
    """Counts in Ray's metrics; see `serve.metrics.Meters`."""

    def __init__(self) -> None:
        tags = ("generator",)
        self._waiting = Gauge("rpg_queued_models", "Models asked for and not made yet", tag_keys=tags)
        self._made = Counter("rpg_models", "Models made", tag_keys=tags)
        self._ended = Counter("rpg_jobs", "Jobs that have ended", tag_keys=("generator", "state"))
        self._first = Histogram(
            "rpg_first_model_seconds", "From accepting a job to its first model", _SECONDS, tag_keys=tags
        )
        self._whole = Histogram(
            "rpg_job_seconds", "From accepting a job to its end", _SECONDS, tag_keys=("generator", "state")
        )

    def waiting(self, generator: str, models: int) -> None:
        """See `Meters`."""
        self._waiting.set(models, {"generator": generator})

    def made(self, generator: str, models: int) -> None:
        """See `Meters`."""
        self._made.inc(models, {"generator": generator})

    def first_model(self, generator: str, seconds: float) -> None:
        """See `Meters`."""
        self._first.observe(seconds, {"generator": generator})

    def ended(self, generator: str, state: JobState, seconds: float) -> None:
        """See `Meters`."""
        self._ended.inc(1, {"generator": generator, "state": state})
        self._whole.observe(seconds, {"generator": generator, "state": state})


def batch_metrics(generator: str) -> Callable[[int, int, float], None]:
    """What counts a replica's denoising batches: called with (rows, places, seconds) of each."""
    labels = {"generator": generator}
    names = ("generator",)
    tokens = Counter("rpg_tokens", "Tokens sampled", tag_keys=names)
    places = Counter("rpg_batch_places", "Rows of all batches, filled or not", tag_keys=names)
    duration = Counter("rpg_sampling_seconds", "Time spent in denoising batches", tag_keys=names)

    def count(rows: int, all_rows: int, seconds: float) -> None:
        tokens.inc(rows, labels)
        places.inc(all_rows, labels)
        if seconds > 0:
            duration.inc(seconds, labels)

    return count


async def prometheus_text() -> str:
    """What the nodes of the cluster export of the service, of Ray Serve and of GPUs."""
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    texts = await asyncio.gather(
        *(
            asyncio.to_thread(
                _exported, f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            )
            for node in nodes
        )
    )
    # A family's lines have to follow each other, though every node has some of them.
    families: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = line.split()[2]
            shown = family.startswith(_SHOWN) and line not in families.get(family, [])
            if shown and not (line.startswith("#") and families.get(family, [""])[-1][:1] not in ("", "#")):
                families.setdefault(family, []).append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines)


def _exported(url: str) -> str:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
        text: str = answer.read().decode()
        return text
    return ""
