"""Users and their examples: parts that are never mixed, in time order, for every split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsa_gym.data import DataError
from dsa_gym.domains import Examples
from dsa_gym.population import PARTS, SPLITS, Population, SplitConfig, encode_population


class NumberDomain:
    """A domain whose examples are (user, time); negative times cannot be used."""

    name = "number"

    def encode(self, raw: Sequence[Any]) -> tuple[Examples, Tensor]:
        kept = [i for i, (_, time) in enumerate(raw) if time >= 0]
        pairs = torch.tensor([raw[i] for i in kept], dtype=torch.int64).view(-1, 2)
        return {"user": pairs[:, 0], "time": pairs[:, 1]}, torch.tensor(kept, dtype=torch.int64)


def encode(counts: Sequence[int], config: SplitConfig | None = None) -> tuple[Population, dict[str, Any]]:
    """A population of users with so many examples each."""
    raw = [(f"user{u:02}", [(u, time) for time in range(count)]) for u, count in enumerate(counts)]
    return encode_population(raw, NumberDomain(), config or SplitConfig())  # type: ignore[arg-type]


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(5, 40), min_size=4, max_size=12),
    support=st.floats(0.01, 0.98),
    unseen=st.floats(0.01, 0.98),
    seed=st.integers(0, 20),
)
def test_parts_never_overlap_and_keep_time_order(counts: list[int], support: float, unseen: float, seed: int) -> None:
    if support + unseen >= 0.999:
        unseen = 0.999 - support
        if unseen <= 0:
            return
    config = SplitConfig(support=support, unseen=unseen, min_examples=5, seed=seed)
    population, _ = encode(counts, config)
    # every example belongs to the user it came from
    assert torch.equal(population.user, population.examples["user"])
    for user, count in enumerate(counts):
        times = {part: population.examples["time"][population.rows(user, part)] for part in PARTS}
        together = torch.cat([times["support"], times["query"], times["unseen"]])
        # disjoint, complete, each in time order, and support before query before unseen
        assert together.tolist() == list(range(count))
        train = population.groups[user] == "train"
        assert len(times["support"]) > 0
        assert len(times["unseen"]) > 0
        assert (len(times["query"]) > 0) == train


def test_sizes_of_parts_and_groups() -> None:
    population, _ = encode([20] * 25, SplitConfig(validation=0.08, test=0.24))
    assert {group: len(population.members(group)) for group in ("train", "validation", "test")} == {
        "train": 17,
        "validation": 2,
        "test": 6,
    }
    train, test = population.members("train")[0], population.members("test")[0]
    assert [len(population.rows(train, part)) for part in PARTS] == [7, 9, 4]
    assert [len(population.rows(test, part)) for part in PARTS] == [7, 0, 13]


def test_split_rows() -> None:
    inputs = {"train": 3, "seen": 100, "test": 5}
    config = SplitConfig(inputs=inputs)
    population, _ = encode([40] * 12, config)
    seen: dict[str, set[int]] = {}
    for split in SPLITS:
        rows = population.split_rows(split, config)
        seen[split] = set(rows.tolist())
        group = "train" if split in ("train", "seen") else split
        members = population.members(group)
        assert set(population.user[rows].tolist()) == set(members)
        part = "query" if split == "train" else "unseen"
        for user in members:
            own = rows[population.user[rows] == user]
            available = population.rows(user, part)
            assert len(own) == min(len(available), config.inputs_of(split))
            assert set(own.tolist()) <= set(available.tolist())
            assert (own.diff() > 0).all()
            # evenly spaced over the time that there is
            assert own[0] == available[0]
            assert own[-1] == available[-1]
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    support = set(population.support_rows(config.support_inputs).tolist())
    assert len(support) == 12 * 8
    assert not support & set.union(*seen.values())
    assert config.inputs_of("validation") == 12


def test_dropped_users_are_counted() -> None:
    raw = [(f"user{u}", [(u, time) for time in range(10)]) for u in range(6)]
    raw += [("short", [(6, time) for time in range(4)]), ("unusable", [(7, time - 8) for time in range(12)])]
    population, report = encode_population(raw, NumberDomain(), SplitConfig(min_examples=5))  # type: ignore[arg-type]
    assert population.users == [f"user{u}" for u in range(6)]
    assert report == {
        "users": 6,
        "users_dropped": 2,
        "examples": 60,
        "examples_read": 76,
        "examples_unusable": 8,
        "min_examples": 5,
        "users_of_the_backbone": 0,
    }


def test_order_of_users_does_not_matter() -> None:
    raw = [(name, [(i, time) for time in range(9)]) for i, name in enumerate("abcdefgh")]
    config = SplitConfig(min_examples=5)
    first, _ = encode_population(raw, NumberDomain(), config)  # type: ignore[arg-type]
    again, _ = encode_population(raw[::-1], NumberDomain(), config)  # type: ignore[arg-type]
    assert first.users == again.users == list("abcdefgh")
    assert first.groups == again.groups
    assert torch.equal(first.examples["user"], again.examples["user"])
    assert torch.equal(first.part, again.part)


def test_seed_chooses_the_users() -> None:
    groups = [tuple(encode([20] * 30, SplitConfig(seed=seed))[0].groups) for seed in (0, 0, 1)]
    assert groups[0] == groups[1] != groups[2]


@pytest.mark.parametrize("counts", [[], [3] * 10, [20, 20]])
def test_too_few_users(counts: list[int]) -> None:
    with pytest.raises(DataError, match="users are too few"):
        encode(counts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0.0}, "validation=0.0"),
        ({"test": 1.0}, "test=1.0"),
        ({"support": 0.0}, "support=0.0"),
        ({"support": 0.6, "unseen": 0.4}, "support=0.6, unseen=0.4"),
        ({"min_examples": 4}, "min_examples=4"),
        ({"support_inputs": 0}, "support_inputs=0"),
        ({"inputs": {"traim": 4}}, "inputs={'traim': 4}"),
        ({"inputs": {"train": 0}}, "inputs={'train': 0}"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SplitConfig(**settings)
