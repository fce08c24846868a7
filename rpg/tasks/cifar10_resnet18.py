"""ResNet-18 for CIFAR-10's ten classes, and what it answers."""

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from rpg.tasks.cifar10_images import CLASSES, Images
from rpg.tasks.cifar10_net import normalised

_EVALUATED_TOGETHER = 1000
"""Images."""


def cifar10_resnet18() -> nn.Module:
    """torchvision's ResNet-18, 11,173,962 parameters, with the usual stem for small images.

    Its first convolution is 3 × 3 with stride 1 instead of 7 × 7 with stride 2, and nothing is pooled behind
    it. Maps images that `normalised` made [N, 3, 32, 32] to logits [N, 10].
    """
    network: nn.Module = resnet18(num_classes=CLASSES)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


@torch.no_grad()
def predicted_classes(network: nn.Module, images: Images) -> Tensor:
    """The classes that `network` takes `images` for, int64 [N], in float32 and evaluation mode.

    Args:
        network: on the device of the images; left in evaluation mode.
        images: N of them.
    """
    network.eval()
    chunks = images.pixels.split(_EVALUATED_TOGETHER)
    return torch.cat([network(normalised(chunk)).argmax(1) for chunk in chunks])
