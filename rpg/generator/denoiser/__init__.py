"""Denoisers: networks that predict, from a noisy token, its timestep and its prototype, what to remove.

Every denoiser has three methods. N counts tokens and G timesteps; G divides N, and the tokens come in G
groups of N / G consecutive rows, each group at one timestep. A training step has a group for each checkpoint,
and a step of the sampler has one group.

- `forward(x: [N, token_size], t: [G], prototype: [N, prototype_width])` returns the prediction [N,
  token_size].
- `prepare(prototype)` returns what depends on the prototypes only, [N, …]. Sampling calls it once for each
  token.
- `denoise(x, t, prepared)` returns what `forward` returns, from what `prepare` returned.
"""

from rpg.config import DenoiserConfig, DenoiserKind
from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.generator.denoiser.direct import DirectPrediction
from rpg.generator.denoiser.unet import ConditionalUNet


def build_denoiser(
    config: DenoiserConfig, token_size: int, prototype_width: int
) -> ConditionalUNet | AdaLNMLP | DirectPrediction:
    """The denoiser that a configuration asks for, for tokens and prototypes of the given sizes."""
    match config.kind:
        case DenoiserKind.unet:
            return ConditionalUNet(
                token_size=token_size,
                prototype_width=prototype_width,
                channels=config.channels,
                kernel_size=config.kernel_size,
            )
        case DenoiserKind.adaln_mlp:
            return AdaLNMLP(
                token_size=token_size,
                width=config.width,
                depth=config.depth,
                prototype_width=prototype_width,
            )
        case DenoiserKind.direct:
            return DirectPrediction(token_size, prototype_width)
