"""Recurrent networks: from a sequence of positions and conditions to one prototype a token.

Every network is causal and maps `forward(x: [B, L, width], state=None, keep_state=True, at=None)` to the
outputs, [B, L, width], and the state after the last element (None without `keep_state`, which saves its cost
where it is not needed). A sequence fed in pieces, each with the state that the piece before returned, gives
the outputs of the whole. With `at`, int64 [B, K], outputs are those of these elements alone, [B, K, width],
and what only the others need is not computed.
"""

from torch import nn

from rpg.config import RecurrentConfig, RecurrentKind
from rpg.generator.recurrent.identity import Identity
from rpg.generator.recurrent.lstm import LSTM
from rpg.generator.recurrent.mamba2 import Mamba2Stack
from rpg.generator.recurrent.transformer import Transformer


def build_recurrent(config: RecurrentConfig) -> nn.Module:
    """The recurrent network that a configuration asks for; this package's description has its interface."""
    match config.kind:
        case RecurrentKind.mamba2:
            return Mamba2Stack(
                config.width,
                config.depth,
                d_state=config.state_size,
                d_conv=config.conv_width,
                expand=config.expand,
                headdim=config.head_size,
            )
        case RecurrentKind.lstm:
            return LSTM(config.width, config.depth)
        case RecurrentKind.transformer:
            return Transformer(config.width, config.depth, head_size=config.head_size)
        case RecurrentKind.none:
            return Identity()
