"""Single image files that may come from anywhere: damaged ones, bombs, formats that run programs."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rpg.errors import RPGError
from rpg.tasks.images.part import Part, decoded, encoded_part
from tests.cifar10_files import encoded

PIXELS = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize("form", ["PNG", "BMP", "PPM", "TIFF"])
def test_pixels_are_kept(form: str) -> None:
    assert np.array_equal(decoded(encoded(PIXELS, form), "a"), PIXELS)


def test_grey_and_transparent_images_become_rgb() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[..., 0]).save(buffer, "PNG")
    assert np.array_equal(decoded(buffer.getvalue(), "a"), np.repeat(PIXELS[..., :1], 3, axis=2))
    buffer = io.BytesIO()
    alpha = np.full((6, 9, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)).save(buffer, "PNG")
    assert np.array_equal(decoded(buffer.getvalue(), "a"), PIXELS)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int) -> bytes:
    """A PNG that says to have this size, and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("side", "says"), [(2000, "found 2000 × 2000"), (60_000, "decompression bomb")])
def test_bombs_are_refused_before_they_are_decoded(side: int, says: str) -> None:
    with pytest.raises(RPGError, match=says):
        decoded(png(side, side), "a")


def test_other_sizes_and_truncated_files_are_refused() -> None:
    content = encoded(PIXELS)
    with pytest.raises(RPGError, match=r"^b: expected an image of 8 × 6, as the first one is, found 9 × 6$"):
        decoded(content, "b", (8, 6))
    for cut in (b"", content[:20], content[: len(content) // 2]):
        with pytest.raises(RPGError, match=r"^b: not a readable image"):
            decoded(cut, "b")


def test_a_format_that_runs_another_program_is_refused() -> None:
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(page)) as image:
        assert image.format == "EPS"
    with pytest.raises(RPGError, match="not a readable image; expected PNG, JPEG"):
        decoded(page, "a")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_end_in_one_line_or_pixels(data: st.DataObject) -> None:
    content = bytearray(encoded(PIXELS, data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))))
    for place, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=5)
    ):
        content[place] = value
    try:
        pixels = decoded(bytes(content[: data.draw(st.integers(0, len(content)))]), "a")
    except RPGError as error:
        assert str(error).startswith("a: ")
        assert "\n" not in str(error)
    else:
        assert pixels.ndim == 3
        assert max(pixels.shape[:2]) <= 1024


def test_images_are_read_in_order_and_name_the_one_at_fault() -> None:
    images = [np.full((4, 4, 3), i % 256, np.uint8) for i in range(1201)]
    files = [(f"image {i}", encoded(each)) for i, each in enumerate(images)]
    part = encoded_part("all", np.zeros(1201, np.int64), lambda: iter(files))
    assert np.array_equal(part.read(), np.stack(images))
    files[1100] = ("image 1100", files[1100][1][:30])
    with pytest.raises(RPGError, match=r"^image 1100: not a readable image"):
        part.read()


def test_more_images_than_fit_in_memory_are_refused() -> None:
    with pytest.raises(RPGError, match=r"all: 1,000,000 images of 1000 × 1000 need 2794 GiB of memory"):
        Part("all", np.zeros(1_000_000, np.int64), 1000, 1000, lambda: PIXELS)
