"""LSTM as recurrent network, an ablation of the published model."""

from torch import Tensor, nn

from rpg.generator.recurrent.chosen import chosen


class LSTM(nn.Module):
    """LSTM layers and a linear output layer, all of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, num_layers=depth, batch_first=True)
        self.to_out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None = None,
        keep_state: bool = True,
        at: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """[B, L, width] -> [B, L or K, width], and the hidden and cell states, each [depth, B, width]."""
        hidden, after = self.lstm(x, state)
        return self.to_out(chosen(hidden, at)), after if keep_state else None
