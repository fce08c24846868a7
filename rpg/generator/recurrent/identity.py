"""No recurrence: every token's prototype is its own input (an ablation of the published model)."""

from torch import Tensor, nn


class Identity(nn.Module):
    """Returns its input; there is nothing to remember."""

    def forward(self, x: Tensor, state: None = None, keep_state: bool = True) -> tuple[Tensor, None]:
        """[B, L, width] -> the same tensor, and None."""
        return x, None
