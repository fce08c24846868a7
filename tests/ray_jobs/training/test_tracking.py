"""Metrics are read back from each tracker; a resumed run goes on in the same place."""

import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_jobs.training.tracking import log_everywhere, refuse_missing_packages, trackers
from rpg.config import Optimiser, TrackingConfig, TrainConfig
from rpg.errors import RPGError


def row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "steps": 30,
        "loss": 1 / step,
        "loss_by_noise": [0.1, None, 0.3, 0.4],
        "gradient_norm": 2.0,
    }


def log(config: TrackingConfig, directory: Path, resumed: int, steps: list[int], well: bool) -> None:
    """Log as a run resumed at step `resumed`; only a run that ends `well` closes its trackers."""
    chosen = trackers(config, "digits", "abc", directory, directory, resumed)
    for step in steps:
        log_everywhere(chosen, row(step))
    for tracker in chosen:
        if well:
            tracker.close()


def test_tensorboard_has_every_step_once_after_resuming(tmp_path: Path) -> None:
    config = TrackingConfig(tensorboard=True)
    log(config, tmp_path, 0, [5, 10, 15], well=False)
    log(config, tmp_path, 10, [15, 20], well=True)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "abc"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(1 / step)) for step in (5, 10, 15, 20)]
    names = {"loss", "gradient_norm", "loss_by_noise/1_of_4", "loss_by_noise/3_of_4", "loss_by_noise/4_of_4"}
    assert set(events.Tags()["scalars"]) == names


def test_mlflow_has_every_step_once_after_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = TrackingConfig(tensorboard=False, mlflow=str(tmp_path / "mlflow"))
    log(config, tmp_path, 0, [5, 10, 15], well=False)
    log(config, tmp_path, 10, [15, 20], well=True)
    client = MlflowClient(str(tmp_path / "mlflow"))
    experiment = client.get_experiment_by_name("rpg")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert found == [(step, pytest.approx(1 / step)) for step in (5, 10, 15, 20)]


def test_an_mlflow_server_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = TrackingConfig(tensorboard=False, mlflow="http://127.0.0.1:9")
    with pytest.raises(
        RPGError, match=r"tracking.mlflow: http://127.0.0.1:9: cannot be logged to: \S"
    ) as caught:
        trackers(config, "digits", "abc", tmp_path, tmp_path, 0)
    assert "\n" not in str(caught.value)


def test_wandb_logs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(TrackingConfig(tensorboard=False, wandb="rpg"), tmp_path, 0, [5, 10], well=True)
    (file,) = (tmp_path / "wandb").glob("offline-run-*-abc/run-abc.wandb")
    # It is written by a process of its own, which may be behind on a busy machine.
    ends = time.monotonic() + 30
    while b"digits" not in file.read_bytes() and time.monotonic() < ends:
        time.sleep(0.1)
    assert b"digits" in file.read_bytes()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_missing_packages(
        TrackingConfig(mlflow="x", wandb="y"), "train", TrainConfig(optimiser=Optimiser.adamw8bit)
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_missing_packages(TrackingConfig(), "train", TrainConfig())
    for tracking, settings, message in (
        (TrackingConfig(mlflow="x"), TrainConfig(), r"tracking.mlflow: .* pip install 'rpg\[mlflow\]'"),
        (TrackingConfig(wandb="x"), TrainConfig(), r"tracking.wandb: .* pip install 'rpg\[wandb\]'"),
        (TrackingConfig(), TrainConfig(optimiser=Optimiser.adamw8bit), r"adamw8bit: .*'rpg\[eightbit\]'"),
    ):
        with pytest.raises(RPGError, match=message):
            refuse_missing_packages(tracking, "train", settings)
