"""From the tokens of many networks to their weights, stacked, in a way that gradients flow back."""

import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.collection.tensor_spec import TensorKind
from rpg.collection.tokens import LOG_SHIFT, join, offset, values_per_token
from rpg.config import TokenCut


class StackedDecoder:
    """`Layout.decode` for M networks at once, on any device, differentiable.

    Weights are those of the layout before they are rounded to their tensors' dtypes, up to the rounding of
    float32.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Decode networks of `layout` on `device`, which then holds one checkpoint in float32."""
        self._layout = layout
        self._constants = {name: value.to(device) for name, value in layout.constants.items()}
        self._offsets = {
            spec.name: torch.as_tensor(offset(spec, layout.centre_of(spec)), dtype=spec.compute_dtype).to(
                device
            )
            for spec in layout.specs
            if spec.tokens
        }

    def __call__(self, tokens: Tensor) -> dict[str, Tensor]:
        """The networks with these tokens.

        Args:
            tokens: normalised values [M, layout.tokens, token_size]; padding has no meaning.

        Returns:
            By name, in the layout's order: float32 (float64 where a tensor has it) [M, *shape]. Tensors that
            are no tokens are the layout's, expanded; tied ones are the same tensor.
        """
        layout, start = self._layout, 0
        stacked: dict[str, Tensor] = {}
        for spec in layout.specs:
            if spec.alias_of is not None:
                stacked[spec.name] = stacked[spec.alias_of]
                continue
            if not spec.tokens:
                constant = self._constants[spec.name]
                stacked[spec.name] = constant.expand(len(tokens), *constant.shape)
                continue
            if layout.cut == TokenCut.flat:
                values = tokens.flatten(1)[:, start : start + spec.numel]
                start += spec.numel
            else:
                rows = tokens[:, spec.first_token : spec.first_token + spec.tokens]
                values = join(rows, spec.numel, values_per_token(spec.shape, layout.token_size, layout.cut))
            weights = values.to(spec.compute_dtype) * spec.scale + self._offsets[spec.name]
            if spec.kind == TensorKind.running_var:
                weights = (weights.exp() - LOG_SHIFT).clamp(min=spec.floor) * spec.pre_mean
            stacked[spec.name] = weights.view(len(tokens), *spec.shape)
        return stacked
