"""Memory of every process of the service under load that does not end."""

import statistics
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.service.running import GENERATOR, Service, Setup, running
from benchmarks.service.table import Row

CLIENTS = 4
MODELS = 200
SAMPLE_SECONDS = 5.0
MOST_GROWTH = 1.05
"""Most growth of the median from the second quarter to the last; the first quarter is for warming up."""
_NAMES = {
    "ray::ServeReplica:rpg:front": "front",
    "ray::ServeReplica:rpg:jobs": "dispatcher",
    f"ray::ServeReplica:rpg.{GENERATOR}.": "replica",
    "ray::ServeController": "Serve's controller",
    "ray::ProxyActor": "Serve's proxy",
}


def measure(setup: Setup, directory: Path, minutes: float) -> list[Row]:
    """Have clients submit, wait and download over and over, and watch the memory."""
    stop = threading.Event()
    made = [0] * CLIENTS
    errors: list[str] = []
    with running(setup, directory) as service:
        threads = [
            threading.Thread(target=_client, args=(service, setup, i, stop, made, errors))
            for i in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        memory: dict[str, list[float]] = {}
        start = time.monotonic()
        while time.monotonic() < start + 60 * minutes:
            for name, size in _memory(service).items():
                memory.setdefault(name, []).append(size)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.monotonic() - start
        stop.set()
        for thread in threads:
            thread.join()
    rows = [
        Row("minutes", f"{seconds / 60:.1f}", "20", seconds >= 20 * 60),
        Row("models made and downloaded", f"{sum(made):,}, {sum(made) / seconds:.0f}/s"),
        Row("errors that clients saw", f"{len(errors)}", "0", not errors),
    ]
    for name, sizes in memory.items():
        quarter = max(1, len(sizes) // 4)
        early, late = statistics.median(sizes[quarter : 2 * quarter]), statistics.median(sizes[-quarter:])
        rows.append(
            Row(
                f"memory of {name}, second quarter, last quarter, peak",
                f"{early:.0f}, {late:.0f}, {max(sizes):.0f} MB",
                f"<= {MOST_GROWTH:.2f}x",
                late <= MOST_GROWTH * early,
            )
        )
    return rows


def _client(
    service: Service, setup: Setup, number: int, stop: threading.Event, made: list[int], errors: list[str]
) -> None:
    with service.client() as client:
        job = 0
        while not stop.is_set():
            job += 1
            try:
                id = client.submit(GENERATOR, [setup.condition(CLIENTS * job + number)], MODELS, seed=job).id
                if client.wait(id).state != "succeeded":
                    raise RuntimeError(f"{client.job(id)}")
                with tempfile.TemporaryDirectory() as directory:
                    made[number] += len(client.download(id, Path(directory)))
            except Exception as error:
                errors.append(repr(error))


def _memory(service: Service) -> dict[str, float]:
    """Megabytes of physical memory by process; Ray's other processes are one sum."""
    found = {"all others of Ray, together": 0.0}
    for pid, title in service.processes().items():
        name = next((each for start, each in _NAMES.items() if title.startswith(start)), None)
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            size = int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1e3
            found[name or "all others of Ray, together"] = (
                found.get(name or "all others of Ray, together", 0.0) + size
            )
    return found
