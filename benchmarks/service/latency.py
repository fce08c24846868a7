"""How long `GET` calls take while the replicas are full."""

import itertools
import statistics
import time
from pathlib import Path

import httpx

from benchmarks.service.running import GENERATOR, Setup, running
from benchmarks.service.table import Row

CALLS_PER_SECOND = 20
WARM_UP_SECONDS = 15.0


def measure(setup: Setup, directory: Path, minutes: float) -> list[Row]:
    """Call in turn, so many times a second, while a job runs that lasts longer than the calls."""
    with running(setup, directory) as service, service.client() as client:
        jobs = [client.submit(GENERATOR, [setup.condition(i)], 100_000, seed=i).id for i in range(4)]
        while client.job(jobs[0]).finished < 100:
            time.sleep(0.1)
        time.sleep(WARM_UP_SECONDS)
        paths = (
            f"/v1/jobs/{jobs[0]}",
            "/v1/jobs",
            f"/v1/jobs/{jobs[0]}/models?limit=100",
            f"/v1/jobs/{jobs[0]}/models/0",
            "/v1/generators",
            f"/v1/generators/{GENERATOR}",
            "/healthz",
            "/",
        )
        before, start = sum(client.job(id).finished for id in jobs), time.monotonic()
        times: dict[str, list[float]] = {path: [] for path in paths}
        with httpx.Client(base_url=service.url, timeout=60) as http:
            for i, path in enumerate(itertools.cycle(paths)):
                begin = start + i / CALLS_PER_SECOND
                if begin >= start + 60 * minutes:
                    break
                time.sleep(max(0.0, begin - time.monotonic()))
                began = time.monotonic()
                http.get(path).raise_for_status()
                times[path].append(1000 * (time.monotonic() - began))
        seconds = time.monotonic() - start
        made = sum(client.job(id).finished for id in jobs) - before
        for id in jobs:
            client.cancel(id)
    everything = [value for each in times.values() for value in each]
    p99 = _percentile(everything, 99)
    rows = [
        Row("models/s meanwhile", f"{made / seconds:.0f}"),
        Row(f"all {len(everything):,} GET calls, p99", f"{p99:.1f} ms", "< 50 ms", p99 < 50),
        Row("the same, median and largest", f"{statistics.median(everything):.1f}, {max(everything):.1f} ms"),
    ]
    for path, values in times.items():
        name = path.replace(jobs[0], "ID").replace(f"/{GENERATOR}", "/NAME")
        rows.append(
            Row(
                f"`{name}`, median, p99",
                f"{statistics.median(values):.1f}, {_percentile(values, 99):.1f} ms",
            )
        )
    return rows


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
