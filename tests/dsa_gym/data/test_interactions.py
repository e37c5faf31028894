"""Interactions: every data set reads alike, what is dropped is counted, and the core is the largest there is."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsa_gym.data import DataError
from dsa_gym.data.interactions import UserInteractions, core, read_interactions

ROWS = [("7", "1193", 5.0, 978300760.0), ("7", "661", 3.0, 978302109.0), ("42", "914", 4.0, 978301968.0)]
EXPECTED = [
    UserInteractions("42", ("914",), (978301968.0,), (4.0,)),
    UserInteractions("7", ("1193", "661"), (978300760.0, 978302109.0), (5.0, 3.0)),
]


def lines(template: str, *, header: str = "") -> str:
    """The rows by a template."""
    return header + "".join(template.format(u=u, i=i, r=r, t=int(t)) for u, i, r, t in ROWS)


AMAZON_2014 = '{{"reviewerID": "{u}", "asin": "{i}", "overall": {r}, "unixReviewTime": {t}, "reviewText": "x"}}\n'
AMAZON_2023 = '{{"rating": {r}, "asin": "variant", "parent_asin": "{i}", "user_id": "{u}", "timestamp": {t}000}}\n'

FILES = {
    "movielens-100k": ("u.data", lines("{u}\t{i}\t{r:.0f}\t{t}\n"), {}),
    "movielens-100k-split": ("u1.base", lines("{u}\t{i}\t{r:.0f}\t{t}\n"), {}),
    "movielens-1m": ("ratings.dat", lines("{u}::{i}::{r:.0f}::{t}\n"), {}),
    "movielens-10m": ("ratings.dat", lines("{u}::{i}::{r}::{t}\r\n"), {}),
    "movielens-latest": ("ratings.csv", lines("{u},{i},{r},{t}\n", header="userId,movieId,rating,timestamp\n"), {}),
    "amazon-2014": ("reviews_Books_5.json.gz", lines(AMAZON_2014), {}),
    "amazon-2023": ("Books.jsonl", lines(AMAZON_2023), {}),
    "amazon-2023-csv": (
        "Books.csv",
        lines("{u},{i},{r},{t}000\n", header="user_id,parent_asin,rating,timestamp\n"),
        {},
    ),
    "amazon-csv-2014": (
        "ratings_Books.csv",
        lines("{u},{i},{r},{t}\n"),
        {"source": "amazon-csv", "user_column": "1", "item_column": "2"},
    ),
    "amazon-csv-2018": (
        "Books.csv",
        lines("{i},{u},{r},{t}\n"),
        {"source": "amazon-csv", "user_column": "2", "item_column": "1"},
    ),
    "csv": ("a.csv", lines("{u},{i},{r},{t}\n", header="user,item,rating,time\n"), {}),
    "tsv": ("a.tsv.gz", lines("{u}\t{i}\t{r}\t{t}\n", header="user_id\titem_id\trating\ttimestamp\n"), {}),
    "jsonl": ("a.jsonl", lines('{{"user": {u}, "item": {i}, "rating": {r}, "time": {t}}}\n'), {}),
    "named": (
        "a.csv",
        lines("{r},{t},{u},{i}\n", header="stars,at,who,what\n"),
        {"user_column": "who", "item_column": "what", "rating_column": "stars", "time_column": "at"},
    ),
}


def save(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return path


def read(path: Path, **arguments: Any) -> list[UserInteractions]:
    """The interactions of one file, all of them unless the arguments say otherwise."""
    return read_interactions([path], **({"user_core": 1, "item_core": 1} | arguments))[0]


# Data sets


@pytest.mark.parametrize("kind", FILES)
def test_data_sets_read_alike(tmp_path: Path, kind: str) -> None:
    name, content, arguments = FILES[kind]
    assert read(save(tmp_path, name, content), **arguments) == EXPECTED


@pytest.mark.parametrize("types", [(pa.string(), pa.float32()), (pa.int64(), pa.int8())])
def test_parquet(tmp_path: Path, types: tuple[pa.DataType, pa.DataType]) -> None:
    users, items, ratings, times = (list(column) for column in zip(*ROWS, strict=True))
    ids = [pa.array(map(int, values)).cast(types[0]) for values in (users, items)]
    when = pa.array([datetime.fromtimestamp(time, UTC) for time in times])
    table = pa.table({"userId": ids[0], "itemId": ids[1], "rating": pa.array(ratings).cast(types[1]), "date": when})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == EXPECTED


def test_movietweetings_is_told_from_movielens(tmp_path: Path) -> None:
    path = save(tmp_path, "ratings.dat", "1::0114508::8::1381006850\n2::0208092::0::1586466072\n")
    users = read(path)
    assert [user.ratings for user in users] == [(8.0,), (0.0,)]
    assert users[0].items == ("0114508",)
    with pytest.raises(DataError, match=r"ratings\.dat, line 1: '3' is 8, outside 0.5 to 5, .*'movielens'"):
        read(path, source="movielens")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ratings_Books.csv", "A1,B1,5.0,978300760\n"),
        ("a.csv", "who,what\nx,y\n"),
        ("a.jsonl", '{"who": "x", "what": "y"}\n'),
        ("ratings.txt", "1 2 3 4\n"),
        ("ratings.dat", "1::2::3\n"),
    ],
)
def test_ambiguous_files_ask_for_the_source(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match=r"is none of the known files.*give source, one of .*'amazon-csv'.*'table'"):
        read(save(tmp_path, name, content))


def test_amazon_csv_does_not_guess_the_order(tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", "A1,B1,5.0,978300760\n")
    with pytest.raises(DataError, match="give user_column, one of '1', '2', '3', '4'"):
        read(path, source="amazon-csv")
    with pytest.raises(DataError, match="give item_column"):
        read(path, source="amazon-csv", user_column="1")
    with pytest.raises(DataError, match="has no column '5'"):
        read(path, source="amazon-csv", user_column="1", item_column="5")


# Values


@pytest.mark.parametrize(
    ("source", "name", "header", "row", "good", "bad"),
    [
        ("movielens-100k", "u.data", "", "1\t2\t{}\t3\n", ["1", "5"], ["0.5", "5.5"]),
        ("movielens", "ratings.dat", "", "1::2::{}::3\n", ["0.5", "5"], ["0", "6"]),
        ("movietweetings", "ratings.dat", "", "1::0000002::{}::3\n", ["0", "10"], ["-1", "11"]),
        ("amazon-csv", "a.csv", "", "1,2,{},3\n", ["1.0", "5.0"], ["0", "5.1"]),
        ("table", "a.csv", "user,item,rating\n", "1,2,{}\n", ["-1e9", "1e9"], []),
    ],
)
def test_scales(tmp_path: Path, source: str, name: str, header: str, row: str, good: list[str], bad: list[str]) -> None:
    columns = {"user_column": "1", "item_column": "2"} if source == "amazon-csv" else {}
    for value in good:
        assert read(save(tmp_path, name, header + row.format(value)), source=source, **columns)[0].ratings == (
            float(value),
        )
    for value in bad:
        with pytest.raises(
            DataError, match=rf"line 2: .* is {value}, outside .* to .*, the scale of source='{source}'"
        ):
            read(save(tmp_path, name, row.format(good[0]) + row.format(value)), source=source, **columns)
    for value in ("nan", "inf", "", "five", "1_0"):
        with pytest.raises(DataError, match=rf"line \d: .* must be a finite number, got '{value}'"):
            read(save(tmp_path, name, header + row.format(value)), source=source, **columns)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"user": "", "item": "b", "time": 1}, r"line 2: 'user' is empty"),
        ({"user": "a", "item": None, "time": 1}, r"line 2: 'item' must be a string, got null"),
        ({"user": "a", "item": 1.5, "time": 1}, r"line 2: 'item' must be a string, got float"),
        ({"user": "a", "time": 1}, r"line 2: 'item' must be a string, got null"),
        ({"user": "a", "item": "b", "time": "yesterday"}, r"line 2: 'time' must be a number or an ISO 8601 time"),
        ({"user": "a", "item": "b", "time": True}, r"line 2: 'time' must be a number"),
        ({"user": "a", "item": "b", "time": 10**400}, r"line 2: 'time' must be a"),
        ({"user": "a", "item": "b"}, r"line 2: 'time' must be a number"),
    ],
)
def test_wrong_values_are_named_with_their_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    rows = [{"user": "a", "item": "b", "time": 1}, row]
    with pytest.raises(DataError, match=message):
        read(save(tmp_path, "a.jsonl", "".join(json.dumps(each) + "\n" for each in rows)))


@pytest.mark.parametrize("line", ["1::2::3", "1::2::3::4::5", "1,2,3,4"])
def test_rows_with_too_few_or_too_many_fields(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"ratings\.dat, line 2: \d fields, expected 4 with '::' between them"):
        read(save(tmp_path, "ratings.dat", f"1::2::3::4\n{line}\n"))


@pytest.mark.parametrize("source", ["auto", "movielens"])
def test_empty_and_missing_files(tmp_path: Path, source: str) -> None:
    with pytest.raises(DataError, match=r"ratings\.dat is empty"):
        read(save(tmp_path, "ratings.dat", ""), source=source)
    with pytest.raises(DataError, match=r"there is no file .*none\.dat"):
        read(tmp_path / "none.dat", source=source)


def test_arguments_are_checked(tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", "user,item\na,b\n")
    with pytest.raises(DataError, match="source='netflix': expected one of 'auto', 'movielens-100k'"):
        read(path, source="netflix")
    with pytest.raises(ValueError, match="user_core=0, item_core=1: expected at least 1"):
        read(path, user_core=0)
    with pytest.raises(ValueError, match="min_rating=nan"):
        read(path, min_rating=float("nan"))
    with pytest.raises(DataError, match=r"min_rating=3: .*a\.csv has no column with ratings"):
        read(path, min_rating=3)
    with pytest.raises(DataError, match="is given twice"):
        read_interactions([path, path])
    with pytest.raises(DataError, match="paths must be a list"):
        read_interactions([])


# Order, duplicates and what is dropped


def test_times_are_sorted_stably_whatever_they_are_written_as(tmp_path: Path) -> None:
    rows = ["a,x,2000-01-01T00:00:01Z", "a,y,946684800.5", "a,z,946684801", "a,w,2000-01-01"]
    (user,) = read(save(tmp_path, "a.csv", "user,item,time\n" + "\n".join(rows)))
    assert user.items == ("w", "y", "x", "z")
    assert user.times == (946684800.0, 946684800.5, 946684801.0, 946684801.0)
    assert user.ratings is None


def test_without_times_the_rows_are_in_order_across_files(tmp_path: Path) -> None:
    first = save(tmp_path, "b.csv", "user,item\na,x\nb,x\n")
    second = save(tmp_path, "a.csv", "user,item\na,w\n")
    users, _ = read_interactions([first, second], user_core=1, item_core=1)
    assert users == [UserInteractions("a", ("x", "w"), (0.0, 2.0), None), UserInteractions("b", ("x",), (1.0,), None)]


@pytest.mark.parametrize("other", ["user,item,time\na,w,1\n", "user,item,rating\na,w,1\n"])
def test_files_that_do_not_say_the_same_are_not_mixed(tmp_path: Path, other: str) -> None:
    paths = [save(tmp_path, "b.csv", "user,item\na,x\n"), save(tmp_path, "a.csv", other)]
    with pytest.raises(DataError, match=r"a\.csv, line 2: this file has .*, those before it no ratings and no times"):
        read_interactions(paths, user_core=1, item_core=1)


def test_the_earliest_of_those_that_count_is_kept(tmp_path: Path) -> None:
    rows = "a,x,5,30\na,x,4,20\na,x,1,10\na,y,5,40\na,y,5,40\nb,x,1,1\n"
    path = save(tmp_path, "a.csv", "user,item,rating,time\n" + rows)
    users, report = read_interactions([path], min_rating=4, user_core=1, item_core=1)
    assert users == [UserInteractions("a", ("x", "y"), (20.0, 40.0), (4.0, 5.0))]
    assert (report.rows, report.below_min_rating, report.duplicates, report.interactions) == (6, 2, 2, 2)
    assert (report.users_read, report.users, report.users_outside_core) == (2, 1, 0)


def test_everything_dropped_is_counted(tmp_path: Path) -> None:
    # c goes in the first round, then z has too few, then b, then nothing
    rows = ["a,x", "a,y", "d,x", "d,y", "b,x", "b,z", "c,z", "c,z"]
    _, report = read_interactions([save(tmp_path, "a.csv", "user,item\n" + "\n".join(rows))], user_core=2, item_core=2)
    assert json.loads(json.dumps(asdict(report))) == {
        "rows": 8,
        "users_read": 4,
        "items_read": 3,
        "below_min_rating": 0,
        "duplicates": 1,
        "outside_core": 3,
        "users_outside_core": 2,
        "items_outside_core": 1,
        "rounds": 3,
        "users": 2,
        "items": 2,
        "interactions": 4,
    }


def test_nothing_left_says_why(tmp_path: Path) -> None:
    path = save(tmp_path, "a.csv", "user,item,rating\na,x,1\na,x,5\na,x,5\nb,x,5\n")
    message = "4 rows of 2 users and 1 items, 1 below min_rating, 1 duplicates, 2 outside the core: use lower numbers"
    with pytest.raises(DataError, match=message):
        read(path, min_rating=2, user_core=2)
    with pytest.raises(DataError, match="4 below min_rating, 0 duplicates"):
        read(path, min_rating=6)


# The core

edges = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=60, unique=True)
cores = st.integers(1, 4)


def slow_core(pairs: set[tuple[int, int]], user_core: int, item_core: int) -> set[tuple[int, int]]:
    """Drop one user or item at a time."""
    for axis, least in ((0, user_core), (1, item_core)):
        for name in {pair[axis] for pair in pairs}:
            having = {pair for pair in pairs if pair[axis] == name}
            if len(having) < least:
                return slow_core(pairs - having, user_core, item_core)
    return pairs


@given(edges, cores, cores)
def test_the_core_is_the_largest_there_is(pairs: list[tuple[int, int]], user_core: int, item_core: int) -> None:
    user, item = np.array(pairs, dtype=np.int32).T
    kept, rounds = core(user, item, user_core, item_core)
    assert {pairs[row] for row in kept} == slow_core(set(pairs), user_core, item_core)
    assert len(set(kept.tolist())) == len(kept) and (np.diff(kept) > 0).all()
    assert (rounds == 0) == (len(kept) == len(pairs))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(edges, cores, cores, st.randoms(use_true_random=False))
def test_the_order_of_rows_makes_no_difference(
    tmp_path: Path, pairs: list[tuple[int, int]], user_core: int, item_core: int, shuffler: random.Random
) -> None:
    def result() -> Any:
        path = save(tmp_path, "a.csv", "user,item,time\n" + "\n".join(rows))
        try:
            return read_interactions([path], user_core=user_core, item_core=item_core)
        except DataError as error:
            return str(error)

    rows = [f"{user},{item},{time}" for time, (user, item) in enumerate(pairs)]
    expected = result()
    shuffler.shuffle(rows)
    assert result() == expected


def test_many_interactions(rng: np.random.Generator) -> None:
    user, item = (rng.zipf(1.5, 1_000_000).clip(max=50_000).astype(np.int32) for _ in range(2))
    kept, rounds = core(user, item, 5, 5)
    assert rounds > 1 and len(kept)
    for ids in (user[kept], item[kept]):
        assert np.unique(ids, return_counts=True)[1].min() >= 5
