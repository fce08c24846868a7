"""Small files in the layout of CIFAR-10's Parquet: images that show their class."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded(pixels: np.ndarray, form: str = "PNG") -> bytes:
    """An image file of uint8 [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def pixels_and_classes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise whose brightness grows from left to right, or down, the more the higher the class."""
    random = np.random.default_rng(seed)
    classes = random.permutation(np.arange(count) % 10)
    ramp = np.linspace(-1, 1, 32)
    ramps = np.where((classes % 2 == 0)[:, None, None], ramp[None, :, None], ramp[None, None, :])
    values = 128 + (classes // 2 - 2)[:, None, None] * 30 * ramps
    noisy = values[..., None] + random.normal(0, 20, (count, 32, 32, 3))
    return noisy.clip(0, 255).astype(np.uint8), classes


def write_parquet(path: Path, pixels: np.ndarray, classes: np.ndarray) -> None:
    """One file; the images keep every pixel."""
    rows = [{"bytes": encoded(each), "path": None} for each in pixels]
    table = pa.table({"img": pa.array(rows, IMAGE), "label": pa.array(classes, pa.int64())})
    pq.write_table(table, path)


def write_cifar10(directory: Path, train: int = 200, test: int = 60) -> None:
    """`train.parquet` and `test.parquet`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_parquet(directory / "train.parquet", *pixels_and_classes(train, 0))
    write_parquet(directory / "test.parquet", *pixels_and_classes(test, 1))
