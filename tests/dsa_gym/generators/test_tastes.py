"""Tastes: the same seed gives the same readers, and knowing a reader's habit is worth a lot."""

import csv
import gzip
import json
import lzma
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_gym.generators.tastes import (
    GENRES,
    HABITS,
    TasteConfig,
    catalogue,
    generate_tastes,
    habit_of,
    write_tastes,
    write_titles,
)

ODD = TasteConfig(users=160, odd=1.0, seed=3)
PLAIN = TasteConfig(users=80, seed=4)
SMALL = TasteConfig(users=6, items=60, genres=4, min_interactions=5, max_interactions=12, odd=0.5, seed=1)


def lists_of(config):
    return [[row.item for row in rows] for _, rows in generate_tastes(config)]


@pytest.fixture(scope="module")
def plain():
    return lists_of(PLAIN)


@pytest.fixture(scope="module")
def by_habit():
    found = defaultdict(list)
    for number, items in enumerate(lists_of(ODD)):
        found[habit_of(ODD, number)].append(items)
    return found


class Shelf:
    """What a librarian knows: genre, series and popularity of every item, but nothing about the reader."""

    def __init__(self, config):
        self.items = {item.item: item for item in catalogue(config)}
        self.at = {(item.series, item.place): item.item for item in self.items.values()}
        self.popular = defaultdict(list)
        for item in sorted(self.items.values(), key=lambda item: -item.popularity):
            self.popular[item.genres[0]].append(item.item)
        self.neighbours = defaultdict(Counter)  # learned from readers, as are the opposite genres
        self.opposites = defaultdict(Counter)

    def learn(self, lists):
        for items in lists:
            for a, b in pairwise(items):
                self.neighbours[self.items[a].series][self.items[b].series] += (
                    self.items[a].series != self.items[b].series
                )
                self.opposites[self.genre(a)][self.genre(b)] += 1

    def genre(self, item):
        return self.items[item].genres[0]

    def along(self, item, steps):
        return [self.at.get((self.items[item].series, self.items[item].place + steps))]

    def edge(self, genre, last):
        """First or last items of the series of a genre."""
        return [item for item in self.popular[genre] if (None in self.along(item, 1 if last else -1))]

    def resumed(self, past, genre):
        return self.along(next((item for item in reversed(past) if self.genre(item) == genre), past[-1]), 1)

    def predict(self, habit, past):
        """Best first, at most five unread items."""
        last = past[-1]
        home, other = ([*dict.fromkeys(self.genre(item) for item in reversed(past))] * 2)[:2]
        if habit == "ordinary":
            guesses = self.along(last, 1) + self.popular[home]
        elif habit == "backwards":
            guesses = self.along(last, -1) + self.edge(home, last=True)
        elif habit == "skipping":
            guesses = self.along(last, 2) + self.edge(home, last=False)
        elif habit == "hopping":
            beside = self.neighbours[self.items[last].series].most_common(1)
            guesses = [self.at.get((s, self.items[last].place)) for s, _ in beside] + self.edge(home, last=False)
        elif habit == "alternating":
            guesses = self.resumed(past, other) + self.edge(other, last=False)
        elif habit == "two-and-one":
            genre = other if len(past) > 1 and self.genre(past[-2]) == home else self.majority(past[-3:])
            guesses = self.resumed(past, genre) + self.edge(genre, last=False)
        elif habit == "contrary":
            guesses = self.popular[self.opposites[home].most_common(1)[0][0]]
        else:
            guesses = self.popular[home][::-1]
        return [item for item in dict.fromkeys(guesses) if item is not None and item not in set(past)][:5]

    def majority(self, past):
        return Counter(map(self.genre, past)).most_common(1)[0][0]

    def hits(self, habit, lists, first):
        """Share of next items among the first guesses, from the fourth item on."""
        found = [items[t] in self.predict(habit, items[:t])[:first] for items in lists for t in range(3, len(items))]
        return float(np.mean(found))


def genre_shares(config, rows):
    genre = {item.item: item.genres[0] for item in catalogue(config)}
    count = Counter(genre[row.item] for row in rows)
    return np.array([count[name] / len(rows) for name in GENRES[: config.genres]])


def drifted(config):
    """Mean total variation distance between the genres of a reader's first and last third."""
    thirds = ((rows[: len(rows) // 3], rows[-(len(rows) // 3) :]) for _, rows in generate_tastes(config))
    return np.mean([np.abs(genre_shares(config, a) - genre_shares(config, b)).sum() / 2 for a, b in thirds])


def test_same_config_gives_the_same_readers():
    assert list(generate_tastes(SMALL)) == list(generate_tastes(SMALL))
    assert list(generate_tastes(SMALL)) != list(generate_tastes(replace(SMALL, seed=2)))


def test_a_reader_does_not_depend_on_the_number_of_readers():
    assert list(generate_tastes(replace(SMALL, users=2))) == list(islice(generate_tastes(SMALL), 2))


def test_the_catalogue_is_the_same_for_other_people():
    other = replace(SMALL, seed=9, users=3, odd=0.0, drift=0.5, max_interactions=20)
    assert catalogue(SMALL) == catalogue(other)
    assert catalogue(SMALL) != catalogue(replace(SMALL, catalogue_seed=1))


@settings(max_examples=30, deadline=None)
@given(
    users=st.integers(1, 4),
    genres=st.integers(3, len(GENRES)),
    more=st.integers(0, 120),
    interactions=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    drift=st.floats(0, 1),
    odd=st.floats(0, 1),
    seeds=st.tuples(st.integers(0, 2**70), st.integers(0, 2**70)),
)
def test_every_population_is_well_formed(users, genres, more, interactions, drift, odd, seeds):
    low, high = sorted(interactions)
    items = max(10 * genres, high) + more
    config = TasteConfig(users, items, genres, low, high, drift, odd, *seeds)
    known = {item.item for item in catalogue(config)}
    people = list(generate_tastes(config))
    assert len(known) == items
    assert len({name for name, _ in people}) == users
    for _, rows in people:
        read = [row.item for row in rows]
        assert low <= len(rows) <= high
        assert len(set(read)) == len(read)
        assert known >= set(read)
        assert all(1 <= row.rating <= 5 for row in rows)
        assert all(a.time < b.time for a, b in pairwise(rows))


@pytest.mark.parametrize("items", [30, 31, 59])
def test_readers_can_read_everything(items):
    config = TasteConfig(
        users=20, items=items, genres=3, min_interactions=items, max_interactions=items, odd=0.9, seed=2
    )
    assert {frozenset(read) for read in lists_of(config)} == {frozenset(item.item for item in catalogue(config))}


@pytest.mark.parametrize(("items", "genres"), [(30, 3), (180, 18), (1000, 12), (15_000, 5)])
def test_shape_of_the_catalogue(items, genres):
    found = catalogue(TasteConfig(items=items, genres=genres, min_interactions=1, max_interactions=5))
    assert len({item.title for item in found}) == len({item.item for item in found}) == len(found) == items
    assert [item.year for item in found] == sorted(item.year for item in found)
    shares = sorted((item.popularity for item in found), reverse=True)
    assert np.allclose(np.array(shares) * np.arange(1, items + 1), shares[0])
    assert sum(shares) == pytest.approx(1)
    series = defaultdict(list)
    for item in found:
        series[item.series].append(item)
    assert {item.genres[0] for item in found} == set(GENRES[:genres])
    assert all(len({row[0].series for row in series.values() if row[0].genres[0] == g}) > 1 for g in GENRES[:genres])
    for row in series.values():
        assert 5 <= len(row) <= 9
        assert [item.place for item in row] == list(range(len(row)))
        assert len({item.genres for item in row}) == 1
        assert all(a.year < b.year for a, b in pairwise(row))


def test_ordinary_readers_follow_series(plain):
    shelf = Shelf(PLAIN)
    assert shelf.hits("ordinary", plain, 1) > 0.45
    for habit in ("backwards", "skipping", "obscure"):
        assert shelf.hits(habit, plain, 1) < 0.05


@pytest.mark.parametrize("habit", HABITS)
def test_a_habit_is_worth_knowing(by_habit, habit):
    """Who knows the habit guesses the next item; who takes the reader for another one fails."""
    shelf = Shelf(ODD)
    known, unknown = by_habit[habit][::2], by_habit[habit][1::2]
    shelf.learn(known)
    right = shelf.hits(habit, unknown, 1)
    assert right > 0.35
    assert shelf.hits(habit, unknown, 5) > 0.6
    if habit == "two-and-one":  # one step of three goes on with a series
        assert right > shelf.hits("ordinary", unknown, 1) + 0.25
    else:
        assert shelf.hits("ordinary", unknown, 1) < 0.12
    assert all(shelf.hits(other, unknown, 1) < right - 0.15 for other in HABITS if other != habit)


def test_what_ordinary_readers_teach_fails_with_odd_ones(plain, by_habit):
    """Counts of which item follows which, from ordinary readers; new ordinary readers are guessed well enough."""
    after = defaultdict(Counter)
    for items in lists_of(replace(PLAIN, users=400, seed=5)):
        for a, b in pairwise(items):
            after[a][b] += 1
    likely = {item: count.most_common(1)[0][0] for item, count in after.items()}
    hits = {
        habit: np.mean([likely.get(a) == b for items in lists for a, b in pairwise(items)])
        for habit, lists in (by_habit | {"ordinary": plain}).items()
    }
    assert hits.pop("ordinary") > 0.5
    assert hits.pop("two-and-one") < 0.4
    assert max(hits.values()) < 0.12, hits


def test_share_of_odd_readers():
    habits = Counter(habit_of(replace(ODD, odd=0.8), number) for number in range(2000))
    assert habits["ordinary"] / 2000 == pytest.approx(0.2, abs=0.03)
    assert set(habits) == {*HABITS, "ordinary"}
    assert min(habits.values()) > 0.8 * 1600 / len(HABITS)
    assert {habit_of(PLAIN, number) for number in range(200)} == {"ordinary"}


def test_preferences_drift():
    amounts = [drifted(replace(PLAIN, users=150, drift=drift)) for drift in (0.0, 0.15, 0.6)]
    assert all(b > a + 0.04 for a, b in pairwise(amounts)), amounts


def test_readers_rate_their_genres_higher(plain):
    genre = {item.item: item.genres[0] for item in catalogue(PLAIN)}
    ratings = {True: [], False: []}
    for _, rows in generate_tastes(replace(PLAIN, drift=0.0)):
        favourite = Counter(genre[row.item] for row in rows).most_common(1)[0][0]
        for row in rows:
            ratings[genre[row.item] == favourite].append(row.rating)
    assert np.mean(ratings[True]) > np.mean(ratings[False]) + 0.3


@pytest.mark.parametrize("packed", [("", open), (".gz", gzip.open), (".xz", lzma.open)])
@pytest.mark.parametrize("kind", [".csv", ".tsv", ".jsonl"])
def test_written_rows_come_back(tmp_path, kind, packed):
    suffix, reader = packed
    path = tmp_path / f"tastes{kind}{suffix}"
    path.write_text("old")
    wanted = [(user, row.item, row.rating, row.time) for user, rows in generate_tastes(SMALL) for row in rows]
    assert write_tastes(SMALL, path) == len(wanted)
    with reader(path, "rt", encoding="utf-8", newline="") as file:
        if kind == ".jsonl":
            rows = [json.loads(line) for line in file]
        else:
            rows = list(csv.DictReader(file, delimiter="," if kind == ".csv" else "\t"))
    assert list(rows[0]) == ["user_id", "item_id", "rating", "timestamp"]
    assert [(r["user_id"], r["item_id"], int(r["rating"]), int(r["timestamp"])) for r in rows] == wanted
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    first = path.read_bytes()
    write_tastes(SMALL, path)
    assert path.read_bytes() == first


def test_titles_come_back(tmp_path):
    assert write_titles(SMALL, tmp_path / "titles.csv") == SMALL.items
    with (tmp_path / "titles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row.values()) for row in rows] == [
        (item.item, item.title, "|".join(item.genres)) for item in catalogue(SMALL)
    ]


def test_no_habit_in_the_file(tmp_path):
    write_tastes(replace(SMALL, odd=1.0), tmp_path / "tastes.csv")
    assert not [habit for habit in HABITS if habit in (tmp_path / "tastes.csv").read_text()]


@pytest.mark.parametrize("name", ["tastes", "tastes.parquet", "tastes.csv.bz2", "tastes.gz"])
def test_bad_paths(tmp_path, name):
    for write in (write_tastes, write_titles):
        with pytest.raises(ValueError, match=r"must end in \.csv"):
            write(SMALL, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("users", 0),
        ("users", 2.0),
        ("users", True),
        ("items", 119),
        ("items", 100_001),
        ("items", "1000"),
        ("genres", 2),
        ("genres", len(GENRES) + 1),
        ("min_interactions", 0),
        ("max_interactions", 39),
        ("drift", -0.1),
        ("drift", float("nan")),
        ("odd", 1.1),
        ("odd", "0.5"),
        ("odd", True),
        ("seed", -1),
        ("catalogue_seed", None),
    ],
)
def test_bad_settings_name_the_argument_and_the_value(name, value):
    with pytest.raises(ValueError) as error:
        TasteConfig(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert "must be" in str(error.value)


def test_a_catalogue_must_last_a_reader():
    with pytest.raises(ValueError, match=r"items=120 must be from 121 .*max_interactions=121"):
        TasteConfig(items=120, max_interactions=121)


@pytest.mark.parametrize("function", [catalogue, lambda config: next(generate_tastes(config))])
def test_only_a_config_will_do(function):
    with pytest.raises(ValueError, match="must be a TasteConfig"):
        function({"users": 3})
