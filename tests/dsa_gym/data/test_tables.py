"""Tables: rows stream with bounded memory, columns are those asked for, and every error says where."""

from __future__ import annotations

import gzip
import json
import math
import random
import tracemalloc
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dsa_gym.data import DataError, Row, read_lines, read_rows
from dsa_gym.data.streams import read_whole
from dsa_gym.data.tables import check_name, check_string, order_key, read_objects

ROWS = [{"a": "1", "b": "x", "c": "p"}, {"a": "2", "b": "y", "c": "q"}]


def save(folder: Path, kind: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if kind == "tsv" else ","
        path.write_text("\n".join(mark.join(map(str, line)) for line in [list(rows[0]), *(r.values() for r in rows)]))
    return path


KINDS = ["jsonl", "csv", "tsv", "parquet"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("required", "optional", "names"),
    [
        (["b", "a"], (), ["b", "a"]),
        (["a"], ["z", "c"], ["a", "c"]),
        (["a", "a"], ["a"], ["a"]),
        (["c"], None, ["c", "a", "b"]),
        ([], None, ["a", "b", "c"]),
    ],
)
def test_columns(tmp_path: Path, kind: str, required: list[str], optional: list[str] | None, names: list[str]) -> None:
    path = save(tmp_path, kind)
    unit, first = {"parquet": ("row", 1), "jsonl": ("line", 1)}.get(kind, ("line", 2))
    expected = [
        Row(f"{path}, {unit} {first + number}", {name: row[name] for name in names}) for number, row in enumerate(ROWS)
    ]
    rows = list(read_rows(path, required, optional))
    assert rows == expected
    assert [list(row.values) for row in rows] == [names, names]


@pytest.mark.parametrize("kind", KINDS)
def test_missing_columns(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match=rf"t\.{kind} has no column 'd', 'e'; it has 'a', 'b', 'c'"):
        next(read_rows(save(tmp_path, kind), ["a", "d", "e"], ["f"]))


def test_optional_columns_of_the_first_object_are_required_of_all(tmp_path: Path) -> None:
    path = save(tmp_path, "jsonl", [{"a": 1, "b": 2}, {"a": 3}])
    assert [row.values for row in read_rows(path, ["a"])] == [{"a": 1}, {"a": 3}]
    with pytest.raises(DataError, match=r"t\.jsonl, line 2 has no column 'b'; it has 'a'"):
        list(read_rows(path, ["a"], ["b"]))
    path = save(tmp_path, "jsonl", [{"a": 3}, {"a": 1, "b": 2}])
    assert [row.values for row in read_rows(path, ["a"], ["b"])] == [{"a": 3}, {"a": 1}]


def test_values_keep_their_types_where_the_format_has_types(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": None, "c": [0.5]}]
    assert [row.values for row in read_rows(save(tmp_path, "jsonl", rows), ["a", "b", "c"])] == rows
    assert [row.values for row in read_rows(save(tmp_path, "parquet", rows), ["a", "b", "c"])] == rows


def test_objects_of_any_name_and_any_keys(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text('{"a": 1}\n\n{"b": 2}\n')
    assert list(read_objects(tmp_path / "dump")) == [
        Row(f"{tmp_path}/dump, line 1", {"a": 1}),
        Row(f"{tmp_path}/dump, line 3", {"b": 2}),
    ]
    (tmp_path / "dump").write_text('{"a": 1}\n[]\n')
    with pytest.raises(DataError, match="dump, line 2: expected one JSON object per line, got list"):
        list(read_objects(tmp_path / "dump"))


@pytest.mark.parametrize("read", [read_lines, read_objects, lambda path: read_rows(path, ["a"])])
def test_no_file(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(DataError, match=r"there is no file .*t\.csv"):
        list(read(tmp_path / "t.csv"))
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(DataError, match=r"t\.csv is not a file"):
        list(read(tmp_path / "t.csv"))


COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize(
    ("kind", "count"),
    [("csv", 200_000), ("csv.gz", 40_000), ("csv.zst", 40_000), ("jsonl", 40_000), ("parquet", 40_000)],
)
def test_memory_is_bounded_whatever_the_rows(tmp_path: Path, kind: str, count: int) -> None:
    """20 MB in less than 6 MiB of Python objects, which a batch of 4096 rows of Parquet needs."""
    path, draw = tmp_path / f"t.{kind}", random.Random(0)
    fillers = [draw.randbytes(10_000_000 // count).hex() for _ in range(count)]
    if kind == "parquet":
        pq.write_table(pa.table({"a": pa.array(range(count)), "b": fillers}), path)
    else:
        line = '{{"a": {}, "b": "{}"}}\n' if kind == "jsonl" else "{},{}\n"
        content = ("" if kind == "jsonl" else "a,b\n") + "".join(map(line.format, range(count), fillers))
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(content.encode()))
    total = 0
    tracemalloc.start()
    try:
        for row in read_rows(path, ["a", "b"]):
            total += int(row.values["a"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == count * (count - 1) // 2
    assert peak < 6 << 20


@pytest.mark.slow
def test_a_million_rows_stream(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("a,b\n")
        file.writelines(f"{number},some text of row {number}\n" for number in range(1_000_000))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(path, ["a", "b"])) == 1_000_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# Zstandard


def test_zstandard_frames_of_all_kinds(tmp_path: Path) -> None:
    """With and without a checksum and a size, empty ones, ones to skip, of many blocks and larger than a chunk."""
    noise = b"".join(f"{number * 2654435761 % 2**32:x}\n".encode() for number in range(50_000))
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    checked = zstandard.ZstdCompressor(write_checksum=True, write_content_size=False)
    path = tmp_path / "t.zst"
    path.write_bytes(
        skippable + checked.compress(b"a\n") + zstandard.compress(b"") + zstandard.compress(noise) + skippable
    )
    assert "".join(line for _, line in read_lines(path)) == "a\n" + noise.decode()


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: content + b"\x28\xb5", lambda _: b"x"]
)
def test_damaged_zstandard(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "t.csv.zst"
    path.write_bytes(damage(zstandard.compress(b"a,b\n1,2\n" * 1000)))
    with pytest.raises(DataError, match=r"cannot read .*t\.csv\.zst, it may be truncated or damaged"):
        list(read_rows(path, ["a"]))


def test_whole_files_have_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "t.txt.zst"
    path.write_bytes(zstandard.compress(b"\xef\xbb\xbf" + "é".encode() * 10))
    assert read_whole(path, 23) == "é" * 10
    with pytest.raises(DataError, match=r"t\.txt\.zst is larger than 2.09808e-05 MiB"):
        read_whole(path, 22)


# Checks


def test_names_and_strings() -> None:
    assert check_name(7, "user", "here") == "7"
    assert check_name("7 ", "user", "here") == "7 "
    assert check_string("", "text", "here") == ""
    with pytest.raises(DataError, match="here: 'item' is empty, expected the item's name"):
        check_name(" ", "item", "here", "the item's name")
    for value in (True, 1.5, None, ["a"]):
        with pytest.raises(DataError, match="here: 'user' must be a string, got "):
            check_name(value, "user", "here")
    with pytest.raises(DataError, match="here: 'text' has half of a surrogate pair"):
        check_string("\ud83d", "text", "here")


@given(st.one_of(st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False)))
def test_numbers_are_the_same_as_strings(value: float) -> None:
    assert order_key(value, "at", "here") == order_key(f" {value!r} ", "at", "here") == ("'at' (numbers)", value)


@given(st.datetimes(timezones=st.just(UTC)), st.datetimes(timezones=st.just(UTC)))
def test_times_are_the_same_as_strings_and_in_order(one: datetime, other: datetime) -> None:
    kind, key = order_key(one, "at", "here")
    assert order_key(one.isoformat(), "at", "here") == (kind, key) == ("'at' (dates)", key)
    assert key - order_key(other, "at", "here")[1] == (one - other) // timedelta(microseconds=1) * 1000


def test_days_begin_at_midnight_utc() -> None:
    day = ("'at' (dates)", 86_400 * 10**9)
    assert order_key(date(1970, 1, 2), "at", "here") == order_key("1970-01-02", "at", "here") == day
    assert order_key(None, None, "here") == ("their place in the file", 0)


@pytest.mark.parametrize("value", [None, True, "", "soon", math.nan, math.inf, "1e999", [1]])
def test_what_orders_nothing(value: Any) -> None:
    with pytest.raises(DataError, match="here: 'at' must be a number or an ISO 8601 time, got "):
        order_key(value, "at", "here")
