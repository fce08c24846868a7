"""Fitting on Ray: workers, nodes and drivers that die, clusters that grow, and where the metrics go."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_jobs.training.checkpoints import copy_generator
from ray_jobs.training.fitting import fit_generator
from ray_jobs.training.mailbox import TrainingMailbox
from rpg.collection.shards import ShardedCollection
from rpg.config import Config, load_config
from rpg.errors import RPGError
from rpg.generator.generator import Generator

pytestmark = pytest.mark.slow

STEPS = 60
SETTINGS = (
    "name=small",
    "generator.recurrent.width=16",
    "generator.recurrent.head_size=8",
    "generator.recurrent.state_size=8",
    "generator.denoiser.width=64",
    "generator.condition.width=8",
    f"train.steps={STEPS}",
    "train.checkpoints_per_step=5",
    "train.tokens_per_checkpoint=5",
    "train.warmup_steps=5",
    "train.save_every=10",
    "train.log_every=5",
    "train.ema_decay=0.9",
    "train.precision=float32",
    "ray.train_threads=1",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, make_collection: Callable[..., ShardedCollection]) -> Path:
    root = tmp_path_factory.mktemp("fitting")
    make_collection(root / "shards")
    (root / "config.yaml").write_text("{}")
    return root


@pytest.fixture(scope="module", autouse=True)
def sigint() -> Iterator[None]:
    """Ray Train takes over Ctrl-C where it runs in the main thread."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def config(root: Path, *overrides: str) -> Config:
    return load_config(root / "config.yaml", [*SETTINGS, f"output={root}", *overrides])


def fitted(root: Path, name: str, *overrides: str) -> tuple[Generator, list[dict[str, Any]]]:
    """Fit, and read the generator and the history of the run."""
    mailbox = TrainingMailbox.remote()
    result = fit_generator(config(root, *overrides), root / "shards", root / "train", name, mailbox)
    assert result.checkpoint is not None
    target = root / "generators" / name
    copy_generator(result.checkpoint, root / "train", target)
    return Generator.from_pretrained(target), json.loads((target / "history.json").read_text())


@pytest.fixture(scope="module")
def alone(root: Path, local_ray: None) -> tuple[Generator, list[dict[str, Any]]]:
    """The result of one worker that is not disturbed."""
    return fitted(root, "alone")


def snapshot(root: Path, name: str) -> list[str]:
    """The checkpoints that Ray lists as complete."""
    path = root / "train" / name / "checkpoint_manager_snapshot.json"
    if not path.is_file():
        return []
    return [result["checkpoint_dir_name"] for result in json.loads(path.read_text())["checkpoint_results"]]


def when(condition: Callable[[], Any], then: Callable[[], None]) -> threading.Thread:
    """Do something as soon as a condition holds."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def workers_of(session: int) -> list[int]:
    """The processes of Ray's workers and actors in a session.

    Ray's agents are left out: where Ray was killed, they try for a minute to reach it before they end.
    """
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                title = (directory / "cmdline").read_bytes()
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            is_agent = title.startswith((b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"))
            if title.startswith(b"ray::") and not is_agent and int(fields[3]) == session and fields[0] != "Z":
                found.append(int(directory.name))
    return found


def kill_a_worker() -> None:
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers_of(os.getsid(0))}
    os.kill(next(pid for pid, title in titles.items() if b"RayTrainWorker" in title), signal.SIGKILL)


def assert_same(one: Generator, other: Generator, tolerance: float) -> None:
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=tolerance, atol=tolerance)


def assert_same_curve(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in one] == [row["step"] for row in other] == list(range(5, STEPS + 1, 5))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-4)
    seconds = [row["seconds"] for row in one]
    assert seconds == sorted(seconds)


def test_two_workers_of_which_one_is_killed_train_the_same_generator(
    root: Path, alone: tuple[Generator, list[dict[str, Any]]]
) -> None:
    killing = when(lambda: snapshot(root, "killed"), kill_a_worker)
    generator, history = fitted(root, "killed", "ray.train_workers=2")
    killing.join()
    assert_same(generator, alone[0], 1e-4)
    assert_same_curve(history, alone[1])
    assert {row["workers"] for row in history} == {2}
    assert len(snapshot(root, "killed")) == 2
    assert len(list((root / "train" / "killed").glob("checkpoint_2*"))) == 2

    steps = list(range(5, STEPS + 1, 5))
    events = EventAccumulator(str(root / "train" / "tensorboard" / "killed"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == steps
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([r["loss"] for r in history])
    assert {"loss_by_noise/4_of_4", "gradient_norm", "waiting_share", "memory_bytes"} <= set(
        events.Tags()["scalars"]
    )


def test_a_killed_driver_goes_on_from_the_last_whole_checkpoint(
    root: Path, alone: tuple[Generator, list[dict[str, Any]]]
) -> None:
    script = """
        import sys
        from pathlib import Path
        from ray_jobs.training.mailbox import TrainingMailbox
        from ray_jobs.cluster import ray_cluster
        from ray_jobs.training.fitting import fit_generator
        from rpg.config import RayConfig, load_config
        root, *overrides = sys.argv[1:]
        config = load_config(Path(root) / "config.yaml", overrides)
        with ray_cluster(RayConfig(num_cpus=1)):
            mailbox = TrainingMailbox.remote()
            fit_generator(config, Path(root) / "shards", Path(root) / "train", "driver", mailbox)
    """
    longer = [*SETTINGS, f"output={root}"]
    command = [sys.executable, "-c", textwrap.dedent(script), str(root), *longer]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not snapshot(root, "driver") and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Ray's workers follow it within a second or two, sooner than a job can be started again.
    while workers_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    before = snapshot(root, "driver")
    assert before
    # An upload that the kill met half way looks like this.
    half = root / "train" / "driver" / "checkpoint_2999-01-01_00-00-00.000000"
    shutil.copytree(root / "train" / "driver" / before[-1], half)
    (half / "training_state.pt").write_bytes(b"half of it")
    generator, history = fitted(root, "driver")
    assert_same_curve(history, alone[1])
    assert generator.digest() == alone[0].digest()
    assert not half.exists()


def test_input_that_no_worker_can_train_on_is_refused(root: Path, local_ray: None) -> None:
    with pytest.raises(RPGError, match="expected at least one for each of 2 training workers, got 1"):
        fitted(root, "few", "ray.train_workers=2", "train.checkpoints_per_step=1")
    with pytest.raises(RPGError, match=r"train: the loss is nan at step \d+: lower train.learning_rate"):
        fitted(root, "nan", "ray.train_workers=2", "train.learning_rate=1e30", "train.warmup_steps=0")
