"""Task families of CIFAR-10's class subsets: networks of torchvision or timm, fine-tuned side by side.

A network of ten classes is trained first. From it, networks of one output are fine-tuned for the 1,022 tasks
"is the class one of this set?", many at once with their parameters stacked (`torch.func.vmap`). All models of
a call see the same augmented images in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.gpu_compiler import has_gpu_compiler
from rpg.seeds import derived_seed
from rpg.tasks.adam import SideBySideAdam
from rpg.tasks.cifar10_images import CLASSES, check_cifar10, cifar10_images
from rpg.tasks.class_subsets import class_labels, class_labels_many, class_tasks, in_set, task_name
from rpg.tasks.families import Asked, Task
from rpg.tasks.fine_tuning import binary_loss, fine_tuned_by_copy
from rpg.tasks.image_networks import ImageNetworks
from rpg.tasks.shared_batches import batches

BACKBONE_BATCH_SIZE = 512
BACKBONE_LEARNING_RATE = 1e-3


class Cifar10SubsetClassifier(ImageNetworks):
    """A family of one architecture without BatchNorm. On a GPU it trains with bfloat16 products."""

    copies_share_order = True

    def __init__(self, images: str, device: torch.device) -> None:
        """Use CIFAR-10's images in the directory or URI `images`, and compute on `device`."""
        super().__init__(images, device)
        self._skeleton: nn.Module | None = None
        self._answered: tuple[tuple[str, int], Tensor] | None = None
        """The backbone's classes of a split, computed once for all tasks."""

    @property
    def outputs(self) -> int:
        """Outputs of the collection's networks."""
        return 1

    def check(self) -> None:
        """Raise an `RPGError` if CIFAR-10's images are not there, or the network's library is not."""
        check_cifar10(self.directory)
        super().check()

    def tasks(self, validation_tasks: int, seed: int) -> list[Task]:
        """The 1,022 tasks (`class_tasks`)."""
        return class_tasks(validation_tasks, seed)

    def task_name(self, condition: Sequence[float]) -> str:
        """The task's id."""
        return task_name(condition)

    def backbone(self, config: CollectConfig, seed: int) -> dict[str, Tensor]:
        """A network of ten classes trained on the training images; its state dict."""
        recipe = replace(
            self.usual_recipe(),
            epochs=config.backbone_epochs + 1,
            batch_size=BACKBONE_BATCH_SIZE,
            peak_learning_rate=BACKBONE_LEARNING_RATE,
            checkpoints=1,
        )
        with TemporaryDirectory() as scratch:
            yielded = list(self.trained(recipe, seed, Path(scratch) / "state.pt"))
        [last] = [each for each in yielded if not isinstance(each, str)]
        return {name: value.cpu().clone() for name, value in last.items()}

    def fine_tune(
        self, backbone: dict[str, Tensor], models: list[tuple[Task, int]], config: CollectConfig, seed: int
    ) -> list[dict[str, Tensor]]:
        """Fine-tune networks of one output from the backbone and a fresh head of zeros, all layers of them.

        Args:
            backbone: from `backbone`.
            models: (task, copy) of each model; models of one copy share the order of images.
            config: epochs, batch size, learning rate.
            seed: of the collection.

        Returns:
            One state dict a model, on the CPU.
        """
        network = self.build_network().to(self.device)

        def train(conditions: list[list[float]], copy: int) -> dict[str, Tensor]:
            start, order = stacked_from(network, backbone, len(conditions)), "fine-tuning order"
            return self._fine_tuned(network, start, conditions, config, derived_seed(seed, order, copy))

        return fine_tuned_by_copy(models, list(network.state_dict()), train)

    def _fine_tuned(
        self,
        network: nn.Module,
        weights: dict[str, Tensor],
        conditions: list[list[float]],
        config: CollectConfig,
        seed: int,
    ) -> dict[str, Tensor]:
        """Weights with a leading dimension, one for each condition, after training."""
        images, dtype = self.images("train"), self._products()
        leaves = [value.requires_grad_() for value in weights.values()]
        steps = config.epochs * (len(images.classes) // config.batch_size)
        if not steps:
            raise RPGError(
                f"collect.batch_size: expected at most the {len(images.classes)} training images, "
                f"got {config.batch_size}"
            )
        adam = SideBySideAdam(leaves, config.learning_rate, steps)

        def total_loss(weights: dict[str, Tensor], inputs: Tensor, right: Tensor) -> Tensor:
            logits = stacked_logits(network, weights, inputs, dtype)
            # In the gradient of the sum, each model has the gradient of its own loss.
            return binary_loss(logits.float(), right).sum()

        compute: Callable[..., Tensor] = total_loss
        if self.device.type == "cuda" and has_gpu_compiler():
            compute = torch.compile(total_loss, dynamic=False)
        for pixels, classes in batches(images, seed, config.epochs, config.batch_size):
            loss = compute(weights, self.inputs(pixels), in_set(conditions, classes))
            adam.step(torch.autograd.grad(loss, leaves))
        return {name: value.detach() for name, value in weights.items()}

    def references(self, backbone: dict[str, Tensor], condition: Asked, split: str) -> dict[str, Tensor]:
        """What the ten-class backbone answers: whether its class is in the set, bool [images]."""
        if self._answered is None or self._answered[0] != (split, id(backbone)):
            [logits] = self.logits([backbone], split, CLASSES)
            self._answered = ((split, id(backbone)), logits.argmax(1))
        return {"ten-class backbone": class_labels(condition, self._answered[1])}

    def labels(self, condition: Asked, split: str) -> Tensor:
        """Whether each image's class is in the set that the condition names, bool [images]."""
        return class_labels(condition, cifar10_images(self.directory, split).classes)

    def predict_many(self, models: list[dict[str, Tensor]], split: str) -> Tensor:
        """The models' answers on a split's images, bool [models, images]."""
        return torch.stack([logits[:, 0] > 0 for logits in self.logits(models, split)])

    def outputs_many(self, networks: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [M, images, 1] of networks, stacked."""
        if self._skeleton is None:
            self._skeleton = self.build_network().to(self.device)
        return stacked_logits(self._skeleton, networks, batch[0], self._products())

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], condition: Asked) -> Tensor:
        """Mean cross-entropy of logits [images, 1]."""
        return self.loss_many(outputs[None], batch, [condition])[0]

    def loss_many(self, outputs: Tensor, batch: tuple[Tensor, Tensor], conditions: Sequence[Asked]) -> Tensor:
        """Mean cross-entropy [M] of logits [M, images, 1]."""
        return binary_loss(outputs.float(), class_labels_many(conditions, batch[1]))

    def _products(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def stacked_from(network: nn.Module, backbone: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """`count` stacked copies of a backbone's weights in `network`, whose other tensors, its head, are zero.

    Raises:
        RPGError: if the network has BatchNorm or other buffers, which many networks cannot update side by
            side.
    """
    if next(network.buffers(), None) is not None:
        raise RPGError("networks with BatchNorm or other buffers cannot be fine-tuned side by side")
    start = {}
    for name, value in network.state_dict().items():
        given = backbone.get(name)
        if given is None or given.shape != value.shape:
            given = torch.zeros_like(value)
        start[name] = given.to(value).expand(count, *value.shape).clone()
    return start


def stacked_logits(
    network: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor, dtype: torch.dtype
) -> Tensor:
    """Logits [M, N, outputs] of M networks on the same inputs [N, 3, 32, 32].

    Args:
        network: of their architecture; it is put into evaluation mode, in which dropout is off.
        weights: by name, with a leading dimension M.
        inputs: for all of them.
        dtype: of matrix products.
    """
    network.eval()

    def run(one: dict[str, Tensor]) -> Any:
        return functional_call(network, one, (inputs,))

    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits: Tensor = vmap(run)(dict(weights))
    return logits


class SubsetViTTiny(Cifar10SubsetClassifier):
    """timm's ViT-Tiny with patches of 4 × 4, 5.4 million parameters."""

    network = "timm:vit_tiny_patch16_224"
