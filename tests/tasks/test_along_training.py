"""Checkpoints along one training run: at which steps, with which weights, and resuming after a kill."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.collection.collection import Collection
from rpg.errors import RPGError
from rpg.seeds import derived_seed
from rpg.tasks.along_training import Recipe, collect_along_training, train_along
from rpg.tasks.cifar10_images import Images
from rpg.tasks.cifar10_net import normalised
from rpg.tasks.shared_batches import batches
from tests.cifar10_files import pixels_and_classes

RECIPE = Recipe(
    epochs=4, batch_size=10, peak_learning_rate=0.1, last_learning_rate=0.02, checkpoints=3, save_every=2
)
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


def nothing(*arguments: object) -> None:
    pass


@pytest.fixture(scope="module")
def images() -> Images:
    """75: the five that do not fill a batch are left out."""
    pixels, classes = pixels_and_classes(75, 0)
    return Images(torch.from_numpy(pixels), torch.from_numpy(classes))


def copied(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state_dict.items()}


def trained_plainly(images: Images) -> list[dict[str, Tensor]]:
    """The network after every step of the last epoch, by a loop that knows the rate of each step."""
    network = fresh().train()
    optimiser = torch.optim.SGD(network.parameters(), 1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
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
            F.cross_entropy(network(normalised(pixels)), classes, label_smoothing=0.1).backward()
            optimiser.step()
            if epoch == 3:
                found.append(copied(network.state_dict()))
    return found


def test_checkpoints_are_those_of_a_plain_loop(images: Images, tmp_path: Path) -> None:
    kept: dict[int, dict[str, Tensor]] = {}
    losses: list[tuple[int, float]] = []
    train_along(
        fresh(), images, RECIPE, SEED, tmp_path / "state.pt",
        lambda index, state_dict: kept.update({index: copied(state_dict)}),
        lambda epoch, loss: losses.append((epoch, loss)),
    )  # fmt: skip
    assert [epoch for epoch, _ in losses] == [1, 2, 3, 4]
    assert list(kept) == [0, 1, 2]
    after = trained_plainly(images)
    # Two steps apart, and the last step's is one of them.
    for index, step in enumerate((2, 4, 6)):
        for name, value in after[step].items():
            torch.testing.assert_close(kept[index][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_collection_is_registered_and_its_networks_differ(images: Images, tmp_path: Path) -> None:
    directory = tmp_path / "collection"
    seconds = collect_along_training(fresh(), images, RECIPE, SEED, directory, nothing)
    assert seconds > 0
    collection = Collection.load(directory)
    assert [entry.file for entry in collection.entries] == [
        f"checkpoint_{i:03d}.safetensors" for i in range(3)
    ]
    assert {entry.split for entry in collection.entries} == {"train"}
    assert collection.condition_width is None
    seen = []
    for entry in collection.entries:
        network = TinyNet()
        network.load_state_dict(load_file(directory / entry.file), strict=True)
        seen.append(torch.cat([value.flatten().float() for value in network.state_dict().values()]))
    assert all(not a.equal(b) for i, a in enumerate(seen) for b in seen[:i])
    assert [path.name for path in tmp_path.iterdir()] == ["collection"]


@pytest.mark.parametrize("finished", [2, 3])
def test_a_killed_run_goes_on_and_makes_the_same_files(images: Images, tmp_path: Path, finished: int) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def killed(epoch: int, loss: float) -> None:
        if epoch == finished:
            raise Killed

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    collect_along_training(fresh(), images, RECIPE, SEED, whole, nothing)
    with pytest.raises(Killed):
        collect_along_training(fresh(), images, RECIPE, SEED, parts, killed)
    assert not parts.exists()
    epochs: list[int] = []
    collect_along_training(fresh(), images, RECIPE, SEED, parts, lambda epoch, loss: epochs.append(epoch))
    assert epochs == list(range(finished + 1, 5))
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in parts.iterdir()
    }


def test_a_state_of_another_training_is_ignored(images: Images, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    train_along(fresh(), images, RECIPE, SEED, state, nothing, nothing)
    epochs: list[int] = []
    train_along(fresh(), images, RECIPE, SEED + 1, state, nothing, lambda epoch, loss: epochs.append(epoch))
    assert epochs == [1, 2, 3, 4]


def test_a_damaged_state_is_named(images: Images, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    state.write_bytes(b"not a state")
    with pytest.raises(RPGError, match=r"state\.pt: cannot be resumed from: "):
        train_along(fresh(), images, RECIPE, SEED, state, nothing, nothing)


def test_an_epoch_needs_a_step_a_checkpoint(images: Images, tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=10, checkpoints=8)
    with pytest.raises(RPGError, match="expected at least 8 steps an epoch, one a checkpoint, got 7"):
        train_along(fresh(), images, recipe, SEED, tmp_path / "state.pt", nothing, nothing)
