"""A saved generator, configurations, and the service both in this process and on a Ray of its own."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi import FastAPI

from rpg.client.schema import JobState
from rpg.collection.checkpoint import checkpoint_sha256, write_checkpoint
from rpg.collection.collection import FAMILY, Collection, Entry
from rpg.collection.layout import Layout
from rpg.config import RecurrentKind, SamplingConfig, Solver, save_config
from rpg.generator.generator import Generator
from rpg.sampling.generate import run_job
from rpg.sampling.job import GenerationJob
from rpg.storage.locations import location
from rpg.tasks.digits import DigitsNet
from serve.config import CacheConfig, GeneratorEntry, ServeConfig, TokenEntry
from serve.dispatch.api import DispatcherAPI
from serve.dispatch.caller import Caller
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.served_generator import ServedGenerator
from serve.dispatch.store import JobStore
from serve.http.application import http_app
from serve.metrics import JobMetrics
from serve.replicas.replica import Replica

Calling = Callable[[Callable[[Any], Awaitable[None]]], None]
ROOT = Path(__file__).parents[2]
CONDITIONS = [[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]
TOKENS = {"alice": ["submit", "read"], "bob": ["submit", "read"], "reader": ["read"], "root": ["admin"]}


class NoMetrics(JobMetrics):
    """Counts nothing, and so needs no Ray."""

    def __init__(self) -> None: ...

    def queued(self, generator: str, models: int) -> None: ...

    def made(self, generator: str, models: int) -> None: ...

    def first_model(self, generator: str, seconds: float) -> None: ...

    def ended(self, generator: str, state: JobState, seconds: float) -> None: ...


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer secret-of-{name}"}


def token_entry(name: str, **changes: Any) -> TokenEntry:
    digest = hashlib.sha256(f"secret-of-{name}".encode()).hexdigest()
    return TokenEntry(digest, name, **{"scopes": TOKENS.get(name, ["submit", "read"]), **changes})


def caller(name: str = "alice") -> Caller:
    return Caller(name, frozenset(TOKENS[name]))


@pytest.fixture(scope="session")
def generator(make_generator: Callable[..., Generator], make_layout: Callable[..., Layout]) -> Generator:
    generator = make_generator(make_layout(16), recurrent=RecurrentKind.lstm, dropout=0.1)
    generator.config.sampling = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)
    return generator


@pytest.fixture(scope="session")
def saved(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("roots") / "small"
    generator.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def described(describing: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved generator that reads descriptions."""
    directory = tmp_path_factory.mktemp("described") / "small"
    describing.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Measurable:
    """A generator of digits networks, untrained, and a collection of one network for `condition`."""

    root: Path
    condition: list[float]

    def of(self, config: ServeConfig) -> ServeConfig:
        """`config` with this generator under the same name."""
        config.roots.append(str(self.root))
        config.generators[0].path = str(self.root / "generator")
        config.generators[0].collection = str(self.root / "collection")
        return config


@pytest.fixture(scope="session")
def measurable(
    make_generator: Callable[..., Generator],
    make_layout: Callable[..., Layout],
    tmp_path_factory: pytest.TempPathFactory,
) -> Measurable:
    root, template = tmp_path_factory.mktemp("measurable"), DigitsNet().state_dict()
    generator = make_generator(make_layout(576, template), recurrent=RecurrentKind.lstm, condition_size=10)
    generator.config.sampling = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)
    generator.save_pretrained(root / "generator")
    path = root / "collection" / "a.safetensors"
    write_checkpoint(path, template, {})
    condition = [0.0, 1.0] * 5
    entry = Entry(path.name, checkpoint_sha256(path), condition)
    Collection(path.parent, {FAMILY: "digits"}, [entry]).save()
    return Measurable(root, condition)


@pytest.fixture
def config(saved: Path, tmp_path: Path) -> ServeConfig:
    return _config(saved, tmp_path)


@pytest.fixture(scope="session")
def saved_config(described: Path, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """The configuration of a service that lasts a session; its generator reads descriptions."""
    return _config(described, tmp_path_factory.mktemp("service"))


@pytest.fixture
def describing_config(described: Path, tmp_path: Path) -> ServeConfig:
    return _config(described, tmp_path)


def _config(saved: Path, directory: Path) -> ServeConfig:
    return ServeConfig(
        storage=str(directory / "storage"),
        roots=[str(saved.parent)],
        generators=[GeneratorEntry("small", str(saved), num_gpus=0)],
        tokens=[token_entry(name) for name in TOKENS],
    )


@pytest.fixture(scope="session")
def expected(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[bytes]]:
    """`expected(conditions, number, seed, indices=all, **sampling)`: the files of `run_job`, in order."""

    def make(
        conditions: list[list[float]] | None,
        number: int = 1,
        seed: int = 0,
        indices: range | None = None,
        **sampling: Any,
    ) -> list[bytes]:
        settings = SamplingConfig(**{**vars(generator.config.sampling), **sampling})
        job = GenerationJob(conditions, number, seed, settings)
        out = tmp_path_factory.mktemp("expected")
        return [path.read_bytes() for path in run_job(generator, job, indices or range(len(job)), out)]

    return make


@dataclass
class Service:
    """The service in this process: no Ray, no sockets."""

    dispatcher: Dispatcher
    replica: Replica
    store: JobStore
    app: FastAPI
    client: httpx.AsyncClient

    async def ended(self, job_id: str, name: str = "alice") -> dict[str, Any]:
        """The job, once it has ended."""
        async with asyncio.timeout(60):
            while True:
                job: dict[str, Any] = (
                    await self.client.get(f"/v1/jobs/{job_id}", headers=bearer(name))
                ).json()
                if job["ended"] is not None:
                    return job
                await asyncio.sleep(0.02)


@asynccontextmanager
async def _service(
    config: ServeConfig, wrap: Callable[[Replica], Any] = lambda replica: replica, **options: Any
) -> AsyncIterator[Service]:
    store = JobStore(location(config.storage))
    replica = Replica(config.generators[0], config.storage, CacheConfig())
    dispatcher = Dispatcher(store, config.limits, config.retention, NoMetrics(), **options)

    async def metrics() -> str:
        return "# HELP ray_rpg_models Models made\n"

    await dispatcher.start()
    entry = config.generators[0]
    has_test = bool(entry.tasks or entry.evaluate.command)
    served = ServedGenerator("small", replica.generator.config, 1, bool(entry.collection), has_test)
    (await dispatcher.add_generator(served)).start(wrap(replica))
    app = http_app(DispatcherAPI(dispatcher), store, config, metrics)
    transport = httpx.ASGITransport(app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            yield Service(dispatcher, replica, store, app, client)
    finally:
        await dispatcher.stop()
        await asyncio.to_thread(replica.close)


@pytest.fixture(scope="session")
def in_process() -> Callable[..., AbstractAsyncContextManager[Service]]:
    """`async with in_process(config, wrap=..., **options) as service`.

    `wrap` may put something around the replica; the options are the dispatcher's.
    """
    return _service


@pytest.fixture
def calling(config: ServeConfig, in_process: Callable[..., Any]) -> Calling:
    """Run a coroutine function with the service."""

    def call(function: Callable[[Any], Awaitable[None]]) -> None:
        async def run() -> None:
            async with in_process(config) as service:
                await function(service)

        asyncio.run(run())

    return call


@dataclass
class Server:
    """`python -m serve` with a Ray of its own."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def part(self, title: str, seconds: float = 30) -> psutil.Process:
        """The process of one deployment, such as `rpg:front` or `rpg.small.`."""
        deadline = time.monotonic() + seconds
        while True:
            # Ray rewrites a process's title at every call, and now and then it cannot be read meanwhile.
            if found := self.parts(title):
                return found[0]
            assert time.monotonic() < deadline, f"no process {title}"
            time.sleep(0.05)

    def parts(self, title: str) -> list[psutil.Process]:
        """The processes of a title, as far as it can be read."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if " ".join(child.cmdline()).startswith(f"ray::ServeReplica:{title}"):
                    found.append(child)
        return found

    def kill_all(self) -> None:
        """SIGKILL for the command and everything of its Ray, children first so that none is missed."""
        processes = psutil.Process(self.process.pid).children(recursive=True)
        for process in [psutil.Process(self.process.pid), *processes]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        self.process.wait()

    def stop(self) -> int:
        """End it as a user would."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise

    def wait_ready(self) -> "Server":
        deadline = time.monotonic() + 240
        while "http://" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)
        return self


@contextmanager
def _server(config: ServeConfig, directory: Path, port: int) -> Iterator[Server]:
    config.http.port = port
    config.num_cpus = 2
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "serve.yaml"
    save_config(config, path)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    log = directory / f"{time.monotonic_ns()}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", str(path)], cwd=ROOT, env=environment, text=True,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        yield server.wait_ready()
    finally:
        if process.poll() is None:
            server.stop()


@pytest.fixture(scope="session")
def serving(
    free_ports: Callable[[int], list[int]],
) -> Callable[[ServeConfig, Path], AbstractContextManager[Server]]:
    """`with serving(config, directory) as server`: `python -m serve` with a Ray of its own."""
    return lambda config, directory: _server(config, directory, free_ports(1)[0])
