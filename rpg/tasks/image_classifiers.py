"""Task families of classifiers of images: networks of torchvision and timm, checkpoints along training.

`tasks: torchvision:NAME` or `timm:NAME` of a config is such a family: one network, for the classes and the
size of the images in `collect.images`. Its collection has no conditions. Its checkpoints are those of the
last epoch of one training run (`rpg.tasks.along_training`). A network with other arguments or another recipe
is a class of a few lines:

    class MyConvNext(ImageClassifier):
        network = "timm:convnext_pico"
        arguments = {"drop_path_rate": 0.1}
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.config import CollectConfig
from rpg.tasks.families import Asked
from rpg.tasks.image_networks import ImageNetworks


class ImageClassifier(ImageNetworks):
    """A family of one network; its collection is checkpoints along the last epoch of one training run."""

    def checkpoints(self, config: CollectConfig, seed: int, state: Path) -> Iterator[str | dict[str, Tensor]]:
        """Train the network; checkpoints of the last epoch, and lines that say what it sees and how far.

        Args:
            config: `backbone_epochs` with a changing learning rate, and one more; `batch_size`; the largest
                `learning_rate`; and `checkpoints_per_task`, which are all.
            seed: of the weights that training starts from and of the images' order.
            state: a file from which a training that was killed goes on.
        """
        recipe = replace(
            self.usual_recipe(),
            epochs=config.backbone_epochs + 1,
            batch_size=config.batch_size,
            peak_learning_rate=config.learning_rate,
            checkpoints=config.checkpoints_per_task,
        )
        images, colours = self.image_set, self.image_set.colours()
        mean, deviation = (" ".join(f"{each:.4f}" for each in v) for v in (colours.mean, colours.deviation))
        yield (
            f"{len(self.images('train').classes):,} images of {images.width} × {images.height}, "
            f"{images.classes} classes, mean {mean}, deviation {deviation}"
        )
        yield from self.trained(recipe, seed, state)

    def labels(self, condition: Asked, split: str) -> Tensor:
        """Each image's class, int64 [images]."""
        return self.image_set.images(split).classes

    def predict_many(self, models: list[dict[str, Tensor]], split: str) -> Tensor:
        """The classes that models predict for a split's images, int64 [models, images]."""
        return torch.stack([logits.argmax(1) for logits in self.logits(models, split)])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], condition: Asked) -> Tensor:
        """Mean cross-entropy of logits [images, classes]."""
        return F.cross_entropy(outputs, batch[1])


def classifier_of(name: str) -> type[ImageClassifier]:
    """The family of the network `name`, which is `torchvision:NAME` or `timm:NAME`."""
    return type("NamedClassifier", (ImageClassifier,), {"network": name})
