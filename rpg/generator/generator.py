"""The generator: condition, recurrent network and denoiser for one layout (arXiv 2501.11587)."""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from rpg.collection.layout import Layout
from rpg.config import ConditionKind, GeneratorConfig, Positions
from rpg.errors import RPGError
from rpg.generator.condition import VectorCondition
from rpg.generator.diffusion import Diffusion
from rpg.generator.embeddings import embedded_positions
from rpg.generator.networks import build_networks
from rpg.generator.saving import PretrainedMixin
from rpg.storage.locations import AnyPath


@dataclass
class Batch:
    """What a loss is computed of: K tokens of each of B checkpoints, and the noise to add to them."""

    tokens: Tensor
    """Float32 [B, K, token_size], padded with 0."""
    mask: Tensor
    """Bool, like `tokens`: true at real values, false at padding."""
    indices: Tensor
    """Int64 [B, K], which tokens of the layout they are."""
    condition: Tensor
    """B rows, one a checkpoint, in the form that the generator's condition takes."""
    t: Tensor
    """Int64 timesteps [B]."""
    noise: Tensor
    """Like `tokens`."""
    dropped: Tensor | None = None
    """Bool [B], conditions to leave out; None: leave out none."""

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch, in the order of its fields."""
        return [value for value in vars(self).values() if value is not None]


class Generator(PretrainedMixin):
    """p(token | its position, condition) for every token of a layout.

    The recurrent network turns position embeddings plus the embedded condition into prototypes; the denoiser
    models each token given its prototype. `save_pretrained` and `from_pretrained` come from
    `PretrainedMixin`.

    Attributes:
        config: what it is built from.
        layout: of the networks that it makes.
        encoder_directory: where its text encoder's files are; None if they are missing, or it has no encoder.
        condition: turns conditions into embeddings; the kinds are in `rpg.generator.condition`.
        recurrent: turns embeddings into prototypes; see `rpg.generator.recurrent`.
        denoiser: predicts what to remove from noised tokens; see `rpg.generator.denoiser`.
        diffusion: the noise schedule.
        positions: float32 [tokens, width], the embeddings of the tokens' places; a parameter if learned.
    """

    positions: Tensor

    def __init__(self, config: GeneratorConfig, layout: Layout) -> None:
        super().__init__()
        self.config = config
        self.layout = layout
        self.encoder_directory: AnyPath | None = None
        self.condition, self.recurrent, self.denoiser = build_networks(
            config, layout.token_size, layout.tokens
        )
        self.diffusion = Diffusion(config.diffusion)
        embedding = embedded_positions(config.recurrent.positions, layout, config.recurrent.width)
        if config.recurrent.positions == Positions.learned:
            self.positions = nn.Parameter(embedding)
        else:
            self.register_buffer("positions", embedding, persistent=False)

    @classmethod
    def for_collection(
        cls,
        config: GeneratorConfig,
        layout: Layout,
        conditions: Tensor | None,
        checkpoints: int,
        encoder: str = "",
        states: Tensor | None = None,
    ) -> "Generator":
        """A fresh generator for a sharded collection.

        Args:
            config: the architecture; sizes that it leaves open are taken from the collection.
            layout: the collection's.
            conditions: [checkpoints, size], or None if the collection has none.
            checkpoints: how many there are.
            encoder: digest of the text encoder that the conditions came from; empty if there is none.
            states: the checkpoints' permutation states, int64 [checkpoints], or None if there are none.

        Raises:
            RPGError: if the condition's kind, size, states or encoder does not fit the collection.
        """
        kind, asked = config.condition.kind, config.condition.size
        if kind == ConditionKind.vector and conditions is None:
            raise RPGError(
                "generator.condition.kind: 'vector' needs a collection with conditions; "
                "this one has none: use 'permutation' or 'none'"
            )
        size = 0
        if kind == ConditionKind.permutation:
            size = checkpoints
        elif kind == ConditionKind.vector:
            assert conditions is not None
            size = conditions.shape[1]
        if asked not in (0, size):
            raise RPGError(f"generator.condition.size: the collection has {size}, got {asked}")
        found = _states_found(config.condition.states, states)
        encoder = encoder if kind == ConditionKind.vector else ""
        if config.condition.encoder not in ("", encoder):
            raise RPGError(
                f"generator.condition.encoder: the collection has '{encoder}', "
                f"got '{config.condition.encoder}'"
            )
        condition = dataclasses.replace(config.condition, size=size, encoder=encoder, states=found)
        config = dataclasses.replace(config, condition=condition)
        generator = cls(config, layout)
        if isinstance(generator.condition, VectorCondition):
            assert conditions is not None
            generator.condition.fit(conditions)
        return generator

    def prototypes(
        self, condition: Tensor, dropped: Tensor | None = None, indices: Tensor | None = None
    ) -> Tensor:
        """Prototypes of the tokens of B checkpoints.

        Args:
            condition: B rows, in the form that the generator's condition takes.
            dropped: bool [B], conditions to leave out; None: leave out none.
            indices: int64 [B, K], tokens whose prototypes are wanted; None: all.

        Returns:
            [B, K or tokens, prototype_width].
        """
        embedded = self.condition(condition, dropped)
        prototypes: Tensor
        prototypes, _ = self.recurrent(self.positions + embedded, keep_state=False, at=indices)
        return prototypes

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the prediction over real values, one value for each checkpoint, [B]."""
        prototypes = self.prototypes(batch.condition, batch.dropped, batch.indices).flatten(0, 1)
        each = batch.t[:, None].expand(batch.indices.shape)
        noised = self.diffusion.diffuse(batch.tokens, batch.noise, each)
        target = self.diffusion.target(batch.tokens, batch.noise, each)
        prediction: Tensor = self.denoiser(noised.flatten(0, 1), batch.t, prototypes).view_as(target)
        error = ((prediction.float() - target) ** 2) * batch.mask
        return error.sum((1, 2)) / batch.mask.sum((1, 2)).clamp(min=1)


def _states_found(asked: int, states: Tensor | None) -> int:
    """The number of permutation states of a generator whose configuration asks for `asked`; -1 asks for all.

    `states` are the collection's, int64 [checkpoints], or None.
    """
    if asked == 0:
        return 0
    if states is None:
        raise RPGError(
            "generator.condition.states: the collection's checkpoints have none; expected 0, or a collection "
            "that is registered with them"
        )
    found = len(states.unique())
    if asked not in (-1, found):
        raise RPGError(f"generator.condition.states: the collection has {found}, got {asked}")
    return found
