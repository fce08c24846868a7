"""Sets of images: splits never share an image, sizes and colours are the data's, and errors are one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rpg.errors import RPGError
from rpg.tasks.cifar10_images import check_cifar10, cifar10_images
from rpg.tasks.images.image_set import image_set
from tests.cifar10_files import pixels_and_classes, write_cifar10, write_parquet


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cifar10")
    write_cifar10(path, train=60, test=20)
    return path


def contents(directory: Path, split: str) -> dict[bytes, int]:
    images = cifar10_images(str(directory), split)
    assert images.pixels.shape[1:] == (32, 32, 3)
    return {
        each.numpy().tobytes(): int(label) for each, label in zip(images.pixels, images.classes, strict=True)
    }


def test_splits_share_no_image_and_lose_none(directory: Path) -> None:
    train, validation, test = (contents(directory, split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (54, 6, 20)
    assert not train.keys() & validation.keys()
    pixels, classes = pixels_and_classes(60, 0)
    written = {each.tobytes(): int(label) for each, label in zip(pixels, classes, strict=True)}
    assert train | validation == written
    pixels, classes = pixels_and_classes(20, 1)
    assert test == {each.tobytes(): int(label) for each, label in zip(pixels, classes, strict=True)}


def test_the_split_is_always_the_same(directory: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "copy")
    assert contents(directory, "validation") == contents(tmp_path / "copy", "validation")


def test_normalised_images_have_mean_zero_and_deviation_one(directory: Path) -> None:
    found = image_set(str(directory))
    train = found.images("train")
    inputs = found.colours().normalised(train.pixels).double()
    assert inputs.shape == (54, 3, 32, 32)
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        inputs.square().mean((0, 2, 3)).sqrt(), torch.ones(3).double(), atol=1e-5, rtol=0
    )
    # Each value lies at its pixel's place.
    values = train.pixels.double() / 255
    plain = (values - values.mean((0, 1, 2))) / values.std((0, 1, 2), correction=0)
    torch.testing.assert_close(inputs, plain.permute(0, 3, 1, 2), atol=1e-4, rtol=0)


def test_classes_and_size_are_those_of_the_data(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    write_parquet(tmp_path / "train.parquet", random.integers(256, size=(9, 20, 28, 3), dtype=np.uint8),
                  np.arange(9) % 3)  # fmt: skip
    write_parquet(tmp_path / "test.parquet", random.integers(256, size=(2, 20, 28, 3), dtype=np.uint8),
                  np.array([2, 0]))  # fmt: skip
    found = image_set(str(tmp_path))
    assert (found.classes, found.height, found.width) == (3, 20, 28)
    assert found.images("test").classes.tolist() == [2, 0]
    assert found.images("train").mirrored
    with pytest.raises(RPGError, match=r"expected CIFAR-10, 10 classes .* found 3 classes of 28 × 20"):
        check_cifar10(str(tmp_path))


def test_sets_of_grey_images_are_not_mirrored(tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("test", 1)):
        for name in ("0", "1"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(5):
                pixels = np.random.default_rng(10 * seed + i).integers(256, size=(8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    train = image_set(str(tmp_path)).images("train")
    assert train.pixels.shape == (9, 8, 8, 3)
    assert not train.mirrored


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(RPGError, match=r"^collect\.images: expected .* train\.parquet .*; got none"):
        image_set("")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_part_is_named(directory: Path, tmp_path: Path, part: str) -> None:
    other = {"train": "test", "test": "train"}[part]
    shutil.copy(directory / f"{other}.parquet", tmp_path)
    with pytest.raises(RPGError) as error:
        image_set(str(tmp_path))
    assert str(error.value) == f"{tmp_path / part}.parquet: not found (collect.images)"


def test_a_directory_without_images_and_one_with_two_sets_are_refused(
    directory: Path, tmp_path: Path
) -> None:
    with pytest.raises(RPGError, match=r"no images found \(collect\.images\); expected the directory"):
        image_set(str(tmp_path))
    with pytest.raises(RPGError, match="no images found"):
        image_set(str(tmp_path / "missing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(RPGError, match="file: ") as error:
        image_set(str(tmp_path / "file"))
    assert "\n" not in str(error.value)
    both = tmp_path / "both"
    shutil.copytree(directory, both)
    (both / "MNIST").mkdir()
    with pytest.raises(RPGError, match="holds several sets of images, MNIST, Parquet files"):
        image_set(str(both))


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [([0, 1, 2, 10], [0], r"train\.parquet: labels: .* found 0 to 10"),
     ([0, 1, -1], [0], r"train\.parquet: labels: .* found -1 to 1"),
     ([0, 1, 2], [3], r"test\.parquet: labels: expected 0 to 2, .* found 3 to 3"),
     ([0, 1, 2], [-1], r"test\.parquet: labels: expected 0 to 2, .* found -1 to -1"),
     ([0, 1], [], r"test\.parquet: holds no images")],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(
    tmp_path: Path, train: list[int], test: list[int], says: str
) -> None:
    for name, labels in (("train", train), ("test", test)):
        pixels = np.zeros((len(labels), 8, 8, 3), np.uint8)
        write_parquet(tmp_path / f"{name}.parquet", pixels, np.array(labels, np.int64))
    with pytest.raises(RPGError, match=says):
        image_set(str(tmp_path))


def test_test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]))
    write_parquet(tmp_path / "test.parquet", np.zeros((2, 8, 9, 3), np.uint8), np.array([0, 1]))
    with pytest.raises(RPGError, match=r"test\.parquet: expected images of 8 × 8, .* found 9 × 8"):
        image_set(str(tmp_path))
