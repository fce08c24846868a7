"""What a training step sees: a pure function of (seed, step), so that a resumed run sees the same.

Every row, one checkpoint's tokens, has random numbers of its own: a worker draws those of its rows alone, and
together the workers see the batch that one would see.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from rpg.collection.retokenised import AnyShards
from rpg.config import TrainConfig
from rpg.seeds import derived_seed
from rpg.training.workers import Workers


@dataclass
class Batch:
    """The tokens of one step and the noise that they meet; see `Generator.loss` for the fields."""

    tokens: Tensor
    mask: Tensor
    indices: Tensor
    condition: Tensor
    t: Tensor
    noise: Tensor
    dropped: Tensor | None

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [value for value in vars(self).values() if value is not None]


class BatchSource:
    """Draws batches from a sharded collection; reads the sampled tokens and no others.

    Tokens go to a GPU as they are stored and become float32 there, and so does the mask come about: less
    traffic for tokens of 16 bits, and less work for the processor.
    """

    def __init__(
        self,
        shards: AnyShards,
        conditions: Tensor,
        config: TrainConfig,
        seed: int,
        timesteps: int,
        condition_dropout: float,
        workers: Workers,
        device: torch.device,
    ) -> None:
        """Draw from `shards`.

        Args:
            shards: the training checkpoints.
            conditions: one row a checkpoint, as the generator's condition takes it.
            config: batch sizes, of all workers together.
            seed: of the run.
            timesteps: of the diffusion.
            condition_dropout: share of conditions to drop.
            workers: whose rows to draw.
            device: of the batches. It draws the noise, by far the most of the random numbers; kinds of device
                draw different ones.

        Raises:
            RPGError: if there are fewer rows than workers.
        """
        self.shards = shards
        self.conditions = conditions
        self.seed = seed
        self.timesteps = timesteps
        self.condition_dropout = condition_dropout
        self.checkpoints_per_step = config.checkpoints_per_step
        self.tokens_per_checkpoint = min(config.tokens_per_checkpoint, shards.layout.tokens)
        self.lengths = shards.layout.lengths().int()
        self.rows = workers.rows(config.checkpoints_per_step)
        self.device = device
        self.on_gpu = device.type == "cuda"

    def batch(self, step: int) -> Batch:
        """This worker's rows of the batch of step number `step`, on the source's device.

        A GPU may still be fetching them in its current stream.
        """
        random = torch.Generator().manual_seed(derived_seed(self.seed, "step", step))
        count, rows = self.checkpoints_per_step, slice(self.rows.start, self.rows.stop)
        checkpoints = self._checkpoints(step)[rows]
        # One timestep a checkpoint, stratified over the batch: an even spread of noise levels at every step.
        level = (torch.arange(count) + torch.rand(count, generator=random)) / count
        t = (level * self.timesteps).long().clamp(max=self.timesteps - 1)[rows]
        dropped = None
        if self.condition_dropout:
            dropped = (torch.rand(count, generator=random) < self.condition_dropout)[rows]
        indices = torch.stack([self._order(step * count + row) for row in self.rows])
        stored = self.shards.read_batch(checkpoints.tolist(), indices.numpy(), pinned=self.on_gpu)
        tokens = stored.to(self.device, non_blocking=True).float()
        lengths = self._moved(self.lengths[indices])
        places = torch.arange(tokens.shape[-1], dtype=torch.int32, device=self.device)
        mask = places < lengths[..., None]
        noise = torch.empty(tokens.shape, device=self.device)
        for target, row in zip(noise, self.rows, strict=True):
            own = torch.Generator(self.device)
            own.manual_seed(derived_seed(self.seed, "noise", step * count + row))
            torch.randn(target.shape, generator=own, out=target)
        return Batch(
            tokens,
            mask,
            self._moved(indices),
            self._moved(self.conditions[checkpoints]),
            self._moved(t),
            noise,
            None if dropped is None else self._moved(dropped),
        )

    def _moved(self, values: Tensor) -> Tensor:
        if not self.on_gpu:
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def _order(self, row: int) -> Tensor:
        """Which tokens of its checkpoint a row holds; rows are counted through all steps."""
        random = torch.Generator().manual_seed(derived_seed(self.seed, "tokens", row))
        return torch.randperm(self.shards.layout.tokens, generator=random)[: self.tokens_per_checkpoint]

    def _checkpoints(self, step: int) -> Tensor:
        """Checkpoints of a step: consecutive places in an endless row of shuffled epochs."""
        total = len(self.shards)
        places = step * self.checkpoints_per_step + torch.arange(self.checkpoints_per_step)
        epochs = places // total
        chosen = [
            epoch_order(self.seed, int(epoch), total)[places[epochs == epoch] % total]
            for epoch in torch.unique(epochs)
        ]
        checkpoints = torch.cat(chosen)
        shuffle = torch.Generator().manual_seed(derived_seed(self.seed, "order", step))
        return checkpoints[torch.randperm(len(checkpoints), generator=shuffle)]


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, total: int) -> Tensor:
    """The order of `total` checkpoints in an epoch, int64 [total]."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
    return torch.randperm(total, generator=generator)
