"""One picture: every mode becomes grey or RGB, and no file can do more harm than be skipped."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dsa_gym.data.pictures import UnusableImageError, square


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def made(
    source: np.ndarray | Path | bytes, *, size: int = 4, channels: int = 1, max_pixels: int = 10_000
) -> np.ndarray:
    return square(source, size=size, channels=channels, max_pixels=max_pixels)


def palette(*, transparent: bool) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    if transparent:
        image.info["transparency"] = 1
    return image


RED, WHITE = (200, 100, 50), (255, 255, 255)
GREY = Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0))


@pytest.mark.parametrize(
    ("content", "rgb", "grey"),
    [
        (encoded(Image.new("1", (8, 8), 1)), WHITE, 255),
        (encoded(Image.new("L", (8, 8), 100)), (100, 100, 100), 100),
        (encoded(Image.new("LA", (8, 8), (0, 0))), WHITE, 255),
        (encoded(Image.new("LA", (8, 8), (100, 255))), (100, 100, 100), 100),
        (encoded(palette(transparent=False)), RED, GREY),
        (encoded(palette(transparent=True)), WHITE, 255),
        (encoded(Image.new("RGB", (8, 8), RED)), RED, GREY),
        (encoded(Image.new("RGB", (8, 8), RED), transparency=RED), WHITE, 255),
        (encoded(Image.new("RGBA", (8, 8), (*RED, 255))), RED, GREY),
        (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))), WHITE, 255),
        (encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 51))), (204, 204, 204), 204),
        (encoded(Image.new("CMYK", (8, 8), (55, 155, 205, 0)), "TIFF"), RED, GREY),
        (encoded(Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))), (100, 100, 100), 100),
        (encoded(Image.fromarray(np.full((8, 8), 65535, np.uint16)), "TIFF"), WHITE, 255),
        (encoded(Image.fromarray(np.full((8, 8), 100 * 257, np.int32)), "TIFF"), (100, 100, 100), 100),
        (encoded(Image.new("RGB", (8, 8), WHITE), "JPEG"), WHITE, 255),
        (encoded(Image.new("RGB", (8, 8), WHITE), "WEBP", lossless=True), WHITE, 255),
        (
            encoded(Image.new("L", (8, 8), 100), "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 9)]),
            None,
            100,
        ),
        (encoded(Image.new("RGB", (8, 8), RED), "BMP"), RED, GREY),
        (encoded(Image.new("RGB", (8, 8), RED), "PPM"), RED, GREY),
    ],
)
def test_modes_and_formats(content: bytes, rgb: tuple[int, int, int] | None, grey: int) -> None:
    image = made(content)
    assert image.dtype == np.uint8 and image.shape == (4, 4) and (image == grey).all()
    image = made(content, channels=3)
    assert image.dtype == np.uint8 and image.shape == (4, 4, 3) and (image == (rgb or (grey, grey, grey))).all()


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1)])
def test_arrays_of_the_right_size_stay_as_they_are(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    array = rng.integers(0, 256, shape, dtype=np.uint8)
    assert (made(array) == array.reshape(4, 4)).all()
    colours = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    assert (made(colours, channels=3) == colours).all()
    see_through = np.concatenate([colours, np.zeros((4, 4, 1), np.uint8)], axis=2)
    assert (made(see_through) == 255).all()


@pytest.mark.parametrize(("width", "height"), [(12, 4), (4, 12), (13, 4)])
def test_the_middle_is_kept(width: int, height: int) -> None:
    image = Image.new("L", (width, height), 0)
    left, top = (width - 4) // 2, (height - 4) // 2
    ImageDraw.Draw(image).rectangle((left, top, left + 3, top + 3), fill=255)
    assert (made(encoded(image)) == 255).all()


def test_resizing_averages() -> None:
    checks = np.kron(np.ones((16, 16)), [[0, 255], [255, 0]]).astype(np.uint8)  # (32, 32)
    assert np.abs(made(checks).astype(int) - 127.5).max() < 8
    assert made(np.full((2, 2), 9, np.uint8), size=5).tolist() == [[9] * 5] * 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(orientation: int) -> None:
    upright = np.array([[10, 60, 110, 160]] * 2 + [[210, 210, 210, 210]] * 2, np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif.tobytes())
    assert made(content).tolist() == upright.tolist()


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A grey PNG that says it has this size, whatever its data are."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


PHOTO = encoded(Image.effect_noise((40, 40), 50), "JPEG")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "corrupt"),
        (b"this is no image", "corrupt"),
        (PHOTO[: len(PHOTO) // 2], "corrupt"),
        (png(4, 4), "corrupt"),
        (png(0, 4), "corrupt"),
        (png(101, 100), "too large"),
        (png(10_000, 10_000), "too large"),
        (png(60_000, 60_000), "too large"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "corrupt"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point pixels"),
    ],
)
def test_unusable_images(content: bytes, reason: str) -> None:
    with pytest.raises(UnusableImageError, match=rf"^{reason}$"):
        made(content)


@pytest.mark.parametrize("pixels", [60_000**2 + 1, 100_000_000])
def test_size_is_looked_at_before_decoding(pixels: int) -> None:
    # neither Pillow's warning nor its error stand in the way of what the caller allows or hides its reason
    with pytest.raises(UnusableImageError, match=r"^too large$"):
        made(png(60_000, 60_000), max_pixels=pixels)
    assert made(png(100, 100, bytes(101) * 100), max_pixels=10_000).max() == 0


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.new("L", (8, 8), 100)))
    assert (made(tmp_path / "a.png") == 100).all()
    with pytest.raises(UnusableImageError, match="corrupt"):
        made(tmp_path / "b.png")


@given(
    st.sampled_from([PHOTO, encoded(palette(transparent=True)), encoded(palette(transparent=True), "GIF")]), st.data()
)
def test_damage_never_gives_another_error(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert made(bytes(damaged)).shape == (4, 4)
    except UnusableImageError as error:
        assert str(error) in ("corrupt", "too large")
