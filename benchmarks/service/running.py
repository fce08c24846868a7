"""A service to measure: `rpg serve` in a process group of its own, with its processes by name."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rpg.client import Client, Patience
from rpg.config import save_config
from serve.config import GeneratorEntry, LimitsConfig, ServeConfig

ROOT = Path(__file__).parents[2]
GENERATOR = "digits"
PATIENCE = Patience(total=600.0)
"""Seconds that a client waits for parts of the service to come back."""


@dataclass(frozen=True)
class Setup:
    """The generator that is served, and its replicas."""

    generator: Path
    condition_size: int
    replicas: int
    num_gpus: int
    num_cpus: int

    def condition(self, i: int) -> list[float]:
        """A condition of the class-subset tasks; every `i` up to 1,021 has another one."""
        number = 1 + i * 389 % (2**self.condition_size - 2)
        return [float(bit) for bit in format(number, f"0{self.condition_size}b")]


@dataclass
class Service:
    """A service that is running."""

    url: str
    process: subprocess.Popen[str]
    directory: Path
    log: Path

    def client(self) -> Client:
        """A new client; each thread takes its own, because connections are not shared."""
        return Client(self.url, patience=PATIENCE)

    def processes(self) -> dict[int, str]:
        """The titles of all processes by their ids, the command itself included."""
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError, IndexError, ValueError):
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        titles = {}
        for pid in found:
            with suppress(OSError):
                titles[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        return titles

    def part(self, title: str, seconds: float = 120) -> int:
        """The process of `rpg:front`, `rpg:jobs` or `rpg.digits.`, once there is one."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for pid, found in self.processes().items():
                if found.startswith(f"ray::ServeReplica:{title}"):
                    return pid
            time.sleep(0.1)
        raise AssertionError(f"no process {title} for {seconds} s")

    def stop(self) -> None:
        """End the service as a user would; processes that are left after two minutes are killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


def config_of(setup: Setup, directory: Path) -> ServeConfig:
    """The service's configuration, with limits that no measurement reaches."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    entry = GeneratorEntry(GENERATOR, str(setup.generator), replicas=setup.replicas, num_gpus=setup.num_gpus)
    config = ServeConfig(
        storage=str(directory / "storage"),
        roots=[str(setup.generator.parent)],
        generators=[entry],
        auth=False,
        limits=LimitsConfig(queued_models=10_000_000, models_per_job=1_000_000),
        num_cpus=setup.num_cpus,
    )
    config.http.port = port
    return config


def command(config: ServeConfig, directory: Path) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of `rpg serve` with this configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "serve.yaml"
    save_config(config, path)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return [sys.executable, "-m", "serve", str(path)], environment


@contextmanager
def running(setup: Setup, directory: Path) -> Iterator[Service]:
    """Yield a service once it answers; it is stopped at the end of the block."""
    config = config_of(setup, directory)
    line, environment = command(config, directory)
    log = directory / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment, text=True, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{config.http.port}"
    service = Service(url, process, directory, log)
    try:
        while url + "\n" not in log.read_text():
            if process.poll() is not None:
                raise SystemExit(f"rpg serve ended:\n{log.read_text()}")
            time.sleep(0.05)
        yield service
    finally:
        if process.poll() is None:
            service.stop()
