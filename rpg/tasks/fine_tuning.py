"""From a ten-class backbone to binary classifiers: their starting points and losses."""

from torch import Tensor
from torch.nn import functional as F


def with_fresh_heads(backbone: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """`count` stacked copies of a backbone, each with a new head of zeros for one output.

    A head that started as the sum of the backbone's rows for the task's classes would make the networks a
    simple function of their tasks (docs/ablations.md).
    """
    features = {name: value for name, value in backbone.items() if not name.startswith("head.")}
    start = {name: value.expand(count, *value.shape) for name, value in features.items()}
    weight = backbone["head.weight"]
    start["head.weight"] = weight.new_zeros(count, 1, weight.shape[1])
    start["head.bias"] = weight.new_zeros(count, 1)
    return start


def unstacked(models: dict[str, Tensor], names: list[str]) -> list[dict[str, Tensor]]:
    """The single state dicts of stacked ones, on the CPU, with their tensors in the order of `names`."""
    moved = {name: models[name].cpu() for name in names}
    return [{name: moved[name][i].clone() for name in names} for i in range(len(moved[names[0]]))]


def binary_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Mean cross-entropy of each model: logits [M, N, 1] against bool or 0/1 [M, N], to [M]."""
    right = right.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits[..., 0], right, reduction="none").mean(1)


def ten_class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy of each model: logits [M, N, 10] against int64 [M, N], to [M]."""
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes).mean(1)
