"""Ray Train's processes know which cluster they belong to."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

_ADDRESS = "RAY_ADDRESS"


@contextmanager
def own_cluster_named() -> Iterator[None]:
    """Have runs of Ray Train that begin in the block find the cluster that this process is connected to.

    A helper of theirs asks whether a run's controller is alive, and if not takes the run's workers away. It
    looks for the cluster as a newcomer would (Ray 2.60): at RAY_ADDRESS, else at the one that somebody last
    started on the node. If that was killed, every run ends twelve seconds late; if it lives, it does not know
    the controller.
    """
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(_ADDRESS)
    try:
        yield
    finally:
        del os.environ[_ADDRESS]
        if before is not None:
            os.environ[_ADDRESS] = before
