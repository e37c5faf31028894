"""Users and their encoded examples: who is seen in training, and which examples serve for what.

Every user's examples are ordered in time and cut into parts that are never mixed:

| part | users | serves |
|---|---|---|
| ``support`` | all | the embedding, delta_u, and the best mask per user |
| ``query`` | train | meta-training and the environment's ``train`` split |
| ``unseen`` | all | evaluation: ``seen`` (train users), ``validation``, ``test`` |
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsa_gym.data import DataError, split_users
from dsa_gym.domains import Domain, Examples

PARTS = ("support", "query", "unseen")
SPLITS = ("train", "seen", "validation", "test")
MIN_USERS = 4
"""Two users to train on, whose spread whitens the observations, one to validate and one to test."""


@dataclass(frozen=True)
class SplitConfig:
    """How users and their examples are split.

    Attributes:
        validation: Share of users that only choose hyperparameters.
        test: Share of users that nothing is trained on.
        support: Share of a user's examples, the earliest, that are support.
        unseen: Share of a train user's examples, the latest, that are held out for the ``seen`` split. All that other
            users have after their support is held out.
        min_examples: Users with fewer usable examples are dropped, and counted.
        inputs: Most inputs per user in each split of the environment, evenly spaced in time.
        support_inputs: Most support inputs per user that the best mask per user is chosen on.
        seed: Seeds the choice of users.
    """

    validation: float = 0.08
    test: float = 0.24
    support: float = 0.35
    unseen: float = 0.2
    min_examples: int = 20
    inputs: Mapping[str, int] | None = None
    support_inputs: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range; the message names it.
        """
        for name in ("validation", "test"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share between 0 and 1")
        if not (self.support > 0 and self.unseen > 0 and self.support + self.unseen < 1):
            raise ValueError(
                f"support={self.support}, unseen={self.unseen}: expected positive shares that leave some for training"
            )
        if self.min_examples < 5 or self.support_inputs < 1:
            raise ValueError(
                f"min_examples={self.min_examples}, support_inputs={self.support_inputs}: expected at least 5 and 1"
            )
        unknown = set(self.inputs or ()) - set(SPLITS)
        if unknown or any(count < 1 for count in (self.inputs or {}).values()):
            raise ValueError(f"inputs={dict(self.inputs or {})}: expected positive counts for {', '.join(SPLITS)}")

    def inputs_of(self, split: str) -> int:
        """Most inputs per user in a split."""
        defaults = {"train": 24, "seen": 12, "validation": 12, "test": 24}
        return (self.inputs or {}).get(split, defaults[split])


@dataclass
class Population:
    """Users with encoded examples.

    Attributes:
        users: Names, sorted.
        groups: For each user ``train``, ``validation`` or ``test``.
        examples: Encoded examples, first axis (N,), grouped by user and in time order.
        user: Index of each example's user, int64 (N,).
        part: Index into :data:`PARTS` of each example, int64 (N,).
    """

    users: list[str]
    groups: list[str]
    examples: Examples
    user: Tensor
    part: Tensor

    def rows(self, user: int, part: str) -> Tensor:
        """Rows of one user's examples of one part, in time order, int64."""
        return ((self.user == user) & (self.part == PARTS.index(part))).nonzero().flatten()

    def members(self, group: str) -> list[int]:
        """Indices of the users of a group."""
        return [i for i, name in enumerate(self.groups) if name == group]

    def split_rows(self, split: str, config: SplitConfig) -> Tensor:
        """Rows of an environment split: at most ``config.inputs_of(split)`` per user, evenly spaced, int64."""
        group = "train" if split in ("train", "seen") else split
        part = "query" if split == "train" else "unseen"
        limit = config.inputs_of(split)
        return torch.cat([_spaced(self.rows(user, part), limit) for user in self.members(group)])

    def support_rows(self, limit: int) -> Tensor:
        """Support rows of all users, at most ``limit`` per user, evenly spaced, int64."""
        return torch.cat([_spaced(self.rows(user, "support"), limit) for user in range(len(self.users))])


def _spaced(rows: Tensor, limit: int) -> Tensor:
    if len(rows) <= limit:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, limit).round().long()]


def encode_population(
    raw: Sequence[tuple[str, Sequence[Any]]],
    domain: Domain,
    config: SplitConfig,
    trained: Collection[str] = (),
) -> tuple[Population, dict[str, Any]]:
    """Encode every user's examples and split users and examples.

    Args:
        raw: ``(user, examples in time order)``, users in any order.
        domain: Encodes the examples.
        config: The split.
        trained: Users that the backbone was trained on; they are never held out.

    Returns:
        The population, and a report: users and examples read, kept and dropped.

    Raises:
        DataError: If too few users are left to split.
    """
    kept: list[tuple[str, Examples, int]] = []
    examples_read = unusable = 0
    dropped: list[str] = []
    for user, items in sorted(raw, key=lambda entry: entry[0]):
        encoded, usable = domain.encode(list(items))
        examples_read += len(items)
        unusable += len(items) - len(usable)
        if len(usable) < config.min_examples:
            dropped.append(user)
        else:
            kept.append((user, encoded, len(usable)))
    if len(kept) < MIN_USERS:
        raise DataError(
            f"{len(kept)} users are too few, expected at least {MIN_USERS}: of {len(raw)} users {len(dropped)} have "
            f"fewer than min_examples={config.min_examples} usable examples"
        )
    groups = split_users(
        [user for user, _, _ in kept],
        validation=config.validation,
        test=config.test,
        seed=config.seed,
        trained=trained,
    )
    if len(groups["train"]) < 2:
        raise DataError(
            f"{len(kept)} users are too few: one is left to train on, expected two; lower validation or test"
        )
    group_of = {user: group for group, members in groups.items() for user in members}
    names = [user for user, _, _ in kept]
    population = Population(
        users=names,
        groups=[group_of[user] for user in names],
        examples={name: torch.cat([encoded[name] for _, encoded, _ in kept]) for name in kept[0][1]},
        user=torch.repeat_interleave(torch.arange(len(kept)), torch.tensor([count for _, _, count in kept])),
        part=torch.cat([_parts(count, group_of[user] == "train", config) for user, _, count in kept]),
    )
    report = {
        "users": len(kept),
        "users_dropped": len(dropped),
        "examples": len(population.user),
        "examples_read": examples_read,
        "examples_unusable": unusable,
        "min_examples": config.min_examples,
        "users_of_the_backbone": len(set(trained) & set(names)),
    }
    return population, report


def _parts(count: int, train: bool, config: SplitConfig) -> Tensor:
    """Part of each of a user's examples in time order, int64 (count,)."""
    # extreme shares are rounded so that no part that a user should have is empty
    support = min(max(1, round(config.support * count)), count - 2)
    unseen = min(max(1, round(config.unseen * count)), count - support - 1) if train else count - support
    part = torch.full((count,), PARTS.index("query"), dtype=torch.int64)
    part[:support] = PARTS.index("support")
    part[count - unseen :] = PARTS.index("unseen")
    return part
