"""From a ten-class backbone to binary classifiers: where they start, and what they minimise."""

from torch import Tensor
from torch.nn import functional as F


def with_fresh_heads(backbone: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """`count` copies of a backbone, stacked, each with a head of zeros for one output instead of its own.

    Heads of zeros make the networks functions of their tasks that are not simply sums of the backbone's
    class rows (docs/ablations.md).
    """
    features = {name: value for name, value in backbone.items() if not name.startswith("head.")}
    start = {name: value.expand(count, *value.shape) for name, value in features.items()}
    weight = backbone["head.weight"]
    start["head.weight"] = weight.new_zeros(count, 1, weight.shape[1])
    start["head.bias"] = weight.new_zeros(count, 1)
    return start


def unstacked(models: dict[str, Tensor], names: list[str]) -> list[dict[str, Tensor]]:
    """State dicts that are stacked, one by one, on the CPU, with their tensors in the order of `names`."""
    moved = {name: models[name].cpu() for name in names}
    return [{name: moved[name][i].clone() for name in names} for i in range(len(moved[names[0]]))]


def binary_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Mean cross-entropy of each model: logits [M, N, 1] against bool or 0/1 [M, N], to [M]."""
    right = right.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits[..., 0], right, reduction="none").mean(1)


def ten_class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy of each model: logits [M, N, 10] against int64 [M, N], to [M]."""
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes).mean(1)
