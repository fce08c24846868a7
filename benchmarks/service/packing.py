"""Models a second: one request at a time, and many jobs; and how much of the time the sampler samples."""

import re
import statistics
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
    """Measure single requests, and for `minutes` each jobs of clients with other conditions and seeds, whose
    models have files of their own or share them."""
    with running(setup, directory) as service:
        condition = setup.condition(0)
        with httpx.Client(base_url=service.url, timeout=60) as http:

            def one(seed: int) -> None:
                asked = {"generator": GENERATOR, "condition": condition, "seed": seed}
                http.post("/v1/generate", json=asked).raise_for_status()

            one(0)
            times: list[float] = []
            while sum(times) < ALONE_SECONDS:
                start = time.monotonic()
                one(len(times) + 1)
                times.append(time.monotonic() - start)
        alone = len(times) / sum(times)
        in_files, in_files_shares = _together(service, setup, 60 * minutes, pack=False)
        in_packs, in_packs_shares = _together(service, setup, 60 * minutes, pack=True)
    alone_goal, together_goal = (50, 3000) if setup.num_gpus else (10, 300)
    p99 = sorted(times)[int(0.99 * len(times))]
    rows = [
        Row(
            "one request at a time (`POST /v1/generate`), models/s",
            f"{alone:.1f}",
            f">= {alone_goal}",
            alone >= alone_goal,
        ),
        Row("the same, median and p99", f"{1e3 * statistics.median(times):.0f}, {1e3 * p99:.0f} ms"),
        Row(
            f"{CLIENTS} jobs at once, models/s",
            f"{in_files:.0f}",
            f">= {together_goal}",
            in_files >= together_goal,
        ),
        Row(
            "the same, many in a file (`pack`)",
            f"{in_packs:.0f}",
            f">= {together_goal}",
            in_packs >= together_goal,
        ),
    ]
    for where, exported in (("files", in_files_shares), ("packs", in_packs_shares)):
        what = f"{where}: share of the time that samplers sample"
        if exported is None:
            rows.append(Row(what, "Ray exported no figures", ">= 0.6", False))
        else:
            share, filled = exported
            rows.append(Row(what, f"{share:.3f}", ">= 0.6", share >= 0.6))
            rows.append(Row(f"{where}: rows of their batches that are filled", f"{filled:.3f}"))
    return rows


def _together(
    service: Service, setup: Setup, seconds: float, pack: bool
) -> tuple[float, tuple[float, float] | None]:
    """Models a second of many jobs, and the used shares of the time and of the batches' rows."""
    with service.client() as client:
        jobs = [
            client.submit(GENERATOR, [setup.condition(i)], 50_000, seed=i, pack=pack).id
            for i in range(CLIENTS)
        ]
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
