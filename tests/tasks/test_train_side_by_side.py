"""Training side by side, against training each model by itself in plain PyTorch."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.tasks.binary_digits import train_side_by_side
from rpg.tasks.digits import DigitsNet, digits_images, digits_patches, digits_side_by_side

SEEDS = [5, 6, 7]
EPOCHS, BATCH, RATE = 2, 32, 1e-2


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits[..., 0], labels, reduction="none").mean(1)


def problem(images: int = 200) -> tuple[list[DigitsNet], Tensor, Tensor]:
    torch.manual_seed(0)
    networks = [DigitsNet().double() for _ in SEEDS]
    train = digits_images()["train"]
    classes = train.classes[:images]
    labels = torch.stack([(classes < 5), (classes % 2 == 0), (classes == 3)]).double()
    return networks, train.images[:images].double(), labels


def together(
    networks: list[DigitsNet], images: Tensor, labels: Tensor, seeds: list[int]
) -> dict[str, Tensor]:
    states = [network.state_dict() for network in networks]
    return train_side_by_side(
        {name: torch.stack([state[name] for state in states]) for name in states[0]},
        digits_side_by_side,
        binary_loss,
        digits_patches(images),
        labels,
        seeds,
        EPOCHS,
        BATCH,
        RATE,
    )


def train_by_itself(network: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    """PyTorch's own Adam on one plain network, with the same schedule and data order."""
    optimiser = torch.optim.Adam(network.parameters(), lr=RATE, betas=(0.9, 0.99))
    random = torch.Generator().manual_seed(seed)
    steps, step = EPOCHS * (len(images) // BATCH), 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=random)
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            step += 1
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1, step / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimiser.zero_grad()
            loss = F.binary_cross_entropy_with_logits(network(images[chosen])[:, 0], labels[chosen])
            torch.autograd.backward(loss)
            optimiser.step()


def test_equals_training_each_model_by_itself() -> None:
    networks, images, labels = problem()
    trained = together(networks, images, labels, SEEDS)
    for i, network in enumerate(networks):
        before = network.head.weight.detach().clone()
        train_by_itself(network, images, labels[i], SEEDS[i])
        assert (network.head.weight - before).abs().max() > 0.01
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(trained[name][i], parameter.detach(), rtol=1e-6, atol=1e-8)


def test_a_model_does_not_depend_on_its_neighbours() -> None:
    networks, images, labels = problem()
    trained = together(networks, images, labels, SEEDS)
    one = together(networks[1:2], images, labels[1:2], SEEDS[1:2])
    for name, value in one.items():
        torch.testing.assert_close(value[0], trained[name][1])
    other_order = together(networks[1:2], images, labels[1:2], [99])
    assert not torch.allclose(other_order["head.weight"], one["head.weight"])


def test_starting_points_are_left_as_they_are_and_few_samples_are_one_batch() -> None:
    networks, images, labels = problem(images=20)
    before = [{name: value.clone() for name, value in n.state_dict().items()} for n in networks]
    trained = together(networks, images, labels, SEEDS)
    for i, network in enumerate(networks):
        for name, value in network.state_dict().items():
            assert torch.equal(value, before[i][name])
            assert not torch.equal(trained[name][i], value)
            assert not trained[name].requires_grad
