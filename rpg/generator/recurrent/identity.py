"""No recurrence: every token's prototype is its own input (an ablation of the published model)."""

from torch import Tensor, nn

from rpg.generator.recurrent.chosen import chosen


class Identity(nn.Module):
    """Returns its input; there is nothing to remember."""

    def forward(
        self, x: Tensor, state: None = None, keep_state: bool = True, at: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[B, L, width] -> the same tensor or its elements `at`, and None."""
        return chosen(x, at), None
