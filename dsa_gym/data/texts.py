"""Users' texts from files: tables, Reddit dumps and Twitter archives.

A row is one text of one user. Files are streamed: what is held in memory are the texts, never a whole
file. Whatever is wrong with a file is a `DataError` that names it and the line.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from dsa_gym.data.privacy import Scrubber
from dsa_gym.data.tables import DataError, check_name, check_string, order_key, read_rows

__all__ = ["TEXT_SOURCES", "Text", "UserTexts", "read_texts"]

logger = logging.getLogger(__name__)

TEXT_SOURCES: dict[str, str] = {
    "table": "dsa_gym.data.texts:read_table",
    "reddit": "dsa_gym.data.reddit:read_reddit",
    "twitter": "dsa_gym.data.twitter:read_twitter",
}
"""Name to ``module:function``; the function is a `Source` and imported when it is asked for."""

_ORDER_COLUMNS = ("time", "timestamp", "index")


class Text(NamedTuple):
    """One text as a source gives it.

    Attributes:
        where: file and line.
        user: name of the user.
        text: the text, maybe empty.
        order: what the user's texts are ordered by, in words, and the sort key, as `order_key` gives them.
    """

    where: str
    user: str
    text: str
    order: tuple[str, float]


Source = Callable[[Path, Counter[str]], Iterator[Text]]
"""Reads a file; counts the rows it leaves out by the reason, which completes "skipped 2 of 3 rows, ..."."""


@dataclass(frozen=True)
class UserTexts:
    """The texts of one user.

    Attributes:
        user: name of the user.
        texts: the user's texts in time order, stripped, none of them empty; at least one.
    """

    user: str
    texts: tuple[str, ...]


@dataclass
class _Collected:
    """What has been read of one user: sort keys and texts, and what the keys are."""

    ordering: str
    source: Path
    rows: list[tuple[float, str]] = field(default_factory=list)


def read_texts(
    paths: Sequence[Path],
    *,
    user_column: str = "user",
    text_column: str = "text",
    order_column: str | None = None,
    source: str = "table",
    scrub: Scrubber | None = None,
) -> list[UserTexts]:
    """Read the texts of users from files.

    The same name in two files is the same user. Texts stay as they are but for surrounding whitespace;
    empty ones are skipped, and how many is logged. A user's texts are sorted, stably, by the order column:
    numbers, or ISO 8601 dates and times (without an offset they are UTC). Files without one keep their
    order, one after the other.

    Args:
        paths: for tables, files called `*.jsonl`, `*.ndjson`, `*.csv`, `*.tsv` or `*.parquet`, or one of these
            with `.gz`, `.bz2`, `.xz` or `.zst` behind it; text is UTF-8, CSV and TSV have a header. For other
            sources see `dsa_gym.data.reddit` and `dsa_gym.data.twitter`.
        user_column: column with the user's name, a string or an integer; of tables only, as the next two.
        text_column: column with the text.
        order_column: column to sort by; by default the first of `time`, `timestamp`, `index` that a file has.
        source: what the files are, one of `TEXT_SOURCES`.
        scrub: what replaces identifiers in the texts and the users' names, row by row.

    Returns:
        Users sorted by name.

    Raises:
        DataError: an argument or a file is not as described above, or a file is missing, damaged or empty.
    """
    if isinstance(paths, (str, Path)):
        raise DataError(f"paths must be a list of paths, got the single path {str(paths)!r}")
    if not paths:
        raise DataError("paths is empty: give at least one file")
    read = _source(source, _Columns(user_column, text_column, order_column))
    collected: dict[str, _Collected] = {}
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.resolve() in seen:
            raise DataError(f"{path} is given twice")
        seen.add(path.resolve())
        _collect(path, read, text_column, scrub, collected)
    if not collected:
        reason = f"every {text_column!r} is empty" if source == "table" else "every text is empty or was left out"
        raise DataError(f"no text in {', '.join(map(str, paths))}: {reason}")
    return [UserTexts(user, _in_order(collected[user])) for user in sorted(collected)]


class _Columns(NamedTuple):
    """Which columns of a table are asked for."""

    user: str = "user"
    text: str = "text"
    order: str | None = None


def _source(name: str, columns: _Columns) -> Source:
    """The registered source of this name."""
    if name not in TEXT_SOURCES:
        raise DataError(f"source={name!r}: expected one of {', '.join(TEXT_SOURCES)}")
    if name != "table" and columns != _Columns():
        raise DataError(f"source={name!r} has columns of its own: leave out {', '.join(_not_default(columns))}")
    module, _, attribute = TEXT_SOURCES[name].partition(":")
    source: Callable[..., Iterator[Text]] = getattr(import_module(module), attribute)
    return partial(source, columns=columns) if name == "table" else source


def _not_default(columns: _Columns) -> list[str]:
    return [
        f"{name}_column={value!r}" for name, value in columns._asdict().items() if value != getattr(_Columns(), name)
    ]


def read_table(path: Path, skipped: Counter[str], *, columns: _Columns) -> Iterator[Text]:
    """The texts of a table, in which no row is left out."""
    required = [columns.user, columns.text, *([columns.order] if columns.order is not None else ())]
    optional = _ORDER_COLUMNS if columns.order is None else ()
    for where, values in read_rows(path, required, optional):
        order = columns.order or next((name for name in _ORDER_COLUMNS if name in values), None)
        user = check_name(values[columns.user], columns.user, where)
        text = check_string(values[columns.text], columns.text, where)
        # Checked for empty texts as well: a broken column should not depend on luck to be found.
        yield Text(where, user, text, order_key(values[order] if order else None, order, where))


def _collect(
    path: Path, read: Source, text_column: str, scrub: Scrubber | None, collected: dict[str, _Collected]
) -> None:
    """Add the texts of one file to what has been read of its users."""
    skipped: Counter[str] = Counter()
    rows = 0
    for where, user, text, (kind, key) in read(path, skipped):
        rows += 1
        if scrub is not None:
            user, text = scrub.anonymise(user), scrub.scrub(text)
        text = text.strip()
        if not text:
            skipped[f"their {text_column!r} is empty"] += 1
            continue
        entry = collected.setdefault(user, _Collected(kind, path))
        if entry.ordering != kind:
            raise DataError(
                f"{where}: the texts of user {user!r} are ordered by {kind} here but by {entry.ordering} in "
                f"{entry.source}; give order_column, and one kind of order in all files"
            )
        entry.rows.append((key, text))
    rows += skipped.total() - skipped[f"their {text_column!r} is empty"]
    for reason, count in skipped.items():
        if count:
            logger.warning("%s: skipped %d of %d rows, %s", path, count, rows, reason)


def _in_order(entry: _Collected) -> tuple[str, ...]:
    return tuple(text for _, text in sorted(entry.rows, key=lambda row: row[0]))
