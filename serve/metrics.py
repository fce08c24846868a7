"""The service's own metrics in Ray, and those of the whole cluster as one text for Prometheus."""

import asyncio
import contextlib
import urllib.request
from collections.abc import Callable

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from rpg.client.schema import JobState

_BUCKETS_SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200]
_SHOWN = ("ray_rpg_", "ray_serve_", "ray_node_gpus_", "ray_node_gram_")
"""How the names begin of the metrics that are shown, of all that Ray exports."""
_TIMEOUT_SECONDS = 5.0


class JobMetrics:
    """What the dispatcher counts of jobs and their models, by the generator's name."""

    def __init__(self) -> None:
        tags = ("generator",)
        self._queued = Gauge("rpg_queued_models", "Models asked for and not made yet", tag_keys=tags)
        self._made = Counter("rpg_models", "Models made", tag_keys=tags)
        self._ended = Counter("rpg_jobs", "Jobs that have ended", tag_keys=("generator", "state"))
        self._first = Histogram(
            "rpg_first_model_seconds",
            "From accepting a job to its first model",
            _BUCKETS_SECONDS,
            tag_keys=tags,
        )
        self._whole = Histogram(
            "rpg_job_seconds",
            "From accepting a job to its end",
            _BUCKETS_SECONDS,
            tag_keys=("generator", "state"),
        )

    def queued(self, generator: str, models: int) -> None:
        """Set how many models are asked for and not made."""
        self._queued.set(models, {"generator": generator})

    def made(self, generator: str, models: int) -> None:
        """Count finished models."""
        self._made.inc(models, {"generator": generator})

    def first_model(self, generator: str, seconds: float) -> None:
        """Record the time from a job's acceptance to its first model."""
        self._first.observe(seconds, {"generator": generator})

    def ended(self, generator: str, state: JobState, seconds: float) -> None:
        """Count a job that has ended, so many seconds after it was accepted."""
        self._ended.inc(1, {"generator": generator, "state": state})
        self._whole.observe(seconds, {"generator": generator, "state": state})


def batch_metrics(generator: str) -> Callable[[int, int, float], None]:
    """What counts a replica's denoising batches: called with (filled rows, all rows, seconds) of each."""
    labels = {"generator": generator}
    names = ("generator",)
    tokens = Counter("rpg_tokens", "Tokens sampled", tag_keys=names)
    places = Counter("rpg_batch_places", "Rows of all batches, filled or not", tag_keys=names)
    duration = Counter("rpg_sampling_seconds", "Time spent in denoising batches", tag_keys=names)

    def count(filled_rows: int, all_rows: int, seconds: float) -> None:
        tokens.inc(filled_rows, labels)
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
    # Prometheus wants the lines of a metric in one block, but every node has some of them.
    blocks: dict[str, list[str]] = {}
    for text in texts:
        metric = ""
        for line in text.splitlines():
            if line.startswith("# HELP "):
                metric = line.split()[2]
            shown = metric.startswith(_SHOWN) and line not in blocks.get(metric, [])
            # A block has one heading, though the nodes' headings may differ in their words.
            if shown and not (line.startswith("#") and blocks.get(metric, [""])[-1][:1] not in ("", "#")):
                blocks.setdefault(metric, []).append(line)
    return "".join(f"{line}\n" for lines in blocks.values() for line in lines)


def _exported(url: str) -> str:
    """The metrics of one node; an empty text if it does not answer."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
        text: str = answer.read().decode()
        return text
    return ""
