"""Networks of torchvision and timm by name: sizes, what small images change, and names that are refused."""

from typing import Any

import pytest
import torch
from torch import nn

from rpg.errors import RPGError
from rpg.tasks.named_networks import named_network

MILLIONS = [
    ("torchvision:resnet18", 11.17),
    ("timm:resnet50_gn", 23.5),
    ("timm:mobilenetv3_large_100", 4.2),
    ("timm:vit_tiny_patch16_224", 5.4),
    ("timm:vit_small_patch16_224", 21.3),
    ("timm:vit_base_patch16_224", 85.2),
    ("timm:convnext_atto", 3.4),
    ("timm:convnext_large", 196.2),
]


def places(name: str, layer: str, height: int, width: int, outputs: int = 10) -> tuple[int, ...]:
    """The shape of a layer's output for one image."""
    with torch.device("meta"):
        network: Any = named_network(name, outputs, height, width).eval()
        found: list[tuple[int, ...]] = []
        network.get_submodule(layer).register_forward_hook(lambda m, i, o: found.append(tuple(o.shape[1:])))
        assert network(torch.empty(1, 3, height, width)).shape == (1, outputs)
    return found[0]


@pytest.mark.parametrize(("name", "millions"), MILLIONS)
def test_the_networks_have_the_sizes_that_their_names_say(name: str, millions: float) -> None:
    with torch.device("meta"):
        network = named_network(name, 10, 32, 32)
        assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "layer", "shapes"),
    [("torchvision:resnet18", "layer4", {32: (512, 4, 4), 28: (512, 4, 4), 224: (512, 7, 7)}),
     ("timm:resnet50_gn", "layer4", {32: (2048, 4, 4), 224: (2048, 7, 7)}),
     ("timm:mobilenetv3_large_100", "blocks", {32: (960, 2, 2), 224: (960, 7, 7)}),
     ("timm:vit_tiny_patch16_224", "norm", {32: (65, 192), 28: (50, 192), 64: (65, 192), 224: (197, 192)}),
     ("timm:convnext_atto", "stages", {32: (320, 4, 4), 64: (320, 2, 2), 224: (320, 7, 7)}),
     ("torchvision:mobilenet_v3_small", "features", {32: (576, 2, 2), 224: (576, 7, 7)}),
     ("torchvision:vit_b_16", "encoder", {32: (5, 768), 224: (197, 768)})],
)  # fmt: skip
def test_small_images_are_looked_at_closely(
    name: str, layer: str, shapes: dict[int, tuple[int, ...]]
) -> None:
    assert {side: places(name, layer, side, side) for side in shapes} == shapes


def test_images_need_not_be_square() -> None:
    # Patches of 4 × 4: 6 × 8 of them, and the class token.
    assert places("timm:vit_tiny_patch16_224", "norm", 24, 32, outputs=3) == (49, 192)


def test_other_arguments_come_first() -> None:
    with torch.device("meta"):
        network: Any = named_network("timm:vit_tiny_patch16_224", 2, 32, 32, {"patch_size": 16, "depth": 1})
    assert network.patch_embed.proj.weight.shape[2:] == (16, 16)
    assert len(network.blocks) == 1


def test_large_images_leave_a_network_as_its_library_makes_it() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    theirs = resnet18(num_classes=7).state_dict()
    torch.manual_seed(0)
    ours = named_network("torchvision:resnet18", 7, 224, 224).state_dict()
    assert all(ours[name].equal(value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet18", "expected torchvision:NAME or timm:NAME, got 'resnet18'"),
     ("timm:no_such_network", "'timm:no_such_network': timm has no network"),
     ("torchvision:no_such_network", "'torchvision:no_such_network': torchvision has no network"),
     ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no network for classification"),
     ("timm:hf-hub:timm/resnet18.a1_in1k", "timm has no network"),
     ("timm:local-dir:/somewhere", "timm has no network")],
)  # fmt: skip
def test_a_network_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(RPGError, match=message):
        named_network(name, 10, 32, 32)


def test_arguments_that_do_not_fit_are_told_in_one_line() -> None:
    with pytest.raises(RPGError, match=r"network: 'torchvision:resnet18': .*colour"):
        named_network("torchvision:resnet18", 10, 32, 32, {"colour": "red"})
    assert isinstance(named_network("torchvision:resnet18", 2, 32, 32), nn.Module)
