"""Networks of torchvision and timm by name, for images of any size.

Most of them are made for images of 224 × 224, of which they keep a thirty-second of the places. Of small
images too little would be left, so there the first layer looks closer, as is usual for CIFAR-10.
"""

import inspect
import re
from collections.abc import Mapping
from math import gcd
from typing import Any

import torch
from torch import nn

from rpg.errors import RPGError, one_line

LIBRARIES = ("torchvision", "timm")
_LARGEST_SMALL_SIDE = 64
"""Pixels of images for which the first layer looks closer."""
_PLACES = 8
"""Patches along a small image's side, in networks that keep their number."""
_LARGEST_COMBINED_PATCH, _COMBINED_PLACES = 4, 32
"""Largest patches of networks that combine them later, such as ConvNeXt and Swin, and the number of patches
along a small image's side that these have."""


def is_named_network(name: str) -> bool:
    """Whether a name says that it is one of torchvision's or timm's networks."""
    return name.partition(":")[0] in LIBRARIES


def named_network(
    name: str, outputs: int, height: int, width: int, arguments: Mapping[str, Any] | None = None
) -> nn.Module:
    """A network of torchvision or timm with new weights.

    - Networks whose class has an argument for the images' size are given that.
    - For images of at most 64 × 64 pixels, timm's networks have smaller patches: about an eighth of the side,
      or, where networks combine patches of at most 4 × 4 later, a thirty-second. A ResNet's first convolution
      is 3 × 3 with stride 1, and no pooling follows it. In other networks, a first convolution with stride 2
      has stride 1.

    Args:
        name: `torchvision:NAME` or `timm:NAME`.
        outputs: classes.
        height: of the images.
        width: of the images.
        arguments: further ones of the network's function; they come before those above.

    Raises:
        RPGError: if the library is not installed, has no such network, or cannot make it for these images.
    """
    build, network = _builder(name), name.partition(":")[2]
    given = {"num_classes": outputs, **(arguments or {})}
    is_small = max(height, width) <= _LARGEST_SMALL_SIDE
    try:
        with torch.device("meta"):
            example = build(network, **given)
        fitting = _fitting_arguments(example, height, width, is_small)
        made: nn.Module = build(network, **(fitting | given))
    except Exception as error:
        raise RPGError(f"network: '{name}': {one_line(error)[:300]}") from error
    if is_small:
        _look_closer(made)
    return made


def _builder(name: str) -> Any:
    library, _, network = name.partition(":")
    # Imported here, so that programs that use neither do not wait for them.
    try:
        if library == "torchvision":
            import torchvision.models

            # Its other networks fetch a trained backbone, and answer with more than classes.
            is_there = network in torchvision.models.list_models(module=torchvision.models)
            build = torchvision.models.get_model
        elif library == "timm":
            import timm

            # A name such as hf-hub:… would be fetched.
            is_there = re.fullmatch(r"[\w.]+", network) is not None and timm.is_model(network)
            build = timm.create_model
        else:
            raise RPGError(f"network: expected torchvision:NAME or timm:NAME, got '{name}'")
    except ImportError as error:
        raise RPGError(f"network: '{name}' needs the package {library}: pip install {library}") from error
    if not is_there:
        raise RPGError(f"network: '{name}': {library} has no network for classification of this name")
    return build


def _fitting_arguments(example: nn.Module, height: int, width: int, is_small: bool) -> dict[str, Any]:
    parameters = inspect.signature(type(example).__init__).parameters
    fitting: dict[str, Any] = {}
    if "img_size" in parameters:
        fitting["img_size"] = (height, width)
    if "image_size" in parameters:
        fitting["image_size"] = height
    first = _first_convolution(example)
    # torchvision's functions do not take a size of patches, even where the class does.
    is_timm = type(example).__module__.startswith("timm.")
    if is_small and is_timm and "patch_size" in parameters and first is not None:
        is_combined = first.stride[0] <= _LARGEST_COMBINED_PATCH
        fitting["patch_size"] = _patch(height, width, _COMBINED_PLACES if is_combined else _PLACES)
    return fitting


def _patch(height: int, width: int, places: int) -> int:
    """The divisor of both sides that comes nearest to so many patches along the shorter one."""
    common, wanted = gcd(height, width), min(height, width) / places
    divisors = [each for each in range(1, common + 1) if common % each == 0]
    return min(divisors, key=lambda patch: (abs(patch - wanted), -patch))


def _look_closer(network: Any) -> None:
    first = _first_convolution(network)
    if first is None:
        return
    is_resnet = isinstance(getattr(network, "maxpool", None), nn.MaxPool2d) and hasattr(network, "conv1")
    if is_resnet and network.conv1 is first:
        network.conv1 = nn.Conv2d(3, first.out_channels, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    elif first.stride == (2, 2) and first.kernel_size != first.stride:
        first.stride = (1, 1)


def _first_convolution(network: nn.Module) -> nn.Conv2d | None:
    return next((each for each in network.modules() if isinstance(each, nn.Conv2d)), None)
