"""cluster/local.sh: a head that starts, tells how to use it, and ends without a trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "cluster" / "local.sh"


def processes_with(home: Path) -> list[str]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                if f"HOME={home}".encode() in (directory / "environ").read_bytes().split(b"\0"):
                    found.append((directory / "cmdline").read_text())
            except OSError:
                continue
    return found


def test_start_status_stop(free_ports, tmp_path):
    port, dashboard = free_ports(2)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RPG_PORT": str(port), "RPG_DASHBOARD_PORT": str(dashboard),
    }  # fmt: skip

    def local(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=240
        )

    try:
        assert local("status").stdout == "no head is running\n"
        started = local("start", "0")
        assert started.returncode == 0, started.stderr
        assert f"RAY_AUTH_MODE=token RAY_ADDRESS=http://127.0.0.1:{dashboard}" in started.stdout
        assert local("start").returncode == 2
        status = local("status")
        assert status.returncode == 0, status.stderr
        assert "CPU" in status.stdout
        assert "GPU" not in status.stdout
    finally:
        stopped = local("stop")
    assert stopped.stdout == "stopped\n", stopped.stderr
    assert processes_with(tmp_path) == []
    assert local("start", "many").stderr == (
        "cluster/local.sh: error: start: expected a number of GPUs, got 'many'\n"
    )
