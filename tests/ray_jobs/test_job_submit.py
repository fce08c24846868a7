"""The pipeline under `ray job submit`, as docs/cluster.md has it: a head, its token, logs and exit codes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture(scope="module")
def head(ray_head, tmp_path_factory):
    """With a token, which Ray asks for on every machine where a job has once started a Ray of its own."""
    with ray_head(tmp_path_factory.mktemp("home"), "--num-cpus=2", token=True) as head:
        yield head


def submit(head, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", *entrypoint],
        cwd=ROOT, env=head.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=500,
    )  # fmt: skip


def test_a_submitted_pipeline_runs_to_the_report(head, small_run, tmp_path):
    output = tmp_path / "run"
    for kept in ("collection", "shards", "stages"):
        shutil.copytree(small_run.root / kept, output / kept)
    settings = [value for value in small_run.arguments[1:] if not value.startswith(("ray.", "output="))]
    job = submit(
        head, "python", "-m", "ray_jobs.pipeline", "configs/digits.yaml", *settings, f"output={output}",
        "train.steps=20", "train.save_every=10", "refine.steps=4", "refine.tasks_per_step=2",
    )  # fmt: skip
    assert job.returncode == 0, job.stdout
    for stage in ("collect", "shard"):
        assert f"{stage}: unchanged, reused" in job.stdout
    for stage in ("train", "generate", "evaluate"):
        assert f"{stage}: done in" in job.stdout
    assert "generated, unseen tasks" in job.stdout
    assert re.search(r"Job 'raysubmit_\w+' succeeded", job.stdout)
    assert json.loads((output / "report.json").read_text())["score"]["generated_unseen"]["n"] == 40


def test_a_bad_config_fails_the_job_and_ignored_files_are_not_uploaded(head):
    job = submit(
        head, "sh", "-c", "find . -type f; exec python -m ray_jobs.pipeline configs/digits.yaml train.stepz=3"
    )
    assert job.returncode != 0
    assert "ray_jobs.pipeline: error: override: unknown key 'train.stepz'; did you mean 'train.steps'?" in (
        job.stdout
    )
    assert "Traceback" not in job.stdout
    assert re.search(r"Job 'raysubmit_\w+' failed", job.stdout)
    assert "exit code 2" in job.stdout
    # No environment, no outputs, no history: Ray leaves out what .gitignore names.
    files = re.findall(r"^\./(.+)$", job.stdout, re.MULTILINE)
    assert {"ray_jobs/pipeline.py", "rpg/config/run.py", "configs/digits.yaml"} <= set(files)
    assert not [name for name in files if name.startswith((".venv/", ".git/", "runs/"))]
    assert not [name for name in files if "__pycache__" in name]


def test_a_driver_without_the_token_is_told_how_to_send_it(head, run_job, small_settings, tmp_path):
    """A driver outside, without the mode that makes Ray send the token: one line that names it."""
    environment = {**head.environment, "RAY_AUTH_MODE": "disabled"}
    arguments = [*small_settings, f"output={tmp_path}"]
    refused = run_job("collect", arguments, ray_address=head.address, environment=environment)
    assert refused.returncode == 2, refused.stderr
    assert "RAY_AUTH_MODE=token" in refused.stderr
    assert "Traceback" not in refused.stderr
