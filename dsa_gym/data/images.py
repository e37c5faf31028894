"""Users' images from folders, NPZ files and tables, as small squares of uint8.

Images are decoded one at a time and only the small square is kept, so that large collections stream. One image that
cannot be used is skipped and counted with its reason; an error is raised only if none can be used.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat, tee
from pathlib import Path

import numpy as np

from dsa_gym.data.fetch import DownloadError, DownloadLimits, fetch_all
from dsa_gym.data.image_tables import ImageColumns, ImageEntry, table_entries
from dsa_gym.data.pictures import UnusableImageError, square
from dsa_gym.data.tables import DataError, named, require_columns

__all__ = ["ImageReport", "UserImages", "read_images"]

logger = logging.getLogger(__name__)

SOURCES = ("auto", "folder", "npz", "table")
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_NPZ_CHANNELS = ((), (1,), (3,), (4,))


@dataclass(frozen=True)
class UserImages:
    """The images of one user.

    Attributes:
        user: Name of the user.
        images: (n, H, W) or (n, H, W, 3) uint8, at least one, in the order of the source.
        conditions: What each image is of, a class or a caption; "" if unknown.
    """

    user: str
    images: np.ndarray
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class ImageReport:
    """What became of the images.

    Attributes:
        read: Images, or rows of a table, that were looked at.
        kept: Images that can be used.
        users: Users with at least one of them.
        skipped: Number of skipped ones by reason, for example ``{"corrupt": 2}``.
    """

    read: int
    kept: int
    users: int
    skipped: dict[str, int]


def read_images(
    path: Path | str,
    *,
    source: str = "auto",
    size: int = 28,
    channels: int = 1,
    user_column: str | None = None,
    condition_column: str | None = None,
    image_column: str | None = None,
    aesthetic_column: str | None = None,
    min_aesthetic: float | None = None,
    max_pixels: int = 64_000_000,
    download: bool = False,
    download_limits: DownloadLimits | None = None,
) -> tuple[list[UserImages], ImageReport]:
    """Read the images of users and make them squares of one size.

    Images are turned upright (EXIF), put on white where they are transparent, converted to grey or RGB, cropped to
    the square in their middle and resized.

    Sources:
        folder: ``ROOT/USER/CONDITION.png`` or ``ROOT/USER/CONDITION/ANY.png``, in sorted order; hidden files are
            ignored.
        npz: array ``image`` (n, H, W[, C]) uint8, and ``user`` (n,) with optional ``condition`` (n,); or ``alphabet``,
            ``character`` and ``drawer`` as in Omniglot, where a user is ``alphabet/drawer`` and a condition
            ``alphabet/character``.
        table: CSV, TSV, JSON Lines or Parquet with a row per image (LAION, Flickr30k and the like), and Flickr30k's
            ``results.csv``. An image is a path relative to the table's folder, and inside it, an http(s) address, or
            the bytes of a file. A path or address that comes again is skipped: of several captions the first is kept.
            Without a user column all images belong to one user, called like the file.

    Args:
        path: Folder or file.
        source: ``"auto"``, or one of the above.
        size: Height and width of the squares, in pixels.
        channels: 1 for grey, 3 for RGB.
        user_column: Column (array of an NPZ file) with the user, if it is not called as usual.
        condition_column: Column with the caption or class; rows in which it is empty are skipped.
        image_column: Column with the image.
        aesthetic_column: Column with the aesthetic score.
        min_aesthetic: Skip images whose aesthetic score is lower or missing.
        max_pixels: Skip images with more pixels, before they are decoded.
        download: Whether to download images whose address is given; else they are skipped.
        download_limits: Limits of downloads.

    Returns:
        Users sorted by name, and what was skipped.

    Raises:
        DataError: The source is missing, damaged, lacks a column, or has not one image that can be used.
        ValueError: An argument is out of range.
    """
    path = Path(path)
    if size < 1 or channels not in (1, 3) or max_pixels < 1:
        raise ValueError(
            f"size={size}, channels={channels}, max_pixels={max_pixels}: expected size >= 1, channels 1 or 3, "
            "max_pixels >= 1"
        )
    columns = ImageColumns(user_column, condition_column, image_column, aesthetic_column)
    kind = _source(path, source)
    _check_unused(path, kind, columns, min_aesthetic)
    if kind == "folder":
        entries = _folder_entries(path)
    elif kind == "npz":
        entries = _npz_entries(path, columns)
    else:
        entries = table_entries(path, columns, min_aesthetic)
    loaded: Iterable[tuple[ImageEntry | str, bytes | DownloadError | None]] = zip(entries, repeat(None))
    if download:
        entries, ahead = tee(entries)
        loaded = zip(entries, fetch_all(map(_address, ahead), download_limits), strict=True)
    return _collected(path, loaded, {"size": size, "channels": channels, "max_pixels": max_pixels})


def _source(path: Path, source: str) -> str:
    """The source of images, by name or by what lies at the path."""
    if source not in SOURCES:
        raise DataError(f"source={source!r}: expected one of {named(SOURCES)}")
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    if source == "auto":
        source = "folder" if path.is_dir() else "npz" if path.suffix.lower() == ".npz" else "table"
    if (source == "folder") != path.is_dir():
        raise DataError(f"source={source!r}: {path} is a {'folder' if path.is_dir() else 'file'}")
    return source


def _check_unused(path: Path, kind: str, columns: ImageColumns, min_aesthetic: float | None) -> None:
    """Refuse what would have no effect."""
    given = {f"{name}_column": value for name, value in columns._asdict().items() if value is not None}
    if min_aesthetic is not None:
        given["min_aesthetic"] = str(min_aesthetic)
    used = {"folder": (), "npz": ("user_column", "condition_column", "image_column"), "table": tuple(given)}[kind]
    for name, value in given.items():
        if name not in used:
            raise ValueError(f"{name}={value!r}: {path} is read as source={kind!r}, which has none; leave it out")


def _collected(
    path: Path, loaded: Iterable[tuple[ImageEntry | str, bytes | DownloadError | None]], target: dict[str, int]
) -> tuple[list[UserImages], ImageReport]:
    """Decode images one by one, sort them by user and count what is skipped."""
    users: dict[str, tuple[list[np.ndarray], list[str]]] = {}
    skipped: Counter[str] = Counter()
    read = 0
    for entry, content in loaded:
        read += 1
        try:
            if isinstance(entry, str):
                raise UnusableImageError(entry)
            image = square(_content(entry, content), **target)
        except UnusableImageError as reason:
            skipped[str(reason)] += 1
            continue
        images, conditions = users.setdefault(entry.user, ([], []))
        images.append(image)
        conditions.append(entry.condition)
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))
    if not users:
        raise DataError(f"{path} has no image that can be used" + (f", of {read} skipped: {counts}" if counts else ""))
    if skipped:
        logger.warning("%s: skipped %d of %d images: %s", path, skipped.total(), read, counts)
    # popped, so that not all images are held twice
    found = [
        UserImages(user, np.stack(images), tuple(conditions))
        for user in sorted(users)
        for images, conditions in [users.pop(user)]
    ]
    return found, ImageReport(read, read - skipped.total(), len(found), dict(sorted(skipped.items())))


def _content(entry: ImageEntry, downloaded: bytes | DownloadError | None) -> np.ndarray | Path | bytes:
    """What to decode."""
    if not isinstance(entry.image, str):
        return entry.image
    if isinstance(downloaded, bytes):
        return downloaded
    raise UnusableImageError("not downloaded" if downloaded is None else downloaded.reason)


# Sources: they yield an entry for every image, or the reason to skip it


def _folder_entries(root: Path) -> Iterator[ImageEntry | str]:
    """Files in the folders of users."""
    # user by user, so that the names of all files need not fit in memory
    for path in (file for user in sorted(root.iterdir()) for file in (sorted(user.rglob("*")) or [user])):
        parts = path.relative_to(root).parts
        if any(part.startswith(".") for part in parts) or path.is_dir():
            continue
        if path.suffix.lower() not in _SUFFIXES:
            yield "not an image file"
        elif len(parts) == 1:
            yield "in no user's folder"
        else:
            yield ImageEntry(parts[0], "/".join(parts[1:-1]) or path.stem, path)


def _npz_entries(path: Path, columns: ImageColumns) -> Iterator[ImageEntry | str]:
    """The rows of an NPZ file's arrays."""
    try:
        # opened here: np.load leaves a file that it cannot read open
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (AttributeError, TypeError):  # what np.load gives is no archive of arrays
        raise DataError(f"{path} is no NPZ file") from None
    except (OSError, EOFError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged, no NPZ file, or has arrays of objects: {error}") from error
    omniglot = columns.user is None and "user" not in arrays and {"alphabet", "character", "drawer"} <= set(arrays)
    image_key = columns.image or "image"
    user_keys = ("alphabet", "drawer") if omniglot else (columns.user or "user",)
    condition_keys: tuple[str, ...] = ("alphabet", "character") if omniglot else ()
    if columns.condition or "condition" in arrays:
        condition_keys = (columns.condition or "condition",)
    require_columns(path, arrays, (image_key, *user_keys, *condition_keys))
    images = arrays[image_key]
    if (
        images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or 0 in images.shape
        or images.shape[3:] not in _NPZ_CHANNELS
    ):
        raise DataError(
            f"{path}: {image_key!r} has shape {images.shape} and type {images.dtype}, expected uint8 of shape "
            "(n, H, W), (n, H, W, 1), (n, H, W, 3) or (n, H, W, 4), none of them 0"
        )
    for key in (*user_keys, *condition_keys):
        if arrays[key].shape != images.shape[:1] or arrays[key].dtype.kind not in "Uiu":
            raise DataError(
                f"{path}: {key!r} has shape {arrays[key].shape} and type {arrays[key].dtype}, expected strings or "
                f"integers of shape {images.shape[:1]} as in {image_key!r}"
            )
    for row, image in enumerate(images):
        user = "/".join(str(arrays[key][row]) for key in user_keys)
        condition = "/".join(str(arrays[key][row]) for key in condition_keys)
        if not user.strip():
            yield "no user"
        elif condition_keys and not condition.strip():
            yield "no caption"
        else:
            yield ImageEntry(user, condition, image)


def _address(entry: ImageEntry | str) -> str | None:
    """The address of an image that is to be downloaded."""
    return entry.image if isinstance(entry, ImageEntry) and isinstance(entry.image, str) else None
