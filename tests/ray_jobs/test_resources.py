"""A job without room for its workers is refused in one line, or waits while the cluster grows."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_jobs.resources import cpus_per_worker

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def error_of(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    [error] = [line for line in result.stderr.splitlines() if "error:" in line]
    assert "Traceback" not in result.stderr
    return error


def test_workers_share_the_cpus_of_their_nodes() -> None:
    small, large, head = {"CPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 0.0}
    assert cpus_per_worker([small], 1, False) == 2
    assert cpus_per_worker([small], 2, False) == 1
    assert cpus_per_worker([small], 3, False) == 1
    assert cpus_per_worker([small, small, head], 2, False) == 2
    assert cpus_per_worker([small, small, head], 3, False) == 1
    assert cpus_per_worker([small, large], 2, False) == 8
    assert cpus_per_worker([small, large], 2, True) == 8
    assert cpus_per_worker([large, large], 4, True) == 8
    assert cpus_per_worker([], 1, False) == 1


def test_missing_gpus_are_refused_before_any_work(join_job, small_settings, tmp_path):
    began = time.monotonic()
    settings = [*small_settings, f"output={tmp_path}", "ray.use_gpu=true", "ray.train_workers=2"]
    error = error_of(join_job("pipeline", settings))
    assert error.endswith(
        "ray.use_gpu: training asks for 2 GPUs (ray.train_workers=2), the cluster has 0 GPUs on 1 node"
    )
    assert time.monotonic() - began < 60
    assert not (tmp_path / "collection").exists()


def test_missing_cpus_are_refused(join_job, small_settings, tmp_path):
    settings = [*small_settings, f"output={tmp_path}", "ray.train_workers=3"]
    assert "training asks for 3 CPUs (ray.train_workers=3), the cluster has 2 CPUs on 1 node" in error_of(
        join_job("pipeline", settings)
    )


def test_finished_stages_ask_for_nothing(join_job, small_run):
    """Nothing is left to do, so that no workers are asked for."""
    again = join_job("pipeline", [*small_run.arguments, "ray.train_workers=3"])
    assert again.returncode == 0, again.stderr


CLIENT = """
import ray
from ray_jobs.resources import ResourceRequest, require_resources
ray.init(address="auto")
request = ResourceRequest("training", 2, "ray.train_workers=2", use_gpu=True)
require_resources([request], float({seconds}))
print("GPUs:", sum(node["Resources"].get("GPU", 0) for node in ray.nodes()))
"""


def test_a_job_waits_for_a_cluster_that_grows(ray_head, free_ports, tmp_path, monkeypatch):
    """Ray's own autoscaler, whose nodes of one GPU each are processes on this machine."""
    [port] = free_ports(1)
    config = tmp_path / "autoscaling.json"
    worker = {"CPU": 1, "GPU": 1, "object_store_memory": 10**8}
    node_types = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    provider = {
        "type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}",
        # All nodes are at one address, and nothing is to be installed on them.
        "use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True,
    }  # fmt: skip
    # What `ray up` would have filled in.
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    settings = {
        "cluster_name": "growing", "max_workers": 2, "upscaling_speed": 10, "idle_timeout_minutes": 5,
        "provider": provider, "available_node_types": node_types, "head_node_type": "ray.head.default",
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [], "no_restart": False,
        **{f"{name}_commands": [] for name in commands},
    }  # fmt: skip
    config.write_text(json.dumps(settings))
    monkeypatch.setenv("RAY_FAKE_CLUSTER", "1")
    monkeypatch.setenv("AUTOSCALER_UPDATE_INTERVAL_S", "1")
    options = (f"--autoscaling-config={config}", "--num-cpus=1", "--num-gpus=0")
    with ray_head(tmp_path, *options, port=port) as head:

        def ask(seconds: float) -> subprocess.CompletedProcess[str]:
            environment = {**head.environment, "RAY_ADDRESS": head.address}
            program = CLIENT.format(seconds=seconds).replace('"auto"', repr(head.address))
            return subprocess.run(
                [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True,
                timeout=120,
            )  # fmt: skip

        refused = ask(0)
        assert "the cluster has 0 GPUs on 1 node" in refused.stderr
        waited = ask(90)
        assert "GPUs: 2.0" in waited.stdout, waited.stderr
        assert "waited 0 of 90 s: training asks for 2 GPUs" in waited.stderr
