"""The presets for networks of torchvision and timm: they load, fit their network, and say its tokens."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rpg.collection.statistics import LayoutStatistics
from rpg.config import load_config
from rpg.generator.networks import build_networks
from rpg.tasks.families import load_family
from rpg.tasks.image_networks import ImageNetworks
from tests.cifar10_files import write_cifar10

CONFIGS = Path(__file__).parents[2] / "configs"
NETWORKS = (
    "resnet18", "resnet50", "mobilenetv3", "vit-tiny", "vit-small", "vit-base", "convnext-atto",
    "convnext-large", "binary-vit-tiny",
)  # fmt: skip
SHALLOW: dict[str, dict[str, Any]] = {
    "vit-small": {"depth": 1},
    "vit-base": {"depth": 1},
    "convnext-large": {"depths": (1, 1, 1, 1)},
}
"""Arguments that keep every kind of tensor, and leave out most of the equal blocks."""
IMAGES_AN_EPOCH = 45_000


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("images")
    write_cifar10(directory, train=60, test=20)
    return str(directory)


def family_of(name: str, images: str) -> ImageNetworks:
    family: ImageNetworks = load_family(load_config(CONFIGS / f"cifar10-{name}.yaml").tasks, images)
    return family


@pytest.mark.parametrize("name", NETWORKS)
def test_a_preset_says_how_many_tokens_its_network_has(name: str, images: str) -> None:
    path = CONFIGS / f"cifar10-{name}.yaml"
    config, family = load_config(path), family_of(name, images)
    family.check()
    with torch.device("meta"):
        values = [v for v in family.build_network().state_dict().values() if v.is_floating_point()]
        tokens = sum(math.ceil(value.numel() / config.shard.token_size) for value in values)
        conditional = hasattr(family, "tasks")
        config.generator.condition.size = 10 if conditional else config.collect.checkpoints_per_task
        config.generator.condition.states = 0
        networks = build_networks(config.generator, config.shard.token_size, tokens)
    said = re.search(r"token_size: \d+ # ([\d,]+) tokens a network", path.read_text())
    assert said is not None
    assert int(said[1].replace(",", "")) == tokens
    # Parameters, their average, two moments and gradients in float32 leave most of a GPU for activations.
    assert 20 * sum(value.numel() for part in networks for value in part.parameters()) < 12e9
    if not conditional:
        steps = IMAGES_AN_EPOCH // config.collect.batch_size
        assert steps >= config.collect.checkpoints_per_task
        shown = config.train.steps * config.train.checkpoints_per_step * config.train.tokens_per_checkpoint
        assert shown / (tokens * config.collect.checkpoints_per_task) > 30


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_become_tokens_and_come_back(name: str, images: str) -> None:
    config, family = load_config(CONFIGS / f"cifar10-{name}.yaml"), family_of(name, images)
    torch.manual_seed(0)
    type(family).arguments, kept = SHALLOW.get(name, {}), type(family).arguments
    try:
        network = family.build_network()
        first = {key: value.clone() for key, value in network.state_dict().items()}
        with torch.no_grad():
            for value in network.state_dict().values():
                if value.is_floating_point():
                    value.mul_(torch.empty_like(value).uniform_(0.9, 1.1)).add_(0.01)
                else:
                    value.add_(1)
        second = network.state_dict()
        statistics = LayoutStatistics(first)
        for each in (first, second):
            statistics.update(each)
        layout = statistics.layout(config.shard.token_size, config.shard.normalisation)
        decoded = layout.decode(layout.encode(second))
        # Names, shapes and types are those of a fresh network.
        family.build_network().load_state_dict(decoded, strict=True)
        for key, value in second.items():
            if value.is_floating_point():
                torch.testing.assert_close(decoded[key], value, rtol=1e-4, atol=1e-5, msg=key)
    finally:
        type(family).arguments = kept
