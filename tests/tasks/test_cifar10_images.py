"""CIFAR-10's images: splits never share an image, and errors in files are one line."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpg.errors import RPGError
from rpg.tasks.cifar10_images import check_files, cifar10_images, read_batch_file
from tests.cifar10_files import IMAGE, encoded, pixels_and_classes, write_cifar10, write_parquet


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


def test_jpeg_is_read_as_well(tmp_path: Path) -> None:
    pixels = np.full((2, 32, 32, 3), 200, np.uint8)
    rows = [{"bytes": encoded(each, "JPEG"), "path": "x.jpg"} for each in pixels]
    pq.write_table(pa.table({"img": pa.array(rows, IMAGE), "label": [3, 4]}), tmp_path / "test.parquet")
    read = cifar10_images(str(tmp_path), "test")
    assert (read.pixels.int() - 200).abs().max() <= 2
    assert read.classes.tolist() == [3, 4]


def refusal(path: Path) -> str:
    with pytest.raises(RPGError) as error:
        cifar10_images(str(path), "test")
    line = str(error.value)
    assert "\n" not in line
    return line


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(RPGError, match=r"^collect\.images: expected .* train\.parquet .*, got none"):
        check_files("")


def test_a_missing_file_is_named(directory: Path, tmp_path: Path) -> None:
    shutil.copy(directory / "test.parquet", tmp_path / "test.parquet")
    with pytest.raises(RPGError) as error:
        check_files(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path / 'train.parquet'}: not found (collect.images)")


def test_corrupt_parquet_is_named(directory: Path, tmp_path: Path) -> None:
    whole = (directory / "test.parquet").read_bytes()
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "other": b"not Parquet at all",
    }.items():
        path = tmp_path / name
        path.mkdir()
        (path / "test.parquet").write_bytes(content)
        assert refusal(path).startswith(f"{path / 'test.parquet'}: not readable as Parquet")


def test_damaged_data_behind_a_whole_footer(directory: Path, tmp_path: Path) -> None:
    content = bytearray((directory / "test.parquet").read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    (tmp_path / "test.parquet").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'test.parquet'}: ")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"image": pa.array([], IMAGE), "label": pa.array([], pa.int64())}, "no column 'img'"),
        ({"img": pa.array([], IMAGE), "fine_label": pa.array([], pa.int64())}, "no column 'label'"),
        ({"img": pa.array([b"x"]), "label": [1]}, "column 'img' is binary"),
        (
            {"img": pa.array([{"bytes": b"", "path": ""}], IMAGE), "label": ["cat"]},
            "column 'label' is string",
        ),
        ({"img": pa.array([{"bytes": b"", "path": ""}], IMAGE), "label": [10]}, "expected 0 to 9, found 10"),
        ({"img": pa.array([{"bytes": b"", "path": ""}], IMAGE), "label": [1]}, "row 0: not a readable image"),
        ({"img": pa.array([None], IMAGE), "label": [1]}, "row 0: not a readable image"),
        ({"img": pa.array([], IMAGE), "label": pa.array([], pa.int64())}, "holds no images"),
    ],
)
def test_wrong_content_is_named(tmp_path: Path, table: dict[str, object], says: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "test.parquet")
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path / 'test.parquet'}: ")
    assert says in line


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


def test_torchvisions_files_are_read_without_being_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    written: dict[bytes, int] = {}
    for i, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        pixels, classes = pixels_and_classes(20, i)
        (folder / name).write_bytes(batch_file(pixels, classes.tolist()))
        if name != "test_batch":
            written |= {each.tobytes(): int(label) for each, label in zip(pixels, classes, strict=True)}
    check_files(str(tmp_path))
    assert contents(tmp_path, "train") | contents(tmp_path, "validation") == written
    assert len(written) == 100
    assert list(contents(tmp_path, "test").values()) == pixels_and_classes(20, 5)[1].tolist()
    assert not (tmp_path / "oops").exists()
    (folder / "data_batch_3").unlink()
    with pytest.raises(RPGError, match="data_batch_3: not found"):
        check_files(str(tmp_path))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_batches_that_newer_pythons_wrote(tmp_path: Path, protocol: int) -> None:
    pixels, classes = pixels_and_classes(10, 0)
    data = pixels.transpose(0, 3, 1, 2).reshape(10, -1).copy()
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({b"data": data, b"labels": classes.tolist()}, protocol=protocol))
    read, labels = read_batch_file(path)
    assert np.array_equal(read, pixels)
    assert labels.tolist() == classes.tolist()


def test_files_that_are_no_batches_are_refused(tmp_path: Path) -> None:
    whole = batch_file(*(lambda pixels, classes: (pixels, classes.tolist()))(*pixels_and_classes(10, 0)))
    fewer = pickle.dumps({b"data": np.zeros((10, 3072), np.uint8), b"labels": [1] * 9})
    for content in (b"", b"no pickle", whole[: len(whole) // 2], fewer, pickle.dumps(1)):
        path = tmp_path / "test_batch"
        path.write_bytes(content)
        with pytest.raises(RPGError) as error:
            read_batch_file(path)
        assert str(error.value).startswith(f"{path}: not one of CIFAR-10's batch files")
        assert "\n" not in str(error.value)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", np.zeros((1, 28, 30, 3), np.uint8), np.array([1]))
    assert "row 0: expected an image of 32 × 32, found 30 × 28" in refusal(tmp_path)
