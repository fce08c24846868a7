"""How long `GET` calls take while very many connections follow the events of one job.

As a command it is one process of such connections: `python -m benchmarks.service.listeners URL PATH NUMBER`.
"""

import asyncio
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from benchmarks.service.running import GENERATOR, ROOT, Service, Setup, running
from benchmarks.service.table import Row

LISTENERS = 1000
CALLS_PER_SECOND = 20
SETTLE_SECONDS = 15.0


def measure(setup: Setup, directory: Path, minutes: float) -> list[Row]:
    """Call in turn for `minutes` each: without listeners, with them, and with them while nothing is made."""
    with running(setup, directory) as service, service.client() as client:
        job = client.submit(GENERATOR, [setup.condition(0)], 1_000_000, seed=0, pack=True).id
        while client.job(job).finished < 100:
            time.sleep(0.1)
        time.sleep(SETTLE_SECONDS)
        alone = _calls(service, job, minutes)
        with _listening(service, job, LISTENERS) as told:
            time.sleep(SETTLE_SECONDS)
            before, start = told(), time.monotonic()
            busy = _calls(service, job, minutes)
            messages = (told() - before) / (time.monotonic() - start)
            # Its replica is only held up: Ray Serve would replace one that was lost.
            replica = service.part(f"rpg.{GENERATOR}.")
            os.kill(replica, signal.SIGSTOP)
            try:
                idle = _calls(service, job, min(minutes, 0.75))
            finally:
                os.kill(replica, signal.SIGCONT)
            refused = httpx.get(f"{service.url}/v1/jobs/{job}/events", timeout=60).status_code
        client.cancel(job)
    return [
        _row("no listeners, replica full: GET, p99, median, largest", alone, reached=None),
        _row(f"{LISTENERS:,} listeners, replica full: GET, p99, median, largest", busy, reached=True),
        _row(f"{LISTENERS:,} listeners, replica held up: GET, p99, median, largest", idle, reached=True),
        Row("events that listeners got meanwhile, a second", f"{messages:.0f}"),
        Row("one listener more is answered with", f"{refused}", "429", refused == 429),
    ]


def _calls(service: Service, job: str, minutes: float) -> list[float]:
    """Milliseconds of each call."""
    paths = (f"/v1/jobs/{job}", "/v1/jobs", f"/v1/jobs/{job}/models?limit=100", "/v1/generators", "/healthz")
    times = []
    start = time.monotonic()
    with httpx.Client(base_url=service.url, timeout=60) as http:
        for i, path in enumerate(itertools.cycle(paths)):
            begin = start + i / CALLS_PER_SECOND
            if begin >= start + 60 * minutes:
                return times
            time.sleep(max(0.0, begin - time.monotonic()))
            began = time.monotonic()
            http.get(path).raise_for_status()
            times.append(1000 * (time.monotonic() - began))
    raise AssertionError("an endless iterator ended")


def _row(what: str, times: list[float], reached: bool | None) -> Row:
    ordered = sorted(times)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    found = f"{p99:.1f}, {statistics.median(ordered):.1f}, {ordered[-1]:.1f} ms"
    return Row(what, found, "" if reached is None else "p99 < 50 ms", None if reached is None else p99 < 50)


@contextmanager
def _listening(service: Service, job: str, number: int) -> Iterator["_Told"]:
    """So many connections of another process; yields what counts the lines of events that they got."""
    path = f"/v1/jobs/{job}/events"
    command = [sys.executable, "-m", "benchmarks.service.listeners", service.url, path, str(number)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        told = _Told(process)
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "listening"
            yield told
        finally:
            process.kill()


class _Told:
    """Asks the process of listeners how many events they got."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def __call__(self) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


async def _listen(url: str, path: str, number: int) -> None:
    address = urlsplit(url)
    told, ready = 0, 0

    async def one() -> None:
        nonlocal told, ready
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode())
        first = True
        while block := await reader.readline():
            if block.startswith(b"data:"):
                ready += first
                told += 1
                first = False

    listeners = []
    for i in range(number):
        listeners.append(asyncio.create_task(one()))
        # They come over some seconds, as callers do.
        if i % 10 == 9:
            await asyncio.sleep(0.2)
    while ready < number:
        if any(each.done() for each in listeners):
            raise SystemExit(f"{sum(each.done() for each in listeners)} of {number} were not answered")
        await asyncio.sleep(0.1)
    print("listening", flush=True)
    while True:
        await asyncio.to_thread(sys.stdin.readline)
        print(told, flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(_listen(sys.argv[1], sys.argv[2], int(sys.argv[3])))
