"""Conditions: what the user asks for, as a vector added to every position's embedding (arXiv 2501.11587).

Every condition is called with the rows of B checkpoints, and for classifier-free guidance with a bool [B] of
those to leave out. It returns [B, 1, width], the same vector for all tokens, or [B, tokens, width].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.config import ConditionConfig, ConditionForm, ConditionKind
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
        """Embed `condition` as [B, 1, width]; rows with `dropped` [B] true become the null vector.

        `condition` is [B, size], or with permutation states [B, size + 1].
        """
        hidden: Tensor = self.mlp[0]((condition[:, : self.size] - self.mean) / self.scale)
        if self.state is not None:
            hidden = hidden + self.state(condition[:, self.size].long())
        embedding: Tensor = self.mlp[1:](hidden)
        if dropped is not None:
            embedding = torch.where(dropped[:, None], self.null, embedding)
        return embedding[:, None]


class GatedCondition(nn.Module):
    """A class vector that reaches the last tokens only, the classifier's (arXiv 2501.11587).

    Source: the published code, which takes the last eight tokens. With permutation states a condition's last
    value is the number of one, whose embedding is added to all tokens.
    """

    def __init__(
        self, size: int, hidden: int, width: int, tokens: int, last_tokens: int, states: int = 0
    ) -> None:
        super().__init__()
        self.size = size
        self.tokens = tokens
        self.last_tokens = min(last_tokens, tokens)
        self.mlp = nn.Sequential(nn.Linear(size, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.state = nn.Embedding(states, width) if states else None

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed `condition`, [B, size] or with states [B, size + 1], as [B, tokens, width]; drops none."""
        embedding: Tensor = self.mlp(condition[:, : self.size])[:, None]
        gated = F.pad(embedding.expand(-1, self.last_tokens, -1), (0, 0, self.tokens - self.last_tokens, 0))
        return _with_state(gated, self.state, condition)


class ConvolutionalCondition(nn.Module):
    """A class vector that becomes another vector for every token: the published code's full variant.

    Its embedding is normalised and widened. A convolution makes a channel of it for each token, and another
    mixes them. States are as in `GatedCondition`.
    """

    def __init__(self, size: int, hidden: int, width: int, tokens: int, states: int = 0) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Sequential(
            nn.Linear(size, hidden), nn.LayerNorm(hidden), nn.Linear(hidden, width)
        )
        self.convolutions = nn.Sequential(
            nn.Conv1d(1, tokens, 9, padding=4),
            nn.GroupNorm(1, tokens),
            nn.Conv1d(tokens, tokens, 9, padding=4),
        )
        self.state = nn.Embedding(states, width) if states else None

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed `condition`, [B, size] or with states [B, size + 1], as [B, tokens, width]; drops none."""
        embedding = self.embedding(condition[:, : self.size])[:, None]
        return _with_state(self.convolutions(embedding), self.state, condition)


def _with_state(embedding: Tensor, state: nn.Embedding | None, condition: Tensor) -> Tensor:
    """Add to [B, tokens, width] the embedding of the state that is the last value of each condition."""
    if state is None:
        return embedding
    added: Tensor = embedding + state(condition[:, -1].long())[:, None]
    return added


class PermutationState(nn.Module):
    """A learned embedding per training checkpoint, sampled at generation (arXiv 2501.11587)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size, width)

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embed the states `condition` (int64 [B]) as [B, 1, width]; dropped ones become zero."""
        embedding: Tensor = self.embedding(condition)
        if dropped is not None:
            embedding = embedding * ~dropped[:, None]
        return embedding[:, None]


class NoCondition(nn.Module):
    """Nothing is asked for: every model comes from the same prototypes."""

    size = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Zeros [B, 1, width] for any `condition` of B rows."""
        return torch.zeros(len(condition), 1, self.width, device=condition.device)


Condition = VectorCondition | GatedCondition | ConvolutionalCondition | PermutationState | NoCondition


def build_condition(config: ConditionConfig, width: int, tokens: int) -> Condition:
    """The condition's embedding of `width` for networks of `tokens` tokens, by kind and form.

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
    match config.form:
        case ConditionForm.mlp:
            return VectorCondition(config.size, config.width, width, config.states)
        case ConditionForm.gated:
            return GatedCondition(config.size, config.width, width, tokens, config.last_tokens, config.states)
        case ConditionForm.convolutional:
            return ConvolutionalCondition(config.size, config.width, width, tokens, config.states)
