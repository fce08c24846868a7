"""The files of torchvision's data sets, against torchvision's own loaders, and none of them executed."""

import gzip
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import MNIST

from rpg.errors import RPGError
from rpg.tasks.images.image_set import image_set
from rpg.tasks.images.torchvision_files import read_batch_file
from tests.cifar10_files import pixels_and_classes


def contents(directory: Path, *splits: str) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for split in splits:
        images = image_set(str(directory)).images(split)
        found |= {
            each.numpy().tobytes(): int(label)
            for each, label in zip(images.pixels, images.classes, strict=True)
        }
    return found


def batch_file(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A file as Python 2 wrote CIFAR-10's, protocol 2; run, it would call the shell."""
    planes = pixels.transpose(0, 3, 1, 2).tobytes()
    return b"".join(
        [
            b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(",
            *(b"K" + bytes([label]) for label in labels),
            b"eU\x04dataq\x06cposix\nsystem\nq\x07U\x0atouch oopsq\x08\x85q\x09Rq\x0a(K\x01K",
            bytes([len(labels)]),
            b"M\x00\x0cI00\nT" + len(planes).to_bytes(4, "little") + planes + b"tbU\x09filenamesq\x0b]q\x0c(",
            *(b"U\x05a.png" for _ in labels),
            b"eu.",
        ]
    )


def test_cifar10s_files_are_read_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    written: dict[bytes, int] = {}
    for i, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        pixels, classes = pixels_and_classes(20, i)
        (folder / name).write_bytes(batch_file(pixels, classes.tolist()))
        if name != "test_batch":
            written |= {each.tobytes(): int(label) for each, label in zip(pixels, classes, strict=True)}
    assert contents(tmp_path, "train", "validation") == written
    assert len(written) == 100
    assert contents(folder, "train", "validation") == written
    assert list(contents(tmp_path, "test").values()) == pixels_and_classes(20, 5)[1].tolist()
    assert not (tmp_path / "oops").exists()
    shutil.copytree(tmp_path, tmp_path / "less")
    (tmp_path / "less" / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(RPGError, match="data_batch_3: not found"):
        image_set(str(tmp_path / "less"))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar100s_files_have_their_fine_classes(tmp_path: Path, protocol: int) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels, classes = pixels_and_classes(10, 0)
    for name in ("train", "test"):
        content: dict[bytes, Any] = {
            b"filenames": [b"a.png"] * 10,
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": classes.tolist(),
            b"coarse_labels": [1] * 10,
            b"data": pixels.transpose(0, 3, 1, 2).reshape(10, -1).copy(),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    assert contents(tmp_path, "test") == {
        each.tobytes(): int(label) for each, label in zip(pixels, classes, strict=True)
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_batches_that_newer_pythons_wrote(tmp_path: Path, protocol: int) -> None:
    pixels, classes = pixels_and_classes(10, 0)
    data = pixels.transpose(0, 3, 1, 2).reshape(10, -1).copy()
    (tmp_path / "a").write_bytes(
        pickle.dumps({b"data": data, b"labels": classes.tolist()}, protocol=protocol)
    )
    read, labels = read_batch_file(tmp_path, "a")
    assert np.array_equal(read, pixels)
    assert labels.tolist() == classes.tolist()


def test_files_that_are_no_batches_are_refused(tmp_path: Path) -> None:
    whole = batch_file(*(lambda pixels, classes: (pixels, classes.tolist()))(*pixels_and_classes(10, 0)))
    fewer = pickle.dumps({b"data": np.zeros((10, 3072), np.uint8), b"labels": [1] * 9})
    huge = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10**30]})
    for content in (b"", b"no pickle", whole[: len(whole) // 2], fewer, huge, pickle.dumps(1)):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(RPGError) as error:
            read_batch_file(tmp_path, "a")
        assert str(error.value).startswith(f"{tmp_path / 'a'}: not one of CIFAR's batch files")
        assert "\n" not in str(error.value)


def idx(values: np.ndarray) -> bytes:
    """MNIST's format: zero, zero, 8 for bytes, the number of dimensions, their sizes, the values."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_mnist(directory: Path, name: str = "MNIST") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    raw = directory / name / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    written = {}
    for part, prefix, count in (("train", "train", 40), ("test", "t10k", 10)):
        pixels = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        classes = (np.arange(count) % 10).astype(np.uint8)
        for file, values in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", classes)):
            (raw / f"{prefix}-{file}").write_bytes(idx(values))
            # torchvision leaves what it has downloaded beside it.
            (raw / f"{prefix}-{file}.gz").write_bytes(gzip.compress(idx(values)))
        written[part] = pixels, classes
    return written


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_mnists_files_are_read_as_torchvision_reads_them(tmp_path: Path, name: str) -> None:
    written = write_mnist(tmp_path, name)
    found = image_set(str(tmp_path))
    assert (found.classes, found.height, found.width) == (10, 28, 28)
    test = found.images("test")
    assert np.array_equal(test.pixels.numpy(), np.repeat(written["test"][0][..., None], 3, axis=3))
    if name == "MNIST":
        theirs = MNIST(str(tmp_path), train=False)
        assert test.pixels[..., 0].equal(theirs.data)
        assert test.classes.equal(theirs.targets)
    train = found.images("train")
    assert len(train.classes) == 36
    assert not train.mirrored


def test_damaged_mnist_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    path = raw / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content in (b"", b"\0\0\x08", whole[:-100], b"\0\0\x0d\x03" + whole[4:], idx(np.zeros(5, np.uint8))):
        path.write_bytes(content)
        with pytest.raises(RPGError) as error:
            image_set(str(tmp_path))
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
    path.write_bytes(idx(np.zeros((39, 28, 28), np.uint8)))
    with pytest.raises(RPGError, match="39 images, but 40 labels"):
        image_set(str(tmp_path))
    path.unlink()
    with pytest.raises(RPGError, match=r"train-images-idx3-ubyte: not found \(collect\.images\)"):
        image_set(str(tmp_path))
    path.symlink_to(raw / "t10k-images-idx3-ubyte")
    with pytest.raises(RPGError, match="train-images-idx3-ubyte: is a link"):
        image_set(str(tmp_path))
