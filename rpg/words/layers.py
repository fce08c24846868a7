"""An encoder cut in two: lower layers, whose outputs are computed once, and upper ones, which are trained.

That halves the work of each batch, and it needs a network of the BERT family (`embeddings`, `encoder.layer`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rpg.text_encoder import TextEncoder
from rpg.threads import one_thread
from rpg.words.embedding import padded

_AT_ONCE = 32


class _Passed(nn.Module):
    """Stands where another part of the network does the work: its output is its input."""

    def forward(self, states: Tensor | None = None, *_: Any, **others: Any) -> Any:
        return others["input_ids"] if states is None else states


def number_of_layers(encoder: TextEncoder) -> int:
    """How many layers an encoder has."""
    layers: Any = encoder.network.encoder
    return len(layers.layer)


def upper_layers(directory: Path, first: int) -> TextEncoder:
    """The encoder without what lies below its layer `first`; it embeds outputs of `lower_outputs`."""
    encoder = TextEncoder(directory)
    network: Any = encoder.network
    network.embeddings = _Passed()
    for i in range(first):
        network.encoder.layer[i] = _Passed()
    return encoder


def lower_outputs(directory: Path, first: int, texts: Sequence[str]) -> list[Tensor]:
    """For each text what goes into layer `first` [tokens, size], in half precision."""
    encoder = TextEncoder(directory)
    network: Any = encoder.network
    for i in range(first, number_of_layers(encoder)):
        network.encoder.layer[i] = _Passed()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    with torch.inference_mode(), one_thread():
        for start in range(0, len(order), _AT_ONCE):
            chosen = order[start : start + _AT_ONCE]
            ids, mask = padded(encoder, [texts[i] for i in chosen])
            states = network(input_ids=ids, attention_mask=mask).last_hidden_state.half()
            for i, row, length in zip(chosen, states, mask.sum(1).tolist(), strict=True):
                found[i] = row[:length].clone()
    return [found[i] for i in range(len(texts))]


def embed_states(upper: TextEncoder, states: Sequence[Tensor], device: torch.device) -> Tensor:
    """The embeddings [texts, size] of outputs of `lower_outputs`, differentiable.

    Texts of about the same length are embedded together, so that little is padded.
    """
    order = sorted(range(len(states)), key=lambda i: len(states[i]))
    parts = []
    for start in range(0, len(order), _AT_ONCE):
        rows = [states[i] for i in order[start : start + _AT_ONCE]]
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True)
        inputs = nn.utils.rnn.pad_sequence(rows, True).float()
        parts.append(upper.embed(inputs.to(device), mask.to(device)))
    return torch.cat(parts)[torch.tensor(order, device=device).argsort()]
