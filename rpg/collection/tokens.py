"""From weights to token values and back: normalising a slice of a tensor, and cutting its values into tokens.

token value = (T(w) − offset) / scale. T is the identity except for BatchNorm variances, for which it is
log(v / pre_mean + 0.05), as published (arXiv 2501.11587, released code). The offset is the tensor's mean
(z-score) or T of the collection's centre at the same place (residual). Tokens are rows of equal length,
padded with 0 at the tensor's end.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.collection.tensor_spec import TensorKind, TensorSpec
from rpg.config import TokenCut
from rpg.errors import RPGError

LOG_SHIFT = 0.05
"""Added to v / pre_mean before the logarithm."""


def log_ratio(variances: Tensor, pre_mean: float) -> Tensor:
    """T of a BatchNorm variance: log(v / pre_mean + 0.05), in the dtype of `variances`."""
    return variances.div(pre_mean).add_(LOG_SHIFT).log_()


def from_log_ratio(transformed: Tensor, pre_mean: float, floor: float) -> Tensor:
    """Inverse of `log_ratio`: max(exp(x) − 0.05, floor) · pre_mean, in the dtype of `transformed`."""
    return transformed.exp().sub_(LOG_SHIFT).clamp_(min=floor).mul_(pre_mean)


def normalise(spec: TensorSpec, values: Tensor, centre: Tensor | None) -> Tensor:
    """Token values of a slice of a tensor.

    Args:
        spec: of the tensor.
        values: [n], the slice in weight space.
        centre: [n], the same slice of the centre (residual); None for z-score.

    Returns:
        float32 [n].

    Raises:
        RPGError: naming the tensor, at a negative running variance.
    """
    result = _transform(spec, values) - offset(spec, centre)
    return result.div_(spec.scale).to(torch.float32)


def denormalise(spec: TensorSpec, values: Tensor, centre: Tensor | None) -> Tensor:
    """Inverse of `normalise`: token values [..., n] of any float dtype to weights of the tensor's dtype.

    Each operation rounds separately (no fused multiply-add), so that a weight does not depend on the slice in
    which it is computed.
    """
    result = values.to(spec.compute_dtype) * spec.scale
    result += offset(spec, centre)
    if spec.kind == TensorKind.running_var:
        result = from_log_ratio(result, spec.pre_mean, spec.floor)
    return result.to(spec.dtype)


def offset(spec: TensorSpec, centre: Tensor | None) -> Tensor | float:
    """What is subtracted before values are scaled, and added afterwards: the mean (z-score), or T(centre)."""
    return spec.mean if centre is None else _transform(spec, centre)


def count_tokens(numel: int, token_size: int) -> int:
    """Number of tokens that `numel` values fill."""
    return -(-numel // token_size)


def values_per_token(shape: Sequence[int], token_size: int, cut: TokenCut) -> int:
    """How many of a tensor's values each of its tokens holds; its last one may hold fewer.

    By output channel a token holds as many whole channels (slices along the first dimension) as fit and
    divide the tensor evenly; a channel that is larger than a token is itself cut so. Source: the published
    code of arXiv 2501.11587, "split by output".
    """
    numel = math.prod(shape)
    if cut != TokenCut.by_output_channel:
        return token_size
    while numel > token_size and numel // shape[0] > token_size:
        numel, shape = numel // shape[0], shape[1:]
    if numel <= token_size:
        return max(numel, 1)
    channels, each = shape[0], numel // shape[0]
    held = next(n for n in range(token_size // each, 0, -1) if channels % n == 0)
    return held * each


def cut(values: Tensor, token_size: int, held: int | None = None) -> Tensor:
    """Values [n] as tokens [ceil(n / held), token_size], of which each holds `held` (all), padded with 0."""
    held = held or token_size
    tokens = count_tokens(values.numel(), held)
    rows = torch.nn.functional.pad(values, (0, tokens * held - values.numel())).view(tokens, held)
    return rows if held == token_size else torch.nn.functional.pad(rows, (0, token_size - held))


def join(tokens: Tensor, numel: int, held: int | None = None) -> Tensor:
    """Inverse of `cut`: tokens [..., t, token_size] to the first `numel` values, padding dropped."""
    return tokens[..., :held].flatten(-2)[..., :numel]


def token_lengths(numel: int, token_size: int) -> Tensor:
    """Number of values in each token, int64 [t], if a token holds `token_size` and the last what is left."""
    lengths = torch.full((count_tokens(numel, token_size),), token_size, dtype=torch.int64)
    if len(lengths):
        lengths[-1] = numel - token_size * (len(lengths) - 1)
    return lengths


def _transform(spec: TensorSpec, values: Tensor) -> Tensor:
    result = values.to(spec.compute_dtype)
    if spec.kind != TensorKind.running_var:
        return result
    if bool((result < 0).any()):
        raise RPGError(f"tensor '{spec.name}': expected no negative running variance, found one")
    return log_ratio(result, spec.pre_mean)
