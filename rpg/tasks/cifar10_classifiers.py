"""Task families of CIFAR-10's ten classes: networks of torchvision and timm, and checkpoints along training.

Each family is one network, whose collection has no conditions: its checkpoints are those of the last epoch of
one training run (`rpg.tasks.along_training`). Another network is a class of a few lines:

    class MyConvNext(Cifar10Classifier):
        network = "timm:convnext_pico"
        arguments = {"patch_size": 2}
        recipe = ADAMW
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.gpu_compiler import has_gpu_compiler
from rpg.seeds import derived_seed
from rpg.tasks.along_training import Recipe, Update, train_along
from rpg.tasks.cifar10_images import CLASSES, SIZE, Images, check_files, cifar10_images
from rpg.tasks.cifar10_net import normalised
from rpg.tasks.families import Asked
from rpg.tasks.shared_batches import augmented

SGD = Recipe()
ADAMW = Recipe(last_learning_rate=1e-4, weight_decay=0.05, update=Update.adamw)
"""For transformers, and networks that are trained like them."""
_IMAGES_AT_ONCE = 1000


class Cifar10Classifier:
    """A family of one network; a subclass says which."""

    network: ClassVar[str]
    """`torchvision:NAME` or `timm:NAME`."""
    arguments: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of the network."""
    recipe: ClassVar[Recipe] = SGD
    """Epochs, batch size, peak learning rate and number of checkpoints are those of `collect`."""
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
        return named_network(self.network, {"num_classes": CLASSES, **self.arguments})

    def checkpoints(self, config: CollectConfig, seed: int, state: Path) -> Iterator[str | dict[str, Tensor]]:
        """Train the network; checkpoints of the last epoch, and after each epoch how far it is.

        Args:
            config: `backbone_epochs` with a changing learning rate, and one more; `batch_size`; the largest
                `learning_rate`; and `checkpoints_per_task`, which are all.
            seed: of the weights that training starts from and of the images' order.
            state: a file from which a training that was killed goes on.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "network", 0))
            network = self.build_network().to(self.device)
        recipe = replace(
            self.recipe,
            epochs=config.backbone_epochs + 1,
            batch_size=config.batch_size,
            peak_learning_rate=config.learning_rate,
            checkpoints=config.checkpoints_per_task,
        )
        if self.device.type == "cuda":
            # Convolutions in bfloat16 are fastest with the channels last, as the images have them.
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            # Sizes never change, so a search for the fastest kernels pays.
            torch.backends.cudnn.benchmark = True
            if has_gpu_compiler():
                network.compile()
        yield from train_along(network, self._images("train"), recipe, seed, state)

    def labels(self, condition: Asked, split: str) -> Tensor:
        """Each image's class, int64 [images]."""
        return cifar10_images(self.directory, split).classes

    @torch.no_grad()
    def predict_many(self, models: list[dict[str, Tensor]], split: str) -> Tensor:
        """The classes that models predict for a split's images, int64 [models, images], in float32."""
        pixels = self._images(split).pixels
        network = self.build_network().to(self.device).eval()
        rows = []
        for model in models:
            network.load_state_dict(model, strict=True)
            parts = [network(normalised(some)).argmax(1) for some in pixels.split(_IMAGES_AT_ONCE)]
            rows.append(torch.cat(parts).cpu())
        return torch.stack(rows)

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Augmented training images, as networks take them, and their classes."""
        train = self._images("train")
        chosen = torch.randint(len(train.classes), (size,), generator=random).to(self.device)
        moves = torch.Generator(self.device)
        moves.manual_seed(int(torch.randint(2**62, (), generator=random)))
        return normalised(augmented(train.pixels[chosen], moves)), train.classes[chosen]

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], condition: Asked) -> Tensor:
        """Mean cross-entropy of logits [images, 10]."""
        return F.cross_entropy(outputs, batch[1])

    def _images(self, split: str) -> Images:
        if split not in self._on_device:
            self._on_device[split] = cifar10_images(self.directory, split).to(self.device)
        return self._on_device[split]


def named_network(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A network of torchvision or timm with new weights.

    Args:
        name: `torchvision:NAME` or `timm:NAME`.
        arguments: of the network's function.

    Raises:
        RPGError: if the library is not installed, or has no such network.
    """
    library, _, called = name.partition(":")
    # Imported here, so that programs that use neither do not wait for them.
    try:
        if library == "torchvision":
            from torchvision.models import get_model as build
        elif library == "timm":
            from timm import create_model as build
        else:
            raise RPGError(f"network: expected torchvision:NAME or timm:NAME, got '{name}'")
    except ImportError as error:
        raise RPGError(f"network: '{name}' needs the package {library}: pip install {library}") from error
    try:
        network: nn.Module = build(called, **arguments)
    except Exception as error:
        raise RPGError(f"network: '{name}': {error}") from error
    return network


def _with_small_stem(network: nn.Module) -> nn.Module:
    """A ResNet with the usual stem for small images.

    Its first convolution is 3 × 3 with stride 1 instead of 7 × 7 with stride 2, and no pooling follows it.
    """
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class ResNet18(Cifar10Classifier):
    """torchvision's ResNet-18, 11,173,962 parameters, with the stem for small images."""

    network = "torchvision:resnet18"

    def build_network(self) -> nn.Module:
        """The network, with new weights."""
        return _with_small_stem(super().build_network())


class ResNet50(Cifar10Classifier):
    """timm's ResNet-50 with GroupNorm, with the stem for small images."""

    network = "timm:resnet50_gn"

    def build_network(self) -> nn.Module:
        """The network, with new weights."""
        return _with_small_stem(super().build_network())


class MobileNetV3(Cifar10Classifier):
    """timm's MobileNetV3-Large, whose first convolution has stride 1."""

    network = "timm:mobilenetv3_large_100"

    def build_network(self) -> nn.Module:
        """The network, with new weights."""
        network: Any = super().build_network()
        network.conv_stem.stride = (1, 1)
        built: nn.Module = network
        return built


class ViTTiny(Cifar10Classifier):
    """timm's ViT-Tiny with patches of 4 × 4."""

    network = "timm:vit_tiny_patch16_224"
    arguments: ClassVar[Mapping[str, Any]] = {"img_size": SIZE, "patch_size": 4}
    recipe = ADAMW


class ViTSmall(ViTTiny):
    """timm's ViT-Small with patches of 4 × 4."""

    network = "timm:vit_small_patch16_224"


class ViTBase(ViTTiny):
    """timm's ViT-Base with patches of 4 × 4."""

    network = "timm:vit_base_patch16_224"


class ConvNextAtto(Cifar10Classifier):
    """timm's ConvNeXt-Atto, whose first convolution takes patches of 2 × 2."""

    network = "timm:convnext_atto"
    arguments: ClassVar[Mapping[str, Any]] = {"patch_size": 2}
    recipe = ADAMW


class ConvNextLarge(ConvNextAtto):
    """timm's ConvNeXt-Large, 196 million parameters, whose first convolution takes patches of 2 × 2."""

    network = "timm:convnext_large"
