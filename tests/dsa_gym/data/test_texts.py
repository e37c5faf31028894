"""Users' texts: every format reads alike, and every error says which file and where."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import random
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsa_gym.data import DataError, Scrubber, UserTexts, read_texts, streams, tables, twitter

Row = dict[str, Any]

ROWS: list[Row] = [
    {"user": "bob", "time": 3, "text": "third, with a comma", "other": "x"},
    {"user": "ann", "time": 2, "text": ' "quoted" \ttab ', "other": "x"},
    {"user": "bob", "time": 1, "text": "first\nof two lines", "other": "x"},
    {"user": "ann", "time": 2, "text": "été 用户 \N{PILE OF POO}", "other": "x"},
    {"user": "bob", "time": 2, "text": "   ", "other": "x"},
    {"user": "007", "time": -1, "text": "NA", "other": "x"},
    {"user": "null", "time": 10, "text": "1.0", "other": "x"},
]
EXPECTED = [
    UserTexts("007", ("NA",)),
    UserTexts("ann", ('"quoted" \ttab', "été 用户 \N{PILE OF POO}")),
    UserTexts("bob", ("first\nof two lines", "third, with a comma")),
    UserTexts("null", ("1.0",)),
]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
FORMATS = ("jsonl", "ndjson", "csv", "tsv", "parquet")


def encode(rows: list[Row], kind: str) -> bytes:
    """The rows as the content of a file."""
    if kind in ("jsonl", "ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def save(folder: Path, name: str, content: bytes | str | list[Row]) -> Path:
    """A file with rows, encoded and compressed as its name says, or with just these bytes."""
    path = folder / name
    if isinstance(content, list):
        kind, _, compression = name.split(".", 1)[1].partition(".")
        content = COMPRESS[f".{compression}" if compression else ""](encode(content, kind))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path | list[Path], **columns: Any) -> dict[str, tuple[str, ...]]:
    paths = path if isinstance(path, list) else [path]
    return {user.user: user.texts for user in read_texts(paths, **columns)}


# Formats


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", FORMATS)
def test_all_formats_and_compressions_read_alike(tmp_path: Path, kind: str, compression: str) -> None:
    assert read_texts([save(tmp_path, f"a.{kind}{compression}", ROWS)]) == EXPECTED


def test_suffixes_in_capitals_and_names_with_dots(tmp_path: Path) -> None:
    content = gzip.compress(encode(ROWS, "jsonl"))
    assert read_texts([save(tmp_path, "users.2024.v1.JSONL.GZ", content)]) == EXPECTED


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_files_of_several_compressed_parts(tmp_path: Path, compression: str) -> None:
    compress = COMPRESS[compression]
    content = compress(encode(ROWS[:3], "jsonl")) + compress(encode(ROWS[3:], "jsonl"))
    assert read_texts([save(tmp_path, f"a.jsonl{compression}", content)]) == EXPECTED


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path: Path, kind: str) -> None:
    rows = [{"user": "a", "text": "x"}, {"user": "b", "text": "y"}]
    content = b"\xef\xbb\xbf" + encode(rows, kind).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n\r\n")
    assert texts(save(tmp_path, f"a.{kind}", content)) == {"a": ("x",), "b": ("y",)}


def test_last_line_without_an_end(tmp_path: Path) -> None:
    assert texts(save(tmp_path, "a.csv", "user,text\na,x\nb,y")) == {"a": ("x",), "b": ("y",)}
    assert texts(save(tmp_path, "a.jsonl", '{"user": "a", "text": "x"}')) == {"a": ("x",)}


@pytest.mark.parametrize("kind", FORMATS)
def test_other_column_names(tmp_path: Path, kind: str) -> None:
    rows = [{"who": "a", "said": "second", "at": 2}, {"who": "a", "said": "first", "at": 1}]
    path = save(tmp_path, f"a.{kind}", rows)
    assert texts(path, user_column="who", text_column="said") == {"a": ("second", "first")}
    assert texts(path, user_column="who", text_column="said", order_column="at") == {"a": ("first", "second")}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_integers_are_users(tmp_path: Path, kind: str) -> None:
    rows = [{"user": 12, "text": "x"}, {"user": -1, "text": "y"}]
    assert texts(save(tmp_path, f"a.{kind}", rows)) == {"12": ("x",), "-1": ("y",)}


def test_parquet_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "user": pa.array(["a", "b", "a"]).dictionary_encode(),
            "text": pa.array(["x", "y", "z"], pa.large_string()),
            "index": pa.array([2, 1, 1], pa.uint8()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == {"a": ("z", "x"), "b": ("y",)}


def test_parquet_in_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_PARQUET_BATCH", 3)
    rows = [{"user": "a", "text": str(number)} for number in range(10)] + [{"user": "b", "text": None}]
    path = save(tmp_path, "a.parquet", rows)
    with pytest.raises(DataError, match=r"a\.parquet, row 11: 'text' must be a string, got null"):
        read_texts([path])
    assert texts(save(tmp_path, "b.parquet", rows[:-1])) == {"a": tuple(map(str, range(10)))}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["a", "b, c", '"']),
            st.text(st.characters(codec="utf-8", exclude_characters="\0\r")),
        ),
        min_size=1,
    )
)
def test_any_text_reads_alike(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    expected: dict[str, tuple[str, ...]] = {}
    for user, text in rows:
        if text.strip():
            expected[user] = (*expected.get(user, ()), text.strip())
    for kind in ("jsonl", "csv", "tsv", "parquet"):
        path = save(tmp_path, f"a.{kind}", [{"user": user, "text": text} for user, text in rows])
        if expected:
            assert texts(path) == expected
        else:
            with pytest.raises(DataError, match="every 'text' is empty"):
                read_texts([path])


def test_large_files_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line at a time: nothing asks a decompressor for all there is."""
    sizes: list[int] = []
    original = gzip.GzipFile.readline

    def readline(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        line = original(self, size)
        sizes.append(len(line))
        return line

    monkeypatch.setattr(gzip.GzipFile, "readline", readline)
    path = save(tmp_path, "a.jsonl.gz", [{"user": "a", "text": f"text {n}"} for n in range(1000)])
    assert len(texts(path)["a"]) == 1000
    assert len(sizes) == 1001
    assert max(sizes) < 100


# Order


def ordered(folder: Path, key: str, values: list[Any], kind: str = "jsonl", **columns: Any) -> str:
    """The texts a, b, c, ... of one user, in the order that these values give them."""
    rows = [{"user": "u", "text": chr(ord("a") + n), key: value} for n, value in enumerate(values)]
    return "".join(texts(save(folder, f"order.{kind}", rows), **columns)["u"])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("column", ["time", "timestamp", "index"])
def test_default_order_columns(tmp_path: Path, kind: str, column: str) -> None:
    assert ordered(tmp_path, column, [10, 9, 100, 9], kind) == "bdac"


def test_the_first_order_column_wins_and_none_is_file_order(tmp_path: Path) -> None:
    rows = [
        {"user": "u", "text": "a", "index": 1, "time": 2, "timestamp": 3},
        {"user": "u", "text": "b", "index": 2, "time": 1, "timestamp": 3},
    ]
    assert texts(save(tmp_path, "a.jsonl", rows)) == {"u": ("b", "a")}
    assert texts(save(tmp_path, "a.jsonl", rows), order_column="index") == {"u": ("a", "b")}
    assert ordered(tmp_path, "when", [3, 2, 1]) == "abc"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_times_in_iso_format(tmp_path: Path, kind: str) -> None:
    values = [
        "2024-03-01T12:00:00+02:00",
        "2024-03-01 11:00:00",
        "2024-03-01T10:30:00Z",
        "2024-02-29",
        "1969-12-31T23:59:59.5",
    ]
    assert ordered(tmp_path, "time", values, kind) == "edacb"


def test_numbers_as_strings_and_floats(tmp_path: Path) -> None:
    assert ordered(tmp_path, "time", ["10", "9.5", " 1e3 ", "-2", "+3."]) == "debac"


def test_integers_beyond_floats_stay_exact(tmp_path: Path) -> None:
    start = 1_700_000_000_000_000_000
    assert ordered(tmp_path, "time", [start + 1, start]) == "ba"
    assert ordered(tmp_path, "time", [start + 1, start], "csv") == "ba"


@pytest.mark.parametrize(
    "column",
    [
        pa.array([3, 1, 2], pa.timestamp("ns")),
        pa.array([3, 1, 2], pa.timestamp("ms", tz="Europe/Berlin")),
        pa.array([date(2024, 1, 3), date(2024, 1, 1), date(2024, 1, 2)]),
        pa.array(
            [
                datetime(2024, 1, 3, tzinfo=UTC),
                datetime(2024, 1, 1, tzinfo=UTC),
                datetime(2024, 1, 2, tzinfo=UTC),
            ]
        ),
        pa.array([3.0, 1.0, 2.0], pa.float32()),
        pa.array(["3", "1", "2"]),
    ],
    ids=lambda column: str(column.type),
)
def test_times_in_parquet(tmp_path: Path, column: Any) -> None:
    pq.write_table(pa.table({"user": ["u"] * 3, "text": ["c", "a", "b"], "time": column}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == {"u": ("a", "b", "c")}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("yesterday", "'yesterday'"),
        (None, "None"),
        (True, "True"),
        ([1], r"\[1\]"),
        (float("inf"), "inf"),
        ("", "''"),
    ],
)
def test_order_that_is_none(tmp_path: Path, value: Any, shown: str) -> None:
    match = rf"order\.jsonl, line 2: 'time' must be a number or an ISO 8601 time, got {shown}"
    with pytest.raises(DataError, match=match):
        ordered(tmp_path, "time", [1, value, 2])


def test_unparsable_times_in_tables_have_a_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"order\.csv, line 3: 'time' must be .*, got '2024-13-01'"):
        ordered(tmp_path, "time", ["2024-12-01", "2024-13-01"], "csv")
    with pytest.raises(DataError, match=r"order\.parquet, row 2: 'time' must be .*, got 'soon'"):
        ordered(tmp_path, "time", ["2024-12-01", "soon"], "parquet")


def test_numbers_and_dates_do_not_mix(tmp_path: Path) -> None:
    match = (
        r"order\.jsonl, line 2: the texts of user 'u' are ordered by 'time' \(dates\) here "
        r"but by 'time' \(numbers\) in .*order\.jsonl"
    )
    with pytest.raises(DataError, match=match):
        ordered(tmp_path, "time", [5, "2024-01-01"])


# Several files


def test_one_user_in_two_files_is_one_user(tmp_path: Path) -> None:
    one = save(tmp_path, "1.jsonl", [{"user": "a", "text": "x", "time": 5}, {"user": "b", "text": "y", "time": 1}])
    two = save(tmp_path, "2.csv.gz", [{"user": "a", "text": "z", "time": 4}])
    assert texts([one, two]) == {"a": ("z", "x"), "b": ("y",)}
    assert texts([two, one]) == {"a": ("z", "x"), "b": ("y",)}


def test_files_without_order_follow_each_other(tmp_path: Path) -> None:
    one = save(tmp_path, "1.jsonl", [{"user": "a", "text": "x"}, {"user": "a", "text": "y"}])
    two = save(tmp_path, "2.tsv", [{"user": "a", "text": "z"}])
    assert texts([one, two]) == {"a": ("x", "y", "z")}
    assert texts([two, one]) == {"a": ("z", "x", "y")}


def test_one_user_ordered_in_two_ways_is_an_error(tmp_path: Path) -> None:
    one = save(tmp_path, "1.jsonl", [{"user": "a", "text": "x", "time": 5}])
    two = save(tmp_path, "2.jsonl", [{"user": "b", "text": "y"}, {"user": "a", "text": "z"}])
    match = (
        r"2\.jsonl, line 2: the texts of user 'a' are ordered by their place in the file here but by 'time' "
        r"\(numbers\) in .*1\.jsonl; give order_column"
    )
    with pytest.raises(DataError, match=match):
        read_texts([one, two])


def test_paths_that_are_no_list_of_files(tmp_path: Path) -> None:
    path = save(tmp_path, "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"a\.jsonl is given twice"):
        read_texts([path, tmp_path / "." / "a.jsonl"])
    with pytest.raises(DataError, match="paths is empty"):
        read_texts([])
    for single in (path, str(path)):
        with pytest.raises(DataError, match="paths must be a list of paths, got the single path"):
            read_texts(single)  # type: ignore[arg-type]


# Texts


def test_empty_texts_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"user": "a", "text": ""}, {"user": "b", "text": "x"}, {"user": "b", "text": " \n"}]
    path = save(tmp_path, "a.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="dsa_gym.data"):
        assert texts(path) == {"b": ("x",)}
    assert caplog.messages == [f"{path}: skipped 2 of 3 rows, their 'text' is empty"]


def test_nothing_but_empty_texts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text in .*a\.csv: every 'text' is empty"):
        read_texts([save(tmp_path, "a.csv", "user,text\na,\nb, \n")])


def test_texts_are_not_normalised(tmp_path: Path) -> None:
    rows = [{"user": "e\u0301", "text": "e\u0301 \u00e9"}, {"user": "\u00e9", "text": "x"}]
    assert texts(save(tmp_path, "a.jsonl", rows)) == {"e\u0301": ("e\u0301 \u00e9",), "\u00e9": ("x",)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"user": None, "text": "x"}, "line 2: 'user' must be a string, got null"),
        ({"user": 1.5, "text": "x"}, "line 2: 'user' must be a string, got float"),
        ({"user": True, "text": "x"}, "line 2: 'user' must be a string, got bool"),
        ({"user": ["a"], "text": "x"}, "line 2: 'user' must be a string, got list"),
        ({"user": " ", "text": "x"}, "line 2: 'user' is empty, expected the user's name"),
        ({"user": "a", "text": None}, "line 2: 'text' must be a string, got null"),
        ({"user": "a", "text": 3}, "line 2: 'text' must be a string, got int"),
        ({"user": "a"}, "line 2 has no column 'text'; it has 'user'"),
        ({}, "line 2 has no column 'user', 'text'; it has none"),
    ],
)
def test_bad_values_in_json(tmp_path: Path, row: Row, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}"):
        read_texts([save(tmp_path, "a.jsonl", [{"user": "a", "text": "x"}, row])])


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = save(tmp_path, "a.jsonl", '{"user": "a", "text": "cut \\ud83d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: 'text' has half of a surrogate pair"):
        read_texts([path])


def test_bad_values_in_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv, line 3: 'user' is empty"):
        read_texts([save(tmp_path, "a.csv", "user,text\na,x\n,y\n")])
    for column, kind in (([None, "a"], "null"), ([1.5, 2.5], "float")):
        pq.write_table(pa.table({"user": column, "text": ["x", "y"]}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match=rf"a\.parquet, row 1: 'user' must be a string, got {kind}"):
            read_texts([tmp_path / "a.parquet"])
    pq.write_table(pa.table({"user": ["a"], "text": [b"x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: 'text' must be a string, got bytes"):
        read_texts([tmp_path / "a.parquet"])


# Broken files


GOOD = '{"user": "a", "text": "x"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"user": "a", "text": "x"', "line 3: not JSON at column 26: Expecting ',' delimiter"),
        ("user,text", "line 3: not JSON at column 1: Expecting value"),
        ('["a", "x"]', "line 3: expected one JSON object per line, got list"),
        ("[" * 100_000, "line 3: not usable JSON: "),
        ('{"user": ' + "1" * 5000 + "}", "line 3: not usable JSON: "),
    ],
)
def test_malformed_json_lines(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}"):
        read_texts([save(tmp_path, "a.jsonl", GOOD + "\n" + line + "\n")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user,text\na,x\nb\n", r"a\.csv, line 3: 1 fields where the header has 2"),
        (
            "user,text\na,x,y\n",
            r"a\.csv, line 2: 3 fields where the header has 2; fields with the delimiter ','",
        ),
        ('user,text\na,"x\ny"\nb,"never closed\n', r"a\.csv, line 4: unexpected end of data"),
        ('user,text\na,"x"y\n', r"a\.csv, line 2: ',' expected after '\"'"),
        ("user,text,text\na,x,y\n", r"a\.csv has column 'text' more than once"),
    ],
)
def test_malformed_csv(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_texts([save(tmp_path, "a.csv", content)])


def test_line_numbers_count_quoted_line_ends(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv, line 5: 'user' is empty"):
        read_texts([save(tmp_path, "a.csv", 'user,text\na,"1\n2\n3"\n,x\n')])


def test_the_field_limit_of_csv_is_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "x" * 200_000
    assert texts(save(tmp_path, "a.csv", f"user,text\na,{long}\n")) == {"a": (long,)}
    assert csv.field_size_limit() == before


def test_endless_lines_and_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_LONGEST_FIELD", 1000)
    with pytest.raises(DataError, match=r"a\.csv, line \d+: field larger than field limit \(1000\)"):
        read_texts([save(tmp_path, "a.csv", 'user,text\na,"x\n' + "b,y\n" * 1000)])
    monkeypatch.setattr(streams, "_LONGEST_LINE", 1 << 20)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 is longer than 1 MiB: is it one row per line\?"):
        read_texts([save(tmp_path, "a.jsonl", GOOD + "[" + GOOD.strip() * 50_000 + "]")])


@pytest.mark.parametrize("kind", FORMATS)
def test_missing_columns_are_named_with_those_there(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path, f"a.{kind}", [{"name": "a", "body": "x"}])
    match = rf"a\.{kind} has no column 'user', 'text'; it has 'name', 'body'"
    with pytest.raises(DataError, match=match):
        read_texts([path])
    with pytest.raises(DataError, match=rf"a\.{kind} has no column 'when'; it has 'name', 'body'"):
        read_texts([path], user_column="name", text_column="body", order_column="when")


def test_order_columns_missing_further_down(tmp_path: Path) -> None:
    rows: list[Row] = [{"user": "a", "text": "x", "time": 1}, {"user": "a", "text": "y"}]
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 has no column 'time'; it has 'user', 'text'"):
        read_texts([save(tmp_path, "a.jsonl", rows)])


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(("kind", "content"), [("jsonl", ""), ("jsonl", "\n\n"), ("csv", ""), ("csv", "user,text\n")])
def test_empty_files(tmp_path: Path, kind: str, content: str, compression: str) -> None:
    path = save(tmp_path, f"a.{kind}{compression}", COMPRESS[compression](content.encode()))
    with pytest.raises(DataError, match=rf"a\.{kind}{compression} is empty: it has no rows"):
        read_texts([path])


def test_empty_parquet(tmp_path: Path) -> None:
    schema = pa.schema([("user", pa.string()), ("text", pa.string())])
    pq.write_table(pa.Table.from_pylist([], schema), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is empty: it has no rows"):
        read_texts([tmp_path / "a.parquet"])


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_truncated_and_damaged_compression(tmp_path: Path, kind: str, compression: str) -> None:
    noise = random.Random(0)
    rows = [{"user": "a", "text": f"{noise.getrandbits(400):x}"} for _ in range(2000)]
    whole = COMPRESS[compression](encode(rows, kind))
    for content in (whole[:-3], whole[: len(whole) // 2], b"not compressed at all"):
        path = save(tmp_path, f"a.{kind}{compression}", content)
        with pytest.raises(DataError, match=rf"cannot read .*a\.{kind}{compression}, it may be truncated or damaged"):
            read_texts([path])


def test_damaged_parquet(tmp_path: Path) -> None:
    whole = encode(ROWS, "parquet")
    for content in (b"", b"PAR1", whole[:-10], b"user,text\na,x\n"):
        with pytest.raises(DataError, match=r"a\.parquet is damaged or no Parquet file"):
            read_texts([save(tmp_path, "a.parquet", content)])


@pytest.mark.parametrize("compression", ["", ".xz"])
def test_wrong_encoding_has_line_and_byte(tmp_path: Path, compression: str) -> None:
    compress = COMPRESS[compression]
    latin = GOOD.encode() + '{"user": "a", "text": "été"}\n'.encode("latin-1")
    with pytest.raises(DataError, match=r"a\.jsonl.*, line 2, byte 24: not UTF-8 \(0xe9\); save the file as UTF-8"):
        read_texts([save(tmp_path, f"a.jsonl{compression}", compress(latin))])
    with pytest.raises(DataError, match=r"a\.csv.*, line 1, byte 1: not UTF-8 \(0xff\)"):
        read_texts([save(tmp_path, f"a.csv{compression}", compress("user,text\na,x\n".encode("utf-16")))])


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a", "a.gz", "a.jsonl.zip", ".jsonl"])
def test_unknown_suffixes(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, name, b"x")
    match = (
        r"has an unknown suffix: use \.jsonl, \.ndjson, \.csv, \.tsv, \.parquet, alone or followed by "
        r"\.gz, \.bz2, \.xz, \.zst"
    )
    with pytest.raises(DataError, match=match):
        read_texts([path])


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*a\.jsonl"):
        read_texts([tmp_path / "a.jsonl"])
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(DataError, match=r"b\.csv is not a file"):
        read_texts([tmp_path / "b.csv"])


def test_data_errors_are_value_errors() -> None:
    assert issubclass(DataError, ValueError)


# Reddit


def comment(author: str | None, body: str, at: Any = 0, **other: Any) -> Row:
    return {"author": author, "body": body, "created_utc": at, "subreddit": "aww", "score": 1, **other}


REDDIT = [
    comment("ann", "second &gt; &amp;amp;", 20),
    comment("ann", "first", "10"),
    comment("[deleted]", "still there", 1),
    comment("ann", "[removed]", 1),
    comment("bob", "[deleted]", 1),
    comment(None, "nobody's", 1),
    comment("AutoModerator", "I am a bot", 1),
    {"author": "bob", "title": "A title", "selftext": "and text", "created_utc": 5},
    {"author": "bob", "title": "A link", "selftext": "", "created_utc": 4},
    {"author": "bob", "title": "Removed", "selftext": "[removed]", "created_utc": 3},
]
READ_FROM_REDDIT = {"ann": ("first", "second > &amp;"), "bob": ("A link", "A title\n\nand text")}


@pytest.mark.parametrize("name", ["RC_2019-04", "a.jsonl", "a.json"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_reddit(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, compression: str) -> None:
    path = save(tmp_path, name + compression, COMPRESS[compression](encode(REDDIT, "jsonl")))
    assert texts(path, source="reddit") == READ_FROM_REDDIT
    assert sorted(caplog.messages) == [
        f"{path}: skipped 1 of 10 rows, they are by AutoModerator",
        f"{path}: skipped 5 of 10 rows, they are deleted or removed",
    ]


def test_reddit_with_the_long_window_of_its_dumps(tmp_path: Path) -> None:
    """A frame whose header asks for a window of 2 GiB, with one raw block of text."""
    content = encode(REDDIT, "jsonl")
    window = (31 - 10) << 3
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, window]) + block + content
    assert texts(save(tmp_path, "RC.zst", frame), source="reddit") == READ_FROM_REDDIT
    with pytest.raises(
        DataError, match=r"cannot read .*RC\.zst, it may be truncated or damaged: it ends in the middle"
    ):
        texts(save(tmp_path, "RC.zst", frame[:-1]), source="reddit")


def test_reddit_truncated_between_lines(tmp_path: Path) -> None:
    """Whole frames and half of another: what came before is no reason to take the file as complete."""
    rows = [comment("ann", str(number)) for number in range(5000)]
    whole = zstandard.compress(encode(rows[:2500], "jsonl"))
    half = zstandard.compress(encode(rows[2500:], "jsonl"))
    assert len(texts(save(tmp_path, "RC.zst", whole + half), source="reddit")["ann"]) == 5000
    for cut in (1, len(half) // 2, len(half) - 1):
        with pytest.raises(DataError, match=r"cannot read .*RC\.zst, it may be truncated or damaged"):
            texts(save(tmp_path, "RC.zst", whole + half[:cut]), source="reddit")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"user": "a", "text": "x"}, r"expected a comment \(author, body, .*, it has 'user', 'text'"),
        ({"author": "a", "body": "x"}, "expected a comment .*, it has 'author', 'body'"),
        ({"author": "a", "created_utc": 1}, "expected a comment"),
        (comment("a", "x", "yesterday"), "'created_utc' must be a number or an ISO 8601 time, got 'yesterday'"),
        ({"author": "a", "body": 3, "created_utc": 1}, "'body' must be a string, got int"),
        ({"author": "a", "title": "x", "selftext": 3, "created_utc": 1}, "'selftext' must be a string, got int"),
        ({"author": 1.5, "body": "x", "created_utc": 1}, "'author' must be a string, got float"),
    ],
)
def test_what_is_not_from_reddit(tmp_path: Path, row: Row, message: str) -> None:
    path = save(tmp_path, "RC.jsonl", [comment("a", "x"), row])
    with pytest.raises(DataError, match=rf"RC\.jsonl, line 2: {message}"):
        texts(path, source="reddit")


def test_nothing_left_from_reddit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text in .*RC\.jsonl: every text is empty or was left out"):
        texts(save(tmp_path, "RC.jsonl", [comment("[deleted]", "x")]), source="reddit")
    with pytest.raises(DataError, match=r"RC\.jsonl is empty"):
        texts(save(tmp_path, "RC.jsonl", ""), source="reddit")


# Twitter


TIMES = ["Wed Oct 10 20:19:24 +0000 2018", "Tue Jan 02 03:04:05 +0000 2018", "Wed Oct 10 20:19:24 +0200 2018"]


def archive(tweets: Any, variable: str = "tweets", part: int = 0) -> str:
    return f"window.YTD.{variable}.part{part} = {json.dumps(tweets, indent=2)}"


def tweets_in_archive(*said: str) -> list[Row]:
    return [
        {"tweet": {"full_text": text, "created_at": time, "id_str": "1"}}
        for text, time in zip(said, TIMES, strict=False)
    ]


ACCOUNT = {"email": "a@b.co", "username": "ann", "accountId": "123", "accountDisplayName": "Ann A."}


def test_archive_of_a_twitter_account(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "account.js", archive([{"account": ACCOUNT}], "account"))
    path = save(tmp_path, "tweets.js", archive(tweets_in_archive("third &lt;3", "first", "second")))
    assert texts(path, source="twitter") == {"ann": ("first", "second", "third <3")}
    more = save(tmp_path, "tweets-part1.js", archive(tweets_in_archive("RT @bob: x", "zero"), part=1) + ";\n")
    assert texts([path, more], source="twitter") == {"ann": ("first", "zero", "second", "third <3")}
    assert caplog.messages == [f"{more}: skipped 1 of 2 rows, they are retweets"]


@pytest.mark.parametrize(("missing", "user"), [("username", "123"), ("accountId", "ann")])
def test_what_an_account_is_called(tmp_path: Path, missing: str, user: str) -> None:
    account = {name: value for name, value in ACCOUNT.items() if name != missing}
    save(tmp_path, "account.js", archive([{"account": account}], "account"))
    path = save(tmp_path, "tweet.js", archive([entry["tweet"] for entry in tweets_in_archive("x")], "tweet"))
    assert texts(path, source="twitter") == {user: ("x",)}


@pytest.mark.parametrize("folder", ["ann", "ann/data"])
def test_archive_without_an_account_is_called_after_its_folder(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    path = save(tmp_path / folder, "tweets.js", archive(tweets_in_archive("x")))
    assert texts(path, source="twitter") == {"ann": ("x",)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"is not a file of a Twitter archive: expected it to begin with window\.YTD\.tweets\.part0 =.*'\[\]'"),
        (archive([], "like"), "is not a file of a Twitter archive"),
        (archive([]), "is empty: it has no rows"),
        (archive([])[:-1], r", line 1: not JSON at column \d+"),
        ("window.YTD.tweets.part0 = \n[{]", ", line 2: not JSON at column 3"),
        ("window.YTD.tweets.part0 = " + "[" * 100_000, ": not usable JSON"),
        (archive({"a": 1}), r": expected one array behind window\.YTD\.tweets"),
        (archive([]) + "[]", ": expected one array"),
        (archive([3]), ", tweet 1: expected an object with full_text and created_at"),
        (archive([{"tweet": {"full_text": "x"}}]), ", tweet 1: expected an object with full_text and created_at"),
        (archive([{"full_text": 3, "created_at": TIMES[0]}]), ", tweet 1: 'full_text' must be a string, got int"),
        (archive([{"full_text": "x", "created_at": "now"}]), ", tweet 1: 'created_at' must be a number or an ISO"),
        ("", "is not a file of a Twitter archive"),
    ],
)
def test_what_is_not_an_archive(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"tweets\.js ?{message}"):
        texts(save(tmp_path, "tweets.js", content), source="twitter")


def test_archive_without_a_usable_account(tmp_path: Path) -> None:
    path = save(tmp_path, "tweets.js", archive(tweets_in_archive("x")))
    save(tmp_path, "account.js", archive([{"account": {"email": "a@b.co"}}], "account"))
    with pytest.raises(DataError, match=r"account\.js: expected an account with username, accountId or"):
        texts(path, source="twitter")


def test_archives_too_large_or_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, "tweets.js", archive(tweets_in_archive("x")).encode() + b"\xff")
    with pytest.raises(DataError, match=r"tweets\.js, byte \d+: not UTF-8"):
        texts(path, source="twitter")
    monkeypatch.setattr(twitter, "_LARGEST_ARCHIVE", 64)
    with pytest.raises(DataError, match=r"tweets\.js is larger than .* MiB, too much to be read as a whole"):
        texts(path, source="twitter")


V1 = [
    {"user": {"screen_name": "ann", "id_str": "1"}, "text": "cut…", "full_text": "late", "created_at": TIMES[0]},
    {"user": {"id_str": "2"}, "text": "bob's", "created_at": TIMES[0]},
    {"user": {"screen_name": "ann"}, "text": "early", "created_at": TIMES[1]},
    {"user": {"screen_name": "ann"}, "text": "RT @bob: bob's", "created_at": TIMES[1]},
    {
        "user": {"screen_name": "ann"},
        "text": "cut…",
        "extended_tweet": {"full_text": "in between"},
        "created_at": TIMES[2],
    },
]
V2 = [
    {"author_id": "7", "text": "late", "created_at": "2021-03-20T10:00:00.000Z"},
    {"author_id": "7", "text": "early", "created_at": "2020-03-20T10:00:00.000Z"},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a"])
def test_tweets_of_the_api(tmp_path: Path, name: str) -> None:
    compress = COMPRESS[".gz"] if name.endswith(".gz") else bytes
    path = save(tmp_path, name, compress(encode(V1, "jsonl")))
    assert texts(path, source="twitter") == {"2": ("bob's",), "ann": ("early", "in between", "late")}
    path = save(tmp_path, name, compress(encode(V2, "jsonl")))
    assert texts(path, source="twitter") == {"7": ("early", "late")}


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "csv.gz"])
@pytest.mark.parametrize(
    ("user", "text", "time"),
    [("author", "full_text", "created_at"), ("screen_name", "tweet", "timestamp"), ("Username", "Content", "Date")],
)
def test_tables_of_tweets(tmp_path: Path, kind: str, user: str, text: str, time: str) -> None:
    rows = [
        {user: "ann", text: "late", time: "2020-01-02", "likes": "1"},
        {user: "ann", text: "early", time: "2020-01-01 10:00:00+00:00", "likes": "1"},
        {user: "ann", text: "RT @bob: x", time: "2020-01-01", "likes": "1"},
    ]
    assert texts(save(tmp_path, f"a.{kind}", rows), source="twitter") == {"ann": ("early", "late")}


def test_tables_of_tweets_without_a_time_keep_their_order(tmp_path: Path) -> None:
    assert texts(save(tmp_path, "a.csv", "user,tweet\na,y\na,x\n"), source="twitter") == {"a": ("y", "x")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "name,tweet\na,x\n", r"a\.csv: expected a column author or .*; it has 'name', 'tweet'"),
        ("a.csv", "user,body\na,x\n", r"a\.csv: expected .* a column full_text or .*; it has 'user', 'body'"),
        ("a.jsonl", GOOD, r"a\.jsonl, line 1: expected a tweet as the API gives it: .*; it has 'user', 'text'"),
        ("a.jsonl", '{"author_id": "1"}', r"a\.jsonl, line 1: expected a tweet"),
        ("a.jsonl", archive([]), r"a\.jsonl, line 1: not JSON at column 1"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
    ],
)
def test_what_is_not_from_twitter(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        texts(save(tmp_path, name, content), source="twitter")


# Sources and scrubbing


def test_sources_are_registered_and_columns_are_of_tables(tmp_path: Path) -> None:
    path = save(tmp_path, "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"source='facebook': expected one of table, reddit, twitter"):
        texts(path, source="facebook")
    with pytest.raises(DataError, match=r"source='reddit' has columns of its own: leave out user_column='author'"):
        texts(path, source="reddit", user_column="author")


@pytest.mark.parametrize("source", ["table", "reddit", "twitter"])
def test_texts_and_users_are_scrubbed_while_they_are_read(tmp_path: Path, source: str) -> None:
    rows = {
        "table": [{"user": "ann", "text": text, "time": -n} for n, text in enumerate(["call @bob", "a@b.co"])],
        "reddit": [comment("ann", text, -n) for n, text in enumerate(["call @bob", "a@b.co"])],
        "twitter": [
            {"author_id": "ann", "text": text, "created_at": time}
            for text, time in zip(["call @bob", "a@b.co"], TIMES, strict=False)
        ],
    }[source]
    scrub = Scrubber("a salt of some length")
    path = save(tmp_path, "a.jsonl", rows)
    assert texts(path, source=source, scrub=scrub) == {scrub.anonymise("ann"): ("[EMAIL]", "call [USER]")}
    assert +scrub.counts == {"EMAIL": 1, "USER": 1}
