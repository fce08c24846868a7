"""What families of CIFAR-10 have in common whose networks torchvision or timm has."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rpg.gpu_compiler import has_gpu_compiler
from rpg.seeds import derived_seed
from rpg.tasks.along_training import Recipe, Update, train_along
from rpg.tasks.cifar10_images import CLASSES, Images, check_files, cifar10_images
from rpg.tasks.cifar10_net import normalised
from rpg.tasks.named_networks import named_network
from rpg.tasks.shared_batches import augmented

SGD = Recipe()
ADAMW = Recipe(last_learning_rate=1e-4, weight_decay=0.05, update=Update.adamw)
"""For transformers, and networks that are trained like them."""
_IMAGES_AT_ONCE = 1000


class Cifar10Networks:
    """Networks of one architecture, and the images; a subclass says which architecture."""

    network: ClassVar[str]
    """`torchvision:NAME` or `timm:NAME`."""
    arguments: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the network."""
    recipe: ClassVar[Recipe] = SGD
    """How a network of ten classes is trained. Epochs, batch size, peak learning rate and number of
    checkpoints are those of `collect`."""
    outputs: ClassVar[int] = CLASSES
    """Of the networks of the collection."""
    uses_gpu = True

    def __init__(self, images: str, device: torch.device) -> None:
        """Use the images in the directory or URI `images` (`cifar10_images`), and compute on `device`."""
        self.directory = images
        self.device = device
        self._on_device: dict[str, Images] = {}

    def check(self) -> None:
        """Raise an `RPGError` if the images are not there, or the network's library is not."""
        check_files(self.directory)
        self.build_network()

    def build_network(self) -> nn.Module:
        """The network, with new weights."""
        return self.with_outputs(self.outputs)

    def with_outputs(self, outputs: int) -> nn.Module:
        """The network with so many outputs, with new weights."""
        return named_network(self.network, {"num_classes": outputs, **self.arguments})

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented training images, as networks take them, and their classes."""
        train = self.images("train")
        chosen = torch.randint(len(train.classes), (size,), generator=random).to(self.device)
        moves = torch.Generator(self.device)
        moves.manual_seed(int(torch.randint(2**62, (), generator=random)))
        return normalised(augmented(train.pixels[chosen], moves)), train.classes[chosen]

    def images(self, split: str) -> Images:
        """The images of a split, on the device."""
        if split not in self._on_device:
            self._on_device[split] = cifar10_images(self.directory, split).to(self.device)
        return self._on_device[split]

    @torch.no_grad()
    def logits(
        self, models: Sequence[Mapping[str, Tensor]], split: str, outputs: int | None = None
    ) -> Iterator[Tensor]:
        """What each of some networks answers on a split's images, [images, outputs] on the CPU, in float32.

        Args:
            models: their state dicts.
            split: of the images.
            outputs: of the networks; None: as many as those of the collection have.
        """
        pixels = self.images(split).pixels
        network = self.with_outputs(outputs or self.outputs).to(self.device).eval()
        for model in models:
            network.load_state_dict(model, strict=True)
            yield torch.cat([network(normalised(some)) for some in pixels.split(_IMAGES_AT_ONCE)]).cpu()

    def trained(self, recipe: Recipe, seed: int, state: Path) -> Iterator[str | dict[str, Tensor]]:
        """Train a network of ten classes; as `rpg.tasks.along_training.train_along` yields it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "network", 0))
            network = self.with_outputs(CLASSES).to(self.device)
        if self.device.type == "cuda":
            # Convolutions in bfloat16 are fastest with the channels last, as the images have them.
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # Sizes never change, so a search for the fastest kernels pays.
            torch.backends.cudnn.benchmark = True
            if has_gpu_compiler():
                network.compile()
        yield from train_along(network, self.images("train"), recipe, seed, state)
