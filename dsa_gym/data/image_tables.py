"""Tables of images: what each row says of an image, its user, its caption and its aesthetic score."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsa_gym.data.pictures import UnusableImageError
from dsa_gym.data.ratings import JSON_SUFFIXES, table_suffix
from dsa_gym.data.tables import DataError, Row, named, read_lines, read_objects, read_rows, require_columns

__all__ = ["ImageColumns", "ImageEntry", "table_entries"]

logger = logging.getLogger(__name__)

# The first of these that a table has is taken.
_IMAGE_COLUMNS = (
    *("image", "path", "filename", "file_name", "file", "image_name", "image_path"),
    *("url", "URL", "image_url"),
)
_CONDITION_COLUMNS = ("caption", "TEXT", "text", "comment", "condition", "class", "label", "prompt")
_USER_COLUMNS = ("user", "user_id", "userId", "uploader", "photographer", "author", "artist", "owner")
_AESTHETIC_COLUMNS = ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


class ImageEntry(NamedTuple):
    """One image before it is decoded: an array, a file, the bytes of one, or an address in the web."""

    user: str
    condition: str
    image: np.ndarray | Path | bytes | str


class ImageColumns(NamedTuple):
    """The columns that the caller named, None where they are to be found."""

    user: str | None
    condition: str | None
    image: str | None
    aesthetic: str | None


def table_entries(path: Path, columns: ImageColumns, min_aesthetic: float | None) -> Iterator[ImageEntry | str]:
    """The rows of a table."""
    chosen: ImageColumns | None = None
    seen: set[tuple[str, str]] = set()
    for row in _table_rows(path, columns):
        chosen = chosen or _chosen(path, columns, row.values, scored=min_aesthetic is not None)
        try:
            entry = _table_entry(path, row.values, chosen, min_aesthetic)
        except UnusableImageError as reason:
            yield str(reason)
            continue
        place = (entry.user, str(entry.image))
        if isinstance(entry.image, bytes) or place not in seen:
            yield entry
        else:
            yield "another caption of the same image"
        if not isinstance(entry.image, bytes):
            seen.add(place)


def _table_rows(path: Path, columns: ImageColumns) -> Iterator[Row]:
    """Rows with the columns that were named, and those that may be needed."""
    asked = [name for name in columns if name is not None]
    suffix = table_suffix(path)
    if suffix in JSON_SUFFIXES:
        # not read_rows, which takes a caption that is missing in one row for an error
        yield from read_objects(path)
    elif suffix != ".parquet" and "image_name|" in next(read_lines(path), (0, ""))[1]:
        yield from _piped_rows(path)
    else:
        known = (*_IMAGE_COLUMNS, *_CONDITION_COLUMNS, *_USER_COLUMNS, *_AESTHETIC_COLUMNS)
        yield from read_rows(path, asked, known)


def _piped_rows(path: Path) -> Iterator[Row]:
    """Rows of Flickr30k's `image_name| comment_number| comment`, some of which lack a delimiter."""
    names: list[str] = []
    for number, line in read_lines(path):
        fields = [field.strip() for field in line.split("|", len(names) - 1 if names else -1)]
        if names and line.strip():
            yield Row(f"{path}, line {number}", dict(zip(names, fields, strict=False)))
        names = names or fields


def _chosen(path: Path, asked: ImageColumns, available: Collection[str], *, scored: bool) -> ImageColumns:
    """The columns to read: those that were named, else the usual ones that are there."""
    require_columns(path, available, [name for name in asked if name is not None])
    known = (_USER_COLUMNS, _CONDITION_COLUMNS, _IMAGE_COLUMNS, _AESTHETIC_COLUMNS)
    found = ImageColumns(
        *(
            name or next((candidate for candidate in candidates if candidate in available), None)
            for name, candidates in zip(asked, known, strict=True)
        )
    )
    if found.image is None:
        raise DataError(f"{path} has no column with images: give image_column, or call it {named(_IMAGE_COLUMNS)}")
    if scored and found.aesthetic is None:
        raise DataError(f"{path} has no aesthetic score: give aesthetic_column, or leave out min_aesthetic")
    if found.user is None:
        logger.warning("%s has no column with users, its images are one user's: give user_column", path)
    return found


def _table_entry(
    path: Path, values: Mapping[str, Any], columns: ImageColumns, min_aesthetic: float | None
) -> ImageEntry:
    """One row as an entry; raises `UnusableImageError` with the reason to skip it."""
    user = _text(values.get(columns.user)) if columns.user else path.name.partition(".")[0]
    if not user:
        raise UnusableImageError("no user")
    condition = _text(values.get(columns.condition)) if columns.condition else ""
    if columns.condition and not condition:
        raise UnusableImageError("no caption")
    if min_aesthetic is not None:
        score = _number(values.get(columns.aesthetic or ""))
        if score is None:
            raise UnusableImageError("no aesthetic score")
        if score < min_aesthetic:
            raise UnusableImageError("below aesthetic score")
    return ImageEntry(user, condition, _located(path.parent, values.get(columns.image or "")))


def _located(folder: Path, value: Any) -> Path | bytes | str:
    """What a table says of an image: a path inside the folder, the bytes of a file, or an address."""
    if isinstance(value, dict):  # how Parquet files of the `datasets` library hold images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    place = _text(value)
    if not place:
        raise UnusableImageError("no image")
    if _ADDRESS.match(place):
        return place
    # Flickr30k's images are packed in a folder beside their table
    for name in (folder / place, folder / "flickr30k_images" / place):
        try:
            path = name.resolve()
            if not path.is_relative_to(folder.resolve()):
                raise UnusableImageError("outside the folder")
            if path.is_file():
                return path
        except (OSError, RuntimeError, ValueError):  # too long, links in a circle, a null byte
            break
    raise UnusableImageError("missing file")


def _text(value: Any) -> str:
    """A string or integer as text without spaces around it, "" for anything else."""
    if isinstance(value, str):
        return value.strip()
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else ""


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
