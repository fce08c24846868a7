"""A search as a user runs it: its outputs, what it reuses, and how it goes on after it was killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
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
        "tune.reduction=2",
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


def test_a_search_leaves_a_table_a_figure_and_a_best_config_that_trains(searched, join_job):
    output, _, printed = searched
    rows = table(output)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    tried = {
        (row["settings"]["shard.token_size"], row["settings"]["generator.denoiser.width"]) for row in rows
    }
    # The config itself, and three of the four points.
    assert len(tried) == 4
    assert (576, 128) in tried
    # Equal compute, to within a step in each of four rounds.
    for steps, flops in (("steps", "flops_per_step"), ("refining_steps", "flops_per_refining_step")):
        spent = [row[steps] * row[flops] for row in rows]
        assert 0 <= max(spent) - min(spent) <= 4 * max(row[flops] for row in rows) < 4 * min(spent)
    ended = [row for row in rows if row["share_of_budget"] == 1]
    assert ended
    assert rows[0]["score"] == max(row["score"] for row in ended)
    assert all(0 < row["share_of_budget"] <= 1 for row in rows)
    assert all(row["failure"] is None for row in rows)
    ElementTree.fromstring((output / "tune" / "search.svg").read_bytes())
    assert (output / "tune" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert "Generated networks on validation tasks" in printed
    assert "Traceback" not in printed

    best = load_config(output / "tune" / "best.yaml")
    assert best.shard.token_size == rows[0]["settings"]["shard.token_size"]
    trained = join_job("train", [output / "tune" / "best.yaml"])
    assert trained.returncode == 0, trained.stderr
    assert best.refine.steps == rows[0]["refining_steps"]
    generator = Generator.from_pretrained(Path(best.output) / "fitted")
    assert sum(parameter.numel() for parameter in generator.parameters()) == rows[0]["parameters"]


def test_a_finished_search_is_not_run_again(searched, join_job):
    output, arguments, _ = searched
    before = (output / "tune" / "table.json").read_bytes()
    again = join_job("tune", arguments)
    assert again.returncode == 0, again.stderr
    assert "tune: unchanged, reused" in again.stderr
    assert (output / "tune" / "table.json").read_bytes() == before


def test_a_killed_search_goes_on(small_run, tmp_path):
    output = tmp_path / "killed"
    arguments = [*settings(small_run, output), "tune.concurrent=1", "tune.trials=2"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}

    def start(log: Path) -> subprocess.Popen[bytes]:
        with log.open("w") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "ray_jobs.tune", *arguments], cwd=ROOT, env=environment,
                start_new_session=True, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def rounds() -> dict[str, list[dict]]:
        """What each trial has told so far; cleared away once the search has ended."""
        found = {}
        for path in output.glob("tune/*/train/*.json"):
            with suppress(FileNotFoundError):
                found[path.name] = json.loads(path.read_text())
        return found

    first = start(tmp_path / "first.log")
    try:
        deadline = time.monotonic() + 270
        while len(rounds()) < 2 and time.monotonic() < deadline:
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            time.sleep(0.1)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    before = rounds()
    assert len(before) >= 2

    seen = []
    second = start(tmp_path / "second.log")
    try:
        deadline = time.monotonic() + 270
        while second.poll() is None and time.monotonic() < deadline:
            seen.append(rounds())
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(second.pid, signal.SIGKILL)
        second.wait()
    assert second.returncode == 0, (tmp_path / "second.log").read_text()
    # Rounds have times of their own: one that is made again is another.
    for later in seen:
        for name in before.keys() & later.keys():
            assert later[name][: len(before[name])] == before[name]
    assert any(later.keys() >= before.keys() and later != before for later in seen)
    rows = table(output)
    assert len(rows) == 2
    assert all(row["failure"] is None for row in rows)
