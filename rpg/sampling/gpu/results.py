"""What becomes of a batch that a GPU has sampled: it is decoded there, and copied to the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.collection.tensor_spec import TensorKind
from rpg.collection.tokens import LOG_SHIFT, cut, join, offset
from rpg.config import Normalisation, TokenCut
from rpg.sampling.model_writer import ModelWriter


class TokenDecoder:
    """Token values to weights as `Layout.decode_token` has it, for any tokens at once and on any device.

    Weights are those of the layout before they are rounded to their tensors' dtypes. Running variances may
    differ from the layout's in the last bit, since devices round the exponential differently.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Tables of `layout` on `device`: for residual tokens, a whole checkpoint in float32."""
        tensors = [spec for spec in layout.specs if spec.tokens]
        counts = torch.tensor([spec.tokens for spec in tensors], dtype=torch.int64)

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype).repeat_interleave(counts)[:, None].to(device)

        self._scale = column([spec.scale for spec in tensors])
        self._variance = column([spec.kind == TensorKind.running_var for spec in tensors], torch.bool)
        self._any_variance = any(spec.kind == TensorKind.running_var for spec in tensors)
        self._pre_mean = column([spec.pre_mean for spec in tensors])
        self._floor = column([spec.floor for spec in tensors])
        if layout.normalisation == Normalisation.zscore:
            self._offset = column([spec.mean for spec in tensors])
            return
        self._offset = torch.empty(layout.tokens, layout.token_size, device=device)
        for spec in tensors:
            centre = torch.as_tensor(offset(spec, layout.centre_of(spec)))
            rows = slice(spec.first_token, spec.first_token + spec.tokens)
            self._offset[rows] = cut(centre, layout.token_size).to(device)

    @staticmethod
    def serves(layout: Layout) -> bool:
        """Whether all tensors are computed in float32, and tokens are full but for a tensor's last."""
        if layout.cut != TokenCut.by_tensor:
            return False
        return all(spec.compute_dtype == torch.float32 for spec in layout.specs if spec.tokens)

    def decode(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Weights of the tokens `tokens` (int64 [N]) with `values` [N, token_size]: float32, like `values`.

        What belongs to padding has no meaning.
        """
        # Two roundings, as on the CPU: an addition of its own, no fused multiply-add.
        weights = values.float() * self._scale[tokens]
        weights += self._offset[tokens]
        if not self._any_variance:
            return weights
        variances = torch.maximum(weights.exp().sub_(LOG_SHIFT), self._floor[tokens])
        return torch.where(self._variance[tokens], variances.mul_(self._pre_mean[tokens]), weights)


@dataclass
class SampledWeights:
    """Weights of sampled tokens, float32 [N, token_size], on the host."""

    weights: Tensor
    finite: Tensor
    """Bool [N]: rows without NaN or infinite values."""

    @staticmethod
    def from_gpu(weights: Tensor) -> "SampledWeights":
        """Copy weights [N, token_size] from a GPU; returns when they have arrived."""
        # Copies into pinned memory are the fastest.
        host = torch.empty(weights.shape, dtype=weights.dtype, pin_memory=True)
        return SampledWeights(host.copy_(weights), weights.isfinite().all(1).cpu())

    def __len__(self) -> int:
        return len(self.weights)

    def write(self, rows: slice, file: ModelWriter, first_token: int) -> None:
        """Write `rows`, as `Sampled` describes."""
        file.write_weights(first_token, self.weights[rows], self.finite[rows])

    def models(self, rows: slice, layout: Layout) -> dict[str, Tensor]:
        """Round the weights of the models of `rows`, as `Sampled` describes."""
        weights = self.weights[rows].view(-1, layout.tokens, layout.token_size)
        return {
            spec.name: join(weights[:, spec.first_token : spec.first_token + spec.tokens], spec.numel).to(
                spec.dtype
            )
            for spec in layout.specs
            if spec.tokens
        }
