"""The ResNet-18 for small images, and its predictions against a loop over images."""

import pytest
import torch

from rpg.tasks.cifar10_images import Images
from rpg.tasks.cifar10_resnet18 import cifar10_resnet18, predicted_classes
from tests.cifar10_files import pixels_and_classes

MEAN = torch.tensor([0.4914, 0.4822, 0.4465])
DEVIATION = torch.tensor([0.2470, 0.2435, 0.2616])


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return cifar10_resnet18()


def test_the_network_is_resnet18_with_a_stem_for_small_images(network: torch.nn.Module) -> None:
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_173_962
    places: list[torch.Size] = []
    hook = network.layer4.register_forward_hook(lambda module, inputs, output: places.append(output.shape))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    hook.remove()
    assert places == [(2, 512, 4, 4)]


def test_predictions_are_those_of_a_plain_loop(network: torch.nn.Module) -> None:
    pixels, classes = pixels_and_classes(6, 0)
    images = Images(torch.from_numpy(pixels), torch.from_numpy(classes))
    # Statistics of a training step: evaluation must use them, not the batch's own.
    network.train()
    network(torch.randn(4, 3, 32, 32))
    found = predicted_classes(network, images, batch_size=4)
    expected = []
    with torch.no_grad():
        for image in images.pixels:
            inputs = ((image / 255.0 - MEAN) / DEVIATION).movedim(2, 0)[None]
            expected.append(int(network.eval()(inputs)[0].argmax()))
    assert found.tolist() == expected
