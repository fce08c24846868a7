"""CIFAR-10 among sets of images: for families whose tasks or networks are made for it."""

from rpg.errors import RPGError
from rpg.tasks.images.image_set import Images, image_set

CLASSES = 10
SIZE = 32


def check_cifar10(directory: str) -> None:
    """Check, before any work is done, that a directory or URI holds images like CIFAR-10's.

    Raises:
        RPGError: naming the setting or the file, if it does not.
    """
    found = image_set(directory)
    if (found.classes, found.height, found.width) != (CLASSES, SIZE, SIZE):
        raise RPGError(
            f"{directory}: expected CIFAR-10, {CLASSES} classes of images of {SIZE} × {SIZE}, found "
            f"{found.classes} classes of {found.width} × {found.height}"
        )


def cifar10_images(directory: str, split: str) -> Images:
    """CIFAR-10's images of the split `train` (45,000 of the training images), `validation` (the other 5,000)
    or `test`.

    Raises:
        RPGError: naming the setting or the file, if it is missing or does not hold CIFAR-10.
    """
    check_cifar10(directory)
    return image_set(directory).images(split)
