"""Images in Parquet files: the columns of the Hugging Face Hub, and damaged files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpg.errors import RPGError
from rpg.tasks.images.parquet import parquet_part
from tests.cifar10_files import IMAGE, encoded, pixels_and_classes, write_parquet


def refusal(path: Path) -> str:
    with pytest.raises(RPGError) as error:
        parquet_part(path.parent, [path.name]).read()
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line


def test_images_come_in_order_from_all_files(tmp_path: Path) -> None:
    pixels, classes = pixels_and_classes(30, 0)
    write_parquet(tmp_path / "train-00000-of-00002.parquet", pixels[:20], classes[:20])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", pixels[20:], classes[20:])
    part = parquet_part(tmp_path, ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"])
    assert np.array_equal(part.classes, classes)
    assert (part.height, part.width) == (32, 32)
    assert np.array_equal(part.read(), pixels)


@pytest.mark.parametrize("image", ["img", "image"])
@pytest.mark.parametrize("label", ["label", "fine_label"])
@pytest.mark.parametrize("as_struct", [True, False])
def test_all_names_of_columns_are_known(tmp_path: Path, image: str, label: str, as_struct: bool) -> None:
    pixels, classes = pixels_and_classes(4, 0)
    files = [encoded(each) for each in pixels]
    column = pa.array([{"bytes": each, "path": None} for each in files], IMAGE) if as_struct else files
    table = {image: column, label: pa.array(classes, pa.int32()), "coarse_label": [9] * 4}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    part = parquet_part(tmp_path, ["a.parquet"])
    assert part.classes.tolist() == classes.tolist()
    assert np.array_equal(part.read(), pixels)


def test_jpeg_is_read_as_well(tmp_path: Path) -> None:
    rows = [{"bytes": encoded(np.full((32, 32, 3), 200, np.uint8), "JPEG"), "path": "x.jpg"}] * 2
    pq.write_table(pa.table({"img": pa.array(rows, IMAGE), "label": [3, 4]}), tmp_path / "a.parquet")
    part = parquet_part(tmp_path, ["a.parquet"])
    assert np.abs(part.read().astype(int) - 200).max() <= 2
    assert part.classes.tolist() == [3, 4]


def test_corrupt_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, *pixels_and_classes(20, 0))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not Parquet at all"):
        path.write_bytes(content)
        assert "not readable as Parquet" in refusal(path)


def test_damaged_data_behind_a_whole_footer(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, *pixels_and_classes(20, 0))
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    refusal(path)


def test_links_and_row_groups_that_are_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "a.parquet", *pixels_and_classes(20, 0))
    (tmp_path / "b.parquet").symlink_to(tmp_path / "a.parquet")
    assert "is a link" in refusal(tmp_path / "b.parquet")
    monkeypatch.setattr("rpg.tasks.images.parquet.MOST_BYTES", 1000)
    assert "expected row groups of at most 1,000 bytes" in refusal(tmp_path / "a.parquet")


NO_IMAGE = pa.array([{"bytes": b"", "path": ""}], IMAGE)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"picture": NO_IMAGE, "label": [1]}, "no column 'img'"),
        ({"img": NO_IMAGE, "class": [1]}, "no column 'label'"),
        ({"img": ["x"], "label": [1]}, "column 'img' is string"),
        ({"img": pa.array([{"path": "a"}]), "label": [1]}, "column 'img' is struct"),
        ({"img": NO_IMAGE, "label": ["cat"]}, "column 'label' is string"),
        ({"img": NO_IMAGE, "label": pa.array([None], pa.int64())}, "column 'label' is int64, 1 missing"),
        ({"img": NO_IMAGE, "label": [1]}, "row 0: not a readable image"),
        ({"img": pa.array([None], IMAGE), "label": [1]}, "row 0: not a readable image"),
        ({"img": pa.array([], IMAGE), "label": pa.array([], pa.int64())}, "holds no images"),
    ],
)
def test_wrong_content_is_named(tmp_path: Path, table: dict[str, object], says: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert says in refusal(tmp_path / "a.parquet")
