"""What families of networks for images have in common: torchvision's or timm's networks, and the images."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rpg.errors import RPGError, one_line
from rpg.gpu_compiler import has_gpu_compiler
from rpg.seeds import derived_seed
from rpg.tasks.along_training import Recipe, Update, train_along
from rpg.tasks.images.image_set import Images, ImageSet, image_set
from rpg.tasks.named_networks import named_network
from rpg.tasks.shared_batches import random_batch

SGD = Recipe()
ADAMW = Recipe(last_learning_rate=1e-4, weight_decay=0.05, update=Update.adamw)
"""For transformers, and networks that are trained like them."""
_PIXELS_AT_ONCE = 2**20
"""Of the images that a network is evaluated on at once, about a thousand of 32 × 32."""


class ImageNetworks:
    """Networks of one architecture, and a set of images; a subclass says which architecture."""

    network: ClassVar[str]
    """`torchvision:NAME` or `timm:NAME`."""
    arguments: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the network; they come before those that fit it to the images."""
    recipe: ClassVar[Recipe | None] = None
    """How a network with an output for each class is trained; None: by AdamW if it has LayerNorm, else by
    SGD. Epochs, batch size, peak learning rate and number of checkpoints are those of `collect`."""
    uses_gpu = True

    def __init__(self, images: str, device: torch.device) -> None:
        """Use the images in the directory or URI `images` (`rpg.tasks.images.image_set`), and compute on
        `device`."""
        self.directory = images
        self.device = device
        self._on_device: dict[str, Images] = {}

    @property
    def image_set(self) -> ImageSet:
        """The images' number of classes and size."""
        return image_set(self.directory)

    @property
    def outputs(self) -> int:
        """Outputs of the collection's networks."""
        return self.image_set.classes

    def check(self) -> None:
        """Raise an `RPGError` if images are missing, or the network's library, or if they do not fit."""
        size = self.image_set.height, self.image_set.width
        with torch.device("meta"):
            network = self.build_network().eval()
            try:
                shape = list(network(torch.empty(2, 3, *size)).shape)
            except Exception as error:
                raise RPGError(
                    f"network: '{self.network}' does not run on images of {size[1]} × {size[0]}: "
                    f"{one_line(error)[:200]}"
                ) from error
        if shape != [2, self.outputs]:
            raise RPGError(f"network: '{self.network}': expected an output for each class, got {shape}")

    def build_network(self) -> nn.Module:
        """The network, with new weights."""
        return self.with_outputs(self.outputs)

    def with_outputs(self, outputs: int) -> nn.Module:
        """The network with so many outputs, with new weights."""
        images = self.image_set
        return named_network(self.network, outputs, images.height, images.width, self.arguments)

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented training images, as networks take them, and their classes."""
        pixels, classes = random_batch(self.images("train"), size, random)
        return self.inputs(pixels), classes

    def images(self, split: str) -> Images:
        """The images of a split, on the device."""
        if split not in self._on_device:
            self._on_device[split] = self.image_set.images(split).to(self.device)
        return self._on_device[split]

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels, uint8 [N, height, width, 3], as networks take them, float32 [N, 3, height, width]."""
        return self.image_set.colours().normalised(pixels)

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
        at_once = max(1, _PIXELS_AT_ONCE // (self.image_set.height * self.image_set.width))
        network = self.with_outputs(outputs or self.outputs).to(self.device).eval()
        for model in models:
            network.load_state_dict(model, strict=True)
            yield torch.cat([network(self.inputs(some)) for some in pixels.split(at_once)]).cpu()

    def usual_recipe(self) -> Recipe:
        """How a network with an output for each class is trained, but for what `collect` says."""
        if self.recipe is not None:
            return self.recipe
        with torch.device("meta"):
            modules = self.build_network().modules()
        return ADAMW if any(isinstance(each, nn.LayerNorm) for each in modules) else SGD

    def trained(self, recipe: Recipe, seed: int, state: Path) -> Iterator[str | dict[str, Tensor]]:
        """Train a network with an output for each class; as `rpg.tasks.along_training.train_along` yields
        it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "network", 0))
            network = self.with_outputs(self.image_set.classes).to(self.device)
        if self.device.type == "cuda":
            # Convolutions in bfloat16 are fastest with the channels last, as the images have them.
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # Sizes never change, so a search for the fastest kernels pays.
            torch.backends.cudnn.benchmark = True
            if has_gpu_compiler():
                network.compile()
        colours = self.image_set.colours()
        yield from train_along(network, self.images("train"), colours, recipe, seed, state)
