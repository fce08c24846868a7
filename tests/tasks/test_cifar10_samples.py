"""Sample images, and users' pictures as torchvision would prepare them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, Resize

from rpg.errors import RPGError
from rpg.tasks.cifar10_samples import picture, samples


def test_samples_are_balanced_and_differ() -> None:
    pixels, classes = samples()
    assert pixels.shape == (40, 32, 32, 3) and pixels.dtype == torch.uint8
    assert classes.bincount().tolist() == [4] * 10
    assert len({image.numpy().tobytes() for image in pixels}) == 40


def test_samples_are_cut_from_the_sheet() -> None:
    sheet = np.asarray(Image.open(Path("rpg/tasks/data/cifar10_samples.png").absolute()).convert("RGB"))
    pixels, classes = samples()
    for i in (0, 3, 17, 39):
        row, column = int(classes[i]), i % 4
        expected = sheet[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert np.array_equal(pixels[i].numpy(), expected)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (100, 60), (61, 333), (20, 20), (33, 32)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pictures_are_what_torchvision_makes_of_them(
    tmp_path: Path, size: tuple[int, int], mode: str
) -> None:
    random = np.random.default_rng(0).integers(0, 256, (*reversed(size), 3), np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(random).convert(mode).save(path)
    expected = Compose([Resize(32), CenterCrop(32)])(Image.open(path).convert("RGB"))
    assert np.array_equal(picture(path).numpy(), np.asarray(expected))


def test_pictures_are_turned_as_the_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # The top of the scene is at the right.
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert (picture(tmp_path / "turned.png")[:, -1] == 255).all()


@pytest.mark.parametrize("content", [b"", b"junk", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(RPGError, match=r"picture\.png: not a readable picture"):
        picture(path)


def test_a_picture_that_is_cut_off_or_a_mere_line_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.zeros((200, 200, 3), np.uint8)).save(whole)
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[:400])
    with pytest.raises(RPGError, match=r"half\.jpg: not a readable picture"):
        picture(tmp_path / "half.jpg")
    Image.new("RGB", (20_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(RPGError, match=r"line\.png: .*less extreme proportions than 20000 × 1"):
        picture(tmp_path / "line.png")
