"""A job's Ray: started again where it gives up, and a message if it ends the process."""

import os
import subprocess
import sys
from typing import Any

import pytest
import ray

from ray_jobs.cluster import ray_cluster
from rpg.config import RayConfig
from rpg.errors import RPGError

pytestmark = pytest.mark.slow


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`failing(times)`: so many starts of Ray end as they do on a machine that is too busy."""
    start = ray.init

    def fail(times: int) -> list[str]:
        tried: list[str] = []

        def init(**arguments: Any) -> Any:
            tried.append(arguments["address"])
            if len(tried) <= times:
                raise Exception("The current node timed out during startup.")
            return start(**arguments)

        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(ray, "init", init)
        return tried

    return fail


def test_a_ray_that_gives_up_is_started_again(failing: Any) -> None:
    tried = failing(2)
    with ray_cluster(RayConfig(num_cpus=1)):
        assert ray.cluster_resources()["CPU"] == 1
    assert not ray.is_initialized()
    assert tried == ["local"] * 3


def test_a_ray_that_never_starts_is_told_in_a_line(failing: Any) -> None:
    tried = failing(9)
    with (
        pytest.raises(RPGError, match=r"Ray did not start, 3 times over: The current node timed out .*/logs"),
        ray_cluster(RayConfig(num_cpus=1)),
    ):
        raise AssertionError("not reached")
    assert tried == ["local"] * 3


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [("os._exit(1)", 1, True), ("os.kill(os.getpid(), 9)", -9, True), ("raise SystemExit(3)", 3, False)],
)
def test_a_process_that_ray_ends_leaves_a_message(cluster: Any, ending: str, status: int, said: bool) -> None:
    """`os._exit` ends the process as Ray's native code does."""
    code = (
        "import os; from ray_jobs.cluster import ray_cluster; from rpg.config import RayConfig\n"
        f"with ray_cluster(RayConfig()): {ending}"
    )
    environment = {**os.environ, **cluster.environment, "RAY_ADDRESS": cluster.address}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == status
    assert (ended.stderr.count("error: this process was ended") == 1) == said, ended.stderr
