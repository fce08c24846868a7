"""Jobs of many clients while replicas and the front are killed, against the same jobs undisturbed."""

import hashlib
import os
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.service.running import GENERATOR, Service, Setup, running
from benchmarks.service.table import Row

JOBS, CLIENTS = 200, 20
KILL_SECONDS = 20.0
FRONT_KILLS = 2

Digests = dict[int, list[str]]
"""SHA-256 of each downloaded model, by job."""


def measure(setup: Setup, directory: Path, minutes: float, models: int) -> list[Row]:
    """Submit jobs of `models` models over `minutes`, and kill processes over the same time."""
    began = time.monotonic()
    with running(setup, directory / "calm") as service:
        calm, _, errors = _all_jobs(service, setup, models, lambda job: None)
        assert not errors, errors
    calm_seconds = time.monotonic() - began
    print(f"undisturbed: {len(calm)} jobs in {calm_seconds:.0f} s", file=sys.stderr, flush=True)

    with running(setup, directory / "chaos") as service:
        start = time.monotonic()
        end = start + 60 * minutes
        kills = {"replica": 0, "front": 0}
        killer = threading.Thread(target=_kill, args=(service, start, end, kills))
        killer.start()

        def pace(job: int) -> None:
            time.sleep(max(0.0, start + job / JOBS * (end - start) - time.monotonic()))

        found, ids, errors = _all_jobs(service, setup, models, pace)
        killer.join()
        seconds = time.monotonic() - start
        with service.client() as client:
            listed, after = [], None
            while True:
                page = client.jobs(limit=1000, after=after)
                listed += page.jobs
                if (after := page.next) is None:
                    break
        stored = {
            id: _stored_models(service.directory / "storage/jobs" / id / "models") for id in ids.values()
        }
    names = [f"model_{i:06d}.safetensors" for i in range(models)]
    whole = sum(found.get(job) is not None and len(found[job]) == models for job in range(JOBS))
    once = sum(stored[id] == names for id in ids.values())
    wrong = sum(got != right for job in found for got, right in zip(found[job], calm[job], strict=False))
    for error in errors:
        print(error, file=sys.stderr)
    return [
        Row("jobs, clients, models", f"{JOBS}, {CLIENTS}, {JOBS * models:,}"),
        Row("killed: replicas (every 20 s), front", f"{kills['replica']}, {kills['front']}"),
        Row("lasted, s (undisturbed, without pauses)", f"{seconds:.0f} ({calm_seconds:.0f})"),
        Row("jobs that finished whole", f"{whole}", f"{JOBS}", whole == JOBS),
        Row("jobs known to the service", f"{len(listed)}", f"{JOBS}", len(listed) == JOBS),
        Row("jobs with each model once on storage", f"{once}", f"{JOBS}", once == JOBS),
        Row("models with other bytes than undisturbed", f"{wrong}", "0", wrong == 0),
        Row("errors that clients saw", f"{len(errors)}", "0", not errors),
    ]  # fmt: skip


def _all_jobs(
    service: Service, setup: Setup, models: int, pace: Callable[[int], None]
) -> tuple[Digests, dict[int, str], list[str]]:
    digests: Digests = {}
    ids: dict[int, str] = {}
    errors: list[str] = []

    def client_of(number: int) -> None:
        with service.client() as client:
            for job in range(number, JOBS, CLIENTS):
                pace(job)
                try:
                    # Every other job has its models many in a file.
                    pack = job % 2 == 1
                    asked = client.submit(GENERATOR, [setup.condition(job)], models, seed=job, pack=pack)
                    ids[job] = asked.id
                    ended = client.wait(asked.id)
                    if ended.state != "succeeded":
                        raise RuntimeError(f"{ended.state}: {ended.error}")
                    with tempfile.TemporaryDirectory() as directory:
                        paths = client.download(asked.id, Path(directory))
                        digests[job] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
                except Exception as error:
                    errors.append(f"job {job}: {error!r}")

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(client_of, range(CLIENTS)))
    return digests, ids, errors


def _stored_models(directory: Path) -> list[str]:
    """The names of the models in a job's directory, files and members of packs.

    A pack that was written when its replica was killed may hold models that are in another one as well.
    """
    files = [path.name for path in directory.iterdir() if path.suffix != ".tar"]
    packed: set[str] = set()
    for path in directory.glob("*.tar"):
        with tarfile.open(path) as pack:
            packed.update(pack.getnames())
    return sorted([*files, *packed])


def _kill(service: Service, start: float, end: float, kills: dict[str, int]) -> None:
    fronts = [start + (i + 1) / (FRONT_KILLS + 1) * (end - start) for i in range(FRONT_KILLS)]
    replicas = start + KILL_SECONDS
    while (now := time.monotonic()) < end:
        if now >= replicas:
            os.kill(service.part(f"rpg.{GENERATOR}."), signal.SIGKILL)
            kills["replica"] += 1
            replicas += KILL_SECONDS
        if fronts and now >= fronts[0]:
            os.kill(service.part("rpg:front"), signal.SIGKILL)
            kills["front"] += 1
            fronts.pop(0)
        time.sleep(0.1)
