"""BERT in plain PyTorch, for the sentence encoder that words are understood by.

transformers computes the same. But importing it, and building a network with it, takes longer than all else
that is needed from a description to a network.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from rpg.errors import RPGError
from rpg.storage.files import is_number, read_json

_KIND = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
_WORDS, _PLACES, _TYPES = (f"embeddings.{each}_embeddings" for each in ("word", "position", "token_type"))
_INPUTS = ("query", "key", "value")


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, by the names that they have in `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, path: Path) -> "BertConfig":
        """Read `config.json`.

        Raises:
            RPGError: naming the file and the key, if it is missing or is not a BERT's.
        """
        found = read_json(path, "a BERT's configuration")
        if not isinstance(found, dict):
            raise RPGError(f"{path}: expected a JSON object")
        for key, expected in _KIND.items():
            # Files of older versions do not name the kind of positions, which is this one.
            if found.get(key, "absolute") != expected:
                raise RPGError(f"{path}: {key}: expected {expected}, found {json.dumps(found.get(key)):.80}")
        for field in fields(cls):
            value: Any = found.get(field.name)
            if not is_number(value) or value <= 0 or (field.type is int and not isinstance(value, int)):
                raise RPGError(
                    f"{path}: {field.name}: expected a positive number, found {json.dumps(value):.80}"
                )
        config = cls(**{field.name: found[field.name] for field in fields(cls)})
        if config.hidden_size % config.num_attention_heads:
            raise RPGError(f"{path}: num_attention_heads: expected a divisor of hidden_size")
        return config


class Bert(nn.Module):
    """The encoder without the pooled output, in float32.

    Attributes:
        config: its sizes.
    """

    def __init__(self, config: BertConfig, weights: Mapping[str, Tensor], source: Path) -> None:
        """Take the weights by the names that transformers gives them.

        Layers of `torch.nn` would be filled with random values first, which takes longer than all else.

        Args:
            config: of the weights.
            weights: by name; others than the encoder's are passed over.
            source: what messages call the weights.

        Raises:
            RPGError: naming the tensor that is missing, of another shape, or not finite.
        """
        super().__init__()
        self.config = config
        self._weights: dict[str, Tensor] = {}
        for name, shape in _shapes(config).items():
            if name not in weights or tuple(weights[name].shape) != shape:
                raise RPGError(
                    f"{source}: tensor '{name}' is missing, or not of the shape {list(shape)} that its "
                    "configuration says"
                )
            self._weights[name] = weights[name].float()
            if not self._weights[name].isfinite().all():
                raise RPGError(f"{source}: tensor '{name}' holds NaN or infinite values")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """The outputs `last_hidden_state` [texts, tokens, size], named as those of transformers' networks.

        Args:
            input_ids: of the tokens [texts, tokens].
            attention_mask: 1 where there is a token, 0 where there is padding; same shape.
        """
        weights = self._weights
        hidden = F.embedding(input_ids, weights[f"{_WORDS}.weight"])
        hidden = hidden + weights[f"{_PLACES}.weight"][: input_ids.shape[1]]
        # All tokens are of the first of two texts, which is all that there is.
        hidden = self._normalised("embeddings", hidden + weights[f"{_TYPES}.weight"][0])
        mask = attention_mask[:, None, None, :].bool()
        for i in range(self.config.num_hidden_layers):
            hidden = self._layer(f"encoder.layer.{i}", hidden, mask)
        return SimpleNamespace(last_hidden_state=hidden)

    def _layer(self, name: str, hidden: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            self._linear(f"{name}.attention.self.{part}", hidden)
            .unflatten(-1, (self.config.num_attention_heads, -1))
            .transpose(1, 2)
            for part in _INPUTS
        )
        attended = F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).flatten(2)
        output = f"{name}.attention.output"
        hidden = self._normalised(output, hidden + self._linear(f"{output}.dense", attended))
        inner = F.gelu(self._linear(f"{name}.intermediate.dense", hidden))
        return self._normalised(f"{name}.output", hidden + self._linear(f"{name}.output.dense", inner))

    def _linear(self, name: str, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _normalised(self, name: str, inputs: Tensor) -> Tensor:
        weight, bias = (self._weights[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return F.layer_norm(inputs, weight.shape, weight, bias, self.config.layer_norm_eps)


def _shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name."""
    size, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{_WORDS}.weight": (config.vocab_size, size),
        f"{_PLACES}.weight": (config.max_position_embeddings, size),
        f"{_TYPES}.weight": (config.type_vocab_size, size),
    }
    linear: dict[str, tuple[int, int]] = {}
    norms = ["embeddings"]
    for layer in (f"encoder.layer.{i}" for i in range(config.num_hidden_layers)):
        linear |= {f"{layer}.attention.self.{part}": (size, size) for part in _INPUTS}
        linear[f"{layer}.attention.output.dense"] = (size, size)
        linear[f"{layer}.intermediate.dense"] = (inner, size)
        linear[f"{layer}.output.dense"] = (size, inner)
        norms += [f"{layer}.attention.output", f"{layer}.output"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.LayerNorm.{part}": (size,) for part in ("weight", "bias")}
    return shapes
