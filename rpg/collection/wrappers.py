"""What wrappers of modules do to the names of a `state_dict`, undone."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from rpg.errors import RPGError

WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "module": "DataParallel, DistributedDataParallel or AveragedModel",
}
"""The component that a wrapper puts into every name below it, and whose it is."""
_OUTERMOST = "module"
"""A network may have a submodule of this name, so it is a wrapper only where every name begins with it."""
_AVERAGED = "n_averaged"
"""The counter of `torch.optim.swa_utils.AveragedModel`, beside the network that it wraps."""


def unwrapped(
    state_dict: Mapping[str, Tensor], wrappers: Collection[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """The state dict with the names that the network itself gives, and those of `wrappers` that were found.

    Raises:
        RPGError: naming two tensors that have one name without wrappers.
    """
    inner = set(wrappers) - {_OUTERMOST}
    found: set[str] = set()
    names: dict[str, list[str]] = {}
    for name in state_dict:
        parts = name.split(".")
        rest = [part for part in parts if part not in inner]
        names[name] = rest or parts
        found |= inner & set(parts) if rest else set()
    while _OUTERMOST in wrappers and (stripped := _without_outermost(names, state_dict)) is not None:
        names = stripped
        found.add(_OUTERMOST)
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, parts in names.items():
        new = ".".join(parts)
        if new in origin:
            raise RPGError(f"tensors '{origin[new]}' and '{name}' are both '{new}' without their wrappers")
        origin[new] = name
        result[new] = state_dict[name]
    return result, found


def one_sided_prefix(names: Collection[str], others: Collection[str]) -> str | None:
    """The prefix that all `names` have and the otherwise equal `others` lack; None if there is none."""
    if not names or len(names) != len(others):
        return None
    first = min(names)
    known = set(others)
    # The prefix ends with a whole component.
    ends = [i + 1 for i, character in enumerate(first) if character == "."]
    for end in ends:
        prefix = first[:end]
        if all(name.startswith(prefix) and name[end:] in known for name in names):
            return prefix
    return None


def _without_outermost(
    names: Mapping[str, list[str]], state_dict: Mapping[str, Tensor]
) -> dict[str, list[str]] | None:
    counters = [name for name, parts in names.items() if parts == [_AVERAGED]]
    wrapped = {name: parts for name, parts in names.items() if name not in counters}
    if not wrapped or not all(len(parts) > 1 and parts[0] == _OUTERMOST for parts in wrapped.values()):
        return None
    if any(state_dict[name].dim() or state_dict[name].dtype != torch.long for name in counters):
        return None
    return {name: parts[1:] for name, parts in wrapped.items()}
