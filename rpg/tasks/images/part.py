"""The training or the test images of a set, and image files as pixels. Files may come from anywhere."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from rpg.errors import RPGError, one_line

MOST_BYTES = 2**30
"""Of one file that is read as a whole."""
MOST_SIDE = 1024
"""Pixels of an image's longer side."""
_MOST_PIXEL_BYTES = 2**35
"""Of all images of a part, which stay in memory."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""What is decoded. Pillow has more formats, and starts another program for some of them."""
_DECODERS, _AT_ONCE = 4, 500

Encoded = tuple[str, bytes | None]
"""Where an image comes from, as messages name it, and its file's content."""


@dataclass(frozen=True)
class Part:
    """Images and their classes; the pixels are not read yet."""

    source: str
    """The file or directory, as messages name it."""
    classes: npt.NDArray[np.int64]
    """Each image's class, [N]."""
    height: int
    width: int
    read: Callable[[], npt.NDArray[np.uint8]]
    """Reads the pixels, [N, height, width, 3] (RGB)."""

    def __post_init__(self) -> None:
        if not len(self.classes):
            raise RPGError(f"{self.source}: holds no images")
        if self.height > MOST_SIDE or self.width > MOST_SIDE or not (self.height and self.width):
            raise RPGError(
                f"{self.source}: expected images of 1 to {MOST_SIDE} pixels a side, found "
                f"{self.width} × {self.height}"
            )
        if (needed := 3 * self.height * self.width * len(self.classes)) > _MOST_PIXEL_BYTES:
            raise RPGError(
                f"{self.source}: {len(self.classes):,} images of {self.width} × {self.height} need "
                f"{needed / 2**30:.0f} GiB of memory; expected at most {_MOST_PIXEL_BYTES / 2**30:.0f}"
            )


def encoded_part(
    source: str, classes: npt.NDArray[np.int64], encoded: Callable[[], Iterator[Encoded]]
) -> Part:
    """A part whose images are files such as PNG or JPEG, all of the first one's size.

    Args:
        source: the file or directory, as messages name it.
        classes: each image's class, [N].
        encoded: begins to read the N images, one after the other.

    Raises:
        RPGError: if there are none, or the first cannot be read.
    """
    width, height = 1, 1
    for name, content in islice(encoded(), len(classes) and 1):
        height, width = decoded(content, name).shape[:2]
    return Part(source, classes, height, width, lambda: _all_decoded(encoded(), len(classes), width, height))


def _all_decoded(encoded: Iterator[Encoded], count: int, width: int, height: int) -> npt.NDArray[np.uint8]:
    pixels = np.empty((count, height, width, 3), np.uint8)
    with ThreadPoolExecutor(_DECODERS) as pool:
        for start in range(0, count, _AT_ONCE):
            some = list(islice(encoded, min(_AT_ONCE, count - start)))
            found = pool.map(lambda each: decoded(each[1], each[0], (width, height)), some)
            for row, image in enumerate(found, start):
                pixels[row] = image
    return pixels


def decoded(content: bytes | None, source: str, size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """The pixels of an image file, [height, width, 3] (RGB); a grey image has three equal channels.

    Args:
        content: of the file.
        source: where it comes from, for messages.
        size: the width and height that it has to have; None: any up to `MOST_SIDE`.

    Raises:
        RPGError: in one line, if it is no such image, or of another size. An image that is too large is
            refused before it is decoded.
    """
    try:
        with Image.open(io.BytesIO(content or b""), formats=_FORMATS) as image:
            width, height = image.size
            if size is not None and image.size != size:
                raise RPGError(
                    f"{source}: expected an image of {size[0]} × {size[1]}, as the first one is, found "
                    f"{width} × {height}"
                )
            if max(image.size) > MOST_SIDE:
                raise RPGError(
                    f"{source}: expected an image of at most {MOST_SIDE} pixels a side, found "
                    f"{width} × {height}"
                )
            return np.asarray(image.convert("RGB"))
    except RPGError:
        raise
    except UnidentifiedImageError as error:
        # Its message contains only the buffer's address.
        raise RPGError(f"{source}: not a readable image; expected {', '.join(_FORMATS)}") from error
    except Exception as error:
        # Pillow's decoders raise errors of many kinds for files that somebody has made to break them.
        raise RPGError(f"{source}: not a readable image: {one_line(error)[:200]}") from error
