"""Training metrics beside the terminal: TensorBoard, MLflow, Weights & Biases.

The first worker logs. A run that is resumed goes on in the same place: steps that were logged before it was
stopped are taken back (TensorBoard) or not logged again (the others), and would be the same.
"""

import contextlib
import importlib.util
import logging
import time
from pathlib import Path
from typing import Any, Protocol

from rpg.config import Optimiser, TrackingConfig, TrainConfig
from rpg.errors import RPGError, one_line
from rpg.storage.locations import AnyPath

TENSORBOARD_DIRECTORY = "tensorboard"
_RUN_TAG = "rpg.run"


def refuse_missing_packages(tracking: TrackingConfig, train: TrainConfig) -> None:
    """Look for the packages that a config needs besides the always installed ones.

    Raises:
        RPGError: naming the key, and the command that installs what is missing.
    """
    needed = {
        "tracking.mlflow": ("mlflow", "mlflow", bool(tracking.mlflow)),
        "tracking.wandb": ("wandb", "wandb", bool(tracking.wandb)),
        "train.optimiser=adamw8bit": ("torchao", "eightbit", train.optimiser == Optimiser.adamw8bit),
    }
    for key, (package, extra, used) in needed.items():
        if used and importlib.util.find_spec(package) is None:
            raise RPGError(f"{key}: needs the package {package}: pip install 'rpg[{extra}]'")


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """A row of the history as named scalars, its step left out."""
    by_noise = row["loss_by_noise"]
    named = {f"loss_by_noise/{i + 1}_of_{len(by_noise)}": loss for i, loss in enumerate(by_noise)}
    rest = {key: value for key, value in row.items() if key not in ("step", "steps", "loss_by_noise")}
    return {key: float(value) for key, value in (rest | named).items() if value is not None}


class Tracker(Protocol):
    """One place for metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take in the values of a step."""

    def save(self) -> None:
        """Bring what is only held locally to where it belongs."""

    def close(self) -> None:
        """The run has ended well."""


def trackers(
    config: TrackingConfig, label: str, run: str, storage: AnyPath, scratch: Path, step: int
) -> list[Tracker]:
    """The configured places.

    Args:
        config: which.
        label: what people call the run.
        run: the name that finds it again.
        storage: directory of training runs.
        scratch: a directory on this node.
        step: the last one before this start.

    Raises:
        RPGError: if one cannot be reached.
    """
    chosen: list[Tracker] = []
    if config.tensorboard:
        chosen.append(_TensorBoard(storage / TENSORBOARD_DIRECTORY / run, scratch, step))
    if config.mlflow:
        with _explained(f"tracking.mlflow: {config.mlflow}"):
            chosen.append(_MLflow(config.mlflow, label, run))
    if config.wandb:
        with _explained(f"tracking.wandb: {config.wandb}"):
            chosen.append(_WeightsAndBiases(config.wandb, label, run, scratch))
    return chosen


def log_everywhere(chosen: list[Tracker], row: dict[str, Any]) -> None:
    """Log a row of the history; a place that fails does not stop training."""
    for tracker in chosen:
        try:
            tracker.log(row["step"], scalars(row))
        except Exception:
            logging.getLogger(__name__).exception("step %d was not logged", row["step"])


class _TensorBoard:
    def __init__(self, directory: AnyPath, scratch: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._target = directory
        self._local = directory if isinstance(directory, Path) else scratch / TENSORBOARD_DIRECTORY
        # What was logged after the checkpoint is hidden: it comes again.
        self._writer: Any = SummaryWriter(str(self._local), purge_step=step + 1 if step else None)  # type: ignore[no-untyped-call]

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def save(self) -> None:
        if self._local != self._target:
            for file in self._local.iterdir():
                (self._target / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        self._writer.close()
        self.save()


class _MLflow:
    def __init__(self, uri: str, label: str, run: str) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name("rpg")
        number = experiment.experiment_id if experiment else self._client.create_experiment("rpg")
        found = self._client.search_runs([number], f"tags.`{_RUN_TAG}` = '{run}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(number, tags={_RUN_TAG: run}, run_name=label).info.run_id
        history = self._client.get_metric_history(self._run, "loss")
        self._logged = max((metric.step for metric in history), default=0)

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if step > self._logged:
            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, step) for name, value in values.items()]
            self._client.log_batch(self._run, metrics)

    def save(self) -> None:
        pass

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _WeightsAndBiases:
    def __init__(self, project: str, label: str, run: str, scratch: Path) -> None:
        import wandb

        self._run = wandb.init(project=project, name=label, id=run, resume="allow", dir=scratch)

    def log(self, step: int, values: dict[str, float]) -> None:
        # Steps that the run has already are dropped there.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def save(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


@contextlib.contextmanager
def _explained(what: str) -> Any:
    try:
        yield
    except Exception as error:
        reason = one_line(error)[:200]
        raise RPGError(f"{what}: cannot be logged to: {reason}") from error
