"""The main job in trouble: killed in every stage, a disk that is full or read-only, a damaged shard."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.ray_jobs.conftest import DIGITS, ROOT, SMALL, FinishedRun

pytestmark = pytest.mark.slow
STAGES = ("collect", "shard", "train", "refine", "generate", "evaluate")
Job = Callable[..., subprocess.CompletedProcess[str]]


def files_of(root: Path) -> dict[str, bytes]:
    """What a run leaves that depends on its config alone."""
    found = {}
    for name in ("collection", "shards", "generated"):
        for path in sorted((root / name).rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                found[str(path.relative_to(root))] = path.read_bytes()
    found["weights"] = (root / "generator" / "generator.safetensors").read_bytes()
    return found


def scores_of(root: Path) -> object:
    return json.loads((root / "report.json").read_text())["score"]


def is_done(root: Path, stage: str) -> bool:
    return (root / "stages" / f"{stage}.json").exists()


def kill_with_all(process: "subprocess.Popen[str]") -> None:
    """SIGKILL for a job and the Ray that it started, by their ids."""
    victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(victims[1:], timeout=20)
    process.wait()


def test_killed_in_every_stage_it_ends_like_a_run_that_nobody_killed(
    small_run: FinishedRun, run_job: Job, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "ray_jobs.pipeline", str(DIGITS), *SMALL, f"output={output}"]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")
    }
    log = tmp_path / "log"
    killed = []
    for number, stage in enumerate(STAGES):
        with log.open("a") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        while not (is_done(output, STAGES[number - 1]) if number else (output / ".lock").exists()):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        # In the first stage, Ray has to start.
        time.sleep(12 if stage == "collect" else 0.7)
        if process.poll() is None and not is_done(output, stage):
            killed.append(stage)
        kill_with_all(process)
    assert len(killed) >= 4, f"the others ended sooner than they were killed: {killed}"
    last = run_job("pipeline", [DIGITS, *SMALL, f"output={output}"])
    assert last.returncode == 0, last.stderr
    assert files_of(output) == files_of(small_run.root)
    assert scores_of(output) == scores_of(small_run.root)


def one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if ": error: " in line]
    assert len(errors) == 1 and all(part in errors[0] for part in parts), result.stderr
    assert "Traceback" not in result.stderr


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of its own in memory, so that no other is filled."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_fills_in_any_stage_harms_nothing_and_the_next_run_goes_on(
    small_run: FinishedRun, join_job: Job, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 256 * 2**20) as disk:
        root = disk / "run"
        shutil.copytree(
            small_run.root, root, ignore=lambda _, names: [n for n in names if n.endswith(".lock")]
        )
        arguments = [str(DIGITS), *SMALL, f"output={root}"]
        before = files_of(root)
        for number, stage in list(enumerate(STAGES))[1:]:
            (root / "stages" / f"{stage}.json").unlink()
            filler = disk / "filler"
            room = os.statvfs(disk)
            # Enough for records and logs, and for no output.
            with filler.open("wb") as file:
                left = room.f_bavail * room.f_frsize - 8192
                while left > 0:
                    left -= file.write(bytes(min(left, 2**20)))
            result = join_job("pipeline", arguments)
            if stage != "evaluate" or result.returncode:
                one_line(result, str(disk), "No space left on device")
            for earlier in STAGES[:number]:
                assert is_done(root, earlier)
            filler.unlink()
            again = join_job("pipeline", arguments)
            assert again.returncode == 0, again.stderr
            assert f"{STAGES[number - 1]}: unchanged, reused" in again.stderr
            assert files_of(root) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_an_output_that_is_read_only_is_refused_in_one_line(
    small_run: FinishedRun, join_job: Job, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 64 * 2**20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        one_line(
            join_job("pipeline", [str(DIGITS), *SMALL, f"output={disk / 'run'}"]), "Read-only file system"
        )


def test_a_damaged_byte_in_a_shard_is_named_and_mended_by_its_stage(
    small_run: FinishedRun, join_job: Job, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(small_run.root, root)
    arguments = [str(DIGITS), *SMALL, f"output={root}"]
    shard = next(path for path in sorted((root / "shards").glob("*.arrow")) if path.name != "entries.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (root / "stages" / "train.json").unlink()
    one_line(join_job("pipeline", arguments), f"shards/{shard.name}: damaged: its SHA-256 is not the one in")
    mended = join_job("shard", arguments)
    assert mended.returncode == 0, mended.stderr
    again = join_job("pipeline", arguments)
    assert again.returncode == 0, again.stderr
    assert files_of(root) == files_of(small_run.root)


HOLDER = """
import sys, time
from pathlib import Path
from ray_jobs.stage import locked_output

with locked_output(Path(sys.argv[1]), Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_pipelines_on_one_output_do_not_meet(
    small_run: FinishedRun, join_job: Job, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(small_run.root, root)
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root), str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout is not None and first.stdout.readline().strip() == "held"
        before = files_of(root)
        one_line(join_job("pipeline", [str(DIGITS), *SMALL, f"output={root}"]), "another job is writing here")
        assert files_of(root) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    again = join_job("pipeline", [str(DIGITS), *SMALL, f"output={root}"])
    assert again.returncode == 0, again.stderr
