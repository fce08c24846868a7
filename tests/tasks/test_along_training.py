"""Checkpoints along one training run: at which steps, with which weights, and resuming after a kill."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.errors import RPGError
from rpg.seeds import derived_seed
from rpg.tasks.along_training import Recipe, Update, train_along
from rpg.tasks.images.image_set import Colours, Images
from rpg.tasks.shared_batches import batches
from tests.cifar10_files import pixels_and_classes

RECIPE = Recipe(
    epochs=4, batch_size=10, peak_learning_rate=0.1, last_learning_rate=0.02, checkpoints=3, save_every=2
)
COLOURS = Colours((0.5, 0.4, 0.6), (0.2, 0.25, 0.3))
STEPS = 7
SEED = 5


class TinyNet(nn.Module):
    """A convolution with BatchNorm, and ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        return logits


def fresh() -> TinyNet:
    torch.manual_seed(0)
    return TinyNet()


@pytest.fixture(scope="module")
def images() -> Images:
    """75: the five that do not fill a batch are left out."""
    pixels, classes = pixels_and_classes(75, 0)
    return Images(torch.from_numpy(pixels), torch.from_numpy(classes))


def copied(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state_dict.items()}


def train(
    images: Images, state: Path, recipe: Recipe = RECIPE, seed: int = SEED, lines: list[str] | None = None
) -> list[dict[str, Tensor]]:
    """The checkpoints; what is said about the training goes to `lines`."""
    found = []
    for got in train_along(fresh(), images, COLOURS, recipe, seed, state):
        if isinstance(got, str):
            if lines is not None:
                lines.append(got)
        else:
            found.append(copied(got))
    return found


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), 1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), 1.0, betas=(0.9, 0.99), weight_decay=5e-4)


def trained_plainly(
    images: Images, build: Callable[[nn.Module], torch.optim.Optimizer], clip: float
) -> list[dict[str, Tensor]]:
    """The network after every step of the last epoch, by a loop that knows the rate of each step."""
    network = fresh().train()
    optimiser = build(network)
    cycle, found = 3 * STEPS, []
    top = 0.25 * (cycle + 1) - 1
    for epoch in range(4):
        order = derived_seed(SEED, "order along training", epoch)
        for step, (pixels, classes) in enumerate(batches(images, order, 1, 10)):
            at = min(epoch * STEPS + step, cycle)
            share = at / top if at <= top else (cycle - at) / (cycle - top)
            rate = 0.02 + (0.1 - 0.02) * (1 - torch.cos(torch.tensor(share * torch.pi))) / 2
            optimiser.param_groups[0]["lr"] = float(rate)
            optimiser.zero_grad()
            F.cross_entropy(network(COLOURS.normalised(pixels)), classes, label_smoothing=0.1).backward()
            norm = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter.grad *= min(1.0, clip / float(norm))
            optimiser.step()
            if epoch == 3:
                found.append(copied(network.state_dict()))
    return found


@pytest.mark.parametrize(("update", "build", "clip"), [("sgd", sgd, 1e9), ("adamw", adamw, 1.0)])
def test_checkpoints_are_those_of_a_plain_loop(
    images: Images,
    tmp_path: Path,
    update: str,
    build: Callable[[nn.Module], torch.optim.Optimizer],
    clip: float,
) -> None:
    lines: list[str] = []
    found = train(images, tmp_path / "state.pt", replace(RECIPE, update=Update(update)), lines=lines)
    assert [line.split(",")[0] for line in lines] == [f"epoch {i}/4" for i in range(1, 5)]
    assert len(found) == 3
    after = trained_plainly(images, build, clip)
    # Two steps apart, and the last step's is one of them.
    for index, step in enumerate((2, 4, 6)):
        for name, value in after[step].items():
            torch.testing.assert_close(found[index][name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert all(not a["head.weight"].equal(b["head.weight"]) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("finished", [2, 3])
def test_a_killed_run_goes_on_and_makes_the_same_networks(
    images: Images, tmp_path: Path, finished: int
) -> None:
    state = tmp_path / "state.pt"
    for got in train_along(fresh(), images, COLOURS, RECIPE, SEED, state):
        if isinstance(got, str) and got.startswith(f"epoch {finished}/"):
            break
    lines: list[str] = []
    found = train(images, state, lines=lines)
    assert [line.split(",")[0] for line in lines] == [f"epoch {i}/4" for i in range(finished + 1, 5)]
    for one, other in zip(found, train(images, tmp_path / "whole.pt"), strict=True):
        assert all(one[name].equal(other[name]) for name in one)


def test_a_state_of_another_training_is_ignored(images: Images, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    train(images, state)
    lines: list[str] = []
    train(images, state, seed=SEED + 1, lines=lines)
    assert len(lines) == 4


def test_a_damaged_state_is_named(images: Images, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    state.write_bytes(b"not a state")
    with pytest.raises(RPGError, match=r"state\.pt: cannot be resumed from: "):
        train(images, state)


def test_an_epoch_needs_a_step_a_checkpoint(images: Images, tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=10, checkpoints=8)
    with pytest.raises(RPGError, match="expected at least 8 steps an epoch, one a checkpoint, got 7"):
        train(images, tmp_path / "state.pt", recipe)
