"""The loss of many networks in their own tasks, in a way that gradients flow back to their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm

from rpg.errors import RPGError
from rpg.tasks.families import Asked, calling
from rpg.tasks.predictions import WithState

_TOLERANCE = 1e-3
"""What outputs may differ by, relative to the largest, if networks run side by side instead of alone."""


@dataclass(frozen=True)
class TrainingTasks:
    """The tasks that networks are made for: those of the training checkpoints, each once.

    Attributes:
        conditions: float32 [tasks, size]; None where the generator takes no vector, and there is one task.
        asked: what the family is told of each.
    """

    conditions: Tensor | None
    asked: list[Asked]


class TaskLoss:
    """Runs networks of a family on training data, all on the same, and says how well they do.

    Networks run in evaluation mode: BatchNorm takes the running statistics that they bring.

    Attributes:
        device: where networks run, and the data lie.
    """

    def __init__(self, family: Any, name: str, device: torch.device) -> None:
        """Use `family`, which computes on `device`, and which `name` names in messages.

        Raises:
            RPGError: if it has no methods `batch` and `loss`.
        """
        if not can_train(family):
            raise RPGError(
                f"tasks: '{name}' has no methods batch and loss, through which a generator could be refined; "
                "without: refine.steps=0"
            )
        self.device = device
        self._family = family
        self._name = name
        self._side_by_side: bool | None = None
        with calling(name, "build_network"):
            self._network = family.build_network().eval()
        for module in self._network.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.__class__ = _GivenStatistics

    def batch(self, size: int, random: torch.Generator) -> Any:
        """Training data of one step: about `size` samples, drawn by `random`."""
        with calling(self._name, "batch"):
            return self._family.batch(size, random)

    def outputs(self, networks: Mapping[str, Tensor], batch: Any) -> Tensor:
        """What M networks answer on the data, [M, samples, ...].

        Args:
            networks: their tensors by name, [M, *shape] each.
            batch: from `batch`.

        Raises:
            RPGError: if the family's code fails, or answers in another shape.
        """
        if callable(getattr(self._family, "outputs_many", None)):
            with calling(self._name, "outputs_many"):
                return self._checked(self._family.outputs_many(networks, batch), networks)
        if self._side_by_side is None:
            self._side_by_side = self._can_run_side_by_side(networks, batch)
        if self._side_by_side:
            return self._checked(vmap(lambda one: self._outputs(one, batch))(dict(networks)), networks)
        count = len(next(iter(networks.values())))
        with calling(self._name, "outputs"):
            each = [
                self._outputs({name: value[i] for name, value in networks.items()}, batch)
                for i in range(count)
            ]
        return self._checked(torch.stack(each), networks)

    def losses(self, outputs: Tensor, batch: Any, conditions: Sequence[Asked]) -> Tensor:
        """The mean loss of M networks with these outputs, asked for `conditions`, [M].

        Raises:
            RPGError: if the family's code fails, or returns another shape.
        """
        if callable(getattr(self._family, "loss_many", None)):
            with calling(self._name, "loss_many"):
                losses = self._family.loss_many(outputs, batch, conditions)
        else:
            with calling(self._name, "loss"):
                losses = torch.stack(
                    [
                        torch.as_tensor(self._family.loss(each, batch, condition))
                        for each, condition in zip(outputs, conditions, strict=True)
                    ]
                )
        if losses.shape != (len(outputs),):
            raise RPGError(
                f"{self._name}: loss: expected one number for each network, got shape {list(losses.shape)}"
            )
        checked: Tensor = losses
        return checked

    def _outputs(self, state: dict[str, Tensor], batch: Any) -> Tensor:
        network = WithState(self._network, state)
        if callable(getattr(self._family, "outputs", None)):
            result: Tensor = self._family.outputs(network, batch)
        else:
            result = network(batch[0])
        return result

    @torch.no_grad()
    def _can_run_side_by_side(self, networks: Mapping[str, Tensor], batch: Any) -> bool:
        two = {name: value[:2] for name, value in networks.items()}
        try:
            together = vmap(lambda one: self._outputs(one, batch))(two)[0]
        # Code that branches on values fails in many ways. Networks then run one after the other.
        except Exception:
            return False
        with calling(self._name, "outputs"):
            alone = self._outputs({name: value[0] for name, value in networks.items()}, batch)
        if together.shape != alone.shape:
            return False
        return bool((together - alone).abs().max() <= _TOLERANCE * alone.abs().max().clamp(min=1e-6))

    def _checked(self, outputs: Any, networks: Mapping[str, Tensor]) -> Tensor:
        count = len(next(iter(networks.values())))
        if not isinstance(outputs, Tensor) or outputs.ndim < 2 or len(outputs) != count:
            got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise RPGError(f"{self._name}: outputs: expected a tensor [{count}, samples, ...], got {got}")
        if not outputs.requires_grad and torch.is_grad_enabled():
            raise RPGError(f"{self._name}: outputs: no gradient flows back from them to the weights")
        return outputs


class _GivenStatistics(_BatchNorm):
    """BatchNorm in evaluation mode, written out: PyTorch's own has no gradient by the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        shape = (1, -1, *[1] * (input.ndim - 2))
        scale = torch.rsqrt(self.running_var + self.eps)
        if self.affine:
            scale = scale * self.weight
        result = (input - self.running_mean.view(shape)) * scale.view(shape)
        return result + self.bias.view(shape) if self.affine else result


def can_train(family: Any) -> bool:
    """Whether generators can be refined through the tasks of a family."""
    return all(callable(getattr(family, method, None)) for method in ("batch", "loss"))
