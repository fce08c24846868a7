"""What a network is worth: measured by a task family, or by a command of the user's (`command_judge`)."""

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rpg.errors import RPGError
from rpg.evaluation.baselines import majority_accuracy
from rpg.evaluation.batchnorm import batchnorm_modules, recomputed_batchnorm, training_batches
from rpg.evaluation.similarity import BoolArray
from rpg.tasks.families import (
    Asked,
    Metric,
    calling,
    can_evaluate,
    can_predict,
    check_family,
    load_family,
    takes_split,
)
from rpg.tasks.predictions import load_network, predict_all

T = TypeVar("T")

ACCURACY = Metric("accuracy")
_LIKELY_FACTOR = 10
"""So many times the time of the first network, each other one may take where all are answered at once."""
_MOST_LATE = 2
"""After so many networks in a row that reach the time limit, a family's others are not tried."""


@dataclass(frozen=True)
class Candidate:
    """A network that is to be measured."""

    name: str
    """Of its file, for messages."""
    state_dict: dict[str, Tensor]
    asked: Asked
    """What it was made for."""


@dataclass(frozen=True)
class Measurement:
    """What a network is worth."""

    metrics: Mapping[str, float]
    """Finite values by name, the one that counts first; empty where the network could not be measured."""
    wrong: BoolArray | None = None
    """[inputs]: True where its answer is wrong; None if the judge looks at no answers."""
    failure: str | None = None
    """Why it could not be measured, in one line that names it."""
    answers: Tensor | None = None
    """[inputs]: what it answers, on the CPU; None where `wrong` is."""


class Judge(Protocol):
    """Measures networks."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """What is known beforehand about the metrics, the one that counts first; empty if nothing is."""

    def check(self) -> None:
        """Raise an `RPGError` for what can be seen to be wrong before any network is there."""

    def measure(self, networks: Sequence[Candidate], split: str) -> list[Measurement]:
        """Measure networks on the data of `split`: `validation` or `test`."""

    def majority(self, asked: Asked, split: str) -> float | None:
        """Accuracy of always giving the most frequent right answer; None if the judge knows no right
        answers."""


def metric_that_counts(judge: Judge, measurements: Sequence[Measurement]) -> Metric:
    """The judge's first metric, or the first one of what it measured, of which higher is better."""
    if judge.metrics and judge.metrics[0].name:
        return judge.metrics[0]
    names = [next(iter(each.metrics)) for each in measurements if each.metrics]
    higher = judge.metrics[0].higher_is_better if judge.metrics else True
    return Metric(names[0] if names else "score", higher)


def with_metric(metric: Metric, networks: Sequence[str], rows: Sequence[Measurement]) -> list[Measurement]:
    """The measurements, where those that lack the metric that counts are failures."""
    return [
        replace(row, metrics={}, failure=f"{name}: metric '{metric.name}' is missing")
        if row.metrics and metric.name not in row.metrics
        else row
        for name, row in zip(networks, rows, strict=True)
    ]


class _TimeLimitError(RPGError):
    """A call took too long."""


class _Answers(NamedTuple):
    given: Tensor
    """[inputs]."""
    wrong: BoolArray
    """[inputs]."""


class FamilyJudge:
    """Measures networks by a task family."""

    def __init__(
        self, name: str, images: str = "", device: torch.device | None = None, time_limit: float = 600.0
    ) -> None:
        """Load the family.

        Args:
            name: of the family, as `tasks` names it (`rpg.tasks.families.load_family`).
            images: where the family's images lie, if it takes some.
            device: where networks run, for families that take one; None: the CPU.
            time_limit: seconds that measuring one network may take.

        Raises:
            RPGError: if there is no such family.
        """
        self.name = name
        self.family = load_family(name, images, device)
        self.metrics = self._declared_metrics()
        self._time_limit = time_limit
        self._network: nn.Module | None = None
        # Threads may share a judge, but not the network that it puts checkpoints into.
        self._lock = threading.Lock()

    def check(self) -> None:
        """Have the family check that its data are there."""
        check_family(self.family, self.name)

    def measure(self, networks: Sequence[Candidate], split: str) -> list[Measurement]:
        """Measure networks. What is wrong with one of them is told in its measurement."""
        if not networks:
            return []
        found: Sequence[_Answers | str | None] = [None] * len(networks)
        if can_predict(self.family):
            found = self._checked_answers(networks, split)
        return [self._measurement(network, row, split) for network, row in zip(networks, found, strict=True)]

    def majority(self, asked: Asked, split: str) -> float | None:
        """Accuracy of always giving the most frequent right answer."""
        return majority_accuracy(self._labels(asked, split)) if can_predict(self.family) else None

    @property
    def has_references(self) -> bool:
        """Whether the family answers tasks by networks that were not trained for them."""
        return all(callable(getattr(self.family, method, None)) for method in ("references", "labels"))

    def references(self, backbone: dict[str, Tensor], asked: Asked, split: str) -> dict[str, float]:
        """Accuracy of the answers of networks that were not trained for the task, by name.

        Args:
            backbone: state dict that the family's `backbone` returned.
            asked: the task.
            split: whose data they answer.

        Raises:
            RPGError: if the family's code fails, or does not return one answer an input by name.
        """

        def references() -> Any:
            with calling(self.name, "references"):
                return self.family.references(backbone, asked, split)

        found = within(self._time_limit, references, f"{self.name}: references")
        if not isinstance(found, Mapping) or not all(
            isinstance(name, str) and name and name.isprintable() for name in found
        ):
            raise RPGError(
                f"{self.name}: references: expected answers by names of one line, got {found!r:.80}"
            )
        right = self._labels(asked, split)
        scores: dict[str, float] = {}
        for name, answers in found.items():
            if not isinstance(answers, Tensor) or answers.shape != right.shape:
                got = list(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
                raise RPGError(
                    f"{self.name}: references: '{name}': expected a tensor {list(right.shape)}, got {got}"
                )
            scores[name] = float((answers.cpu() == right).double().mean())
        return scores

    @property
    def can_recompute_batchnorm(self) -> bool:
        """Whether BatchNorm's statistics can be recomputed: the family says what networks are trained on, and
        they have such statistics."""
        if not callable(getattr(self.family, "batch", None)):
            return False
        with calling(self.name, "build_network"):
            return bool(batchnorm_modules(self.family.build_network()))

    def with_batchnorm_recomputed(
        self, networks: Sequence[Candidate], seed: int
    ) -> tuple[list[Candidate], list[str]]:
        """The networks with BatchNorm's statistics of training data (`rpg.evaluation.batchnorm`), and why
        some are left out.

        Args:
            networks: as they were generated.
            seed: of the training data; they are the same for all networks.

        Raises:
            RPGError: if the family's `batch` fails.
        """

        def drawn() -> list[Any]:
            return training_batches(self.family, self.name, torch.Generator().manual_seed(seed))

        batches = within(self._time_limit, drawn, f"{self.name}: batch")
        done, failures = [], []
        for network in networks:

            def recomputed(network: Candidate = network) -> dict[str, Tensor]:
                return recomputed_batchnorm(self.family, self.name, network.state_dict, batches)

            try:
                found = within(self._time_limit, recomputed, f"{self.name}: outputs")
                done.append(replace(network, state_dict=found))
            except RPGError as error:
                failures.append(f"{network.name}: BatchNorm recomputed: {error}")
        return done, failures

    def _declared_metrics(self) -> Sequence[Metric]:
        with calling(self.name, "metrics"):
            declared = getattr(self.family, "metrics", None)
        if declared is None:
            return () if can_evaluate(self.family) else (ACCURACY,)
        if not isinstance(declared, Sequence) or not all(isinstance(each, Metric) for each in declared):
            raise RPGError(f"tasks: '{self.name}': metrics: expected a list of Metric, got {declared!r:.80}")
        if not can_evaluate(self.family) and [each.name for each in declared] != [ACCURACY.name]:
            raise RPGError(
                f"tasks: '{self.name}': metrics: expected accuracy alone without a method evaluate"
            )
        return tuple(declared)

    def _measurement(self, network: Candidate, found: _Answers | str | None, split: str) -> Measurement:
        if isinstance(found, str):
            return Measurement({}, failure=found)
        given, wrong = found or (None, None)
        try:
            if can_evaluate(self.family):
                with self._lock:
                    return Measurement(self._evaluate(network, split), wrong, answers=given)
            assert wrong is not None
            return Measurement({ACCURACY.name: 1 - float(wrong.mean())}, wrong, answers=given)
        except RPGError as error:
            return Measurement({}, wrong, f"{network.name}: {error}", given)

    def _evaluate(self, network: Candidate, split: str) -> dict[str, float]:
        if self._network is None:
            with calling(self.name, "build_network"):
                self._network = self.family.build_network()
        module = self._network
        # What a family's own `load` does not replace, and what a call that hangs still does, must not reach
        # the next checkpoint.
        self._network = None
        load_network(self.family, self.name, module, network.state_dict)

        def evaluate() -> Any:
            with calling(self.name, "evaluate"):
                named = {"split": split} if takes_split(self.family.evaluate) else {}
                return self.family.evaluate(module, network.asked, **named)

        found = within(self._time_limit, evaluate, f"{self.name}: evaluate")
        if not callable(getattr(self.family, "load", None)):
            self._network = module
        metrics = finite_metrics(found, f"{self.name}: evaluate")
        missing = [metric.name for metric in self.metrics if metric.name not in metrics]
        if missing:
            raise RPGError(f"{self.name}: evaluate: metric '{missing[0]}' is missing")
        # The metric that counts comes first, wherever the family's code put it.
        first = [metric.name for metric in self.metrics[:1]]
        return {name: metrics[name] for name in dict.fromkeys([*first, *metrics])}

    def _checked_answers(self, networks: Sequence[Candidate], split: str) -> list[_Answers | str]:
        """What each network answers and what of it is wrong, or the reason why it has no answers."""
        right: dict[str, Tensor] = {}
        rows: list[_Answers | str] = []
        for network, answer in zip(networks, self._answers(networks, split), strict=True):
            key = repr(network.asked)
            try:
                if isinstance(answer, RPGError):
                    raise answer
                if key not in right:
                    right[key] = self._labels(network.asked, split)
                if answer.shape != right[key].shape:
                    raise RPGError(
                        f"{self.name}: expected as many answers as labels, "
                        f"got {len(answer)} and {len(right[key])}"
                    )
                wrong = np.asarray((answer != right[key]).numpy(), dtype=np.bool_)
                rows.append(_Answers(answer, wrong))
            except RPGError as error:
                rows.append(f"{network.name}: {error}")
        return rows

    def _answers(self, networks: Sequence[Candidate], split: str) -> list[Tensor | RPGError]:
        """What each network answers, or why it has no answers.

        One network alone shows how long a network takes. All others are then answered at once, in the time
        that this makes likely: a call that hangs must not cost the limit once for every network.
        """
        found: list[Tensor | RPGError] = []
        at_once, late = True, 0
        while len(found) < len(networks):
            rest = networks[len(found) :]
            if late == _MOST_LATE:
                # Most likely it is not the network, but the family that hangs.
                return [*found, *(found[-1] for _ in rest)]
            began = time.perf_counter()
            try:
                found += self._predict(rest[:1], split, self._time_limit)
            except RPGError as error:
                found.append(error)
                late = late + 1 if isinstance(error, _TimeLimitError) else 0
                continue
            late, others = 0, rest[1:]
            if not (at_once and others):
                continue
            alone = time.perf_counter() - began
            likely = _LIKELY_FACTOR * len(others) * alone
            limit = min(self._time_limit * len(others), self._time_limit + likely)
            try:
                return [*found, *self._predict(others, split, limit)]
            except _TimeLimitError:
                reason = f"{self.name}: predict: {len(others)} networks took longer than {limit:.3g} s"
                return [*found, *(RPGError(f"{reason}, the first one {alone:.2g} s") for _ in others)]
            except RPGError:
                # One network may be to blame for all.
                at_once = False
        return found

    def _predict(self, networks: Sequence[Candidate], split: str, limit: float) -> list[Tensor]:
        states = [network.state_dict for network in networks]
        what = f"{self.name}: predict"
        return [*within(limit, lambda: predict_all(self.family, self.name, states, split), what)]

    def _labels(self, asked: Asked, split: str) -> Tensor:
        with calling(self.name, "labels"):
            labels = self.family.labels(asked, split)
        if not isinstance(labels, Tensor) or labels.ndim != 1 or not labels.numel():
            got = list(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise RPGError(f"{self.name}: labels: expected a tensor [inputs], got {got}")
        return labels.cpu()


def finite_metrics(found: Any, what: str) -> dict[str, float]:
    """Metrics by name as finite numbers.

    Raises:
        RPGError: naming what is none, after `what`.
    """
    if not isinstance(found, Mapping) or not found:
        raise RPGError(f"{what}: expected metrics by name, got {found!r:.80}")
    metrics: dict[str, float] = {}
    for key, value in found.items():
        try:
            number = math.nan if isinstance(value, str | bool | None) else float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
        if not isinstance(key, str) or not math.isfinite(number):
            raise RPGError(f"{what}: metric '{key}': expected a finite number, got {value!r:.80}")
        metrics[key] = number
    return metrics


def within(seconds: float, call: Callable[[], T], what: str) -> T:
    """The result of `call`, which may take so many seconds.

    The call runs in a thread, since Python cannot end a call of another's code. A thread that hangs is left
    behind, and does not keep the process from ending.

    Raises:
        RPGError: if it takes longer.
    """
    done: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            with torch.no_grad():
                done.put((call(), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise _TimeLimitError(f"{what}: took longer than evaluate.time_limit = {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
