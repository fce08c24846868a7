"""Stopping a job: Ctrl-C leaves no process behind, and a stopped training goes on where it was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def processes_of(session: int) -> list[str]:
    """Command lines of the living processes in a session."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(command)
    return found


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray_jobs.train", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_interrupt_leaves_no_process_and_training_goes_on(small_run, tmp_path):
    output = tmp_path / "stopped"
    for kept in ("collection", "shards", "stages"):
        shutil.copytree(small_run.root / kept, output / kept)
    longer = [*small_run.arguments, f"output={output}", "train.steps=600", "train.save_every=50"]
    longer.append("refine.steps=0")
    process = start(longer)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(output.glob("train/*/checkpoint_*/training_state.pt")):
        time.sleep(0.2)
    ray_was_running = any("raylet" in command for command in processes_of(process.pid))
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert ray_was_running
    deadline = time.monotonic() + 60
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(process.pid) == []
    assert not (output / "generator").exists()

    # The same config again would take all 600 steps from the start; it goes on from the last checkpoint.
    process = start(longer)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    history = json.loads((output / "generator" / "history.json").read_text())
    steps = [row["step"] for row in history]
    assert steps == sorted(set(steps))
    assert steps[-1] == 600
