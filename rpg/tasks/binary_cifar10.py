"""The task family `cifar10`: a ten-class backbone, and binary classifiers fine-tuned from it side by side.

All layers of a network are trained, only on the training images, with augmentation. Models of one copy see
the same images in the same order (`rpg.tasks.shared_batches`); copies of a task differ in that order.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from rpg.config import CollectConfig
from rpg.gpu_compiler import has_gpu_compiler
from rpg.seeds import derived_seed
from rpg.tasks.cifar10_images import check_cifar10, cifar10_images
from rpg.tasks.cifar10_net import (
    Cifar10Net,
    evaluation_logits,
    first_patches,
    is_first_layer,
    normalised,
    shared_first_layer,
    stacked,
)
from rpg.tasks.class_subsets import (
    ALL_TASKS,
    CLASSES,
    HELD_OUT_TASKS,
    class_bits,
    class_labels,
    class_labels_many,
    class_tasks,
    task_name,
)
from rpg.tasks.families import Asked, Task
from rpg.tasks.fine_tuning import binary_loss, class_and_set_loss, fine_tuned_by_copy, with_set_heads
from rpg.tasks.images.image_set import Images
from rpg.tasks.shared_batches import random_batch, train_on_shared_batches

BACKBONE_BATCH_SIZE = 512
BACKBONE_LEARNING_RATE = 1e-2
TEACHERS = 8
"""Ten-class networks that are trained side by side. The first is the backbone, and all of them together say
what is right for an augmented image."""


class BinaryCifar10:
    """The task family, on one device. On a GPU it trains with bfloat16 products, all else is in float32."""

    uses_gpu = True
    copies_share_order = True

    def __init__(self, images: str, device: torch.device) -> None:
        """Use the images in the directory or URI `images` (`cifar10_images`), and compute on `device`."""
        self.directory = images
        self.device = device
        self._on_device: dict[str, Images] = {}
        self._answers: tuple[tuple[str, int], Tensor] | None = None

    def check(self) -> None:
        """Raise an `RPGError` if the images are not there."""
        check_cifar10(self.directory)

    def tasks(self, validation_tasks: int, seed: int) -> list[Task]:
        """The 1,022 tasks (`class_tasks`)."""
        return class_tasks(validation_tasks, seed)

    def task_name(self, condition: Sequence[float]) -> str:
        """The task's id."""
        return task_name(condition)

    def backbone(self, config: CollectConfig, seed: int) -> dict[str, Tensor]:
        """Ten-class networks trained on the training images, as a state dict with a leading dimension.

        The first is the backbone, all are teachers. They have outputs for sets as well
        (`class_and_set_loss`).
        """
        starts = []
        for number in range(TEACHERS):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derived_seed(seed, "backbone", number))
                starts.append(Cifar10Net(outputs=2 * CLASSES + 1).state_dict())
        # Held-out tasks have no part in it.
        sets = torch.tensor([class_bits(task) for task in ALL_TASKS if task not in HELD_OUT_TASKS])
        sets = sets.to(self.device)
        trained = train_on_shared_batches(
            stacked(starts, self.device),
            self._images("train"),
            lambda patches, classes: classes.expand(TEACHERS, -1),
            lambda logits, classes: class_and_set_loss(logits, classes, sets),
            derived_seed(seed, "backbone order", 0),
            epochs=config.backbone_epochs,
            batch_size=BACKBONE_BATCH_SIZE,
            learning_rate=BACKBONE_LEARNING_RATE,
            dtype=self._training_dtype(),
        )
        return {name: value.cpu() for name, value in trained.items()}

    def fine_tune(
        self, backbone: dict[str, Tensor], models: list[tuple[Task, int]], config: CollectConfig, seed: int
    ) -> list[dict[str, Tensor]]:
        """Fine-tune binary classifiers from the backbone, whose first layer they keep, and its head for sets.

        What is right for an image is the teachers' probability that its class is in the set.

        Args:
            backbone: from `backbone`.
            models: (task, copy) of each model; models of one copy share the order of images.
            config: epochs, batch size, learning rate.
            seed: of the collection.

        Returns:
            One state dict a model, of `Cifar10Net()`, on the CPU.
        """
        teachers = {name: value.to(self.device) for name, value in backbone.items()}
        first = {name: value[0] for name, value in teachers.items()}

        def train(conditions: list[list[float]], copy: int) -> dict[str, Tensor]:
            sets = torch.tensor(conditions, device=self.device)

            def answers(patches: Tensor, classes: Tensor) -> Tensor:
                return sets @ _class_probabilities(teachers, patches).mean(0).T

            return train_on_shared_batches(
                with_set_heads(first, sets),
                self._images("train"),
                answers,
                binary_loss,
                derived_seed(seed, "fine-tuning order", copy),
                epochs=config.epochs,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                dtype=self._training_dtype(),
                first_layer=first,
            )

        return fine_tuned_by_copy(models, list(Cifar10Net().state_dict()), train)

    @torch.no_grad()
    def references(self, backbone: dict[str, Tensor], condition: Asked, split: str) -> dict[str, Tensor]:
        """What ten-class networks answer, the backbone alone and the teachers together: whether it is more
        likely than not that the class is in the set, bool [images]."""
        likely = self._teachers_answers(backbone, split)
        bits = torch.tensor(condition, dtype=likely.dtype)
        return {
            "ten-class backbone": likely[0] @ bits > 0.5,
            f"{TEACHERS} ten-class networks together": likely.mean(0) @ bits > 0.5,
        }

    def _teachers_answers(self, backbone: dict[str, Tensor], split: str) -> Tensor:
        """Probabilities of classes [teachers, images, classes], computed once for all tasks."""
        key = (split, id(backbone))
        if self._answers is None or self._answers[0] != key:
            teachers = {name: value.to(self.device) for name, value in backbone.items()}
            pixels = self._images(split).pixels
            parts = [
                _class_probabilities(teachers, first_patches(normalised(some))) for some in pixels.split(250)
            ]
            self._answers = (key, torch.cat(parts, 1).cpu())
        return self._answers[1]

    def build_network(self) -> nn.Module:
        """The plain PyTorch network that checkpoints of this family load into."""
        return Cifar10Net()

    def labels(self, condition: Asked, split: str) -> Tensor:
        """Whether each image's class is in the set that the condition names, bool [images]."""
        return class_labels(condition, cifar10_images(self.directory, split).classes)

    @torch.no_grad()
    def predict_many(
        self, models: list[dict[str, Tensor]], split: str, group: int = 64, images_at_once: int = 250
    ) -> Tensor:
        """The models' answers on a split's images, bool [models, images], on the CPU.

        Args:
            models: state dicts of `Cifar10Net()`.
            split: of the images.
            group: models evaluated at once; with `images_at_once` it bounds the memory.
            images_at_once: images evaluated at once.
        """
        images = self._images(split)
        answers = torch.zeros(len(models), len(images.classes), dtype=torch.bool, device=self.device)
        groups = [(i, stacked(models[i : i + group], self.device)) for i in range(0, len(models), group)]
        for start in range(0, len(images.classes), images_at_once):
            end = start + images_at_once
            patches = first_patches(normalised(images.pixels[start:end]))
            for i, some in groups:
                answers[i : i + group, start:end] = evaluation_logits(some, patches)[..., 0] > 0
        return answers.cpu()

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented training images, as `Cifar10Net` takes them, and their classes."""
        pixels, classes = random_batch(self._images("train"), size, random)
        return normalised(pixels), classes

    def outputs_many(self, networks: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Logits [M, images, 1] of networks, stacked."""
        state, dtype = dict(networks), self._training_dtype()
        inputs = first_patches(batch[0].to(dtype))
        if all(value.stride(0) == 0 for name, value in state.items() if is_first_layer(name)):
            # One layer, expanded: the networks share it.
            first = {name: value[0] for name, value in state.items() if is_first_layer(name)}
            inputs = shared_first_layer(first, inputs, dtype)
        logits = evaluation_logits
        if self.device.type == "cuda" and has_gpu_compiler():
            logits = _compiled_logits()
        return logits(state, inputs, dtype)

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], condition: Asked) -> Tensor:
        """Mean cross-entropy of logits [images, 1]."""
        return self.loss_many(outputs[None], batch, [condition])[0]

    def loss_many(self, outputs: Tensor, batch: tuple[Tensor, Tensor], conditions: Sequence[Asked]) -> Tensor:
        """Mean cross-entropy [M] of logits [M, images, 1]."""
        return binary_loss(outputs, class_labels_many(conditions, batch[1]))

    def _images(self, split: str) -> Images:
        # Copying them at every step of refining would take longer than the step.
        if split not in self._on_device:
            self._on_device[split] = cifar10_images(self.directory, split).to(self.device)
        return self._on_device[split]

    def _training_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def _class_probabilities(networks: dict[str, Tensor], patches: Tensor) -> Tensor:
    """What stacked ten-class networks hold likely, float32 [M, N, classes]."""
    return evaluation_logits(networks, patches)[..., :CLASSES].float().softmax(-1)


@cache
def _compiled_logits() -> Callable[..., Tensor]:
    """`evaluation_logits`, compiled for each shape: normalisation, ReLU and patches become one kernel."""
    return torch.compile(evaluation_logits, dynamic=False)
