"""Refining: its gradients against a plain network's, its batches, and that generators get better by it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.collection.layout import Encoded, Layout
from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    DiffusionConfig,
    GeneratorConfig,
    Normalisation,
    Prediction,
    RecurrentConfig,
    RefineConfig,
    SamplingConfig,
    Solver,
)
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.solvers import generator_steps
from rpg.tasks.families import Asked
from rpg.tasks.task_loss import TaskLoss, TrainingTasks
from rpg.training.refining import (
    TaskObjective,
    TaskSource,
    new_refiner,
    refine,
    sample_tokens,
    with_states,
)
from rpg.training.trainer import Trainer
from rpg.training.workers import Workers

CPU = torch.device("cpu")
ALONE = Workers()
CONDITIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
TASKS = TrainingTasks(CONDITIONS, [row.tolist() for row in CONDITIONS])
CONFIG = RefineConfig(
    steps=150, tasks_per_step=3, networks_per_task=2, samples_per_step=16, learning_rate=3e-3, warmup_steps=5
)


class Lines:
    """Networks with BatchNorm that add up their two inputs, each as often as the condition says."""

    def build_network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    def evaluate(self, network: nn.Module, condition: Asked) -> dict[str, float]:
        batch = self.batch(200, torch.Generator().manual_seed(9))
        with torch.no_grad():
            return {"error": float(self.loss(network(batch[0]), batch, condition))}

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(size, 2, generator=random),)

    def loss(self, outputs: Tensor, batch: tuple[Tensor], condition: Asked) -> Tensor:
        return F.mse_loss(outputs[:, 0], batch[0] @ torch.tensor(condition))


def layout(normalisation: Normalisation = Normalisation.residual) -> Layout:
    torch.manual_seed(0)
    networks = [Lines().build_network() for _ in range(4)]
    for network in networks:
        nn.init.uniform_(network[1].running_var, 0.5, 2.0)  # type: ignore[index]
    statistics = LayoutStatistics(networks[0].state_dict())
    for network in networks:
        statistics.update(network.state_dict())
    return statistics.layout(5, normalisation)


def generator(states: int = 0, **sampling: Any) -> Generator:
    torch.manual_seed(1)
    config = GeneratorConfig(
        recurrent=RecurrentConfig(width=32, head_size=32, state_size=8),
        denoiser=DenoiserConfig(width=48, depth=1),
        condition=ConditionConfig(size=2, width=16, states=states),
        diffusion=DiffusionConfig(prediction=Prediction.x0),
        sampling=SamplingConfig(**{"solver": Solver.ddim, "steps": 1, **sampling}),
    )
    made = Generator(config, layout())
    for parameter in made.denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.eval()


def loss() -> TaskLoss:
    return TaskLoss(Lines(), "lines", CPU)


def source(made: Generator, config: RefineConfig = CONFIG, workers: Workers = ALONE) -> TaskSource:
    return TaskSource(TASKS, loss(), made, config, 0, workers, CPU)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_loss_is_that_of_the_networks_that_the_layout_decodes(steps: int) -> None:
    """Each network is decoded by `Layout.decode`, loaded into a module and run by itself."""
    made = generator(steps=steps)
    batch = source(made).batch(4)
    sampling = made.config.sampling
    config = replace(CONFIG, variety=0.25)
    losses, weights = TaskObjective(loss(), made, config, sampling, None, CPU)(made, batch)
    tokens = sample_tokens(made, batch, generator_steps(made, sampling), sampling).detach()
    alone, together = [], []
    for task, asked in enumerate(batch.asked):
        outputs = []
        for each in tokens[2 * task : 2 * task + 2]:
            network = Lines().build_network().eval()
            network.load_state_dict(made.layout.decode(Encoded(each, made.layout.constants)))
            with torch.no_grad():
                outputs.append(network(batch.data[0]))
        alone.append(torch.stack([Lines().loss(one, batch.data, asked) for one in outputs]).mean())
        together.append(Lines().loss(torch.stack(outputs).mean(0), batch.data, asked))
    expected = 0.75 * torch.stack(alone) + 0.25 * torch.stack(together)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert weights.tolist() == [1, 1, 1]


def test_gradients_are_those_of_finite_differences() -> None:
    made = generator(steps=2).double()
    batch = source(made).batch(0)
    batch.noise, batch.condition = batch.noise.double(), batch.condition.double()
    objective = TaskObjective(loss(), made, CONFIG, made.config.sampling, None, CPU)
    objective._decoder = _DoubleDecoder(objective._decoder)  # type: ignore[assignment]

    def total() -> Tensor:
        return objective(made, batch)[0].sum()

    weight = made.denoiser.output.bias  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(total(), weight)
    with torch.no_grad():
        for place in range(0, len(weight), 2):
            before = weight[place].clone()
            weight[place] = before + 1e-3
            more = total()
            weight[place] = before - 1e-3
            less = total()
            weight[place] = before
            torch.testing.assert_close(
                gradient[place].float(), (more - less).float() / 2e-3, rtol=2e-2, atol=1e-3
            )


class _DoubleDecoder:
    """Networks of float32, as the family has them, from tokens of any type."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        decoded: dict[str, Tensor] = self._decoder(tokens.float())
        return decoded


def test_workers_see_parts_of_the_same_batch() -> None:
    made = generator(states=4)
    whole = source(made).batch(7)
    parts = [source(made, workers=Workers(rank, 2)).batch(7) for rank in range(2)]
    assert [asked for part in parts for asked in part.asked] == whole.asked
    assert torch.equal(torch.cat([part.condition for part in parts]), whole.condition)
    assert torch.equal(torch.cat([part.noise for part in parts], 1), whole.noise)
    assert all(torch.equal(part.data[0], whole.data[0]) for part in parts)
    states = whole.condition[:, -1].view(3, 2)
    assert (states[:, 0] != states[:, 1]).all()
    with pytest.raises(RPGError, match=r"refine\.tasks_per_step: expected at least one for each of 4"):
        source(made, workers=Workers(0, 4))


def mean_error(made: Generator) -> float:
    batch = source(made, replace(CONFIG, samples_per_step=200)).batch(10**6)
    objective = TaskObjective(loss(), made, replace(CONFIG, variety=0.0), made.config.sampling, None, CPU)
    with torch.no_grad():
        return float(objective(made, batch)[0].mean())


def test_networks_get_better_and_the_fitted_generator_is_left_alone() -> None:
    fitted = generator()
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    trainer = new_refiner(fitted, loss(), CONFIG, fitted.config.sampling, 0, CPU)
    refine(trainer, TASKS, loss(), 0, lambda progress: None, lambda *_: None)
    assert mean_error(trainer.average) < 0.2 * mean_error(fitted)
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_anchor_holds_networks_where_they_were() -> None:
    def distance(anchor: float) -> float:
        fitted = generator()
        config = replace(CONFIG, steps=60, anchor=anchor)
        trainer = new_refiner(fitted, loss(), config, fitted.config.sampling, 0, CPU)
        refine(trainer, TASKS, loss(), 0, lambda progress: None, lambda *_: None)
        batch, sampling = source(fitted).batch(3), fitted.config.sampling
        steps = generator_steps(fitted, sampling)
        with torch.no_grad():
            moved = sample_tokens(trainer.average, batch, steps, sampling)
            return float((moved - sample_tokens(fitted, batch, steps, sampling)).pow(2).mean())

    assert distance(10.0) < 0.3 * distance(0.0)


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=12, save_every=6)
    saved: list[int] = []

    def on_save(trainer: Trainer, progress: Any) -> None:
        saved.append(progress.step)
        if progress.step == 6:
            trainer.save(tmp_path)

    def run(trainer: Trainer) -> Trainer:
        refine(trainer, TASKS, loss(), 0, lambda progress: None, on_save)
        return trainer

    whole = run(new_refiner(generator(), loss(), config, generator().config.sampling, 0, CPU))
    resumed = new_refiner(generator(), loss(), config, generator().config.sampling, 0, CPU)
    resumed.load(tmp_path)
    run(resumed)
    assert saved == [6, 12, 12]
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, resumed.average.state_dict()[name]), name


@pytest.mark.parametrize("known", [0, 2])
def test_states_are_added_and_known_ones_kept(known: int) -> None:
    fitted = generator(states=known)
    more = with_states(fitted, 5, fitted.config.sampling, 0)
    assert more.config.condition.states == 5
    weight = more.state_dict()["condition.state.weight"]
    assert weight.shape == (5, 16)
    if known:
        assert torch.equal(weight[:known], fitted.state_dict()["condition.state.weight"])
    assert len(weight.unique(dim=0)) == 5
    with pytest.raises(RPGError, match=r"refine.states: the fitted generator has 5, got 3"):
        with_states(more, 3, fitted.config.sampling, 0)


@pytest.mark.parametrize("kind", [ConditionKind.permutation, ConditionKind.none])
@pytest.mark.parametrize("normalisation", list(Normalisation))
def test_generators_without_conditions_are_refined(kind: ConditionKind, normalisation: Normalisation) -> None:
    """There is one task, which the family is told of as None."""

    class Sums(Lines):
        def loss(self, outputs: Tensor, batch: tuple[Tensor], condition: Asked) -> Tensor:
            assert condition is None
            return F.mse_loss(outputs[:, 0], batch[0].sum(1))

    torch.manual_seed(1)
    config = replace(generator().config, condition=ConditionConfig(kind=kind, size=4))
    fitted = Generator(config, layout(normalisation)).eval()
    of_sums, errors = TaskLoss(Sums(), "sums", CPU), []
    trainer = new_refiner(fitted, of_sums, CONFIG, config.sampling, 0, CPU)
    one_task = TrainingTasks(None, [None])
    refine(trainer, one_task, of_sums, 0, lambda progress: errors.append(progress.loss), lambda *_: None)
    assert errors[-1] < 0.3 * errors[0]
    with pytest.raises(
        RPGError, match=rf"refine\.states: expected 0 beside generator.condition.kind '{kind}'"
    ):
        with_states(fitted, 5, config.sampling, 0)


def test_networks_of_different_states_come_to_differ() -> None:
    """They answer together, so each may err for itself; with states they can."""

    def spread(variety: float) -> float:
        fitted = generator()
        config = replace(CONFIG, states=8, variety=variety)
        trainer = new_refiner(fitted, loss(), config, fitted.config.sampling, 0, CPU)
        refine(trainer, TASKS, loss(), 0, lambda progress: None, lambda *_: None)
        batch = source(trainer.average, config).batch(5)
        sampling = trainer.average.config.sampling
        with torch.no_grad():
            tokens = sample_tokens(
                trainer.average, batch, generator_steps(trainer.average, sampling), sampling
            )
        return float(tokens.view(3, 2, -1).std(1).mean())

    assert spread(1.0) > 1.5 * spread(0.0)


def test_a_family_without_a_loss_is_refused() -> None:
    class Without:
        def build_network(self) -> nn.Module:
            return nn.Linear(1, 1)

    with pytest.raises(RPGError, match=r"'without' has no methods batch and loss.*refine\.steps=0"):
        TaskLoss(Without(), "without", CPU)


def test_a_loss_that_fails_or_gives_no_gradient_ends_in_one_line() -> None:
    class Fails(Lines):
        def loss(self, outputs: Tensor, batch: tuple[Tensor], condition: Asked) -> Tensor:
            raise ValueError("no such class")

    class Detached(Lines):
        def outputs(self, network: nn.Module, batch: tuple[Tensor]) -> Tensor:
            outputs: Tensor = network(batch[0]).detach()
            return outputs

    class Shape(Lines):
        def loss(self, outputs: Tensor, batch: tuple[Tensor], condition: Asked) -> Tensor:
            return outputs[:, 0]

    made = generator()
    for family, message in (
        (Fails(), r"lines: loss: ValueError: no such class \(test_refining.py, line \d+\)"),
        (Detached(), "lines: outputs: no gradient flows back"),
        (Shape(), r"lines: loss: expected one number for each network, got shape \[6, 16\]"),
    ):
        of_family = TaskLoss(family, "lines", CPU)
        objective = TaskObjective(of_family, made, CONFIG, made.config.sampling, None, CPU)
        batch = source(made).batch(0)
        with pytest.raises(RPGError, match=message):
            objective(made, batch)


def test_code_that_cannot_run_side_by_side_runs_one_by_one() -> None:
    class Branches(Lines):
        def outputs(self, network: nn.Module, batch: tuple[Tensor]) -> Tensor:
            outputs: Tensor = network(batch[0])
            return outputs if float(outputs.sum()) > -1e9 else -outputs

    made = generator()
    batch = source(made).batch(0)
    networks = TaskObjective(loss(), made, CONFIG, made.config.sampling, None, CPU)._decoder(
        sample_tokens(made, batch, generator_steps(made, made.config.sampling), made.config.sampling)
    )
    torch.testing.assert_close(
        TaskLoss(Branches(), "lines", CPU).outputs(networks, batch.data), loss().outputs(networks, batch.data)
    )
