"""Titles of items, such as the films of MovieLens and the products of Amazon Reviews."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsa_gym.data.ratings import JSON_SUFFIXES, SOURCES, table_suffix
from dsa_gym.data.streams import open_binary
from dsa_gym.data.tables import DataError, check_name, check_string, named, read_objects, read_rows

__all__ = ["read_titles"]

# The first of these that a table has is taken.
_ITEMS = ("item_id", "item", "itemId", "movieId", "movie_id", "parent_asin", "asin")
_TITLES = ("title", "name")
_LONGEST_LINE = 1 << 20


def read_titles(path: Path, source: str = "auto") -> dict[str, str]:
    """Read the titles of items: MovieLens, MovieTweetings, Amazon's product data, or a table with ids and titles.

    Args:
        path: ``u.item`` (fields between ``|``), ``movies.dat`` (between ``::``), or CSV, TSV, JSON Lines or Parquet
            with columns such as ``movieId`` or ``parent_asin``, and ``title``. Plain or compressed.
        source: A source of `read_interactions`; ``"auto"`` decides by the name.

    Returns:
        Title by id of the item, the first where an id comes twice; items without a title are left out.

    Raises:
        DataError: The file is missing, damaged, of another kind, or has no titles.
    """
    path = Path(path)
    if source not in SOURCES:
        raise DataError(f"source={source!r}: expected one of {named(SOURCES)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    suffix = table_suffix(path)
    if source == "movielens-100k" or (source == "auto" and suffix == ".item"):
        rows = _separated(path, "|")
    elif source in ("movielens", "movietweetings") or (source == "auto" and suffix == ".dat"):
        rows = _separated(path, "::")
    else:
        rows = _table(path)
    titles: dict[str, str] = {}
    for where, item, title in rows:
        name = check_name(item, "item", where, "the item's id")
        text = "" if title is None else check_string(title, "title", where).strip()
        if text:
            titles.setdefault(name, text)
    if not titles:
        raise DataError(f"{path} has no titles")
    return titles


def _separated(path: Path, delimiter: str) -> Iterator[tuple[str, str, str]]:
    """Rows that begin with an id and a title."""
    with open_binary(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), start=1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError:
                text = line.decode("latin-1")  # MovieLens's older files
            fields = text.strip().split(delimiter)
            if len(fields) >= 2:
                # movies.dat ends with the genres, and a title may have the delimiter in it
                title = fields[1] if delimiter == "|" else delimiter.join(fields[1 : max(2, len(fields) - 1)])
                yield f"{path}, line {number}", fields[0], title
            elif text.strip():
                raise DataError(f"{path}, line {number}: expected an item, {delimiter!r} and its title")


def _table(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Rows of a table, or of JSON Lines whatever they are called."""
    is_json = table_suffix(path) in JSON_SUFFIXES
    item = title = None
    for where, values in read_objects(path) if is_json else read_rows(path, (), (*_ITEMS, *_TITLES)):
        if item is None or title is None:
            item = next((name for name in _ITEMS if name in values), None)
            title = next((name for name in _TITLES if name in values), None)
            if item is None or title is None:
                raise DataError(f"{path} must have one of the columns {named(_ITEMS)} and one of {named(_TITLES)}")
        yield where, values.get(item), values.get(title)
