"""Embeddings of many texts at once, which may differ in the last digits from those of each alone."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rpg.text_encoder import TextEncoder
from rpg.threads import one_thread

_BATCH = 32


def padded(encoder: TextEncoder, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [texts, tokens] of several texts."""
    rows = [torch.tensor(encoder.tokens(text)) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def embeddings(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """The embeddings [texts, size]; texts of about the same length are embedded together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.zeros(len(texts), encoder.size)
    with torch.inference_mode(), one_thread():
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            found[chosen] = encoder.embed(*padded(encoder, [texts[i] for i in chosen]))
    return found
