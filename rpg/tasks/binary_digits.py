"""The task family `digits`: a 10-class backbone, and binary classifiers fine-tuned from it side by side.

Side by side means that the parameters of many networks are stacked along a leading dimension, so that one
operation computes them all.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rpg.config import CollectConfig
from rpg.seeds import derived_seed
from rpg.tasks.adam import SideBySideAdam
from rpg.tasks.class_subsets import (
    CLASSES,
    class_labels,
    class_labels_many,
    class_tasks,
    in_set,
    task_name,
)
from rpg.tasks.digits import (
    FIRST_LAYER,
    DigitsNet,
    after_first_layer,
    digits_images,
    digits_patches,
    digits_side_by_side,
    shared_first_layer,
)
from rpg.tasks.families import Asked, Task
from rpg.tasks.fine_tuning import binary_loss, ten_class_loss, unstacked, with_fresh_heads


class BinaryDigits:
    """The task family. scikit-learn contains its images, and its networks are small enough for a CPU."""

    def tasks(self, validation_tasks: int, seed: int) -> list[Task]:
        """The 1,022 tasks (`class_tasks`)."""
        return class_tasks(validation_tasks, seed)

    def task_name(self, condition: Sequence[float]) -> str:
        """The task's id."""
        return task_name(condition)

    def backbone(self, config: CollectConfig, seed: int) -> dict[str, Tensor]:
        """A ten-class `DigitsNet` trained on the training images; its state dict."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "backbone", 0))
            start = DigitsNet(outputs=CLASSES).state_dict()
        train = digits_images()["train"]
        trained = train_side_by_side(
            {name: value[None] for name, value in start.items()},
            digits_side_by_side,
            ten_class_loss,
            digits_patches(train.images),
            train.classes[None],
            seeds=[derived_seed(seed, "backbone order", 0)],
            epochs=config.backbone_epochs,
            batch_size=config.batch_size,
            learning_rate=3e-3,
        )
        return {name: value[0] for name, value in trained.items()}

    def fine_tune(
        self, backbone: dict[str, Tensor], models: list[tuple[Task, int]], config: CollectConfig, seed: int
    ) -> list[dict[str, Tensor]]:
        """Fine-tune binary classifiers from the backbone's convolutions and a fresh head of zeros.

        The first convolution stays the backbone's. That costs no accuracy, and computes it once for all
        models, so that in the same time the rest is trained for longer (docs/ablations.md).

        Args:
            backbone: from `backbone`.
            models: (task, copy) of each model; copies of a task differ in their data order.
            config: epochs, batch size, learning rate.
            seed: of the collection.

        Returns:
            One state dict a model, of `DigitsNet()`.
        """
        train = digits_images()["train"]
        start = with_fresh_heads(backbone, len(models))
        frozen = {name: start.pop(name) for name in FIRST_LAYER}
        trained = train_side_by_side(
            start,
            after_first_layer,
            binary_loss,
            shared_first_layer(backbone, digits_patches(train.images)),
            in_set([task.condition for task, _ in models], train.classes),
            seeds=[derived_seed(seed, f"task {task.name}", copy) for task, copy in models],
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
        )
        return unstacked({**frozen, **trained}, list(DigitsNet().state_dict()))

    def references(self, backbone: dict[str, Tensor], condition: Asked, split: str) -> dict[str, Tensor]:
        """What the ten-class backbone answers: whether its class is in the set, bool [images]."""
        images = digits_images()[split].images
        logits = digits_side_by_side(
            {name: value[None] for name, value in backbone.items()}, digits_patches(images)[None]
        )
        return {"ten-class backbone": class_labels(condition, logits[0].argmax(1))}

    def build_network(self) -> nn.Module:
        """The plain PyTorch network that checkpoints of this family load into."""
        return DigitsNet()

    def labels(self, condition: Asked, split: str) -> Tensor:
        """Whether each image's class is in the set that the condition names, bool [images]."""
        return class_labels(condition, digits_images()[split].classes)

    @torch.no_grad()
    def predict_many(self, models: list[dict[str, Tensor]], split: str, group: int = 64) -> Tensor:
        """The models' answers on a split's images, bool [models, images]; `group` of them at a time."""
        patches = digits_patches(digits_images()[split].images)
        answers = []
        for i in range(0, len(models), group):
            some = models[i : i + group]
            stacked = {name: torch.stack([model[name] for model in some]) for name in some[0]}
            logits = digits_side_by_side(stacked, patches.expand(len(some), *patches.shape))
            answers.append(logits[..., 0] > 0)
        return torch.cat(answers) if answers else torch.zeros(0, len(patches), dtype=torch.bool)

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Training images, their classes, and their patches (`digits_patches`)."""
        train = digits_images()["train"]
        chosen = torch.randint(len(train.images), (size,), generator=random)
        images = train.images[chosen]
        return images, train.classes[chosen], digits_patches(images)

    def outputs_many(self, networks: Mapping[str, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Logits [M, images, 1] of networks, stacked."""
        parameters, count = dict(networks), len(networks["head.weight"])
        if any(parameters[name].stride(0) for name in FIRST_LAYER):
            return digits_side_by_side(parameters, batch[2].expand(count, *batch[2].shape))
        # One layer, expanded: the networks share it.
        first = {name: parameters[name][0] for name in FIRST_LAYER}
        shared = shared_first_layer(first, batch[2])
        return after_first_layer(parameters, shared.expand(count, *shared.shape))

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor, Tensor], condition: Asked) -> Tensor:
        """Mean cross-entropy of logits [images, 1]."""
        return self.loss_many(outputs[None], batch, [condition])[0]

    def loss_many(
        self, outputs: Tensor, batch: tuple[Tensor, Tensor, Tensor], conditions: Sequence[Asked]
    ) -> Tensor:
        """Mean cross-entropy [M] of logits [M, images, 1]."""
        return binary_loss(outputs, class_labels_many(conditions, batch[1]))


def train_side_by_side(
    parameters: dict[str, Tensor], forward: Callable[[dict[str, Tensor], Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor,
    seeds: list[int], epochs: int, batch_size: int, learning_rate: float,
) -> dict[str, Tensor]:  # fmt: skip
    """Minimise the loss of each of M models with Adam (warm-up, then a half cosine).

    A model's result depends only on its own start, targets and seed, up to the rounding of sums.

    Args:
        parameters: starting points, every tensor with a leading dimension M.
        forward: (parameters, inputs [M, batch, ...]) to outputs [M, batch, ...].
        loss: (outputs, targets [M, batch]) to losses [M].
        inputs: [N, ...], shared by all models.
        targets: [M, N].
        seeds: M seeds, each for one model's data order.
        epochs: passes over the data.
        batch_size: samples a step and model; the rest of an epoch is dropped.
        learning_rate: at its peak.

    Returns:
        The trained parameters.
    """
    weights = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    leaves = list(weights.values())
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    count = len(inputs)
    batch_size = min(batch_size, count)
    batches = count // batch_size
    adam = SideBySideAdam(leaves, learning_rate, epochs * batches)
    rows = torch.arange(len(seeds))[:, None]
    for _ in range(epochs):
        order = torch.stack([torch.randperm(count, generator=generator) for generator in generators])
        for batch in torch.split(order[:, : batches * batch_size], batch_size, dim=1):
            # In the gradient of the sum, each model has the gradient of its own loss.
            total = loss(forward(weights, inputs[batch]), targets[rows, batch]).sum()
            adam.step(torch.autograd.grad(total, leaves))
    return {name: value.detach() for name, value in weights.items()}
