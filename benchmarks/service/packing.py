"""Models a second: one request at a time, and packed; and how much of the time the sampler samples."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from benchmarks.service.running import GENERATOR, Service, Setup, running
from benchmarks.service.table import Row

ALONE_SECONDS = 20.0
CLIENTS = 20
_PATIENCE = 60.0
"""Seconds after the load in which Ray exports its last metrics."""


def measure(setup: Setup, directory: Path, minutes: float) -> list[Row]:
    """Measure single requests, and for `minutes` packed jobs of clients with other conditions and seeds."""
    with running(setup, directory) as service:
        condition = setup.condition(0)
        with httpx.Client(base_url=service.url, timeout=60) as http:

            def one(seed: int) -> None:
                asked = {"generator": GENERATOR, "condition": condition, "seed": seed}
                http.post("/v1/generate", json=asked).raise_for_status()

            one(0)
            start, count = time.monotonic(), 0
            while (alone_seconds := time.monotonic() - start) < ALONE_SECONDS:
                count += 1
                one(count)
        alone = count / alone_seconds
        packed, exported = _packed(service, setup, 60 * minutes)
    rows = [
        Row("one request at a time (`POST /v1/generate`), models/s", f"{alone:.1f}"),
        Row(f"{CLIENTS} jobs at once, models/s", f"{packed:.1f}"),
        Row("packed against one at a time", f"{packed / alone:.1f}x", ">= 5x", packed >= 5 * alone),
    ]
    what = "share of the time that samplers sample, under load"
    if exported is None:
        rows.append(Row(what, "Ray exported no figures", ">= 0.9", False))
    else:
        share, filled = exported
        rows.append(Row(what, f"{share:.3f}", ">= 0.9", share >= 0.9))
        rows.append(Row("rows of their batches that are filled", f"{filled:.3f}"))
    return rows


def _packed(service: Service, setup: Setup, seconds: float) -> tuple[float, tuple[float, float] | None]:
    """Models a second, and the used shares of the time and of the batches' rows."""
    with service.client() as client:
        jobs = [client.submit(GENERATOR, [setup.condition(i)], 20_000, seed=i).id for i in range(CLIENTS)]
        while client.job(jobs[0]).finished < 100:
            time.sleep(0.1)

        def finished() -> int:
            with ThreadPoolExecutor(4) as pool:
                return sum(pool.map(lambda id: client.job(id).finished, jobs))

        before, start = finished(), time.monotonic()
        readings = _readings(service, start + seconds)
        rate = (finished() - before) / (time.monotonic() - start)
        for id in jobs:
            client.cancel(id)
    if len(readings) < 2:
        return rate, None
    (first, sampling, places, tokens), (last, *after) = readings[0], readings[-1]
    share = (after[0] - sampling) / (last - first) / setup.replicas
    return rate, (share, (after[2] - tokens) / (after[1] - places))


def _readings(service: Service, end: float) -> list[tuple[float, float, float, float]]:
    """The metrics at each time when they changed, because Ray exports them only every ten seconds or so."""
    readings: list[tuple[float, float, float, float]] = []
    seen: tuple[float, ...] | None = None
    with httpx.Client(base_url=service.url, timeout=60) as http:
        while (at := time.monotonic()) < end or (len(readings) < 3 and at < end + _PATIENCE):
            text = http.get("/metrics").text
            now = tuple(_sum(text, name) for name in ("sampling_seconds", "batch_places", "tokens"))
            if seen is not None and now[0] != seen[0] and now[0]:
                readings.append((at, now[0], now[1], now[2]))
            seen = now
            time.sleep(0.1)
    return readings


def _sum(metrics: str, name: str) -> float:
    """Sum of a metric over all replicas."""
    values = re.findall(rf"^ray_rpg_{name}(?:_total)?{{.*}} (\S+)$", metrics, re.MULTILINE)
    return sum(float(value) for value in values)
