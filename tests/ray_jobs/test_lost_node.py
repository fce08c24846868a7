"""The digits pipeline with a node lost in every stage: the same to the byte as on one that stays."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


class Node:
    """A second node: `ray start` in a session of its own, whose processes all die at once."""

    def __init__(self, head, log: Path) -> None:
        # The head has no CPUs: every task is here.
        self._command = [RAY, "start", "--block", f"--address={head.address}", "--num-cpus=2"]
        self._command += ["--num-gpus=0", "--dashboard-agent-listen-port=0", "--disable-usage-stats"]
        self._command += ["--object-store-memory=200000000"]
        self._environment = head.environment
        self._log = log
        self._start()

    def _start(self) -> None:
        with self._log.open("a") as file:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def stay(self) -> None:
        """Start it again if it has ended, as one does that a busy machine does not start in time."""
        if self._process.poll() is not None:
            self._start()

    def kill(self) -> int:
        """SIGKILL to the raylet, its agents and its workers; returns how many processes that were."""
        victims = processes_of(self._process.pid)
        for process in victims:
            os.kill(process, signal.SIGKILL)
        self._process.wait()
        return len(victims)


def processes_of(session: int) -> list[int]:
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(directory.name))
    return found


def signs_of_work(output: Path) -> dict[str, Callable[[], bool]]:
    """By stage, what shows that it is at work and not done."""

    def files(pattern: str) -> bool:
        return any(output.glob(pattern))

    return {
        "collect": lambda: files(".collection.*/task*.safetensors"),
        "shard": lambda: files(".shards.*/*") or files("shards/*"),
        "train": lambda: files("train/*/checkpoint_*/training_state.pt"),
        "refine": lambda: files("refine/*/checkpoint_*/training_state.pt"),
        "generate": lambda: files(".generated.*/*.safetensors") or files("generated/*.safetensors"),
        "evaluate": lambda: files("stages/generate.json"),
    }


def digests(output: Path) -> dict[str, str]:
    """Every file of the stages' outputs that should be the same again, hidden ones included.

    Left out: what has times, of training or of files.
    """
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in ("collection", "shards", "generator", "generated")
        for path in sorted((output / part).rglob("*"))
        if path.is_file() and path.name not in ("history.json", "README.md", ".verified.json")
    }


def run_pipeline(head, settings: list[str], output: Path, beside: Callable[[], object]) -> str:
    """Run the pipeline, and `beside` again and again meanwhile; returns what it printed."""
    environment = {**head.environment, "RAY_ADDRESS": head.address}
    command = [sys.executable, "-m", "ray_jobs.pipeline", *settings, f"output={output}"]
    log = output.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 500
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            beside()
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, log.read_text()
    return log.read_text()


@pytest.mark.timeout(1200)
def test_a_node_lost_in_every_stage_changes_nothing(
    ray_head, small_run, small_settings, tmp_path, monkeypatch
):
    # A lost node's port no longer answers, which Ray then notices in two seconds instead of half a minute. A
    # busy node may still take its time to answer.
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_timeout_ms", "20000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    settings = [*small_settings, "generate.models_per_batch=5", "train.save_every=10", "ray.wait_seconds=120"]
    lost: list[str] = []
    with ray_head(tmp_path, "--num-cpus=0", "--num-gpus=0") as head:
        node = Node(head, tmp_path / "node.log")
        signs = list(signs_of_work(tmp_path / "lost").items())

        def lose_node() -> None:
            if signs and signs[0][1]():
                stage, _ = signs.pop(0)
                done = (tmp_path / "lost" / "stages" / f"{stage}.json").exists()
                if node.kill() and not done:
                    lost.append(stage)
            node.stay()

        try:
            printed = run_pipeline(head, settings, tmp_path / "lost", lose_node)
        finally:
            node.kill()
    assert lost == ["collect", "shard", "train", "refine", "generate", "evaluate"], printed
    assert "Traceback" not in printed
    whole = digests(small_run.root)
    assert digests(tmp_path / "lost") == whole
    models = [name for name in whole if name.startswith("collection/task")]
    assert len(models) == 1022
    assert len([name for name in whole if name.startswith("generated/") and ".safetensors" in name]) == 80
    reports = [json.loads((run / "report.json").read_text()) for run in (small_run.root, tmp_path / "lost")]
    assert reports[0]["score"] == reports[1]["score"]
