"""The `fast` denoiser: a residual MLP over the token, modulated by prototype and timestep (AdaLN).

Dense matrix products only. The modulation (shift, scale, gate of each block; Peebles & Xie, arXiv 2212.09748
section 3.2) is a sum of a part from the prototype and a part from the timestep, so that sampling computes the
first once a token and the second once a step.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from rpg.generator.embeddings import TimestepEmbedding


class AdaLNMLP(nn.Module):
    """Tokens [N, token_size] and prototypes [N, prototype_width] to a prediction [N, token_size]."""

    def __init__(self, token_size: int, width: int, depth: int, prototype_width: int) -> None:
        super().__init__()
        self.width = width
        self.timestep = TimestepEmbedding(width)
        self.input = nn.Linear(token_size, width)
        modulations = (3 * depth + 2) * width
        self.prototype_modulation = nn.Linear(prototype_width, modulations)
        self.timestep_modulation = nn.Linear(width, modulations, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.output = nn.Linear(width, token_size)
        # All gates start at zero, so that a block returns its input, and so does the output layer.
        nn.init.zeros_(self.timestep_modulation.weight)
        nn.init.zeros_(self.prototype_modulation.weight)
        nn.init.zeros_(self.prototype_modulation.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, t: Tensor, prototype: Tensor) -> Tensor:
        """Predict for noised tokens.

        Args:
            x: noised tokens [N, token_size].
            t: int64 timesteps [G]; the rows of `x` come in G equal groups, each at one timestep.
            prototype: [N, prototype_width].
        """
        return self.denoise(x, t, self.prepare(prototype))

    def prepare(self, prototype: Tensor) -> Tensor:
        """The prototype's part of the modulation, [N, (3 · depth + 2) · width]."""
        modulation: Tensor = self.prototype_modulation(F.silu(prototype))
        return modulation

    def denoise(self, x: Tensor, t: Tensor, modulation: Tensor) -> Tensor:
        """Predict like `forward`, from the prototypes' part of the modulation that `prepare` returned."""
        by_time = self.timestep_modulation(F.silu(self.timestep(t)))
        groups = len(t)
        total = modulation.view(groups, -1, modulation.shape[-1]) + by_time[:, None]
        parts = total.flatten(0, 1).split(self.width, dim=-1)
        x = self.input(x)
        for i, block in enumerate(self.blocks):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            x = x + gate * block(_modulated(x, shift, scale))
        shift, scale = parts[-2:]
        prediction: Tensor = self.output(_modulated(x, shift, scale))
        return prediction


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
