"""Images in a folder for each class, against torchvision's own ImageFolder."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from rpg.errors import RPGError
from rpg.tasks.images.class_folders import class_names, folder_part
from rpg.tasks.images.image_set import image_set


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 3)):
        for name in ("zebra", "Ant", "bee", "bee/dark", "bee/dark/young"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(256, size=(12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
            (folder / "notes.txt").write_text("not an image")
        (tmp_path / part / "list.csv").write_text("")
    return tmp_path


@pytest.mark.parametrize(("part", "split"), [("train", "train"), ("val", "test")])
def test_images_and_classes_are_those_of_torchvision(directory: Path, part: str, split: str) -> None:
    theirs = ImageFolder(str(directory / part))
    assert class_names(directory, "train") == theirs.classes == ["Ant", "bee", "zebra"]
    ours = folder_part(directory, part, theirs.classes)
    assert ours.classes.tolist() == theirs.targets
    assert np.array_equal(ours.read(), np.stack([np.asarray(image) for image, _ in theirs]))
    found = image_set(str(directory))
    assert (found.classes, found.height, found.width) == (3, 12, 10)
    # A tenth of the 35 training images is for validation.
    assert len(found.images(split).classes) == (31 if split == "train" else 15)


def test_a_class_without_training_images_is_refused(directory: Path) -> None:
    (directory / "val" / "wasp").mkdir()
    with pytest.raises(RPGError, match=r"val/wasp: this class has no folder among the training images"):
        image_set(str(directory))


def test_links_are_refused_where_they_stand(
    directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "0.png"
    Image.new("RGB", (10, 12)).save(secret)
    for link, target in (
        ("val/cat", secret.parent),
        ("train/bee/a.png", secret),
        ("train/bee/dark/b", secret.parent),
    ):
        (directory / link).symlink_to(target)
        with pytest.raises(RPGError, match=f"{link}: is a link"):
            image_set(str(directory))
        (directory / link).unlink()
    image_set(str(directory))


def test_a_folder_that_links_into_itself_does_not_go_on_for_ever(directory: Path) -> None:
    (directory / "train" / "bee" / "again").symlink_to(directory / "train")
    with pytest.raises(RPGError, match="train/bee/again: is a link"):
        image_set(str(directory))


def test_no_folders_and_damaged_images_are_named(directory: Path) -> None:
    (directory / "train" / "Ant" / "3.jpg").write_bytes(b"")
    with pytest.raises(RPGError) as error:
        image_set(str(directory)).images("train")
    assert str(error.value).startswith(f"{directory}/train/Ant/3.jpg: not a readable image")
    (directory / "empty" / "train").mkdir(parents=True)
    with pytest.raises(RPGError, match="empty/train: expected a folder of images for each class, found none"):
        image_set(str(directory / "empty"))
