"""One small run of the whole flow, shared by the tests that look at its outputs."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits.yaml"
SMALL = (
    "collect.checkpoints_per_task=1",
    "collect.backbone_epochs=5",
    "collect.epochs=2",
    "collect.models_per_batch=128",
    "generator.denoiser.width=128",
    "generator.recurrent.width=64",
    "train.steps=60",
    "train.warmup_steps=10",
    "train.save_every=30",
    "train.log_every=15",
    "train.ema_decay=0.9",
    "generate.models_per_task=2",
    "ray.num_cpus=2",
)


def _run_job(
    module: str,
    arguments: Sequence[object],
    timeout: float = 300,
    ray_address: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ray_jobs.MODULE` as a user would, in a process group that ends with it."""
    command = [sys.executable, "-m", f"ray_jobs.{module}", *map(str, arguments)]
    environment = {**os.environ, **(environment or {})}
    environment.pop("RAY_ADDRESS", None)
    if ray_address is not None:
        environment["RAY_ADDRESS"] = ray_address
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@dataclass(frozen=True)
class FinishedRun:
    """The small run: its directory, the arguments that made it, and what it printed."""

    root: Path
    arguments: list[str]
    printed: str


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root = tmp_path_factory.mktemp("run") / "small"
    arguments = [str(DIGITS), *SMALL, f"output={root}"]
    result = _run_job("pipeline", arguments)
    assert result.returncode == 0, result.stderr
    return FinishedRun(root, arguments, result.stdout + result.stderr)


@pytest.fixture(scope="session")
def run_job() -> Callable[..., subprocess.CompletedProcess[str]]:
    return _run_job


@pytest.fixture(scope="session")
def small_settings() -> list[str]:
    """The preset and the overrides of the small run, without its output."""
    return [str(DIGITS), *SMALL]


@dataclass(frozen=True)
class Head:
    """A cluster's head that `ray start` has started, and the environment that its clients need."""

    address: str
    dashboard: str
    environment: dict[str, str]


@contextmanager
def _head(ports: list[int], home: Path, *options: str, token: bool = False) -> Iterator[Head]:
    """`ray start --head` with ports, a temporary directory and a home of its own; at the end its processes
    are killed, and no other session's, as `ray stop` would.
    """
    port, dashboard, agent, metrics = ports
    ray = str(Path(sys.executable).parent / "ray")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token" if token else "disabled"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if token:
        subprocess.run(
            [ray, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True
        )
    # Ray's sockets lie below it, and their names may have 107 bytes.
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    command = [
        ray, "start", "--head", "--block", "--disable-usage-stats", f"--port={port}",
        f"--temp-dir={temporary}",
        f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", *options,
    ]  # fmt: skip
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{dashboard}"
        deadline = time.monotonic() + 90
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{url}/api/gcs_healthz", timeout=5).close()
                break
            assert process.poll() is None, (home / "head.log").read_text()
            assert time.monotonic() < deadline, (home / "head.log").read_text()
            time.sleep(0.2)
        yield Head(f"127.0.0.1:{port}", url, environment)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_head(free_ports: Callable[[int], list[int]]) -> Callable[..., AbstractContextManager[Head]]:
    """`with ray_head(home, *options, token=False, ports=free_ports(4)) as head`."""

    def head(
        home: Path, *options: str, token: bool = False, ports: list[int] | None = None
    ) -> AbstractContextManager[Head]:
        return _head(ports or free_ports(4), home, *options, token=token)

    return head
