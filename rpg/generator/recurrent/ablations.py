"""What the published model's Mamba-2 is compared with: no recurrence, an LSTM and a causal Transformer.

The package's description has the interface that they share.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.errors import RPGError
from rpg.generator.recurrent.elements import elements_at

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of the sequence so far, each [B, heads, length, head_size]."""


class Identity(nn.Module):
    """Returns its input: every token's prototype is its own input, and there is no state."""

    def forward(
        self, x: Tensor, state: None = None, keep_state: bool = True, at: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[B, L, width] -> the same tensor or its elements `at`, and None."""
        return elements_at(x, at), None


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
        return self.to_out(elements_at(hidden, at)), after if keep_state else None


class TransformerLayer(nn.Module):
    """Pre-norm causal self-attention and a feed-forward network of twice the width, both residual."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, state: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """[B, L, width] -> [B, L, width], and keys and values of the past and these elements."""
        length = x.shape[1]
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, -1, self.head_size))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mask = None
        if state is not None:
            key, value = torch.cat([state[0], key], dim=2), torch.cat([state[1], value], dim=2)
            past = key.shape[2] - length
            mask = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril(past)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x), (key, value)


class Transformer(nn.Module):
    """Causal Transformer of `width / head_size` heads. It adds no positions: its input contains them.

    Raises:
        RPGError: if `head_size` does not divide `width`.
    """

    def __init__(self, width: int, depth: int, head_size: int) -> None:
        super().__init__()
        if width % head_size:
            raise RPGError(f"Transformer: head_size: expected a divisor of width = {width}, got {head_size}")
        self.layers = nn.ModuleList(TransformerLayer(width, head_size) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        state: tuple[KeysValues, ...] | None = None,
        keep_state: bool = True,
        at: Tensor | None = None,
    ) -> tuple[Tensor, tuple[KeysValues, ...] | None]:
        """[B, L, width] -> [B, L or K, width], and every layer's keys and values."""
        states = []
        for index, layer in enumerate(self.layers):
            x, after = layer(x, None if state is None else state[index])
            states.append(after)
        return self.norm(elements_at(x, at)), tuple(states) if keep_state else None
