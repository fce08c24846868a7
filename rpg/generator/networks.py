"""The three networks of a generator, built from its configuration."""

from typing import NamedTuple

from torch import nn

from rpg.config import GeneratorConfig
from rpg.generator.condition import NoCondition, PermutationState, VectorCondition, build_condition
from rpg.generator.denoiser import build_denoiser
from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.generator.recurrent import build_recurrent

Condition = VectorCondition | PermutationState | NoCondition
Denoiser = ConditionalUNet | AdaLNMLP


class Networks(NamedTuple):
    """The modules that hold all parameters of a generator, under the names that they have there."""

    condition: Condition
    recurrent: nn.Module
    denoiser: Denoiser


def build_networks(config: GeneratorConfig, token_size: int) -> Networks:
    """Fresh networks for tokens of `token_size` values, with random weights.

    Raises:
        RPGError: if the configuration is not consistent in itself.
    """
    width = config.recurrent.width
    return Networks(
        build_condition(config.condition, width),
        build_recurrent(config.recurrent),
        build_denoiser(config.denoiser, token_size, width),
    )
