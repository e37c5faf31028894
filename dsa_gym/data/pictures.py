"""One image file as a small square of uint8.

What a file holds is not to be trusted: its size is looked at before it is decoded, and whatever Pillow stumbles over
is one exception with a few words to count it by.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

__all__ = ["UnusableImageError", "square"]

# Pillow can open more, but some of it (EPS) by running other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


class UnusableImageError(Exception):
    """An image to skip; the message is the reason, in few words to count it by."""


def square(source: np.ndarray | Path | bytes, *, size: int, channels: int, max_pixels: int) -> np.ndarray:
    """Make one image a square.

    It is turned upright (EXIF), cropped to the square in its middle, put on white where it is transparent, converted
    to grey or RGB and resized with antialiasing. Of an animation it is the first frame.

    Args:
        source: uint8 (H, W) or (H, W, 1, 3 or 4), or an image file or its bytes.
        size: Height and width of the square, in pixels.
        channels: 1 for grey, 3 for RGB.
        max_pixels: Largest image that is decoded.

    Returns:
        uint8 (size, size), or (size, size, 3) with three channels.

    Raises:
        UnusableImageError: The image is too large, corrupt or of an unusual kind.
    """
    try:
        # Size is checked below, and a damaged EXIF block is no reason to worry anyone.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _opened(source) as image:
                pixels = image.width * image.height
                if pixels > max_pixels:
                    raise UnusableImageError("too large")
                if pixels == 0:
                    raise UnusableImageError("corrupt")
                ImageOps.exif_transpose(image, in_place=True)
                converted = _converted(_cropped(image), "L" if channels == 1 else "RGB")
                if converted.size != (size, size):
                    converted = converted.resize((size, size), Image.Resampling.LANCZOS)
                return np.array(converted)
    except UnusableImageError:
        raise
    except (Image.DecompressionBombError, MemoryError):
        raise UnusableImageError("too large") from None
    except Exception as error:  # a damaged file can make Pillow's readers raise nearly anything
        raise UnusableImageError("corrupt") from error


def _opened(source: np.ndarray | Path | bytes) -> Image.Image:
    """An image that is not decoded yet."""
    if isinstance(source, np.ndarray):
        return Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)


def _cropped(image: Image.Image) -> Image.Image:
    """The largest square in the middle."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """The image as 8 bits of grey ("L") or RGB, on white."""
    if image.mode.startswith("I"):
        # 16 bits, which Pillow would clip at 255; older versions have them in 32 bits ("I")
        values = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise UnusableImageError("floating-point pixels")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
