"""scikit-learn's handwritten digits: images, split once, and a small convolutional network for them.

The network exists as a plain PyTorch module and as a function with the same parameters that runs many models
side by side (every parameter and input has a leading model dimension).
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CHANNELS = (12, 24)
_TEST_IMAGES, _VALIDATION_IMAGES = 450, 210
FIRST_LAYER = ("conv1.weight", "conv1.bias")
"""Tensors of the first convolution."""


@dataclass(frozen=True)
class Images:
    """Normalised images [N, 1, 8, 8] and their classes (int64 [N])."""

    images: Tensor
    classes: Tensor


@cache
def digits_images() -> dict[str, Images]:
    """The disjoint splits `train` (1,137 images), `validation` (210) and `test` (450), which never change."""
    # Imported here, so that programs that use other data sets do not wait for scikit-learn.
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    classes = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, validation, train = torch.split(
        order, [_TEST_IMAGES, _VALIDATION_IMAGES, len(order) - _TEST_IMAGES - _VALIDATION_IMAGES]
    )
    mean, deviation = images[train].mean(), images[train].std()
    images = (images - mean) / deviation
    splits = {"train": train, "validation": validation, "test": test}
    return {name: Images(images[chosen], classes[chosen]) for name, chosen in splits.items()}


class DigitsNet(nn.Module):
    """Two convolutions and a linear head, 2,820 parameters and 97 an output: [N, 1, 8, 8] to [N, outputs]."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        first, second = _CHANNELS
        self.conv1 = nn.Conv2d(1, first, kernel_size=4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3)
        self.head = nn.Linear(4 * second, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of `images`."""
        hidden = F.relu(self.conv1(images))
        hidden = F.relu(self.conv2(hidden))
        logits: Tensor = self.head(hidden.flatten(1))
        return logits


def digits_patches(images: Tensor) -> Tensor:
    """The first convolution's input patches, [N, 16, 16], computed once for all models and epochs."""
    return F.unfold(images, kernel_size=4, stride=2, padding=1).transpose(1, 2).contiguous()


def digits_side_by_side(parameters: dict[str, Tensor], patches: Tensor) -> Tensor:
    """`DigitsNet` for M models at once, by batched matrix products.

    Args:
        parameters: a `DigitsNet` state dict with a leading dimension M on every tensor.
        patches: [M, N, 16, 16], from `digits_patches`; each model has its own images.

    Returns:
        Logits [M, N, outputs].
    """
    models, count = patches.shape[:2]
    first = _CHANNELS[0]
    weight = parameters["conv1.weight"].reshape(models, first, 16).transpose(1, 2)
    hidden = torch.baddbmm(parameters["conv1.bias"][:, None], patches.reshape(models, count * 16, 16), weight)
    return after_first_layer(parameters, _second_patches(hidden.relu().view(models, count, 16, first)))


def shared_first_layer(parameters: dict[str, Tensor], patches: Tensor) -> Tensor:
    """The first layer of one `DigitsNet`, for models that share it: the second layer's patches, [N, 4, 108].

    Args:
        parameters: of one model.
        patches: [N, 16, 16], from `digits_patches`.
    """
    weight = parameters["conv1.weight"].reshape(_CHANNELS[0], 16)
    return _second_patches((patches @ weight.T + parameters["conv1.bias"]).relu())


def after_first_layer(parameters: dict[str, Tensor], patches: Tensor) -> Tensor:
    """The rest of `DigitsNet` for M models at once: logits [M, N, outputs].

    Args:
        parameters: with a leading dimension M; those of the first layer are not used.
        patches: of the second convolution, [M, N, 4, 108].
    """
    models, count = patches.shape[:2]
    first, second = _CHANNELS
    weight = parameters["conv2.weight"].reshape(models, second, first, 9).permute(0, 3, 2, 1)
    weight = weight.reshape(models, 9 * first, second)
    hidden = patches.reshape(models, count * 4, 9 * first)
    hidden = torch.baddbmm(parameters["conv2.bias"][:, None], hidden, weight).relu()
    hidden = hidden.view(models, count, 4 * second)
    weight = torch.unflatten(parameters["head.weight"], 2, (second, 4)).permute(0, 3, 2, 1).flatten(1, 2)
    return torch.baddbmm(parameters["head.bias"][:, None], hidden, weight)


def _second_patches(hidden: Tensor) -> Tensor:
    """Of the first layer's 4 × 4 map [..., 16, channels]: four places' nine neighbours each."""
    patches: Tensor = hidden.index_select(-2, _neighbours()).unflatten(-2, (4, 9)).flatten(-2)
    return patches


@cache
def _neighbours() -> Tensor:
    return torch.tensor(
        [
            (row + i) * 4 + column + j
            for row in range(2)
            for column in range(2)
            for i in range(3)
            for j in range(3)
        ]
    )
