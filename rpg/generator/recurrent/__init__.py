"""Recurrent networks: from a sequence of positions and conditions to one prototype a token.

Every network is causal. `forward(x: [B, L, width], state=None, keep_state=True, at=None)` returns the
outputs, [B, L, prototype_width], and the state after the last element. A sequence may be fed in pieces, each
with the state that the piece before returned; the outputs are those of the whole sequence. Without
`keep_state` the returned state is None, which saves its cost. With `at`, int64 [B, K], only the outputs of
these elements are computed, [B, K, prototype_width].
"""

from torch import nn

from rpg.config import RecurrentConfig, RecurrentKind
from rpg.generator.recurrent.ablations import LSTM, Identity, Transformer
from rpg.generator.recurrent.mamba2 import Mamba2Stack


def build_recurrent(config: RecurrentConfig) -> nn.Module:
    """The recurrent network that a configuration asks for."""
    match config.kind:
        case RecurrentKind.mamba2:
            return Mamba2Stack(
                config.width,
                config.depth,
                d_state=config.state_size,
                d_conv=config.conv_width,
                expand=config.expand,
                headdim=config.head_size,
                output_width=config.prototype_width,
            )
        case RecurrentKind.lstm:
            return LSTM(config.width, config.depth)
        case RecurrentKind.transformer:
            return Transformer(config.width, config.depth, head_size=config.head_size)
        case RecurrentKind.none:
            return Identity()
