"""The three networks of a generator, built from its configuration."""

from typing import NamedTuple

from torch import nn

from rpg.config import GeneratorConfig
from rpg.generator.condition import Condition, build_condition
from rpg.generator.denoiser import build_denoiser
from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.generator.denoiser.direct import DirectPrediction
from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.generator.recurrent import build_recurrent

Denoiser = ConditionalUNet | AdaLNMLP | DirectPrediction


class Networks(NamedTuple):
    """The modules that hold all parameters of a generator, under the names that they have there."""

    condition: Condition
    recurrent: nn.Module
    denoiser: Denoiser


def build_networks(config: GeneratorConfig, token_size: int, tokens: int) -> Networks:
    """Fresh networks for `tokens` tokens of `token_size` values, with random weights.

    Raises:
        RPGError: if the configuration is not consistent in itself.
    """
    return Networks(
        build_condition(config.condition, config.recurrent.width, tokens),
        build_recurrent(config.recurrent),
        build_denoiser(config.denoiser, token_size, config.recurrent.prototype_width),
    )
