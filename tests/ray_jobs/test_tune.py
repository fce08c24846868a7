"""A search as a user runs it: what it leaves, what it reuses, and what happens when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rpg.config import load_config
from rpg.generator.generator import Generator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SPACE = "tune.space={shard.token_size: [144, 288], generator.denoiser.width: [64, 128]}"


def settings(small_run, output: Path) -> list[str]:
    for kept in ("collection", "shards", "stages"):
        shutil.copytree(small_run.root / kept, output / kept)
    # Relative, as in the presets.
    return [
        *small_run.arguments,
        f"output={os.path.relpath(output, ROOT)}",
        SPACE,
        "tune.trials=4",
        "train.steps=90",
    ]


def table(output: Path) -> list[dict]:
    return json.loads((output / "tune" / "table.json").read_text())


@pytest.fixture(scope="module")
def searched(small_run, run_job, tmp_path_factory):
    output = tmp_path_factory.mktemp("tune") / "whole"
    arguments = settings(small_run, output)
    result = run_job("tune", arguments)
    assert result.returncode == 0, result.stderr
    return output, arguments, result.stdout + result.stderr


def test_what_a_search_leaves(searched, run_job):
    output, _, printed = searched
    rows = table(output)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    tried = {
        (row["settings"]["shard.token_size"], row["settings"]["generator.denoiser.width"]) for row in rows
    }
    # The config itself, and three of the four points.
    assert len(tried) == 4
    assert (576, 128) in tried
    # Equal compute, to within a step in each of nine rounds.
    spent = [row["steps"] * row["flops_per_step"] for row in rows]
    assert max(spent) - min(spent) <= 9 * max(row["flops_per_step"] for row in rows)
    ended = [row for row in rows if row["share_of_budget"] == 1]
    assert ended
    assert rows[0]["accuracy"] == max(row["accuracy"] for row in ended)
    assert all(0 < row["share_of_budget"] <= 1 for row in rows)
    assert all(row["failure"] is None for row in rows)
    ElementTree.fromstring((output / "tune" / "search.svg").read_bytes())
    assert (output / "tune" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert "Accuracy of generated networks on validation tasks" in printed
    assert "Traceback" not in printed

    best = load_config(output / "tune" / "best.yaml")
    assert best.shard.token_size == rows[0]["settings"]["shard.token_size"]
    trained = run_job("train", [output / "tune" / "best.yaml"])
    assert trained.returncode == 0, trained.stderr
    generator = Generator.from_pretrained(Path(best.output) / "generator")
    assert sum(parameter.numel() for parameter in generator.parameters()) == rows[0]["parameters"]


def test_a_finished_search_is_not_run_again(searched, run_job):
    output, arguments, _ = searched
    before = (output / "tune" / "table.json").read_bytes()
    again = run_job("tune", arguments)
    assert again.returncode == 0, again.stderr
    assert "tune: unchanged, reused" in again.stderr
    assert (output / "tune" / "table.json").read_bytes() == before


def test_a_killed_search_goes_on(small_run, run_job, tmp_path):
    output = tmp_path / "killed"
    arguments = [*settings(small_run, output), "tune.concurrent=1"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_jobs.tune", *arguments], cwd=ROOT, env=environment,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def records() -> dict[str, list[dict]]:
        return {path.name: json.loads(path.read_text()) for path in output.glob("tune/*/train/*.json")}

    deadline = time.monotonic() + 200
    while len(records()) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = records()
    assert len(before) >= 2
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("tune/*/train/*.json")}
    result = run_job("tune", arguments)
    assert result.returncode == 0, result.stderr
    rows = table(output)
    assert len(rows) == 4
    assert all(row["failure"] is None for row in rows)
    assert kept
