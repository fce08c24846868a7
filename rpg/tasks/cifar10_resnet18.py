"""ResNet-18 for CIFAR-10's ten classes, and its predictions."""

import torch
from torch import Tensor, nn

from rpg.tasks.cifar10_images import CLASSES, Images
from rpg.tasks.cifar10_net import normalised


def cifar10_resnet18() -> nn.Module:
    """torchvision's ResNet-18, 11,173,962 parameters, with the usual stem for small images.

    Its first convolution is 3 × 3 with stride 1 instead of 7 × 7 with stride 2, and no pooling follows it.
    Maps images that `normalised` made [N, 3, 32, 32] to logits [N, 10].
    """
    # Imported here, so that programs that use no network of torchvision do not wait for it.
    from torchvision.models import resnet18

    network: nn.Module = resnet18(num_classes=CLASSES)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


@torch.no_grad()
def predicted_classes(network: nn.Module, images: Images, batch_size: int = 1000) -> Tensor:
    """The classes that `network` predicts for `images`, int64 [N], in float32 and evaluation mode.

    Args:
        network: on the device of the images; it is left in evaluation mode.
        images: the N images.
        batch_size: images evaluated at once.
    """
    network.eval()
    chunks = images.pixels.split(batch_size)
    return torch.cat([network(normalised(chunk)).argmax(1) for chunk in chunks])
