"""Users' texts from files: JSON Lines, CSV, TSV or Parquet, plain or compressed.

A row is one text of one user. Files are streamed: what is held in memory are the texts, never a whole
file. Whatever is wrong with a file is a `DataError` that names it and the line.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import math
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

__all__ = ["DataError", "UserTexts", "read_lines", "read_texts", "split_users"]

logger = logging.getLogger(__name__)

_FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_ORDER_COLUMNS = ("time", "timestamp", "index")
# A quote that is never closed, or a file without line ends, must not pull the whole file into memory.
_LONGEST_LINE = 1 << 26
_LONGEST_FIELD = 1 << 24
_PARQUET_BATCH = 4096
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class DataError(ValueError):
    """Users' data cannot be used; the message says which file, where in it, and what would be right."""


@dataclass(frozen=True)
class UserTexts:
    """The texts of one user.

    Attributes:
        user: name of the user.
        texts: the user's texts in time order, stripped, none of them empty; at least one.
    """

    user: str
    texts: tuple[str, ...]


class _Row(NamedTuple):
    """One row as it stands in a file, before its values are checked."""

    where: int
    """Line of the file, or row of a Parquet file, from 1."""
    user: Any
    text: Any
    order: Any
    order_column: str | None


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
) -> list[UserTexts]:
    """Read the texts of users from files.

    The same name in two files is the same user. Texts stay as they are but for surrounding whitespace;
    empty ones are skipped, and how many is logged. A user's texts are sorted, stably, by the order column:
    numbers, or ISO 8601 dates and times (without an offset they are UTC). Files without one keep their
    order, one after the other.

    Args:
        paths: files called `*.jsonl`, `*.ndjson`, `*.csv`, `*.tsv` or `*.parquet`, or one of these with
            `.gz`, `.bz2`, `.xz` or `.zst` behind it. Text is UTF-8; CSV and TSV have a header.
        user_column: column with the user's name, a string or an integer.
        text_column: column with the text.
        order_column: column to sort by; by default the first of `time`, `timestamp`, `index` that a file has.

    Returns:
        Users sorted by name.

    Raises:
        DataError: a file is missing, damaged, empty or not as described above.
    """
    if isinstance(paths, (str, Path)):
        raise DataError(f"paths must be a list of paths, got the single path {str(paths)!r}")
    if not paths:
        raise DataError("paths is empty: give at least one file")
    columns = _Columns(user_column, text_column, order_column)
    collected: dict[str, _Collected] = {}
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.resolve() in seen:
            raise DataError(f"{path} is given twice")
        seen.add(path.resolve())
        _collect(path, columns, collected)
    if not collected:
        raise DataError(f"no text in {', '.join(map(str, paths))}: every {text_column!r} is empty")
    return [UserTexts(user, _in_order(collected[user])) for user in sorted(collected)]


def split_users(users: Sequence[str], *, validation: float, test: float, seed: int) -> dict[str, list[str]]:
    """Divide users, so that some are never seen in training.

    The split depends on the set of users and on the seed only, not on the order of `users` or on the
    version of a library. A share of users is rounded to whole users, but is at least one where it is not
    zero.

    Args:
        users: distinct names.
        validation: share for validation, in [0, 1).
        test: share for testing, in [0, 1).
        seed: another seed is another split.

    Returns:
        Sorted names under `train`, `validation` and `test`.

    Raises:
        DataError: a share is out of range, a name is repeated, or no user would be left for training.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise DataError(f"{name} must be a share in [0, 1), got {share}")
    if len(set(users)) < len(users):
        repeated = next(user for user, other in pairwise(sorted(users)) if user == other)
        raise DataError(f"users must be distinct, {repeated!r} is repeated")
    counts = {
        name: max(1, round(share * len(users))) if share else 0
        for name, share in (("test", test), ("validation", validation))
    }
    train = len(users) - sum(counts.values())
    if train < 1:
        raise DataError(
            f"{len(users)} users are too few: test={test} takes {counts['test']}, "
            f"validation={validation} takes {counts['validation']}, and at least one must train"
        )
    # Hashes, not a shuffle: they need no promise of a generator to stay the same, and one user more or less
    # leaves most others where they were.
    drawn = sorted(users, key=lambda user: (_draw(user, seed), user))
    first, second = counts["test"], counts["test"] + counts["validation"]
    return {
        "train": sorted(drawn[second:]),
        "validation": sorted(drawn[first:second]),
        "test": sorted(drawn[:first]),
    }


def _draw(user: str, seed: int) -> bytes:
    """What stands for a random number of this user."""
    return hashlib.sha256(f"{seed}:{user}".encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class _Columns:
    """Which columns are asked for."""

    user: str
    text: str
    order: str | None

    def resolve(self, path: Path, available: Collection[str]) -> str | None:
        """Check that the columns are there and choose the order column."""
        if self.order is not None:
            self.require(path, available, (self.user, self.text, self.order))
            return self.order
        self.require(path, available, (self.user, self.text))
        return next((name for name in _ORDER_COLUMNS if name in available), None)

    @staticmethod
    def require(where: Path | str, available: Collection[str], needed: Sequence[str]) -> None:
        """Raise an error that names the missing columns and those that are there."""
        missing = [name for name in needed if name not in available]
        if missing:
            raise DataError(f"{where} has no column {_listed(missing)}; it has {_listed(available)}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _collect(path: Path, columns: _Columns, collected: dict[str, _Collected]) -> None:
    """Add the rows of one file to what has been read of its users."""
    unit = "row" if _format(path)[0] == ".parquet" else "line"
    rows = empty = 0
    for row in _rows(path, columns):
        rows += 1
        where = f"{path}, {unit} {row.where}"
        user = _user(row.user, columns.user, where)
        text = _string(row.text, columns.text, where).strip()
        # Checked for empty texts as well: a broken column should not depend on luck to be found.
        kind, key = _order_key(row.order, row.order_column, where)
        if not text:
            empty += 1
            continue
        entry = collected.setdefault(user, _Collected(kind, path))
        if entry.ordering != kind:
            raise DataError(
                f"{where}: the texts of user {user!r} are ordered by {kind} here but by {entry.ordering} in "
                f"{entry.source}; give order_column, and one kind of order in all files"
            )
        entry.rows.append((key, text))
    if rows == 0:
        raise DataError(f"{path} is empty: it has no rows")
    if empty:
        logger.warning("%s: skipped %d of %d rows, their %r is empty", path, empty, rows, columns.text)


def _in_order(entry: _Collected) -> tuple[str, ...]:
    return tuple(text for _, text in sorted(entry.rows, key=lambda row: row[0]))


def _user(value: Any, column: str, where: str) -> str:
    """The user's name; an integer is one too."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    user = _string(value, column, where)
    if not user.strip():
        raise DataError(f"{where}: {column!r} is empty, expected the user's name")
    return user


def _string(value: Any, column: str, where: str) -> str:
    """A string that can be encoded."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: {column!r} must be a string, got {kind}")
    # JSON can escape half of a surrogate pair; tokenizers and files could not take it.
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{where}: {column!r} has half of a surrogate pair, which is not valid Unicode")
    return value


def _order_key(value: Any, column: str | None, where: str) -> tuple[str, float]:
    """What the row is ordered by, in words, and its sort key: a number, or nanoseconds for a time.

    Integers stay integers (a float would merge neighbouring nanoseconds), which compare exactly with floats.
    """
    if column is None:
        return "their place in the file", 0
    if isinstance(value, str):
        value = _parsed(value.strip())
    if isinstance(value, date):
        return f"{column!r} (dates)", _nanoseconds(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DataError(f"{where}: {column!r} must be a number or an ISO 8601 time, got {value!r}")
    return f"{column!r} (numbers)", value


def _parsed(text: str) -> Any:
    """The number or time that a string says, else the string."""
    if _NUMBER.fullmatch(text):
        return float(text) if re.search("[.eE]", text) or len(text) > 4000 else int(text)
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return text


def _nanoseconds(value: date) -> int:
    """Nanoseconds since 1970, exactly."""
    if not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    # pandas' timestamps, which Parquet gives, know nanoseconds that `datetime` does not.
    return (value - _EPOCH) // timedelta(microseconds=1) * 1000 + int(getattr(value, "nanosecond", 0))


def _format(path: Path) -> tuple[str, str]:
    """Format and compression of a file by its name, for example `(".csv", ".gz")`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _compression(path)
    if compression:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _FORMATS:
        raise DataError(
            f"{path} has an unknown suffix: use {', '.join(_FORMATS)}, alone or followed by {', '.join(_COMPRESSIONS)}"
        )
    return suffixes[-1], compression


def _compression(path: Path) -> str:
    """Compression of a file by its name, "" for none."""
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else ""


def _rows(path: Path, columns: _Columns) -> Iterator[_Row]:
    """The rows of a file."""
    kind, _ = _format(path)
    if not path.exists():
        raise DataError(f"there is no file {path}")
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    if kind == ".parquet":
        return _parquet_rows(path, columns)
    if kind in (".csv", ".tsv"):
        return _table_rows(path, columns, "," if kind == ".csv" else "\t")
    return _json_rows(path, columns)


def _json_rows(path: Path, columns: _Columns) -> Iterator[_Row]:
    """Rows of a JSON Lines file; blank lines are no rows."""
    order = None
    needed: tuple[str, ...] = ()
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _parse_object(line, where)
        if not needed:
            order = columns.resolve(path, record)
            needed = (columns.user, columns.text, *([order] if order else ()))
        columns.require(where, record, needed)
        yield _Row(number, record[columns.user], record[columns.text], record[order] if order else None, order)


def _parse_object(line: str, where: str) -> dict[str, Any]:
    """One line of JSON."""
    try:
        # Without its end, or an error at the end of the line would be on the next one.
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not usable JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected one JSON object per line, got {type(record).__name__}")
    return record


def _table_rows(path: Path, columns: _Columns, delimiter: str) -> Iterator[_Row]:
    """Rows of a CSV or TSV file.

    The csv module and not pandas: its line numbers are those of the file even when quoted fields span
    lines, and it does not turn names into numbers or `NA` into nothing, or take a row that is too short.
    """
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    for row in _table_records(path, reader):
        if not row:
            continue
        if header is None:
            header = row
            doubled = sorted({name for name in header if header.count(name) > 1})
            if doubled:
                raise DataError(f"{path} has column {_listed(doubled)} more than once")
            order = columns.resolve(path, header)
            user_at, text_at = header.index(columns.user), header.index(columns.text)
            order_at = header.index(order) if order else 0
            continue
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(header)}; "
                f"fields with the delimiter {delimiter!r} in them must be quoted"
            )
        yield _Row(reader.line_num, row[user_at], row[text_at], row[order_at] if order else None, order)


def _table_records(path: Path, reader: Any) -> Iterator[list[str]]:
    """What a csv reader gives, its errors with the file and the line."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path, columns: _Columns) -> Iterator[_Row]:
    """Rows of a Parquet file, in batches."""
    # Here and not above: it takes a third of a second, and most files are text.
    import pyarrow
    import pyarrow.parquet

    with _binary(path) as stream, _seekable(stream) as source:
        try:
            file = pyarrow.parquet.ParquetFile(source)
            order = columns.resolve(path, file.schema_arrow.names)
            names = list(dict.fromkeys((columns.user, columns.text, *([order] if order else ()))))
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=names):
                values = {name: batch.column(name).to_pylist() for name in names}
                keys = values[order] if order else [None] * len(batch)
                for user, text, key in zip(values[columns.user], values[columns.text], keys, strict=True):
                    number += 1
                    yield _Row(number, user, text, key, order)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is damaged or no Parquet file: {error}") from error


@contextmanager
def _seekable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """The stream if it is a file, else a temporary file with its content: Parquet is read from its end."""
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
        yield stream
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(stream, copy)
        copy.seek(0)
        yield cast(BinaryIO, copy)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, plain or compressed, as (number from 1, line with its line end).

    Lines are decoded one by one, so that errors have a line.

    Raises:
        DataError: the file is missing, damaged or not UTF-8, or a line is endless.
    """
    with _binary(path) as stream:
        number = 0
        while line := stream.readline(_LONGEST_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > _LONGEST_LINE:
                raise DataError(f"{where} is longer than {_LONGEST_LINE >> 20} MiB: is it one row per line?")
            try:
                # Excel and PowerShell begin UTF-8 with a byte order mark.
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{where}, byte {error.start + 1}: not UTF-8 (0x{line[error.start]:02x}); save the file as UTF-8"
                ) from error


@contextmanager
def _binary(path: Path) -> Iterator[BinaryIO]:
    """A file's decompressed bytes as a stream; errors while it is open name the file."""
    try:
        with _opened(path) as stream:
            yield stream
    except DataError:
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}, it may be truncated or damaged: {error}") from error


def _opened(path: Path) -> BinaryIO:
    """Open a file by its compression."""
    compression = _compression(path)
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.open(path, "rb"))
    if compression == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if compression == ".zst":
        # pyarrow and not zstandard, whose reader takes a truncated file for a short one.
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")
