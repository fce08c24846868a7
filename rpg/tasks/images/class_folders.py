"""Images in a folder for each class, as torchvision's `ImageFolder` takes them.

Classes are numbered by the folders' names in order. Unlike torchvision, links are not followed, because they
may lead anywhere; they are refused.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from rpg.errors import RPGError
from rpg.storage.below import check_ordinary_below, list_below, read_below
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath
from rpg.tasks.images.part import MOST_BYTES, Encoded, Part, encoded_part


def class_names(root: AnyPath, part: str) -> list[str]:
    """The names of the folders in the directory `part` of `root`, in order.

    Raises:
        RPGError: if there is none.
    """
    check_ordinary_below(root, part)
    if not (names := sorted(name for name, listed in list_below(root, part).items() if listed.is_directory)):
        raise RPGError(f"{root / part}: expected a folder of images for each class, found none")
    return names


def folder_part(root: AnyPath, part: str, classes: Sequence[str]) -> Part:
    """The images in the directory `part` of `root`.

    Args:
        root: the set's directory.
        part: `train`, `test`, `val`.
        classes: names of the classes' folders, in order; images of another class are an error.

    Raises:
        RPGError: naming the file or folder at fault.
    """
    # Imported here: it takes seconds, and sets of other kinds do without.
    from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

    if unknown := sorted(set(class_names(root, part)) - set(classes)):
        raise RPGError(f"{root / part / unknown[0]}: this class has no folder among the training images")
    files: list[str] = []
    numbers: list[int] = []
    for number, name in enumerate(classes):
        found = _files_below(root, f"{part}/{name}")
        images = [file for file in found if has_file_allowed_extension(file, IMG_EXTENSIONS)]
        files += images
        numbers += [number] * len(images)

    def encoded() -> Iterator[Encoded]:
        for file in files:
            with storage_errors_for(root / file):
                yield str(root / file), read_below(root, file, MOST_BYTES)

    return encoded_part(str(root / part), np.array(numbers, np.int64), encoded)


def _files_below(root: AnyPath, folder: str) -> list[str]:
    """All files in a folder and its folders, in torchvision's order: a folder's own files come first."""
    check_ordinary_below(root, folder)
    listed = list_below(root, folder)
    files = sorted(f"{folder}/{name}" for name, each in listed.items() if not each.is_directory)
    for inner in sorted(name for name, each in listed.items() if each.is_directory):
        files += _files_below(root, f"{folder}/{inner}")
    return files
