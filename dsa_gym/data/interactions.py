"""Users' interactions with items, such as ratings of films and reviews of products.

Rows are streamed and held as numbers, 28 bytes each, and every id is held once. The order of the rows in a file makes
no difference but where a user's times are equal.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsa_gym.data.ratings import Rating, RatingColumns, read_ratings
from dsa_gym.data.tables import DataError

__all__ = ["InteractionReport", "UserInteractions", "core", "read_interactions"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserInteractions:
    """The interactions of one user, in time order, no item twice.

    Attributes:
        user: Id of the user.
        items: Ids of the items.
        times: Seconds since 1970; without times the number of the row, from 0.
        ratings: What the user gave the items; None if the files have no ratings.
    """

    user: str
    items: tuple[str, ...]
    times: tuple[float, ...]
    ratings: tuple[float, ...] | None


@dataclass(frozen=True)
class InteractionReport:
    """What became of the rows; each is counted once.

    Attributes:
        rows: Rows read, which are ``below_min_rating + duplicates + outside_core + interactions``.
        users_read: Users in them.
        items_read: Items in them.
        below_min_rating: Rows dropped for their rating.
        duplicates: Rows dropped because the user had the item before.
        outside_core: Rows dropped with their user or item.
        users_outside_core: Users with too few items left.
        items_outside_core: Items with too few users left.
        rounds: Times that users and items had to be dropped until none had too few.
        users: Users kept.
        items: Items kept.
        interactions: Interactions kept.
    """

    rows: int
    users_read: int
    items_read: int
    below_min_rating: int
    duplicates: int
    outside_core: int
    users_outside_core: int
    items_outside_core: int
    rounds: int
    users: int
    items: int
    interactions: int


@dataclass
class _Collected:
    """Rows as numbers; `array` grows by an eighth at a time."""

    users: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)
    user: array[int] = field(default_factory=lambda: array("i"))
    item: array[int] = field(default_factory=lambda: array("i"))
    time: array[float] = field(default_factory=lambda: array("d"))
    rating: array[float] = field(default_factory=lambda: array("d"))
    rows: int = 0
    rated: bool = False
    timed: bool = False

    def add(self, row: Rating, min_rating: float) -> None:
        """Append a row, or only count it if its rating is too low."""
        rated, timed = row.rating is not None, row.time is not None
        if not self.rows:
            self.rated, self.timed = rated, timed
        if (rated, timed) != (self.rated, self.timed):
            raise DataError(
                f"{row.where}: this file has {_said(rated, timed)}, those before it {_said(self.rated, self.timed)}; "
                "all must have the same: give rating_column and time_column, or read them apart"
            )
        user = self.users.setdefault(row.user, len(self.users))
        item = self.items.setdefault(row.item, len(self.items))
        if row.rating is None or row.rating >= min_rating:
            self.user.append(user)
            self.item.append(item)
            self.time.append(self.rows if row.time is None else row.time)
            if row.rating is not None:
                self.rating.append(row.rating)
        self.rows += 1


def _said(rated: bool, timed: bool) -> str:
    return f"{'ratings' if rated else 'no ratings'} and {'times' if timed else 'no times'}"


def read_interactions(
    paths: Sequence[Path],
    *,
    source: str = "auto",
    min_rating: float | None = None,
    user_core: int = 5,
    item_core: int = 5,
    user_column: str | None = None,
    item_column: str | None = None,
    rating_column: str | None = None,
    time_column: str | None = None,
) -> tuple[list[UserInteractions], InteractionReport]:
    """Read the interactions of users from files, and keep their k-core.

    First rows with low ratings are dropped, then all but the earliest of a user with an item, then, again and again,
    users and items with too few interactions. Times are numbers or ISO 8601; of equal ones the first row is first.

    Sources, each plain or compressed:
        movielens-100k: ``u.data``, ratings 1 to 5.
        movielens: ``ratings.dat`` of MovieLens 1M and 10M, ratings 0.5 to 5.
        movielens-csv: ``ratings.csv`` of later ones, ratings 0.5 to 5.
        movietweetings: ``ratings.dat``, ratings 0 to 10.
        amazon-2014: reviews of 2014 and 2018 as JSON Lines, ratings 1 to 5.
        amazon-2023: reviews of 2023 as JSON Lines or CSV, times in milliseconds, ratings 1 to 5.
        amazon-csv: ratings only, without a header: the position of user and item must be given.
        table: CSV, TSV, JSON Lines or Parquet with ``user``, ``item`` and, if there are any, ``rating`` and ``time``
            (``user_id``, ``timestamp`` and the like will do); times that are numbers are in seconds.

    Args:
        paths: Files of the source; the same id in two files is the same user or item.
        source: ``"auto"``, decided by each file's name and first line, or one of the above.
        min_rating: Lowest rating that counts as an interaction.
        user_core: Interactions that a user must have, at least 1.
        item_core: Interactions that an item must have, at least 1.
        user_column: Column with the user's id; without a header the position, ``"1"`` the first.
        item_column: Column with the item's id.
        rating_column: Column with the rating.
        time_column: Column with the time; without one the rows are in time order.

    Returns:
        Users sorted by id, and what was dropped.

    Raises:
        DataError: A file is missing, damaged, ambiguous or has a wrong value; or nothing is left.
        ValueError: An argument is out of range.
    """
    if isinstance(paths, (str, Path)) or not paths:
        raise DataError(f"paths must be a list of at least one path, got {paths!r}")
    if user_core < 1 or item_core < 1:
        raise ValueError(f"user_core={user_core}, item_core={item_core}: expected at least 1")
    if min_rating is not None and not math.isfinite(min_rating):
        raise ValueError(f"min_rating={min_rating}: expected a finite number")
    data = _Collected()
    seen: set[Path] = set()
    for path in map(Path, paths):
        if path.resolve() in seen:
            raise DataError(f"{path} is given twice")
        seen.add(path.resolve())
        for row in read_ratings(path, source, RatingColumns(user_column, item_column, rating_column, time_column)):
            if min_rating is not None and row.rating is None:
                raise DataError(f"min_rating={min_rating}: {path} has no column with ratings, give rating_column")
            data.add(row, -math.inf if min_rating is None else min_rating)
    return _kept(data, user_core, item_core)


def core(
    user: NDArray[np.int32], item: NDArray[np.int32], user_core: int, item_core: int
) -> tuple[NDArray[np.int64], int]:
    """The largest part of the interactions in which every user and every item has enough of them.

    Args:
        user: Number of the user of each interaction (n,), from 0.
        item: Number of the item of each interaction (n,), from 0.
        user_core: Interactions that every user must have.
        item_core: Interactions that every item must have.

    Returns:
        Indices of the interactions kept, ascending, int64; and the rounds in which some were dropped.
    """
    kept = np.arange(len(user))
    rounds = 0
    while True:
        users, items = user[kept], item[kept]
        enough = (np.bincount(users)[users] >= user_core) & (np.bincount(items)[items] >= item_core)
        if enough.all():
            return kept, rounds
        kept = kept[enough]
        rounds += 1


def _kept(data: _Collected, user_core: int, item_core: int) -> tuple[list[UserInteractions], InteractionReport]:
    """Drop duplicates and what is outside the core, and report it."""
    order = np.argsort(np.asarray(data.time), kind="stable")
    user, item = np.asarray(data.user, dtype=np.int32)[order], np.asarray(data.item, dtype=np.int32)[order]
    _, first = np.unique(user.astype(np.int64) * len(data.items) + item, return_index=True)
    order = order[np.sort(first)]
    user, item = np.asarray(data.user, dtype=np.int32)[order], np.asarray(data.item, dtype=np.int32)[order]
    kept, rounds = core(user, item, user_core, item_core)
    users, items = len(np.unique(user[kept])), len(np.unique(item[kept]))
    report = InteractionReport(
        rows=data.rows,
        users_read=len(data.users),
        items_read=len(data.items),
        below_min_rating=data.rows - len(data.user),
        duplicates=len(data.user) - len(order),
        outside_core=len(order) - len(kept),
        users_outside_core=len(np.unique(user)) - users,
        items_outside_core=len(np.unique(item)) - items,
        rounds=rounds,
        users=users,
        items=items,
        interactions=len(kept),
    )
    if not len(kept):
        raise DataError(
            f"no interactions are left: {report.rows} rows of {report.users_read} users and {report.items_read} items, "
            f"{report.below_min_rating} below min_rating, {report.duplicates} duplicates, {report.outside_core} "
            f"outside the core: use lower numbers than user_core={user_core} and item_core={item_core}"
        )
    logger.info("%s", report)
    return _by_user(data, order[kept]), report


def _by_user(data: _Collected, rows: NDArray[np.int64]) -> list[UserInteractions]:
    """Users sorted by id, from the rows to keep in time order."""
    names, items = np.array(list(data.users), dtype=object), np.array(list(data.items), dtype=object)
    user, item = np.asarray(data.user), np.asarray(data.item)
    time, rating = np.asarray(data.time), np.asarray(data.rating)
    rows = rows[np.argsort(user[rows], kind="stable")]
    groups = np.split(rows, np.flatnonzero(np.diff(user[rows])) + 1)
    found = (
        UserInteractions(
            names[user[group[0]]],
            tuple(items[item[group]].tolist()),
            tuple(time[group].tolist()),
            tuple(rating[group].tolist()) if data.rated else None,
        )
        for group in groups
    )
    return sorted(found, key=lambda each: each.user)
