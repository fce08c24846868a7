"""Denoisers: networks that predict, from a noisy token, its timestep and its prototype, what to remove.

Every denoiser maps `forward(x: [N, token_size], t: [N], prototype: [N, condition_width])` to [N, token_size].
"""

from rpg.config import DenoiserConfig, DenoiserKind
from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.generator.denoiser.unet import ConditionalUNet


def build_denoiser(
    config: DenoiserConfig, token_size: int, condition_width: int
) -> ConditionalUNet | AdaLNMLP:
    """The denoiser that a configuration asks for, for tokens and prototypes of the given widths."""
    match config.kind:
        case DenoiserKind.unet:
            return ConditionalUNet(
                token_size=token_size,
                prototype_width=condition_width,
                channels=config.channels,
                kernel_size=config.kernel_size,
            )
        case DenoiserKind.adaln_mlp:
            return AdaLNMLP(
                token_size=token_size,
                width=config.width,
                depth=config.depth,
                prototype_width=condition_width,
            )
