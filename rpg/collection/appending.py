"""Whether a checkpoint that no layout was computed from can be stored with it, without any loss."""

from collections.abc import Mapping

from torch import Tensor

from rpg.collection.layout import Layout
from rpg.collection.state_dicts import check_structure, check_ties, same_bits
from rpg.collection.tensor_spec import TensorKind
from rpg.config import Normalisation
from rpg.errors import RPGError


def check_fits(layout: Layout, state_dict: Mapping[str, Tensor]) -> None:
    """Check that `layout.decode` gives back all that a layout made with this checkpoint would give back.

    Integer tensors may differ from the layout's, and of z-score everything may that is not tokens: these are
    never stored, whatever the collection.

    Raises:
        RPGError: naming the tensor, if names, shapes or dtypes differ from the layout's, if tensors that are
            tied there differ, if a running variance is below the smallest that comes back, or if values
            differ that are equal in all checkpoints that the layout was made from.
    """
    check_structure(state_dict, {spec.name: (spec.shape, spec.dtype) for spec in layout.specs})
    check_ties(state_dict, [(spec.name, spec.alias_of) for spec in layout.specs if spec.alias_of is not None])
    if layout.normalisation != Normalisation.residual:
        return
    for spec in layout.specs:
        tensor = state_dict[spec.name]
        if spec.alias_of is not None or not spec.dtype.is_floating_point or not spec.numel:
            continue
        if spec.kind == TensorKind.constant and not same_bits(layout.centre[spec.name], tensor):
            raise RPGError(
                f"tensor '{spec.name}': expected the values that all earlier checkpoints have, found others"
            )
        if spec.kind == TensorKind.running_var:
            smallest, floor = float(tensor.min()), spec.floor * spec.pre_mean
            if smallest / spec.pre_mean < spec.floor:
                raise RPGError(
                    f"tensor '{spec.name}': expected running variances of at least {floor:g}, "
                    f"the smallest of the earlier checkpoints, found {smallest:g}"
                )
