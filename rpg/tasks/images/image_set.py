"""A set of labelled images, whose classes, size and colours are read from it.

It lies in one directory or behind one URI, in one of these forms:

- Parquet files with the columns of data sets on the Hugging Face Hub: `train.parquet` and `test.parquet`,
  or `train-….parquet` and `test-….parquet` in parts (`rpg.tasks.images.parquet`);
- directories `train` and `test` with a folder of image files for each class
  (`rpg.tasks.images.class_folders`);
- what torchvision stores for CIFAR-10, CIFAR-100, MNIST and FashionMNIST
  (`rpg.tasks.images.torchvision_files`).

Where there is no `test`, `val` or `validation` takes its place. A tenth of the training images, always the
same, is for choosing settings.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from rpg.errors import RPGError
from rpg.storage.below import list_below
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import location
from rpg.tasks.images.class_folders import class_names, folder_part
from rpg.tasks.images.parquet import parquet_part
from rpg.tasks.images.part import Part
from rpg.tasks.images.torchvision_files import DIRECTORIES, torchvision_part

VALIDATION_SHARE = 0.1
"""Share of the training images by which settings are chosen. Nothing is trained on them."""
_MIXED_BY = 0
"""Seed of the split into training and validation images, which is always the same."""
_TRAIN, _TEST = ("train",), ("test", "val", "validation")
_EXPECTED = (
    "expected the directory or URI of train.parquet and test.parquet, of train/ and test/ with a folder for "
    f"each class, or of {', '.join(DIRECTORIES[:-1])} or {DIRECTORIES[-1]}"
)


@dataclass(frozen=True)
class Images:
    """Images, uint8 [N, height, width, 3] (RGB), and their classes, int64 [N]."""

    pixels: Tensor
    classes: Tensor
    mirrored: bool = True
    """Whether training may mirror them. Sets of grey images are often of writing, which may not be."""

    def to(self, device: torch.device) -> "Images":
        """The same images on another device."""
        return Images(self.pixels.to(device), self.classes.to(device), self.mirrored)


@dataclass(frozen=True)
class Colours:
    """Mean and standard deviation of a set's training images by channel, with values from 0 to 1."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels, uint8 [N, height, width, 3], as networks take them: float32 [N, 3, height, width] with
        mean 0 and deviation 1."""
        mean, deviation = _on_device(self, pixels.device)
        return ((pixels.float() / 255 - mean) / deviation).permute(0, 3, 1, 2)


@cache
def _on_device(colours: Colours, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cached, because copying them at every step would wait for the GPU."""
    return torch.tensor(colours.mean, device=device), torch.tensor(colours.deviation, device=device)


@dataclass(frozen=True)
class ImageSet:
    """What is known of a set without reading its pixels."""

    directory: str
    classes: int
    """Classes are numbered from 0; so many are there."""
    height: int
    width: int

    def images(self, split: str) -> Images:
        """One of the splits `train` (nine tenths of the training images), `validation` (the others) and
        `test`.

        Raises:
            RPGError: naming the file, if it cannot be read.
        """
        return _split(self.directory, split)

    def colours(self) -> Colours:
        """Of the images of the split `train`."""
        return _colours(self.directory)


@lru_cache(maxsize=4)
def image_set(directory: str) -> ImageSet:
    """The set of images in a directory or behind a URI, the setting `collect.images`.

    Raises:
        RPGError: naming the setting or the file, if there is none, or its test images do not fit the training
            images.
    """
    train, test = (_part(directory, part) for part in ("train", "test"))
    classes = int(train.classes.max()) + 1
    # A damaged label must not ask for a network of a billion outputs.
    if train.classes.min() < 0 or classes > len(train.classes):
        raise RPGError(
            f"{train.source}: labels: expected classes from 0 on, at most as many as images, found "
            f"{train.classes.min()} to {train.classes.max()}"
        )
    if test.classes.min() < 0 or test.classes.max() >= classes:
        raise RPGError(
            f"{test.source}: labels: expected 0 to {classes - 1}, as the training images have, found "
            f"{test.classes.min()} to {test.classes.max()}"
        )
    if (test.height, test.width) != (train.height, train.width):
        raise RPGError(
            f"{test.source}: expected images of {train.width} × {train.height}, as the training images are, "
            f"found {test.width} × {test.height}"
        )
    return ImageSet(directory, classes, train.height, train.width)


@lru_cache(maxsize=3)
def _split(directory: str, split: str) -> Images:
    images = _read(directory, "test" if split == "test" else "train")
    if split == "test":
        return images
    order = torch.randperm(len(images.classes), generator=torch.Generator().manual_seed(_MIXED_BY))
    held_back = round(VALIDATION_SHARE * len(order))
    chosen = order[:held_back] if split == "validation" else order[held_back:]
    return Images(images.pixels[chosen], images.classes[chosen], images.mirrored)


@lru_cache(maxsize=1)
def _read(directory: str, part: str) -> Images:
    found = _part(directory, part)
    pixels = found.read()
    is_grey = bool((pixels == pixels[..., :1]).all())
    return Images(torch.from_numpy(pixels), torch.from_numpy(found.classes), not is_grey)


@lru_cache(maxsize=4)
def _colours(directory: str) -> Colours:
    pixels = _split(directory, "train").pixels.numpy()
    levels = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(3):
        # There are only 256 values, so the sums are exact and need no copy of the images.
        shares = np.bincount(pixels[..., channel].reshape(-1), minlength=256) / pixels[..., channel].size
        means.append(float(shares @ levels))
        deviations.append(float(np.sqrt(shares @ (levels - means[-1]) ** 2)))
    # A set of one colour has nothing to divide by.
    return Colours(tuple(means), tuple(each or 1.0 for each in deviations))


def _part(directory: str, part: str) -> Part:
    if not directory:
        raise RPGError(f"collect.images: {_EXPECTED}; got none")
    root = location(directory)
    try:
        with storage_errors_for(root):
            listed = list_below(root)
    except OSError as error:
        raise RPGError(f"{root}: {error.strerror} (collect.images); {_EXPECTED}") from error
    files = [name for name, each in listed.items() if not each.is_directory]
    folders = [name for name, each in listed.items() if each.is_directory]
    names = _TRAIN if part == "train" else _TEST
    parquet = {name: _parquet_files(files, name) for name in (*_TRAIN, *_TEST)}
    own = [root.name] if root.name in DIRECTORIES else [name for name in folders if name in DIRECTORIES]
    kinds = [
        *own,
        *(["Parquet files"] if any(parquet.values()) else []),
        *(["train/"] if "train" in folders else []),
    ]
    if not kinds:
        raise RPGError(f"{root}: no images found (collect.images); {_EXPECTED}")
    if len(kinds) > 1:
        raise RPGError(
            f"{root}: holds several sets of images, {', '.join(kinds)} (collect.images); expected one"
        )
    try:
        if own:
            return torchvision_part(root, own[0], part)
        if any(parquet.values()):
            for name in names:
                if parquet[name]:
                    return parquet_part(root, parquet[name])
            raise RPGError(f"{root / names[0]}.parquet: not found (collect.images)")
        for name in names:
            if name in folders:
                return folder_part(root, name, class_names(root, _TRAIN[0]))
        raise RPGError(f"{root / names[0]}/: not found (collect.images)")
    except OSError as error:
        raise RPGError(f"{error.filename or root}: {error.strerror} (collect.images)") from error


def _parquet_files(files: Sequence[str], part: str) -> list[str]:
    """`PART.parquet`, or the shards `PART-00000-of-00004.parquet`, in order."""
    return sorted(name for name in files if re.fullmatch(rf"{part}(-.*)?\.parquet", name))
