"""The digits: splits never share an image, and both forms of the network compute the same."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from rpg.tasks.digits import DigitsNet, digits_images, digits_patches, digits_side_by_side


def test_splits_share_no_image() -> None:
    splits = digits_images()
    sizes = {name: len(split.images) for name, split in splits.items()}
    assert sizes == {"train": 1137, "validation": 210, "test": 450}
    data = load_digits()
    assert sum(sizes.values()) == len(data.images)
    raw = {tuple(image.astype(int).ravel()) for image in data.images}
    # There are no two equal images in the data, so equal content would be the same image twice.
    assert len(raw) == len(data.images)
    contents = [{tuple(image.flatten().tolist()) for image in split.images} for split in splits.values()]
    assert [len(content) for content in contents] == list(sizes.values())
    assert len(set.union(*contents)) == len(data.images)


def test_images_are_normalised_by_the_training_images_and_keep_their_class() -> None:
    splits = digits_images()
    assert splits["train"].images.mean().item() == pytest.approx(0, abs=1e-5)
    assert splits["train"].images.std().item() == pytest.approx(1, abs=1e-5)
    data = load_digits()
    # Undone, an image is one of the data, with its class.
    raw = {
        tuple(image.astype(int).ravel()): int(c) for image, c in zip(data.images, data.target, strict=True)
    }
    low = min(float(split.images.min()) for split in splits.values())
    high = max(float(split.images.max()) for split in splits.values())
    for split in splits.values():
        values = ((split.images - low) / (high - low) * 16).round().int().flatten(1)
        for image, label in zip(values.tolist(), split.classes.tolist(), strict=True):
            assert raw[tuple(image)] == label
        assert torch.bincount(split.classes, minlength=10).min() > 0.05 * len(split.classes)


def test_splits_are_always_the_same() -> None:
    torch.manual_seed(123)
    digits_images.cache_clear()
    first = digits_images()["test"].images
    torch.manual_seed(321)
    digits_images.cache_clear()
    assert torch.equal(digits_images()["test"].images, first)


@pytest.mark.parametrize("outputs", [1, 10])
def test_the_network_has_the_size_that_it_says(outputs: int) -> None:
    parameters = sum(p.numel() for p in DigitsNet(outputs).parameters())
    assert parameters == 2820 + 97 * outputs
    assert 1000 <= parameters <= 5000


def models(count: int, outputs: int) -> list[DigitsNet]:
    torch.manual_seed(0)
    return [DigitsNet(outputs).double() for _ in range(count)]


def stacked(networks: list[DigitsNet]) -> dict[str, Tensor]:
    states = [network.state_dict() for network in networks]
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


@pytest.mark.parametrize("outputs", [1, 10])
def test_side_by_side_equals_each_plain_network(outputs: int) -> None:
    networks = models(5, outputs)
    images = torch.randn(5, 7, 1, 8, 8, dtype=torch.float64)
    patches = torch.stack([digits_patches(some) for some in images])
    logits = digits_side_by_side(stacked(networks), patches)
    assert logits.shape == (5, 7, outputs)
    for i, network in enumerate(networks):
        torch.testing.assert_close(logits[i], network(images[i]))


def test_gradients_side_by_side_are_each_networks_own() -> None:
    networks = models(3, 10)
    images, classes = torch.randn(3, 6, 1, 8, 8, dtype=torch.float64), torch.randint(10, (3, 6))
    parameters = {name: value.requires_grad_() for name, value in stacked(networks).items()}
    patches = torch.stack([digits_patches(some) for some in images])
    logits = digits_side_by_side(parameters, patches)
    total = torch.stack([F.cross_entropy(logits[i], classes[i]) for i in range(3)]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()))
    for i, network in enumerate(networks):
        alone = torch.autograd.grad(
            F.cross_entropy(network(images[i]), classes[i]), list(network.parameters())
        )
        for together, expected in zip(gradients, alone, strict=True):
            torch.testing.assert_close(together[i], expected)
