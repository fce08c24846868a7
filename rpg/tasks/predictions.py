"""What many networks of a task family answer on fixed inputs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from rpg.errors import RPGError
from rpg.tasks.families import calling

_SIDE_BY_SIDE = 16
"""Most networks that `torch.func.vmap` runs at once. Their weights are there twice, alone and stacked."""
_BYTES_SIDE_BY_SIDE = 2**28
"""Most bytes of weights of networks that run at once; one may be larger."""


@torch.no_grad()
def load_network(family: Any, name: str, network: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Put a checkpoint into a network, and the network into evaluation mode.

    Raises:
        RPGError: if it does not fit.
    """
    with calling(name, "load"):
        if callable(getattr(family, "load", None)):
            family.load(network, state_dict)
        else:
            network.load_state_dict(state_dict, strict=True)
    network.eval()


@torch.no_grad()
def predict_all(family: Any, name: str, state_dicts: Sequence[dict[str, Tensor]], split: str) -> Tensor:
    """The networks' answers on a split's inputs, [networks, inputs], on the CPU.

    A family's own `predict_many` computes them, or else `predict`: for many networks at once by
    `torch.func.vmap`, where that gives the first network the answers that it gives alone, and otherwise one
    after the other.

    Raises:
        RPGError: if the family's code fails, or answers in another shape.
    """
    if callable(getattr(family, "predict_many", None)):
        with calling(name, "predict_many"):
            answers = family.predict_many([_float32(state_dict) for state_dict in state_dicts], split)
        return _checked(answers, (len(state_dicts), None), f"{name}: predict_many")
    rows: list[Tensor] = []
    step = _networks_at_once(state_dicts)
    side_by_side = step > 1 and not callable(getattr(family, "load", None))
    for start in range(0, len(state_dicts), step):
        some = state_dicts[start : start + step]
        together = _predict_side_by_side(family, some, split) if side_by_side else None
        if together is not None and not rows:
            alone = _predict_alone(family, name, some[0], split)
            together = together if together.shape[1:] == alone.shape and together[0].equal(alone) else None
        side_by_side = together is not None
        rows += (
            together if together is not None else [_predict_alone(family, name, each, split) for each in some]
        )
    return torch.stack(rows)


def _networks_at_once(state_dicts: Sequence[dict[str, Tensor]]) -> int:
    largest = max(sum(value.nbytes for value in each.values()) for each in state_dicts)
    return max(1, min(len(state_dicts), _SIDE_BY_SIDE, _BYTES_SIDE_BY_SIDE // max(1, largest)))


def _float32(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint that `load_state_dict` would leave in a network of float32."""
    return {n: value.float() if value.is_floating_point() else value for n, value in state_dict.items()}


def _predict_alone(family: Any, name: str, state_dict: dict[str, Tensor], split: str) -> Tensor:
    with calling(name, "build_network"):
        network = family.build_network()
    load_network(family, name, network, state_dict)
    with calling(name, "predict"):
        answers = family.predict(network, split)
    return _checked(answers, (None,), f"{name}: predict")


def _predict_side_by_side(family: Any, state_dicts: Sequence[dict[str, Tensor]], split: str) -> Tensor | None:
    """[networks, inputs], or None where `vmap` cannot run the family's code."""
    try:
        networks = [family.build_network().eval() for _ in state_dicts]
        for network, state_dict in zip(networks, state_dicts, strict=True):
            network.load_state_dict(state_dict, strict=True)
        stacked = stack_module_state(networks)
        answers = vmap(lambda state: family.predict(WithState(networks[0], state), split))(stacked)
        return _checked(answers, (len(state_dicts), None), "predict")
    # Code that branches on values, or changes its network, fails in many ways. It is then run as it is.
    except Exception:
        return None


class WithState(nn.Module):
    """A network with other parameters and buffers. It has no parameters of its own that code could look
    at."""

    def __init__(self, network: nn.Module, state: Any) -> None:
        """`network` with `state`, tensors by name as `torch.func.functional_call` takes them."""
        super().__init__()
        self.eval()
        # As a list it is not registered: its own weights are none of this network's.
        self._of = [network]
        self._state = state

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The network's output."""
        return functional_call(self._of[0], self._state, inputs, named)


def _checked(answers: Any, shape: tuple[int | None, ...], what: str) -> Tensor:
    fits = isinstance(answers, Tensor) and answers.ndim == len(shape)
    if not fits or any(want not in (None, got) for want, got in zip(shape, answers.shape, strict=True)):
        wanted = ", ".join("inputs" if size is None else str(size) for size in shape)
        got = list(answers.shape) if isinstance(answers, Tensor) else type(answers).__name__
        raise RPGError(f"{what}: expected a tensor [{wanted}], got {got}")
    checked: Tensor = answers.detach().cpu()
    return checked
