"""Tastes: a seeded population of readers who work their way through an invented catalogue, made offline.

The catalogue has genres; a genre has series of five to nine items; an item has a year and a popularity that follows
Zipf's law. Ordinary readers mostly read the next item of a series, sometimes a popular item of the genre that they
are in the mood for, sometimes the neighbour of the last item on the shelf. Their preferences over genres are a
softmax of logits that drift (an autoregression that keeps its variance),

    l_t = sqrt(1 - drift^2) * l_{t-1} + drift * n_t,        n_t ~ N(0, s^2),

and every ten steps or so a reader draws from them the two genres to read in for a while.

A share `odd` of the readers has one of the `HABITS`, and keeps it: reading series backwards, alternating between two
genres, and so on. Given the habit and what was read, the next item is easy to guess; habits contradict one another and
the ordinary way, so that nobody can be predicted well by a model of the others.

The catalogue depends on `catalogue_seed` and its own sizes alone: other people can be drawn for the same catalogue.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsa_gym.generators.checks import check_integer, check_share
from dsa_gym.storage import atomic_path

GENRES = (
    "Adventure", "Comedy", "Crime", "Drama", "Fantasy", "History", "Horror", "Music", "Mystery",
    "Nature", "Romance", "Science", "Space", "Sport", "Thriller", "Travel", "War", "Western",
)  # fmt: skip
"""Names of the genres; a catalogue has the first few of them."""

_MOST_ITEMS = 100_000
_SHORTEST_SERIES = 5
_SPREAD = 2.0
"""Standard deviation of the logits of a preference: the favourite of twelve genres has half of the probability."""
_NEW_GENRES = 0.1
"""Probability per step that a reader draws new genres to read in."""
_FAITHFUL = 0.9
"""Share of steps at which an odd reader keeps to the habit; the others are ordinary."""
_FIRST_CHOICE = 0.5
"""Probability of the best item under a habit; each next one has half of the rest, and so on."""
_EPOCH = 1_420_070_400  # the first second of 2015
_DAY = 86_400


@dataclass(frozen=True)
class TasteConfig:
    """What the population and its catalogue look like.

    Attributes:
        users: number of readers, at least 1.
        items: items of the catalogue, at least ten per genre and at least `max_interactions`.
        genres: genres of the catalogue, from 3 to the number of `GENRES`.
        min_interactions: fewest interactions of a reader, at least 1.
        max_interactions: most interactions of a reader, at least `min_interactions`.
        drift: how fast preferences change, from 0 (never) to 1 (new ones at every step).
        odd: probability that a reader has one of the `HABITS`.
        seed: seed of the population, at least 0.
        catalogue_seed: seed of the catalogue, at least 0.
    """

    users: int = 400
    items: int = 1000
    genres: int = 12
    min_interactions: int = 40
    max_interactions: int = 80
    drift: float = 0.15
    odd: float = 0.0
    seed: int = 0
    catalogue_seed: int = 0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: if a value is out of range; it names the argument, the value and what would be right.
        """
        least = {"users": 1, "items": 1, "genres": 3, "min_interactions": 1, "max_interactions": 1}
        for name, low in (least | {"seed": 0, "catalogue_seed": 0}).items():
            check_integer(name, getattr(self, name), low)
        for name in ("drift", "odd"):
            check_share(name, getattr(self, name))
        if self.genres > len(GENRES):
            raise ValueError(f"genres={self.genres!r} must be at most {len(GENRES)}")
        if self.max_interactions < self.min_interactions:
            raise ValueError(
                f"max_interactions={self.max_interactions!r} must be at least "
                f"min_interactions={self.min_interactions!r}"
            )
        fewest = max(2 * _SHORTEST_SERIES * self.genres, self.max_interactions)
        if not fewest <= self.items <= _MOST_ITEMS:
            raise ValueError(
                f"items={self.items!r} must be from {fewest} (ten for each of genres={self.genres!r}, and "
                f"max_interactions={self.max_interactions!r}) to {_MOST_ITEMS}"
            )


class Interaction(NamedTuple):
    """What a reader did once: the item's id, a rating from 1 to 5, and the time in seconds since 1970 (UTC)."""

    item: str
    rating: int
    time: int


class CatalogueItem(NamedTuple):
    """One item.

    Attributes:
        item: opaque id, such as `item-0042`; ids are in order of release.
        title: an invented title, unique in the catalogue.
        genres: the genre of the series, and for some series a second one.
        year: year of release; it grows within a series.
        popularity: share of the item in all popularity; the r-th item has a share proportional to 1/r.
        series: name of the series.
        place: place in the series, from 0.
    """

    item: str
    title: str
    genres: tuple[str, ...]
    year: int
    popularity: float
    series: str
    place: int


def catalogue(config: TasteConfig) -> list[CatalogueItem]:
    """The items, in order of release; they depend on `items`, `genres` and `catalogue_seed` only.

    Raises:
        ValueError: if `config` is not a `TasteConfig`.
    """
    return list(_shelves_of(config).items)


def generate_tastes(config: TasteConfig) -> Iterator[tuple[str, list[Interaction]]]:
    """Yield the readers: each one's name and interactions, in time order, no item twice.

    A reader depends on the seed, its number and the other settings, not on the number of readers.

    Args:
        config: what the population looks like.

    Yields:
        Pairs of an opaque name, such as `taste-0007`, and the interactions.

    Raises:
        ValueError: if `config` is not a `TasteConfig`.
    """
    shelves = _shelves_of(config)
    for number in range(config.users):
        yield f"taste-{number:04d}", _Reader(config, shelves, number).interactions()


def habit_of(config: TasteConfig, number: int) -> str:
    """The habit of a reader, one of `HABITS`, or `"ordinary"`: the truth behind the data, which no file tells."""
    rng = np.random.default_rng(np.random.SeedSequence(int(config.seed), spawn_key=(number, 1)))
    habit = list(HABITS)[int(rng.integers(len(HABITS)))]
    return habit if rng.random() < config.odd else "ordinary"


def write_tastes(config: TasteConfig, path: Path) -> int:
    """Write the interactions with the columns user_id, item_id, rating and timestamp, reader by reader.

    Args:
        config: what the population looks like.
        path: a name that ends in `.csv`, `.tsv` or `.jsonl`, or in one of these with `.gz` or `.xz` behind it.

    Returns:
        Number of rows written.

    Raises:
        ValueError: if the name ends differently or `config` is no `TasteConfig`.
    """
    columns = ("user_id", "item_id", "rating", "timestamp")
    return _write(path, columns, ((user, *row) for user, rows in generate_tastes(config) for row in rows))


def write_titles(config: TasteConfig, path: Path) -> int:
    """Write the catalogue with the columns item_id, title and genres (joined by `|`); otherwise as `write_tastes`."""
    rows = ((item.item, item.title, "|".join(item.genres)) for item in catalogue(config))
    return _write(path, ("item_id", "title", "genres"), rows)


def _write(path: Path, columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> int:
    """Write a table, atomically; no name or time goes into compressed files: equal rows are equal bytes."""
    path = Path(path)
    stem, packed = (path.stem, path.suffix) if path.suffix in (".gz", ".xz") else (path.name, "")
    kind = Path(stem).suffix
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"path={str(path)!r} must end in .csv, .tsv or .jsonl, or in one of these with .gz or .xz")
    kept = list(rows)
    text = io.StringIO()
    if kind == ".jsonl":
        text.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in kept)
    else:
        writer = csv.writer(text, delimiter="," if kind == ".csv" else "\t", lineterminator="\n")
        writer.writerows([columns, *kept])
    data = text.getvalue().encode()
    if packed == ".gz":
        data = gzip.compress(data, mtime=0)
    elif packed == ".xz":
        data = lzma.compress(data)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return len(kept)


# ----------------------------------------------------------------------------------------------------------
# The catalogue.


class _Shelves(NamedTuple):
    """The catalogue as a reader walks through it; items are numbers, lists of items are arrays."""

    items: tuple[CatalogueItem, ...]
    genre: list[int]
    """Genre of each item."""
    series: list[int]
    """Series of each item."""
    place: list[int]
    """Place of each item in its series, from 0."""
    members: list[list[int]]
    """Items of each series, in order."""
    neighbour: list[int]
    """For each series the next one of its genre, in a circle."""
    popular: list[list[int]]
    """Items of each genre, the most popular first."""
    popularity: NDArray[np.float64]
    """Popularity of each item."""
    opposite: list[int]
    """For each genre the one that contrarians go to next: one circle through all genres."""

    def ends(self, genre: int, last: bool = False) -> list[int]:
        """First (or last) items of the series of a genre, the most popular first."""
        return [i for i in self.popular[genre] if i == self.members[self.series[i]][-1 if last else 0]]

    def beside(self, item: int, unread: NDArray[np.bool_]) -> list[int]:
        """The item at the same place of the neighbouring series, or the first unread one after it, in a circle."""
        row, place = self.members[self.neighbour[self.series[item]]], self.place[item]
        return [i for i in (*row[place:], *row[:place]) if unread[i]][:1]

    def along(self, item: int, steps: int, unread: NDArray[np.bool_]) -> list[int]:
        """The item so many places further on in the series, if there is one and it is unread."""
        row, place = self.members[self.series[item]], self.place[item] + steps
        return [row[place]] if 0 <= place < len(row) and unread[row[place]] else []


def _shelves_of(config: TasteConfig) -> _Shelves:
    if not isinstance(config, TasteConfig):
        raise ValueError(f"config={config!r} must be a TasteConfig")
    return _shelves(int(config.items), int(config.genres), int(config.catalogue_seed))


@lru_cache(maxsize=4)
def _shelves(items: int, genres: int, seed: int) -> _Shelves:
    """Make the catalogue: series by series at first, then in order of release."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    lengths = [length for genre in range(genres) for length in _lengths((items + genre) // genres, rng)]
    totals = np.cumsum([(items + genre) // genres for genre in range(genres)])
    genre_of_series = np.searchsorted(totals, np.cumsum(lengths) - 1, side="right")
    series = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    year = np.repeat(rng.integers(1955, 2006, size=len(lengths)), lengths)
    year = year + place + np.concatenate([np.sort(rng.integers(0, length, size=length)) for length in lengths])
    score = np.repeat(rng.normal(size=len(lengths)), lengths) - 0.25 * place + 0.3 * rng.normal(size=items)
    release = np.argsort(year, kind="stable")
    series, place, year, score = series[release], place[release], year[release], score[release]
    popularity = 1 / (1 + np.argsort(np.argsort(-score)))
    popularity /= popularity.sum()
    names, second = _names(lengths, rng), rng.integers(0, 3 * genres, size=len(lengths))
    genre = genre_of_series[series]
    circle = rng.permutation(genres)
    siblings = [np.flatnonzero(genre_of_series == g) for g in range(genres)]
    after = {int(s): int(t) for group in siblings for s, t in zip(group, np.roll(group, -1), strict=True)}
    return _Shelves(
        items=tuple(
            CatalogueItem(
                item=f"item-{i:04d}",
                title=names[s][p],
                genres=tuple(dict.fromkeys(GENRES[g] for g in (genre[i], second[s]) if g < genres)),
                year=int(year[i]),
                popularity=float(popularity[i]),
                series=names[s][0],
                place=int(p),
            )
            for i, (s, p) in enumerate(zip(series, place, strict=True))
        ),
        genre=genre.tolist(),
        series=series.tolist(),
        place=place.tolist(),
        members=[np.flatnonzero(series == s).tolist() for s in range(len(lengths))],
        neighbour=[after[s] for s in range(len(lengths))],
        popular=[[int(i) for i in np.argsort(-popularity) if genre[i] == g] for g in range(genres)],
        popularity=popularity,
        opposite=np.roll(circle, -1)[np.argsort(circle)].tolist(),
    )


def _lengths(items: int, rng: np.random.Generator) -> list[int]:
    """Cut the items of a genre, at least ten, into at least two series of five to eight items, seldom nine."""
    lengths = []
    while items >= 2 * _SHORTEST_SERIES:
        lengths.append(int(rng.integers(_SHORTEST_SERIES, min(8, items - _SHORTEST_SERIES) + 1)))
        items -= lengths[-1]
    return [*lengths, items]


def _names(lengths: Sequence[int], rng: np.random.Generator) -> list[list[str]]:
    """Titles of every series: the first is the name of the series, the others add a number and a subtitle."""
    pairs = rng.permutation(len(_FIRST) * len(_SECOND))
    titles = []
    for number, length in enumerate(lengths):
        turn, index = divmod(number, len(pairs))
        first, second = divmod(int(pairs[index]), len(_SECOND))
        name = f"{_FIRST[first]} {_SECOND[second]}" + (f" of {_PLACES[turn - 1]}" if turn else "")
        subtitles = rng.choice(len(_SUBTITLES), size=length, replace=False)
        titles.append([name] + [f"{name} {p + 1}: {_SUBTITLES[subtitles[p]]}" for p in range(1, length)])
    return titles


# ----------------------------------------------------------------------------------------------------------
# The readers.

_Habit = Callable[[_Shelves, list[int], NDArray[np.bool_], tuple[int, int]], Sequence[int]]
"""From the catalogue, what was read, what is unread and the reader's two genres to the next items, best first.

Items that were read are passed over.
"""


def _backwards(shelves: _Shelves, read: list[int], unread: NDArray[np.bool_], genres: tuple[int, int]) -> Sequence[int]:
    """The instalment before the last one; a new series begins at its end."""
    return shelves.along(read[-1], -1, unread) or shelves.ends(genres[0], last=True)


def _skipping(shelves: _Shelves, read: list[int], unread: NDArray[np.bool_], genres: tuple[int, int]) -> Sequence[int]:
    """Every second instalment."""
    return shelves.along(read[-1], 2, unread) or shelves.ends(genres[0])


def _hopping(shelves: _Shelves, read: list[int], unread: NDArray[np.bool_], genres: tuple[int, int]) -> Sequence[int]:
    """Never twice the same series in a row: the same place of the neighbouring one."""
    same = shelves.genre[read[-1]] == genres[0]
    return (shelves.beside(read[-1], unread) if same else []) or shelves.ends(genres[0])


def _resumed(shelves: _Shelves, read: list[int], unread: NDArray[np.bool_], genre: int) -> Sequence[int]:
    """The next instalment of the series that was read last in a genre, else the beginning of a series there."""
    last = next((item for item in reversed(read) if shelves.genre[item] == genre), None)
    return (shelves.along(last, 1, unread) if last is not None else []) or shelves.ends(genre)


def _alternating(
    shelves: _Shelves, read: list[int], unread: NDArray[np.bool_], genres: tuple[int, int]
) -> Sequence[int]:
    """Genres A, B, A, B, ..., in each of them one series forwards."""
    return _resumed(shelves, read, unread, genres[shelves.genre[read[-1]] == genres[0]])


def _two_and_one(
    shelves: _Shelves, read: list[int], unread: NDArray[np.bool_], genres: tuple[int, int]
) -> Sequence[int]:
    """Genres A, A, B, A, A, B, ..., in each of them one series forwards."""
    twice = len(read) > 1 and all(shelves.genre[item] == genres[0] for item in read[-2:])
    return _resumed(shelves, read, unread, genres[twice])


def _contrary(shelves: _Shelves, read: list[int], unread: NDArray[np.bool_], genres: tuple[int, int]) -> Sequence[int]:
    """A popular item of the genre opposite to the last one."""
    return shelves.popular[shelves.opposite[shelves.genre[read[-1]]]]


def _obscure(shelves: _Shelves, read: list[int], unread: NDArray[np.bool_], genres: tuple[int, int]) -> Sequence[int]:
    """What hardly anybody reads."""
    return shelves.popular[genres[0]][::-1]


HABITS: dict[str, _Habit] = {
    "backwards": _backwards,
    "skipping": _skipping,
    "hopping": _hopping,
    "alternating": _alternating,
    "two-and-one": _two_and_one,
    "contrary": _contrary,
    "obscure": _obscure,
}
"""Odd habits by name."""


class _Reader:
    """One person: preferences, what was read so far, and the choice of what comes next."""

    def __init__(self, config: TasteConfig, shelves: _Shelves, number: int) -> None:
        """Draw the person.

        Args:
            config: the population's settings.
            shelves: the catalogue.
            number: the person's number in the population, from 0.
        """
        self.config, self.shelves = config, shelves
        self.rng = np.random.default_rng(np.random.SeedSequence(int(config.seed), spawn_key=(number,)))
        self.habit = HABITS.get(habit_of(config, number))
        self.logits = self.rng.normal(0, _SPREAD, size=config.genres)  # (genres,)
        self.genres = self._two_genres()
        self.unread = np.ones(config.items, dtype=bool)
        self.read: list[int] = []
        self.kindness = float(self.rng.normal(0, 0.3))

    def interactions(self) -> list[Interaction]:
        """All interactions of the person in time order."""
        count = int(self.rng.integers(self.config.min_interactions, self.config.max_interactions + 1))
        time = _EPOCH + int(self.rng.integers(0, 365 * _DAY))
        rows = []
        for _ in range(count):
            item = self._next()
            self.unread[item] = False
            self.read.append(item)
            time += 60 + int(self.rng.exponential(3 * _DAY))
            rows.append(Interaction(self.shelves.items[item].item, self._rating(item), time))
            self._drift()
        return rows

    def _next(self) -> int:
        """Choose the next item."""
        if not self.read or self.habit is None or self.rng.random() >= _FAITHFUL:
            return self._ordinary()
        ranked = [i for i in self.habit(self.shelves, self.read, self.unread, self.genres) if self.unread[i]]
        if not ranked:
            return self._popular()
        return ranked[min(int(self.rng.geometric(_FIRST_CHOICE)), len(ranked)) - 1]

    def _ordinary(self) -> int:
        """Mostly the next instalment, else the neighbour on the shelf or something popular."""
        way = self.rng.random()
        if self.read and way < 0.85:
            last = self.read[-1]
            found = self.shelves.along(last, 1, self.unread) if way < 0.7 else self.shelves.beside(last, self.unread)
            if found:
                return found[0]
        return self._popular()

    def _popular(self) -> int:
        """Draw an unread item of the person's genre by popularity, or of the whole catalogue if none is left."""
        items = np.array(self.shelves.popular[self.genres[0]])
        items = items[self.unread[items]]
        if not len(items):
            items = np.flatnonzero(self.unread)
        cumulated = np.cumsum(self.shelves.popularity[items])
        return int(items[np.searchsorted(cumulated, self.rng.random() * cumulated[-1], side="right")])

    def _drift(self) -> None:
        """Let the preferences drift, and now and then turn to other genres."""
        drift = self.config.drift
        noise = self.rng.normal(0, _SPREAD, size=len(self.logits))
        self.logits = np.sqrt(1 - drift**2) * self.logits + drift * noise
        if self.rng.random() < _NEW_GENRES:
            self.genres = self._two_genres()

    def _two_genres(self) -> tuple[int, int]:
        """Draw two different genres from the softmax of the logits, without replacement (Gumbel's trick)."""
        order = np.argsort(-(self.logits + self.rng.gumbel(size=len(self.logits))))
        return int(order[0]), int(order[1])

    def _rating(self, item: int) -> int:
        """Draw a rating: people like what they like, and what others like."""
        liking = 0.4 * self.logits[self.shelves.genre[item]] / _SPREAD
        fame = 0.1 * np.log(self.shelves.popularity[item] * len(self.unread))
        return int(np.clip(np.rint(3.5 + self.kindness + liking + fame + self.rng.normal(0, 0.6)), 1, 5))


_FIRST = (
    "Amber", "Ashen", "Borrowed", "Brass", "Broken", "Burning", "Clockwork", "Copper", "Crimson", "Crooked", "Distant",
    "Drowned", "Empty", "Fading", "Feathered", "Forgotten", "Frozen", "Gilded", "Glass", "Golden", "Hidden", "Hollow",
    "Iron", "Ivory", "Last", "Lonely", "Midnight", "Missing", "Northern", "Painted", "Paper", "Patient", "Quiet",
    "Restless", "Salt", "Secret", "Silver", "Sleeping", "Southern", "Stolen", "Tenth", "Velvet", "Wandering", "Wild",
)  # fmt: skip
_SECOND = (
    "Anchor", "Archive", "Bell", "Bridge", "Candle", "Carnival", "Compass", "Crown", "Desert", "Door", "Engine",
    "Feather", "Field", "Forest", "Garden", "Ghost", "Harbour", "House", "Island", "Key", "Lantern", "Letter", "Map",
    "Market", "Mirror", "Mountain", "Ocean", "Orchard", "Parade", "Raven", "Reef", "River", "Road", "Shore", "Signal",
    "Song", "Stair", "Station", "Storm", "Summer", "Tide", "Tower", "Valley", "Window",
)  # fmt: skip
_SUBTITLES = (
    "After the Rain", "All That Remains", "Before Dawn", "Beyond the Wall", "Homecoming", "In Deep Water",
    "Into the Dark", "No Way Back", "Old Debts", "Second Wind", "The Crossing", "The Far Side", "The Heir",
    "The Long Night", "The Return", "The Reckoning", "Under Stars", "What Was Lost",
)  # fmt: skip
_PLACES = ("Arven", "Belmora", "Corrin", "Dunmere", "Eskel", "Farrow", "Galt", "Harrowby", "Isdal", "Kestwick")
