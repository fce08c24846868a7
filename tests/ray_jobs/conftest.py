"""One small run of the whole flow, shared by the tests that look at its outputs."""

import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import pytest
from filelock import FileLock
from ray.util import get_node_ip_address

from ray_jobs.cluster import ray_cluster
from rpg.config import RayConfig

ROOT = Path(__file__).parents[2]
# Of the Rays that this process starts or joins, before it knows of any: it could not change its mind later.
os.environ["RAY_AUTH_MODE"] = "disabled"

DIGITS = ROOT / "configs" / "digits.yaml"
RAY = str(Path(sys.executable).parent / "ray")
HEAD_ATTEMPTS = 2
HEAD_SECONDS = 200
SMALL = (
    "collect.checkpoints_per_task=1",
    "collect.heldout_checkpoints_per_task=1",
    "collect.backbone_epochs=5",
    "collect.epochs=1",
    "collect.models_per_batch=128",
    "generator.denoiser.width=128",
    "generator.recurrent.width=64",
    "train.steps=60",
    "train.warmup_steps=10",
    "train.save_every=30",
    "train.log_every=15",
    "train.ema_decay=0.9",
    "refine.steps=20",
    "refine.warmup_steps=5",
    "refine.save_every=10",
    "refine.validate_every=0",
    "refine.tasks_per_step=4",
    "refine.samples_per_step=32",
    "generate.models_per_task=2",
    "ray.num_cpus=2",
)


def _run_job(
    module: str,
    arguments: Sequence[object],
    timeout: float = 540,
    ray_address: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ray_jobs.MODULE` as a user would, in a process group that ends with it."""
    command = [sys.executable, "-m", f"ray_jobs.{module}", *map(str, arguments)]
    ours = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    environment = {**ours, **(environment or {})}
    environment.pop("RAY_ADDRESS", None)
    if ray_address is not None:
        environment["RAY_ADDRESS"] = ray_address
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _call_job(
    module: str, arguments: Sequence[object], ray_address: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m ray_jobs.MODULE` in this process, which has imported Ray and PyTorch already."""
    out, err, status = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [f"ray_jobs/{module}.py", *map(str, arguments)])
        patch.delenv("RAY_ADDRESS", raising=False)
        if ray_address is not None:
            patch.setenv("RAY_ADDRESS", ray_address)
        # Python warns that the module has been imported before.
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            try:
                runpy.run_module(f"ray_jobs.{module}", run_name="__main__")
            except SystemExit as end:
                status = end.code
    assert isinstance(status, int), err.getvalue()
    return subprocess.CompletedProcess([module], status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class FinishedRun:
    """The small run: its directory, the arguments that made it, and what it printed."""

    root: Path
    arguments: list[str]
    printed: str


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Made once for all of pytest's workers; each has a copy, whose lock and stages are its own."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    made, printed = shared / "small_run", shared / "small_run.log"
    with FileLock(shared / "small_run.lock"):
        if not printed.exists():
            result = _run_job("pipeline", [str(DIGITS), *SMALL, f"output={made}"])
            assert result.returncode == 0, result.stderr
            printed.write_text(result.stdout + result.stderr)
    root = tmp_path_factory.mktemp("run") / "small"
    shutil.copytree(made, root)
    return FinishedRun(root, [str(DIGITS), *SMALL, f"output={root}"], printed.read_text())


@pytest.fixture(scope="session")
def run_job() -> Callable[..., subprocess.CompletedProcess[str]]:
    return _run_job


@pytest.fixture(scope="session")
def call_job() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`call_job(module, arguments)`: in this process; starts a Ray of its own if it comes to that."""
    return _call_job


@pytest.fixture(scope="session")
def cluster(
    ray_head: Callable[..., AbstractContextManager["Head"]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Head"]:
    """One of two CPUs that is there all the time."""
    with ray_head(tmp_path_factory.mktemp("cluster"), "--num-cpus=2", "--num-gpus=0") as head:
        yield head


@pytest.fixture(scope="session")
def join_job(cluster: "Head") -> Callable[..., subprocess.CompletedProcess[str]]:
    """`join_job(module, arguments)`: in this process, on that cluster."""
    return lambda module, arguments: _call_job(module, arguments, ray_address=cluster.address)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs that this process has started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_cluster(RayConfig(num_cpus=2)):
            yield


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


class HeadNotThereError(Exception):
    """A head has ended, or its parts have not come up in time; says what it and its parts logged."""


@contextmanager
def _head(
    home: Path, free_ports: Callable[[int], list[int]], *options: str, token: bool, port: int | None
) -> Iterator[Head]:
    """`ray start --head` with a home of its own, started anew where its parts do not come up."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token" if token else "disabled"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if token:
        subprocess.run(
            [RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True
        )
    with ExitStack() as stack:
        for attempt in range(HEAD_ATTEMPTS):
            gcs, dashboard = free_ports(2)
            try:
                head = stack.enter_context(_started(home, environment, port or gcs, dashboard, options))
                break
            except HeadNotThereError as error:
                if attempt == HEAD_ATTEMPTS - 1:
                    raise
                print(error)
        yield head


@contextmanager
def _started(
    home: Path, environment: dict[str, str], port: int, dashboard: int, options: Sequence[str]
) -> Iterator[Head]:
    """One such head, once its agent takes jobs; at the end its processes are killed, and no other session's,
    as `ray stop` would.
    """
    # Ray's sockets lie below it, and their names may have 107 bytes.
    temporary = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    # The agent takes ports itself: one that was found free before may be taken when it has started.
    command = [
        RAY, "start", "--head", "--block", "--disable-usage-stats", f"--port={port}",
        f"--temp-dir={temporary}", f"--dashboard-port={dashboard}",
        "--dashboard-agent-listen-port=0", *options,
    ]  # fmt: skip
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + HEAD_SECONDS
        while not (_answers(f"{url}/api/gcs_healthz") and _agent_answers(temporary / "session_latest")):
            if process.poll() is not None or time.monotonic() > deadline:
                raise HeadNotThereError(_said(home, temporary))
            time.sleep(0.5)
        yield Head(f"127.0.0.1:{port}", url, environment)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def _agent_answers(session: Path) -> bool:
    """Whether the agent, which starts submitted jobs, is up; it leaves the number of its port behind."""
    ports = [path.read_text() for path in session.glob("dashboard_agent_listen_port_*")]
    # At 127.0.0.1 it has taken another port, which it does not tell.
    host = get_node_ip_address()
    return any(_answers(f"http://{host}:{port}/api/local_raylet_healthz") for port in ports)


def _answers(url: str) -> bool:
    # An agent without HTTP has the port -1.
    with suppress(OSError, HTTPException):
        urllib.request.urlopen(url, timeout=5).close()
        return True
    return False


def _said(home: Path, temporary: Path) -> str:
    """The ends of the logs of a head and its parts."""
    logs = temporary / "session_latest" / "logs"
    names = ("dashboard_agent.log", "raylet.out", "raylet.err")
    paths = [home / "head.log", *(logs / name for name in names)]
    return "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in paths if path.is_file())


@pytest.fixture(scope="session")
def ray_head(free_ports: Callable[[int], list[int]]) -> Callable[..., AbstractContextManager[Head]]:
    """`with ray_head(home, *options, token=False, port=any) as head`."""

    def head(
        home: Path, *options: str, token: bool = False, port: int | None = None
    ) -> AbstractContextManager[Head]:
        return _head(home, free_ports, *options, token=token, port=port)

    return head
