"""The task family `cifar10`: a ten-class backbone, and binary classifiers fine-tuned from it side by side.

All layers of a network are trained, only on the training images, with augmentation. Models of one copy see
the same images in the same order (`rpg.tasks.shared_batches`); copies of a task differ in that order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rpg.config import CollectConfig
from rpg.seeds import derived_seed
from rpg.tasks.cifar10_images import Images, check_files, cifar10_images
from rpg.tasks.cifar10_net import Cifar10Net, evaluation_logits, first_patches, normalised, stacked
from rpg.tasks.class_subsets import CLASSES, class_labels, class_tasks, in_set, task_name
from rpg.tasks.families import Asked, Task
from rpg.tasks.fine_tuning import binary_loss, ten_class_loss, unstacked, with_fresh_heads
from rpg.tasks.shared_batches import train_on_shared_batches

BACKBONE_BATCH_SIZE = 512
BACKBONE_LEARNING_RATE = 1e-2


class BinaryCifar10:
    """The task family, on one device. On a GPU it trains with bfloat16 products, all else is in float32."""

    uses_gpu = True
    copies_share_order = True

    def __init__(self, images: str, device: torch.device) -> None:
        """Use the images in the directory or URI `images` (`cifar10_images`), and compute on `device`."""
        self.directory = images
        self.device = device

    def check(self) -> None:
        """Raise an `RPGError` if the images are not there."""
        check_files(self.directory)

    def tasks(self, validation_tasks: int, seed: int) -> list[Task]:
        """The 1,022 tasks (`class_tasks`)."""
        return class_tasks(validation_tasks, seed)

    def task_name(self, condition: Sequence[float]) -> str:
        """The task's id."""
        return task_name(condition)

    def backbone(self, config: CollectConfig, seed: int) -> dict[str, Tensor]:
        """A ten-class `Cifar10Net` trained on the training images; its state dict."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "backbone", 0))
            start = Cifar10Net(outputs=CLASSES).state_dict()
        trained = train_on_shared_batches(
            stacked([start], self.device),
            self._images("train"),
            torch.arange(CLASSES, device=self.device)[None],
            ten_class_loss,
            derived_seed(seed, "backbone order", 0),
            epochs=config.backbone_epochs,
            batch_size=BACKBONE_BATCH_SIZE,
            learning_rate=BACKBONE_LEARNING_RATE,
            dtype=self._training_dtype(),
        )
        return {name: value[0].cpu() for name, value in trained.items()}

    def fine_tune(
        self, backbone: dict[str, Tensor], models: list[tuple[Task, int]], config: CollectConfig, seed: int
    ) -> list[dict[str, Tensor]]:
        """Fine-tune binary classifiers from the backbone's convolutions and a fresh head of zeros.

        Args:
            backbone: from `train_backbone`.
            models: (task, copy) of each model; models of one copy share the order of images.
            config: epochs, batch size, learning rate.
            seed: of the collection.

        Returns:
            One state dict a model, of `Cifar10Net()`, on the CPU.
        """
        names = list(Cifar10Net().state_dict())
        on_device = {name: value.to(self.device) for name, value in backbone.items()}
        trained: dict[tuple[str, int], dict[str, Tensor]] = {}
        for copy in dict.fromkeys(copy for _, copy in models):
            some = [model for model in models if model[1] == copy]
            together = train_on_shared_batches(
                with_fresh_heads(on_device, len(some)),
                self._images("train"),
                in_set([task.condition for task, _ in some], torch.arange(CLASSES, device=self.device)),
                binary_loss,
                derived_seed(seed, "fine-tuning order", copy),
                epochs=config.epochs,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                dtype=self._training_dtype(),
            )
            done = [(task.name, copy) for task, copy in some]
            trained.update(zip(done, unstacked(together, names), strict=True))
        return [trained[task.name, copy] for task, copy in models]

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

    def _images(self, split: str) -> Images:
        return cifar10_images(self.directory, split).to(self.device)

    def _training_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32
