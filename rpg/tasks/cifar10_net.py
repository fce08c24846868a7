"""A small convolutional network with BatchNorm for CIFAR-10: as a plain module, and many models side by side.

Side by side, every parameter and buffer has a leading model dimension M, and all models see the same images.
Convolutions are matrix products of patches, batched over the models: with so few channels that is several
times faster than PyTorch's grouped convolutions. The first layer's patches are the same for all models.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.tasks.images.image_set import Colours

CHANNELS = (32, 48, 48, 64)
EPSILON = 1e-5
"""BatchNorm's, PyTorch's default."""

_COLOURS = Colours((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
"""Of all of CIFAR-10's training images."""
_PLACES = {"norm1": 16 * 16, "norm2": 8 * 8, "norm3": 8 * 8, "norm4": 4 * 4}
"""Places of the feature map that each BatchNorm layer normalises."""
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

StateDict = dict[str, Tensor]
Statistics = dict[str, tuple[Tensor, Tensor]]
"""By BatchNorm layer, the mean and the (biased) variance of a batch, [M, channels] each."""


class Cifar10Net(nn.Module):
    """Four convolutions with BatchNorm and a linear head, 64,128 parameters and 65 an output.

    Maps images that `normalised` made [N, 3, 32, 32] to logits [N, outputs].
    """

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        first, second, third, fourth = CHANNELS
        self.conv1 = nn.Conv2d(3, first, kernel_size=4, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, kernel_size=3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(third)
        self.conv4 = nn.Conv2d(third, fourth, kernel_size=3, padding=1, bias=False)
        self.norm4 = nn.BatchNorm2d(fourth)
        self.head = nn.Linear(fourth, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of `images`."""
        hidden = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 2)
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        hidden = F.max_pool2d(F.relu(self.norm3(self.conv3(hidden))), 2)
        hidden = F.relu(self.norm4(self.conv4(hidden)))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


def normalised(pixels: Tensor) -> Tensor:
    """Pixels, uint8 [N, 32, 32, 3], as inputs of `Cifar10Net`: float32 [N, 3, 32, 32] with mean 0."""
    return _COLOURS.normalised(pixels)


def first_patches(images: Tensor) -> Tensor:
    """The first convolution's input patches of images [N, 3, 32, 32], [N, 256, 48]."""
    # `F.unfold` would launch a kernel for every image.
    views = F.pad(images, (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)
    return views.permute(0, 2, 3, 1, 4, 5).reshape(len(images), 256, -1)


def is_trained(name: str) -> bool:
    """Whether a tensor of the state dict is a parameter, not one of BatchNorm's buffers."""
    return name.rpartition(".")[2] not in _STATISTICS


def training_logits(parameters: StateDict, inputs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Statistics]:
    """`Cifar10Net` for M models at once in training mode.

    Args:
        parameters: a state dict's parameters with a leading dimension M; its buffers are not used.
        inputs: [N, 256, 48], from `first_patches`, seen by all models; or [N, 8, 8, 32], from
            `shared_first_layer`, for models whose first layer is the same.
        dtype: of matrix products and activations; statistics are in float32 or, with float64, in that.

    Returns:
        Logits [M, N, outputs], and the batch's statistics of the layers that were computed.
    """
    statistics: Statistics = {}

    def normalise(layer: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        exact = hidden.to(torch.promote_types(dtype, torch.float32))
        variance, mean = torch.var_mean(exact, dim=(1, 2, 3), correction=0)
        statistics[layer] = (mean.detach(), variance.detach())
        return mean, variance

    return _logits(parameters, inputs, dtype, normalise), statistics


def update_running_statistics(buffers: StateDict, statistics: Statistics, count: int) -> None:
    """Move BatchNorm's buffers as PyTorch does in training mode, in place.

    Args:
        buffers: running means and variances and the number of batches, with a leading dimension M.
        statistics: of the batch.
        count: images in the batch.
    """
    momentum = 0.1
    for layer, (mean, variance) in statistics.items():
        values = count * _PLACES[layer]
        buffers[f"{layer}.running_mean"].lerp_(mean, momentum)
        buffers[f"{layer}.running_var"].lerp_(variance * (values / max(1, values - 1)), momentum)
        buffers[f"{layer}.num_batches_tracked"] += 1


def evaluation_logits(state: StateDict, inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`Cifar10Net` for M models at once in evaluation mode: logits [M, N, outputs].

    Args:
        state: state dicts with a leading dimension M.
        inputs: as `training_logits` takes them.
        dtype: of matrix products and activations; None: that of `inputs`.
    """

    def normalise(layer: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return state[f"{layer}.running_mean"], state[f"{layer}.running_var"]

    return _logits(state, inputs, dtype or inputs.dtype, normalise)


def is_first_layer(name: str) -> bool:
    """Whether a tensor of the state dict belongs to the first convolution or its BatchNorm."""
    return name.partition(".")[0] in ("conv1", "norm1")


def shared_first_layer(state: StateDict, patches: Tensor, dtype: torch.dtype) -> Tensor:
    """The first layer in evaluation mode, for models that share it: [N, 8, 8, 32].

    Args:
        state: state dict of one model.
        patches: [N, 256, 48], from `first_patches`.
        dtype: of the product and the result.
    """
    one = {name: value[None] for name, value in state.items() if is_first_layer(name)}
    return _first_layer(
        one, patches, dtype, lambda layer, hidden: (one["norm1.running_mean"], one["norm1.running_var"])
    )[0]


def stacked(models: Iterable[StateDict], device: torch.device) -> StateDict:
    """State dicts as one, every tensor with a leading model dimension."""
    models = list(models)
    return {name: torch.stack([model[name] for model in models]).to(device) for name in models[0]}


Normalise = Callable[[str, Tensor], tuple[Tensor, Tensor]]
"""The mean and variance [M, channels] by which a layer, named first, normalises its [M, N, height, width,
channels]."""


def _logits(parameters: StateDict, inputs: Tensor, dtype: torch.dtype, normalise: Normalise) -> Tensor:
    if inputs.ndim == 3:
        hidden = convolved(
            _first_layer(parameters, inputs, dtype, normalise), parameters["conv2.weight"].to(dtype)
        )
    else:
        hidden = _shared_convolved(inputs.to(dtype), parameters["conv2.weight"].to(dtype))
    hidden = _normalised(parameters, "norm2", hidden, dtype, normalise)
    hidden = convolved(hidden, parameters["conv3.weight"].to(dtype))
    hidden = _pooled(_normalised(parameters, "norm3", hidden, dtype, normalise))
    hidden = convolved(hidden, parameters["conv4.weight"].to(dtype))
    hidden = _normalised(parameters, "norm4", hidden, dtype, normalise)
    features = hidden.mean((2, 3))
    weight = parameters["head.weight"].to(dtype).transpose(1, 2)
    logits = torch.baddbmm(parameters["head.bias"].to(dtype)[:, None], features, weight)
    return logits.to(torch.promote_types(dtype, torch.float32))


def _first_layer(parameters: StateDict, patches: Tensor, dtype: torch.dtype, normalise: Normalise) -> Tensor:
    """[M, N, 8, 8, 32] of patches [N, 256, 48]."""
    count, weight = len(patches), parameters["conv1.weight"].to(dtype)
    models = len(weight)
    # In patches and weight the values of a channel are adjacent.
    inputs = patches.to(dtype).reshape(1, count * 256, -1).expand(models, -1, -1)
    hidden = torch.bmm(inputs, weight.reshape(models, CHANNELS[0], -1).transpose(1, 2))
    hidden = hidden.view(models, count, 16, 16, CHANNELS[0])
    return _pooled(_normalised(parameters, "norm1", hidden, dtype, normalise))


def _normalised(
    parameters: StateDict, layer: str, hidden: Tensor, dtype: torch.dtype, normalise: Normalise
) -> Tensor:
    mean, variance = normalise(layer, hidden)
    scale = parameters[f"{layer}.weight"] * (variance + EPSILON).rsqrt()
    shift = parameters[f"{layer}.bias"] - mean * scale
    scale, shift = (each[:, None, None, None] for each in (scale, shift))
    result: Tensor = (hidden * scale + shift).relu().to(dtype)
    return result


def _pooled(images: Tensor) -> Tensor:
    """The greatest of every 2 × 2 places of [M, N, height, width, channels]."""
    models, count, height, width, channels = images.shape
    return images.view(models, count, height // 2, 2, width // 2, 2, channels).amax((3, 5))


def convolved(images: Tensor, weight: Tensor) -> Tensor:
    """3 × 3 convolutions with zero padding for M models.

    Args:
        images: [M, N, height, width, channels].
        weight: [M, outputs, channels, 3, 3].

    Returns:
        [M, N, height, width, outputs].
    """
    # [M, 9 · channels, outputs], in the order of `_neighbourhoods`.
    matrix = weight.permute(0, 3, 4, 2, 1).flatten(1, 3)
    result: Tensor = _Convolution.apply(images, matrix)  # type: ignore[no-untyped-call]
    return result


def _shared_convolved(images: Tensor, weight: Tensor) -> Tensor:
    """`convolved` where all M models see the same images [N, height, width, channels].

    It is one large matrix product, several times faster than M of them.
    """
    models, outputs = weight.shape[:2]
    matrix = weight.permute(3, 4, 2, 0, 1).reshape(-1, models * outputs)
    product = _neighbourhoods(images[None])[0] @ matrix
    return product.view(*images.shape[:-1], models, outputs).permute(3, 0, 1, 2, 4)


def _neighbourhoods(images: Tensor) -> Tensor:
    """[M, N, height, width, channels] to [M, N · height · width, 9 · channels]: row, column, channel."""
    padded = F.pad(images, (0, 0, 1, 1, 1, 1))
    views = padded.unfold(2, 3, 1).unfold(3, 3, 1)
    return views.permute(0, 1, 2, 3, 5, 6, 4).reshape(len(images), images[0, ..., 0].numel(), -1)


class _Convolution(torch.autograd.Function):
    """Computes the gradient of the input as a convolution: this gathers, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, matrix: Tensor) -> Tensor:
        patches = _neighbourhoods(images)
        ctx.save_for_backward(patches, matrix)
        return torch.bmm(patches, matrix).view(*images.shape[:-1], matrix.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        patches, matrix = ctx.saved_tensors
        models, outputs = len(matrix), matrix.shape[-1]
        by_matrix = torch.bmm(patches.transpose(1, 2), gradient.reshape(models, -1, outputs))
        # A place contributed to its neighbours' outputs, so its gradient is a convolution with the turned
        # kernel.
        turned = matrix.view(models, 9, -1, outputs).flip(1).transpose(2, 3).flatten(1, 2)
        by_images = torch.bmm(_neighbourhoods(gradient), turned)
        return by_images.view(*gradient.shape[:-1], -1), by_matrix
