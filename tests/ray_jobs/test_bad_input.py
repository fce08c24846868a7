"""Bad input to the jobs: one clear line, exit status 2, and earlier outputs whole."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import ray

from ray_jobs.stage import locked_output

pytestmark = pytest.mark.slow


def assert_one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in errors[0], errors[0]


def copied(run: Path, to: Path, name: str) -> list[str]:
    """A copy of the small run that a test may harm."""
    shutil.copytree(run, to / name)
    return [f"output={to / name}"]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture
def no_ray(call_job, monkeypatch):
    """Runs a job that has to end before it starts a Ray."""

    def started(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    return call_job


def test_an_unknown_key_is_refused(run_job, small_settings):
    assert_one_line(run_job("pipeline", [*small_settings, "train.stepz=3"]), "train.stepz", "train.steps")


def test_a_missing_config_is_refused(no_ray, tmp_path):
    assert_one_line(no_ray("pipeline", [tmp_path / "none.yaml"]), "none.yaml")


def test_a_token_size_of_zero_is_refused(no_ray, small_settings):
    assert_one_line(no_ray("shard", [*small_settings, "shard.token_size=0"]), "shard.token_size")


def test_training_tasks_cannot_be_the_unseen_ones(no_ray, small_settings):
    assert_one_line(no_ray("generate", [*small_settings, "generate.split=train"]), "generate.split")


def test_more_validation_tasks_than_there_are_is_refused(no_ray, small_settings, tmp_path):
    settings = [*small_settings, f"output={tmp_path / 'new'}", "collect.validation_tasks=5000"]
    assert_one_line(no_ray("collect", settings), "collect.validation_tasks", "1000")


def test_an_output_that_is_a_file_is_refused_and_kept(no_ray, small_settings, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_one_line(no_ray("collect", [*small_settings, f"output={tmp_path / 'file'}"]), "output directory")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_job_on_one_output_is_refused(no_ray, small_settings, tmp_path):
    with locked_output(tmp_path, tmp_path):
        assert_one_line(no_ray("collect", [*small_settings, f"output={tmp_path}"]), "another job")


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1"])
def test_an_address_without_a_cluster_is_refused(call_job, small_settings, tmp_path, address):
    result = call_job("collect", [*small_settings, f"output={tmp_path}"], ray_address=address)
    assert_one_line(result, address)


def test_training_that_diverges_says_so(join_job, small_run, tmp_path):
    output = copied(small_run.root, tmp_path, "diverging")
    settings = [*small_run.arguments, *output, "train.learning_rate=1e30", "train.gradient_clip=1e30"]
    assert_one_line(join_job("train", settings), "loss is nan")


def test_a_stage_needs_the_stage_before(no_ray, small_settings, tmp_path):
    result = no_ray("train", [*small_settings, f"output={tmp_path / 'new'}"])
    assert_one_line(result, "stage 'train' needs stage 'shard'")


def test_a_token_larger_than_the_network_is_refused(join_job, small_run):
    before = snapshot(small_run.root / "shards")
    result = join_job("shard", [*small_run.arguments, "shard.token_size=100000"])
    assert_one_line(result, "shard.token_size", "2917")
    assert snapshot(small_run.root / "shards") == before
    assert not (small_run.root / "shards" / "pending").exists()


def test_a_corrupt_checkpoint_is_named_and_the_shards_are_kept(join_job, small_run, tmp_path):
    output = copied(small_run.root, tmp_path, "corrupt")
    victim = tmp_path / "corrupt" / "collection" / "task0003_copy0.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    before = snapshot(tmp_path / "corrupt" / "shards")
    # Shards that hold all checkpoints already are kept; to make them anew, every checkpoint is read.
    result = join_job("shard", [*small_run.arguments, *output, "--refit"])
    assert_one_line(result, "task0003_copy0.safetensors")
    assert snapshot(tmp_path / "corrupt" / "shards") == before


def test_a_shard_that_was_cut_short_is_named(join_job, small_run, tmp_path):
    output = copied(small_run.root, tmp_path, "cut")
    victim = sorted((tmp_path / "cut" / "shards").glob("shard-*.arrow"))[1]
    os.truncate(victim, victim.stat().st_size // 2)
    before = snapshot(tmp_path / "cut" / "generator")
    result = join_job("train", [*small_run.arguments, *output])
    assert_one_line(result, victim.name)
    assert snapshot(tmp_path / "cut" / "generator") == before


def test_a_generator_without_its_layout_is_refused(join_job, small_run, tmp_path):
    output = copied(small_run.root, tmp_path, "layoutless")
    (tmp_path / "layoutless" / "generator" / "layout.json").unlink()
    before = snapshot(tmp_path / "layoutless" / "generated")
    result = join_job("generate", [*small_run.arguments, *output])
    assert_one_line(result, "layout.json")
    assert snapshot(tmp_path / "layoutless" / "generated") == before


def test_a_folder_that_is_no_collection_is_refused(no_ray, small_run, small_settings, tmp_path):
    source = small_run.root / "collection" / "task0003_copy0.safetensors"
    shutil.copy(source, tmp_path / source.name)
    result = no_ray("shard", [*small_settings, f"collect.directory={tmp_path}", f"output={tmp_path / 'run'}"])
    assert_one_line(result, "collection.json", "rpg register")


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one mebibyte."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_a_full_disk_leaves_no_incomplete_output(join_job, small_run, tiny_disk):
    collection = small_run.root / "collection"
    (tiny_disk / "report.json").write_text("earlier")
    result = join_job(
        "shard", [*small_run.arguments, f"output={tiny_disk}", f"collect.directory={collection}"]
    )
    assert_one_line(result, str(tiny_disk), "No space left")
    assert (tiny_disk / "report.json").read_text() == "earlier"
    # What was finished stays for the next run; nothing says that it is complete.
    assert not (tiny_disk / "shards" / "shards.json").exists()
    assert not [path for path in tiny_disk.rglob("*") if "partial" in path.name]
