"""Training metrics beside the terminal: TensorBoard, MLflow, Weights & Biases.

The first worker logs. A run that is resumed goes on in the same place. It repeats some steps that were logged
before it was stopped, with equal values: TensorBoard's earlier entries are hidden, and MLflow and W&B do not
log these steps again.
"""

import contextlib
import importlib.util
import logging
import time
from pathlib import Path
from typing import Any, Protocol

from rpg.config import Optimiser, OptimiserConfig, TrackingConfig
from rpg.errors import RPGError, one_line
from rpg.storage.locations import AnyPath

TENSORBOARD_DIRECTORY = "tensorboard"
_RUN_TAG = "rpg.run"


def refuse_missing_packages(tracking: TrackingConfig, stage: str, settings: OptimiserConfig) -> None:
    """Check that the optional packages are installed which a config needs in the stage with these settings.

    Raises:
        RPGError: naming the key, and the command that installs what is missing.
    """
    needed = {
        "tracking.mlflow": ("mlflow", "mlflow", bool(tracking.mlflow)),
        "tracking.wandb": ("wandb", "wandb", bool(tracking.wandb)),
        f"{stage}.optimiser=adamw8bit": (
            "torchao",
            "eightbit",
            settings.optimiser == Optimiser.adamw8bit,
        ),
    }
    for key, (package, extra, used) in needed.items():
        if used and importlib.util.find_spec(package) is None:
            raise RPGError(f"{key}: needs the package {package}: pip install 'rpg[{extra}]'")


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The named scalars of a row of the history, without its step."""
    by_noise = row["loss_by_noise"]
    named = {f"loss_by_noise/{i + 1}_of_{len(by_noise)}": loss for i, loss in enumerate(by_noise)}
    rest = {key: value for key, value in row.items() if key not in ("step", "steps", "loss_by_noise")}
    return {key: float(value) for key, value in (rest | named).items() if value is not None}


class Tracker(Protocol):
    """One destination of metrics."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a step."""

    def save(self) -> None:
        """Upload what is only on the local disk."""

    def close(self) -> None:
        """Mark the run as finished."""


def trackers(
    config: TrackingConfig, label: str, run: str, storage: AnyPath, scratch: Path, step: int
) -> list[Tracker]:
    """The trackers that `config` asks for.

    Args:
        config: which destinations there are.
        label: name of the run that people see.
        run: name by which a resumed run finds its earlier entries.
        storage: directory of training runs.
        scratch: a directory on this node.
        step: the last step before this start.

    Raises:
        RPGError: if a destination cannot be reached.
    """
    chosen: list[Tracker] = []
    if config.tensorboard:
        chosen.append(_TensorBoard(storage / TENSORBOARD_DIRECTORY / run, scratch, step))
    if config.mlflow:
        with _naming_destination(f"tracking.mlflow: {config.mlflow}"):
            chosen.append(_MLflow(config.mlflow, label, run))
    if config.wandb:
        with _naming_destination(f"tracking.wandb: {config.wandb}"):
            chosen.append(_WeightsAndBiases(config.wandb, label, run, scratch))
    return chosen


def log_everywhere(chosen: list[Tracker], row: dict[str, Any]) -> None:
    """Log a row of the history; a tracker that fails does not stop training."""
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
        # Entries after the checkpoint are hidden, because training repeats these steps.
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
        # W&B drops steps that the run has already.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def save(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


@contextlib.contextmanager
def _naming_destination(what: str) -> Any:
    try:
        yield
    except Exception as error:
        reason = one_line(error)[:200]
        raise RPGError(f"{what}: cannot be logged to: {reason}") from error
