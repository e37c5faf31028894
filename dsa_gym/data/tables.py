"""Tables from files: JSON Lines, CSV, TSV or Parquet, plain or compressed, row by row.

Files are streamed: what is held in memory are a few rows, never a whole file. Whatever is wrong with a file is a
`DataError` that names it and the line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from dsa_gym.data.streams import COMPRESSIONS, DataError, compression, open_binary, read_lines

__all__ = [
    "DataError",
    "Row",
    "check_name",
    "check_string",
    "named",
    "order_key",
    "read_lines",
    "read_objects",
    "read_rows",
    "require_columns",
]

_FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
# A quote that is never closed must not pull the whole file into memory.
_LONGEST_FIELD = 1 << 24
_PARQUET_BATCH = 4096
_PARQUET_BUFFER = 1 << 20
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Row(NamedTuple):
    """One row as it stands in a file, its values unchecked.

    Attributes:
        where: file and line, or row of a Parquet file, both from 1: `FILE, line 3`.
        values: the required columns, and those of the optional ones that the file has.
    """

    where: str
    values: dict[str, Any]


def read_rows(path: Path, required: Sequence[str], optional: Sequence[str] | None = ()) -> Iterator[Row]:
    """Stream the rows of a table; memory does not grow with their number.

    Args:
        path: a file called `*.jsonl`, `*.ndjson`, `*.csv`, `*.tsv` or `*.parquet`, or one of these with `.gz`, `.bz2`,
            `.xz` or `.zst` behind it. Text is UTF-8; CSV and TSV have a header, and their values are strings.
        required: columns that the file must have.
        optional: columns to read if the file has them (JSON Lines: if its first row has them; then all rows must);
            None for every column.

    Raises:
        DataError: the file is missing, damaged, empty or not as described above.
    """
    columns = _Columns(path, tuple(required), None if optional is None else tuple(optional))
    kind, _ = _format(path)
    if kind == ".parquet":
        rows = _parquet_rows(columns)
    elif kind in (".csv", ".tsv"):
        rows = _table_rows(columns, "," if kind == ".csv" else "\t")
    else:
        rows = _json_rows(columns)
    yield from _some(rows, path)


def read_objects(path: Path) -> Iterator[Row]:
    """Stream the objects of a JSON Lines file, plain or compressed, whatever its name; blank lines are no rows.

    Raises:
        DataError: the file is missing, damaged, empty or not JSON Lines.
    """
    yield from _some(_json_objects(path), path)


class _Columns(NamedTuple):
    """Which columns of which file are asked for."""

    path: Path
    required: tuple[str, ...]
    optional: tuple[str, ...] | None

    def present(self, available: Collection[str]) -> list[str]:
        """Check that the required columns are there and add the optional ones that are."""
        require_columns(self.path, available, self.required)
        optional = available if self.optional is None else [name for name in self.optional if name in available]
        return list(dict.fromkeys((*self.required, *optional)))


def require_columns(where: Path | str, available: Collection[str], needed: Sequence[str]) -> None:
    """Raise a `DataError` that names the missing columns and those that are there."""
    missing = [name for name in needed if name not in available]
    if missing:
        raise DataError(f"{where} has no column {named(missing)}; it has {named(available)}")


def named(names: Collection[str]) -> str:
    """Names in quotes, for messages."""
    return ", ".join(repr(name) for name in names) or "none"


def _some(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    """The rows, of which there must be at least one."""
    row = None
    for row in rows:
        yield row
    if row is None:
        raise DataError(f"{path} is empty: it has no rows")


def check_name(value: Any, column: str, where: str, what: str = "the user's name") -> str:
    """Return a name as a string; an integer is one too.

    Raises:
        DataError: the value is neither a string nor an integer, or empty.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = check_string(value, column, where)
    if not name.strip():
        raise DataError(f"{where}: {column!r} is empty, expected {what}")
    return name


def check_string(value: Any, column: str, where: str) -> str:
    """Return a string that can be encoded.

    Raises:
        DataError: the value is not one.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{where}: {column!r} must be a string, got {kind}")
    # JSON can escape half of a surrogate pair; tokenizers and files could not take it.
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{where}: {column!r} has half of a surrogate pair, which is not valid Unicode")
    return value


def order_key(value: Any, column: str | None, where: str) -> tuple[str, float]:
    """What the row is ordered by, in words, and its sort key: a number, or nanoseconds for a time.

    Integers stay integers (a float would merge neighbouring nanoseconds), which compare exactly with floats. A column
    of None is the place in the file.

    Raises:
        DataError: the value is neither a number nor an ISO 8601 time.
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
    packed = compression(path)
    if packed:
        suffixes.pop()
    if not suffixes or suffixes[-1] not in _FORMATS:
        raise DataError(
            f"{path} has an unknown suffix: use {', '.join(_FORMATS)}, alone or followed by {', '.join(COMPRESSIONS)}"
        )
    return suffixes[-1], packed


def _json_rows(columns: _Columns) -> Iterator[Row]:
    """The columns asked for of the objects of a JSON Lines file."""
    names: list[str] | None = None
    for where, record in _json_objects(columns.path):
        if names is None:
            names = columns.present(record)
        require_columns(where, record, names)
        yield Row(where, {name: record[name] for name in names})


def _json_objects(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file."""
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, _parse_object(line, where))


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


def _table_rows(columns: _Columns, delimiter: str) -> Iterator[Row]:
    """Rows of a CSV or TSV file.

    The csv module and not pandas: its line numbers are those of the file even when quoted fields span
    lines, and it does not turn names into numbers or `NA` into nothing, or take a row that is too short.
    """
    path = columns.path
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    for row in _table_records(path, reader):
        if not row:
            continue
        if header is None:
            header = row
            doubled = sorted({name for name in header if header.count(name) > 1})
            if doubled:
                raise DataError(f"{path} has column {named(doubled)} more than once")
            chosen = [(name, header.index(name)) for name in columns.present(header)]
            continue
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {reader.line_num}: {len(row)} fields where the header has {len(header)}; "
                f"fields with the delimiter {delimiter!r} in them must be quoted"
            )
        yield Row(f"{path}, line {reader.line_num}", {name: row[at] for name, at in chosen})


def _table_records(path: Path, reader: Any) -> Iterator[list[str]]:
    """What a csv reader gives, its errors with the file and the line."""
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(columns: _Columns) -> Iterator[Row]:
    """Rows of a Parquet file, in batches."""
    # Here and not above: it takes a third of a second, and most files are text.
    import pyarrow
    import pyarrow.parquet

    path = columns.path
    with open_binary(path) as stream, _seekable(stream) as source:
        try:
            # With a buffer, or all of a group of rows, which may be all rows, would be read at once.
            file = pyarrow.parquet.ParquetFile(source, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
            names = columns.present(file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=names):
                for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                    number += 1
                    yield Row(f"{path}, row {number}", dict(zip(names, values, strict=True)))
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
