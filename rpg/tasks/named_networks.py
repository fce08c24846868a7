"""Networks of torchvision and timm by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from rpg.errors import RPGError


def named_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A network of torchvision or timm with new weights.

    Args:
        name: `torchvision:NAME` or `timm:NAME`.
        arguments: of the network's function.

    Raises:
        RPGError: if the library is not installed, or has no such network.
    """
    library, _, called = name.partition(":")
    # Imported here, so that programs that use neither do not wait for them.
    try:
        if library == "torchvision":
            from torchvision.models import get_model as build
        elif library == "timm":
            from timm import create_model as build
        else:
            raise RPGError(f"network: expected torchvision:NAME or timm:NAME, got '{name}'")
    except ImportError as error:
        raise RPGError(f"network: '{name}' needs the package {library}: pip install {library}") from error
    try:
        network: nn.Module = build(called, **arguments)
    except Exception as error:
        raise RPGError(f"network: '{name}': {error}") from error
    return network
