"""Images that a network for CIFAR-10's classes answers: test images that come with RPG, and a user's own."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rpg.errors import RPGError, one_line

SIZE = 32
_FILE = "cifar10_samples.png"
"""One class a row; `data/README.md` says where the images come from."""


def samples() -> tuple[Tensor, Tensor]:
    """The images, uint8 [40, 32, 32, 3] (RGB), and their classes, int64 [40]."""
    with files("rpg.tasks").joinpath("data", _FILE).open("rb") as file, Image.open(file) as image:
        sheet = torch.from_numpy(np.array(image.convert("RGB")))
    rows = sheet.unflatten(0, (-1, SIZE)).unflatten(2, (-1, SIZE)).transpose(1, 2)
    return rows.flatten(0, 1), torch.arange(len(rows)).repeat_interleave(rows.shape[1])


def picture(path: Path) -> Tensor:
    """A user's picture as a network takes it, uint8 [32, 32, 3].

    It is turned as its camera says, its shorter side scaled to 32 pixels, and the middle cut out, as
    torchvision's `Resize(32)` and `CenterCrop(32)` do.

    Raises:
        RPGError: naming the file, if it is no picture that Pillow reads.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(_scaled(upright))
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; expected a picture") from error
    except Exception as error:
        # Pillow's decoders raise errors of many kinds for files that somebody has made to break them.
        raise RPGError(f"{path}: not a readable picture: {one_line(error)[:200]}") from error


def _scaled(image: Image.Image) -> npt.NDArray[np.uint8]:
    width, height = image.size
    short = min(width, height)
    size = (max(SIZE, SIZE * width // short), max(SIZE, SIZE * height // short))
    # Pillow would make the whole of a strip that is thousands of times as long as it is wide.
    if max(size) > 100 * SIZE:
        raise RPGError(f"expected a picture of less extreme proportions than {width} × {height}")
    scaled = image.resize(size, Image.Resampling.BILINEAR)
    left, top = (round((side - SIZE) / 2) for side in size)
    return np.array(scaled.crop((left, top, left + SIZE, top + SIZE)))
