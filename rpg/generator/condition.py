"""Conditions: what the user asks for, as a vector added to every position's embedding (arXiv 2501.11587)."""

import torch
from torch import Tensor, nn

from rpg.config import ConditionConfig, ConditionKind
from rpg.errors import RPGError


class VectorCondition(nn.Module):
    """A class vector or an embedding through an MLP.

    Inputs are standardised by the training conditions' mean and standard deviation, kept as buffers. With
    dropout, a learned vector stands for "no condition" (classifier-free guidance, arXiv 2207.12598).

    With permutation states a condition's last value is the number of one. Checkpoints of one state share the
    random choices of their training, such as the order of the data. Given their prototypes, tokens are drawn
    independently of each other, so the prototypes have to carry what such a choice did to all tokens
    together.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int, hidden: int, width: int, states: int = 0) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.mlp = nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.null = nn.Parameter(torch.zeros(width))
        self.state = nn.Embedding(states, hidden) if states else None
        if self.state is not None:
            # The scale of what the first layer makes of a standardised value.
            nn.init.normal_(self.state.weight, std=size**-0.5)

    def fit(self, conditions: Tensor) -> None:
        """Take the standardisation from the training conditions [checkpoints, size]."""
        # In float32 a column of equal values would get a deviation other than zero, from rounding.
        exact = conditions.double()
        mean, deviation = exact.mean(0), exact.std(0, correction=0)
        varies = (conditions != conditions[0]).any(0)
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, deviation, torch.ones_like(deviation)))

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed `condition` as [B, width]; rows with `dropped` [B] true become the null vector.

        `condition` is [B, size], or with permutation states [B, size + 1].
        """
        hidden: Tensor = self.mlp[0]((condition[:, : self.size] - self.mean) / self.scale)
        if self.state is not None:
            hidden = hidden + self.state(condition[:, self.size].long())
        embedding: Tensor = self.mlp[1:](hidden)
        if dropped is None:
            return embedding
        return torch.where(dropped[:, None], self.null, embedding)


class PermutationState(nn.Module):
    """A learned embedding per training checkpoint, sampled at generation (arXiv 2501.11587)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size, width)

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed the states `condition` (int64 [B]) as [B, width]; dropped ones become zero."""
        embedding: Tensor = self.embedding(condition)
        if dropped is None:
            return embedding
        return embedding * ~dropped[:, None]


class NoCondition(nn.Module):
    """Nothing is asked for: every model comes from the same prototypes."""

    size = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Zeros [B, width] for any `condition` of B rows."""
        return torch.zeros(len(condition), self.width, device=condition.device)


def build_condition(config: ConditionConfig, width: int) -> VectorCondition | PermutationState | NoCondition:
    """The condition's embedding of `width`, by kind.

    Raises:
        RPGError: if the kind needs `config.size` and it is not set, or `config.states` is not set.
    """
    if config.kind == ConditionKind.none:
        return NoCondition(width)
    if config.size < 1:
        raise RPGError(f"condition.size: expected at least 1 for kind '{config.kind}', got {config.size}")
    if config.kind == ConditionKind.permutation:
        return PermutationState(config.size, width)
    if config.states < 0:
        raise RPGError(f"condition.states: expected at least 0, got {config.states}")
    return VectorCondition(config.size, config.width, width, config.states)
