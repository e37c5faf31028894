"""Titles of items: every data set's file gives ids and titles."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from dsa_gym.data import DataError
from dsa_gym.data.titles import read_titles

E = "\N{LATIN SMALL LETTER E WITH ACUTE}"
EXPECTED = {"1": "Toy Story (1995)", "0002": f"Les Mis{E}rables: A, B"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("u.item", f"1|Toy Story (1995)|01-Jan-1995||http://x|0|0\n0002|Les Mis{E}rables: A, B|x\n".encode("latin-1")),
        ("movies.dat", f"1::Toy Story (1995)::Comedy\n0002::Les Mis{E}rables: A, B::\n".encode("latin-1")),
        ("movies.dat", f"\ufeff1::Toy Story (1995)::Comedy\r\n\r\n0002::Les Mis{E}rables: A, B::A|B\r\n".encode()),
        ("movies.csv", f'movieId,title,genres\n1,Toy Story (1995),A\n0002,"Les Mis{E}rables: A, B",B\n'.encode()),
        (
            "movies.tsv.xz",
            lzma.compress(f"item_id\ttitle\n1\tToy Story (1995)\n0002\tLes Mis{E}rables: A, B\n".encode()),
        ),
        (
            "meta_Movies.jsonl.gz",
            gzip.compress(
                b'{"title": "Toy Story (1995)", "parent_asin": "1"}\n'
                b'{"title": null, "parent_asin": "3"}\n{"parent_asin": "4"}\n{"title": "", "parent_asin": "5"}\n'
                b'{"title": " Les Mis\\u00e9rables: A, B ", "parent_asin": "0002"}\n'
            ),
        ),
        (
            "meta.json",
            b'{"asin": "1", "title": "Toy Story (1995)"}\n{"asin": "0002", "title": "Les Mis\\u00e9rables: A, B"}',
        ),
    ],
)
def test_data_sets(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_titles(tmp_path / name) == EXPECTED


def test_the_first_title_counts_and_may_have_the_delimiter_in_it(tmp_path: Path) -> None:
    path = tmp_path / "films.txt"
    path.write_text("1::A::B::Comedy\n1::C::Drama\n2::no genre\n")
    assert read_titles(path, source="movielens") == {"1": "A::B", "2": "no genre"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("movies.dat", "1::A::B\n2,C\n", r"movies\.dat, line 2: expected an item, '::' and its title"),
        ("movies.dat", "::A::B\n", r"movies\.dat, line 1: 'item' is empty, expected the item's id"),
        ("movies.csv", "movieId,year\n1,2\n", "must have one of the columns 'item_id'.* and one of 'title'"),
        ("movies.csv", "movieId,title\n1,\n", "has no titles"),
        ("movies.jsonl", '{"asin": "1", "title": ["A"]}', r"line 1: 'title' must be a string, got list"),
        ("movies.txt", "1 A\n", "unknown suffix"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_titles(tmp_path / name)


def test_missing_file_and_unknown_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_titles(tmp_path / "u.item")
    with pytest.raises(DataError, match="source='imdb': expected one of 'auto'"):
        read_titles(tmp_path / "u.item", source="imdb")
