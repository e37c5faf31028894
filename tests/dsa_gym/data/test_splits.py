"""Splits of users: partitions that depend on the users and the seed alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_gym.data import DataError, split_users

USERS = [f"user {number}" for number in range(100)]


def test_split_counts() -> None:
    split = split_users(USERS, validation=0.1, test=0.24, seed=0)
    assert {name: len(part) for name, part in split.items()} == {"train": 66, "validation": 10, "test": 24}
    assert list(split) == ["train", "validation", "test"]


@settings(max_examples=50, deadline=None)
@given(
    users=st.sets(st.text(), min_size=3, max_size=40),
    shares=st.tuples(st.floats(0, 0.25), st.floats(0, 0.25)),  # larger ones can leave nobody of a few users
    seed=st.integers(0, 10**6),
)
def test_splits_are_partitions_and_independent_of_order(
    users: set[str], shares: tuple[float, float], seed: int
) -> None:
    validation, test = shares
    ordered = sorted(users)
    split = split_users(ordered, validation=validation, test=test, seed=seed)
    assert sorted(user for part in split.values() for user in part) == ordered
    assert all(part == sorted(part) for part in split.values())
    assert split["train"]
    assert bool(split["validation"]) == (validation > 0)
    assert bool(split["test"]) == (test > 0)
    assert split == split_users(ordered[::-1], validation=validation, test=test, seed=seed)


def test_splits_stay_what_they_are() -> None:
    """Results on a split must be comparable with those of an earlier version."""
    split = split_users(list("abcdefghij"), validation=0.2, test=0.3, seed=1)
    assert split == {"train": list("bcefh"), "validation": list("aj"), "test": list("dgi")}


def test_seeds_give_different_splits() -> None:
    tests = {tuple(split_users(USERS, validation=0, test=0.24, seed=seed)["test"]) for seed in range(10)}
    assert len(tests) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": -0.1}, r"validation must be a share in \[0, 1\), got -0\.1"),
        ({"test": 1.0}, r"test must be a share in \[0, 1\), got 1\.0"),
        ({"test": float("nan")}, r"test must be a share in \[0, 1\), got nan"),
        (
            {"test": 0.6, "validation": 0.4},
            "100 users are too few: test=0.6 takes 60, validation=0.4 takes 40",
        ),
        ({"users": ["a", "b"], "test": 0.1, "validation": 0.1}, "2 users are too few: test=0.1 takes 1"),
        ({"users": []}, "0 users are too few"),
        ({"users": ["a", "b", "a"]}, "users must be distinct, 'a' is repeated"),
    ],
)
def test_splits_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    defaults: dict[str, Any] = {"users": USERS, "validation": 0.0, "test": 0.0, "seed": 0}
    with pytest.raises(DataError, match=message):
        split_users(**(defaults | arguments))
