"""Rows of rating data sets: MovieLens, Amazon Reviews, MovieTweetings and plain tables, streamed alike."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsa_gym.data.streams import compression
from dsa_gym.data.tables import (
    DataError,
    Row,
    check_name,
    named,
    order_key,
    read_lines,
    read_objects,
    read_rows,
    require_columns,
)

__all__ = ["JSON_SUFFIXES", "SOURCES", "Rating", "RatingColumns", "read_ratings", "table_suffix"]


class Rating(NamedTuple):
    """One checked row: a user, an item, what the user thought of it and when, None where a file does not say."""

    where: str
    user: str
    item: str
    rating: float | None
    time: float | None


class RatingColumns(NamedTuple):
    """The columns that the caller named, None where they are to be found."""

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None


@dataclass(frozen=True)
class _Source:
    """How a data set writes its rows.

    Attributes:
        columns: For user, item, rating and time the columns by which they go, the first that is there is taken.
            Of files without a header they are positions from 1.
        delimiter: What separates the fields of a file without a header; None for a table.
        low: Lowest rating.
        high: Highest rating.
        ticks: Units of time in a second.
    """

    columns: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    delimiter: str | None = None
    low: float = -math.inf
    high: float = math.inf
    ticks: int = 1


_PLACES = (("1",), ("2",), ("3",), ("4",))
_SOURCES = {
    "movielens-100k": _Source(_PLACES, "\t", 1, 5),
    "movielens": _Source(_PLACES, "::", 0.5, 5),
    "movielens-csv": _Source((("userId",), ("movieId",), ("rating",), ("timestamp",)), None, 0.5, 5),
    "movietweetings": _Source(_PLACES, "::", 0, 10),
    "amazon-2014": _Source((("reviewerID",), ("asin",), ("overall",), ("unixReviewTime",)), None, 1, 5),
    "amazon-2023": _Source((("user_id",), ("parent_asin", "asin"), ("rating",), ("timestamp",)), None, 1, 5, 1000),
    # user and item are the other way round in 2018 than in 2014, so they have no default
    "amazon-csv": _Source(((), (), ("3",), ("4",)), ",", 1, 5),
    "table": _Source(
        (
            ("user", "user_id", "userId", "userID", "reviewerID"),
            ("item", "item_id", "itemId", "itemID", "movie_id", "movieId", "product_id", "productId", "asin"),
            ("rating", "score", "stars", "overall"),
            ("time", "timestamp", "date", "index"),
        )
    ),
}
SOURCES = ("auto", *_SOURCES)
"""Names of the data sets that `read_ratings` knows."""

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_MOVIELENS_100K = re.compile(r"u[1-5ab]?\.(data|base|test)")
# IMDb's numbers, which MovieTweetings has, are padded with zeros to seven digits; MovieLens's are shorter.
_IMDB = re.compile(r"\d{7,}")


def read_ratings(path: Path, source: str, asked: RatingColumns) -> Iterator[Rating]:
    """Stream the rows of one file.

    Args:
        path: A file; compressed if it is called so.
        source: One of `SOURCES`; ``"auto"`` decides by the file's name and its first line.
        asked: Columns that are not called as usual; positions from 1 of a file without a header.

    Raises:
        DataError: The file is missing, damaged or ambiguous, lacks a column, or has a value that is none of the
            source's.
    """
    if source not in SOURCES:
        raise DataError(f"source={source!r}: expected one of {named(SOURCES)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    name = _detected(path, asked) if source == "auto" else source
    layout = _SOURCES[name]
    scale = f"the scale of source={name!r}"
    found: RatingColumns | None = None
    for where, values in _rows(path, layout, asked):
        found = found or _found(path, name, asked, values)
        user, item, rating, time = found
        assert user is not None and item is not None
        yield Rating(
            where,
            check_name(values.get(user), user, where),
            check_name(values.get(item), item, where, "the item's id"),
            None if rating is None else _rating(values.get(rating), rating, where, layout, scale),
            None if time is None else _seconds(values.get(time), time, where, layout.ticks),
        )


def table_suffix(path: Path) -> str:
    """Suffix of a file without that of its compression, for example ``".csv"`` of ``ratings.csv.gz``."""
    return (path.with_suffix("") if compression(path) else path).suffix.lower()


def _detected(path: Path, asked: RatingColumns) -> str:
    """The source by the file's name and its first line."""
    suffix = table_suffix(path)
    if suffix in (".parquet", *JSON_SUFFIXES):
        return _by_columns(path, next(_rows(path, _SOURCES["table"], asked, every=True)).values, asked)
    first = next((line.strip() for _, line in read_lines(path) if line.strip()), None)
    if first is None:
        raise DataError(f"{path} is empty: it has no rows")
    fields = first.split("::")
    if len(fields) == 4:
        return "movietweetings" if _IMDB.fullmatch(fields[1]) else "movielens"
    if _MOVIELENS_100K.match(path.name.lower()):
        return "movielens-100k"
    if suffix in (".csv", ".tsv"):
        fields = [field.strip('"') for field in first.split("\t" if suffix == ".tsv" else ",")]
        return _by_columns(path, fields, asked)
    raise _ambiguous(path, f"its first line is {first[:80]!r}")


def _by_columns(path: Path, columns: Collection[str], asked: RatingColumns) -> str:
    """The source of a table by its columns."""
    for name in ("movielens-csv", "amazon-2014", "amazon-2023", "table"):
        users, items, _, _ = _SOURCES[name].columns
        if (asked.user in columns or set(users) & set(columns)) and (
            asked.item in columns or set(items) & set(columns)
        ):
            return name
    raise _ambiguous(path, f"it has the columns {named(columns)}")


def _ambiguous(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is none of the known files, {why}: give source, one of {named(_SOURCES)}; for a table with other "
        "columns user_column and item_column; for Amazon's ratings without a header source='amazon-csv', with "
        "user_column='1' and item_column='2' (2014) or the other way round (2018)"
    )


def _rows(path: Path, layout: _Source, asked: RatingColumns, *, every: bool = False) -> Iterator[Row]:
    """Rows with the columns that were named and those that may be needed, or those of every source."""
    if layout.delimiter is not None:
        return _separated(path, layout.delimiter)
    if table_suffix(path) in JSON_SUFFIXES:
        return read_objects(path)
    layouts = _SOURCES.values() if every else (layout,)
    known = [name for each in layouts for candidates in each.columns for name in candidates]
    return read_rows(path, [name for name in asked if name is not None], known)


def _separated(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of four fields without a header."""
    number = 0
    for number, line in read_lines(path):
        fields = line.strip("\r\n").split(delimiter)
        if len(fields) == 4:
            yield Row(f"{path}, line {number}", dict(zip("1234", fields, strict=True)))
        elif line.strip():
            raise DataError(f"{path}, line {number}: {len(fields)} fields, expected 4 with {delimiter!r} between them")
    if not number:
        raise DataError(f"{path} is empty: it has no rows")


def _found(path: Path, source: str, asked: RatingColumns, available: Collection[str]) -> RatingColumns:
    """The columns to read: those that were named, else the usual ones that are there."""
    require_columns(path, available, [name for name in asked if name is not None])
    candidates = _SOURCES[source].columns
    found = RatingColumns(
        *(
            name or next((candidate for candidate in known if candidate in available), None)
            for name, known in zip(asked, candidates, strict=True)
        )
    )
    for what, name, known in zip(("user_column", "item_column"), found, candidates, strict=False):
        if name is None:
            usual = f", the usual ones are {named(known)}" if known else ""
            raise DataError(f"{path}, read as source={source!r}: give {what}, one of {named(available)}{usual}")
    return found


def _rating(value: Any, column: str, where: str, layout: _Source, scale: str) -> float:
    """A rating within the scale."""
    try:
        rating = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        rating = math.nan
    if not math.isfinite(rating):
        raise DataError(f"{where}: {column!r} must be a finite number, got {value!r}")
    if not layout.low <= rating <= layout.high:
        raise DataError(f"{where}: {column!r} is {rating:g}, outside {layout.low:g} to {layout.high:g}, {scale}")
    return rating


def _seconds(value: Any, column: str, where: str, ticks: int) -> float:
    """Seconds since 1970 of a number or an ISO 8601 time."""
    try:
        kind, key = order_key(value, column, where)
        return key / 1e9 if kind.endswith("(dates)") else key / ticks
    except OverflowError:
        raise DataError(f"{where}: {column!r} must be a time, got a number of {len(str(value))} digits") from None
