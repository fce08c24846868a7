"""Checkpoints along the last epoch of one training run.

In all epochs but the last, the learning rate goes up and down again (one cycle). In the last epoch it stays
where the cycle ends. The checkpoints are taken in the last epoch, equal numbers of steps apart. So they are
different networks of about equal quality, and all are fully trained.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from rpg.errors import RPGError, one_line
from rpg.seeds import derived_seed
from rpg.storage.files import replacing_file
from rpg.tasks.images.image_set import Colours, Images
from rpg.tasks.shared_batches import batches

_MOMENTUM = 0.9
_BETAS = (0.9, 0.99)
_LARGEST_GRADIENT = 1.0
"""Norm to which AdamW's gradients are clipped."""
_WARMUP_SHARE = 0.25
"""Share of the cycle in which the learning rate grows."""


class Update(StrEnum):
    """What changes the weights: SGD with Nesterov's momentum, or AdamW with clipped gradients."""

    sgd = "sgd"
    adamw = "adamw"


@dataclass(frozen=True)
class Recipe:
    """How the network is trained on cross-entropy."""

    epochs: int = 26
    """Passes over the images, at least 2; checkpoints are taken during the last."""
    batch_size: int = 450
    """Images a step; the rest of an epoch is dropped."""
    peak_learning_rate: float = 0.4
    last_learning_rate: float = 0.01
    """The learning rate where the cycle starts and ends, and in the last epoch."""
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    checkpoints: int = 50
    save_every: int = 5
    """Epochs between saved states, from which a killed run resumes."""
    update: Update = Update.sgd


def train_along(
    network: nn.Module, images: Images, colours: Colours, recipe: Recipe, seed: int, state: Path
) -> Iterator[str | dict[str, Tensor]]:
    """Train `network`, or resume from the file `state`.

    Args:
        network: on the images' device, freshly initialised; it is trained.
        images: to train on; augmented as `rpg.tasks.shared_batches.augmented` does.
        colours: by which they are normalised for the network.
        recipe: how to train.
        seed: of the order of images and their augmentation; a GPU and a CPU draw different ones.
        state: file from which a killed run goes on at its last saved epoch, with the same images in the same
            order. It is written meanwhile and not removed.

    Yields:
        After each epoch, in one line, how far training is. In the last epoch the checkpoints, in order; they
        are the network's own tensors, which the next step changes.

    Raises:
        RPGError: if an epoch has too few steps, or the file `state` cannot be read or written.
    """
    count, last = len(images.classes), recipe.epochs - 1
    steps = count // recipe.batch_size
    apart = steps // recipe.checkpoints
    if not apart:
        raise RPGError(
            f"{count} images in batches of {recipe.batch_size}: expected at least {recipe.checkpoints} "
            f"steps an epoch, one a checkpoint, got {steps}"
        )
    training = _Training.start(network, recipe, last * steps, {"seed": seed, "images": count})
    if state.exists():
        training.load(state)
    while training.epoch <= last:
        losses = []
        order = derived_seed(seed, "order along training", training.epoch)
        for step, (pixels, classes) in enumerate(batches(images, order, 1, recipe.batch_size)):
            losses.append(training.step(colours.normalised(pixels), classes))
            if training.epoch < last:
                training.schedule.step()
                continue
            # Steps are counted from the end, so that the last network is a checkpoint.
            place, too_early = divmod(steps - 1 - step, apart)
            if not too_early and place < recipe.checkpoints:
                yield network.state_dict()
        training.epoch += 1
        if training.epoch == last or (training.epoch < last and training.epoch % recipe.save_every == 0):
            training.save(state)
        yield f"epoch {training.epoch}/{recipe.epochs}, loss {float(torch.stack(losses).mean()):.4f}"


@dataclass
class _Training:
    """The state that a step changes."""

    network: nn.Module
    optimiser: Optimizer
    schedule: OneCycleLR
    recipe: Recipe
    made_by: dict[str, Any]
    """Recipe, seed and number of images. A saved state of other ones is ignored."""
    epoch: int = 0
    """Finished epochs."""

    @classmethod
    def start(
        cls, network: nn.Module, recipe: Recipe, cycle_steps: int, source: dict[str, int]
    ) -> "_Training":
        optimiser: Optimizer
        rates: dict[str, Any] = {"lr": recipe.last_learning_rate, "weight_decay": recipe.weight_decay}
        if recipe.update == Update.sgd:
            optimiser = SGD(network.parameters(), momentum=_MOMENTUM, nesterov=True, **rates)
        else:
            optimiser = AdamW(network.parameters(), betas=_BETAS, **rates)
        # The step after the cycle sets the last epoch's rate.
        schedule = OneCycleLR(
            optimiser,
            recipe.peak_learning_rate,
            total_steps=cycle_steps + 1,
            pct_start=_WARMUP_SHARE,
            cycle_momentum=False,
            div_factor=recipe.peak_learning_rate / recipe.last_learning_rate,
            final_div_factor=1.0,
        )
        return cls(
            network, optimiser, schedule, recipe, {**asdict(recipe), **source, "update": recipe.update.value}
        )

    def step(self, inputs: Tensor, classes: Tensor) -> Tensor:
        """Take one step and return the detached loss. Products are in bfloat16 on a GPU, else in float32."""
        self.network.train()
        device = inputs.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            logits = self.network(inputs)
            loss = F.cross_entropy(logits, classes, label_smoothing=self.recipe.label_smoothing)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        if self.recipe.update == Update.adamw:
            nn.utils.clip_grad_norm_(self.network.parameters(), _LARGEST_GRADIENT)
        self.optimiser.step()
        return loss.detach()

    def save(self, path: Path) -> None:
        state = {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "made_by": self.made_by,
            "epoch": self.epoch,
        }
        with replacing_file(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if state["made_by"] != self.made_by:
                return
            self.network.load_state_dict(state["network"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.schedule.load_state_dict(state["schedule"])
            self.epoch = int(state["epoch"])
        except Exception as error:
            reason = one_line(error)[:200]
            raise RPGError(f"{path}: cannot be resumed from: {reason}") from error
