"""Bringing the hidden units of one network into the order of another's (Git Re-Basin, arXiv 2209.04836).

Networks that were trained from different initial weights may compute alike with their units in another order.
Weight matching (algorithm 1 of the paper) permutes them such that the weights correlate most with those of
the other network, one group of axes after another, until nothing changes. What the network computes stays the
same.
"""

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rpg.collection.permutation_groups import AxisOfTensor, PermutationGroup
from rpg.errors import RPGError

_MOST_PASSES = 100


def permuted(
    state_dict: Mapping[str, Tensor], groups: Sequence[PermutationGroup], orders: Sequence[Tensor]
) -> dict[str, Tensor]:
    """A checkpoint whose units are in another order.

    Args:
        state_dict: of a network with these groups.
        groups: of axes (`rpg.collection.permutation_groups`).
        orders: of each group's units, int64 [size]: place i gets the unit `order[i]`.
    """
    result = dict(state_dict)
    for group, order in zip(groups, orders, strict=True):
        for axis in group.axes:
            result[axis.tensor] = _permuted(result[axis.tensor], axis, order)
    return result


def aligned(
    state_dict: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    groups: Sequence[PermutationGroup],
    matched: Sequence[str],
    seed: int,
) -> dict[str, Tensor]:
    """A checkpoint with its units in the order in which its weights are most like those of `reference`.

    Args:
        state_dict: of a network with these groups.
        reference: another checkpoint of this network.
        groups: of axes (`rpg.collection.permutation_groups`).
        matched: names of the tensors that are compared: the parameters. Buffers are permuted with them.
        seed: of the order in which groups take their turns.

    Returns:
        Tensors of the same names, shapes and types.

    Raises:
        RPGError: naming the tensor that one of the checkpoints lacks, or that has another shape.
    """
    for group in groups:
        for axis in group.axes:
            for checkpoint in (state_dict, reference):
                value = checkpoint.get(axis.tensor)
                if value is None or value.shape[axis.dimension] != group.size * axis.block:
                    raise RPGError(
                        f"tensor '{axis.tensor}': not the one of the network whose units are aligned"
                    )
    orders = [torch.arange(group.size) for group in groups]
    current = {axis.tensor: state_dict[axis.tensor].float() for group in groups for axis in group.axes}
    target = {name: reference[name].float() for name in current}
    names = set(matched)
    random = torch.Generator().manual_seed(seed)
    for _ in range(_MOST_PASSES):
        changed = False
        for index in torch.randperm(len(groups), generator=random).tolist():
            group = groups[index]
            axes = [axis for axis in group.axes if axis.tensor in names]
            likeness = torch.zeros(group.size, group.size, dtype=torch.float64)
            for axis in axes:
                rows = [_rows(checkpoint[axis.tensor], axis, group.size) for checkpoint in (target, current)]
                likeness += (rows[0] @ rows[1].T).double()
            before = likeness.trace()
            _, best = linear_sum_assignment(likeness.numpy(), maximize=True)
            order = torch.from_numpy(best)
            gained = likeness[torch.arange(group.size), order].sum() - before
            # Rounding alone must not keep it going.
            if gained <= 1e-9 * likeness.abs().sum() / group.size:
                continue
            changed = True
            orders[index] = orders[index][order]
            for axis in group.axes:
                current[axis.tensor] = _permuted(current[axis.tensor], axis, order)
        if not changed:
            break
    return permuted(state_dict, groups, orders)


def _permuted(value: Tensor, axis: AxisOfTensor, order: Tensor) -> Tensor:
    places = (order[:, None] * axis.block + torch.arange(axis.block)).flatten()
    return value.index_select(axis.dimension, places.to(value.device))


def _rows(value: Tensor, axis: AxisOfTensor, size: int) -> Tensor:
    """What belongs to each unit, [size, values]."""
    return value.movedim(axis.dimension, 0).reshape(size, -1)
