"""Ray Train's processes find their own cluster, also where another was started on the node."""

import os

import pytest
import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from ray_jobs.cluster import ray_cluster
from ray_jobs.training.fitting import ray_train_finds_this_cluster
from rpg.config import RayConfig

pytestmark = pytest.mark.slow


@ray.remote(num_cpus=0)
def found_cluster() -> str:
    from ray._private.services import canonicalize_bootstrap_address_or_die

    address: str = canonicalize_bootstrap_address_or_die(None)
    return address


def test_the_address_leads_to_the_cluster_of_this_process(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # What `ray start --head` leaves there names the cluster that was last started, dead or alive.
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    elsewhere = {"RAY_TMPDIR": str(tmp_path)}
    with ray_cluster(RayConfig(num_cpus=1)):
        own = ray.get_runtime_context().gcs_address
        without = found_cluster.options(runtime_env={"env_vars": elsewhere})
        assert ray.get(without.remote()).endswith(":1")
        with ray_train_finds_this_cluster():
            named = {**elsewhere, **get_env_vars_to_propagate()}
        assert "RAY_ADDRESS" not in os.environ
        assert ray.get(found_cluster.options(runtime_env={"env_vars": named}).remote()) == own
