"""The split of users into those that train and those that are never seen in training."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from itertools import pairwise

from dsa_gym.data.tables import DataError

__all__ = ["split_users"]


def split_users(
    users: Sequence[str], *, validation: float, test: float, seed: int, trained: Collection[str] = ()
) -> dict[str, list[str]]:
    """Divide users, so that some are never seen in training.

    The split depends on the set of users and on the seed only, not on the order of `users` or on the
    version of a library. A share of users is rounded to whole users, but is at least one where it is not
    zero.

    Args:
        users: distinct names.
        validation: share for validation, in [0, 1).
        test: share for testing, in [0, 1).
        seed: another seed is another split.
        trained: users that something was trained on already, such as the backbone: they stay in `train`. Where too
            few others are left, validation and test share them in proportion.

    Returns:
        Sorted names under `train`, `validation` and `test`.

    Raises:
        DataError: a share is out of range, a name is repeated, or no user would be left for training.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 <= share < 1:
            raise DataError(f"{name} must be a share in [0, 1), got {share}")
    if len(set(users)) < len(users):
        repeated = next(user for user, other in pairwise(sorted(users)) if user == other)
        raise DataError(f"users must be distinct, {repeated!r} is repeated")
    counts = {
        name: max(1, round(share * len(users))) if share else 0
        for name, share in (("test", test), ("validation", validation))
    }
    train = len(users) - sum(counts.values())
    if train < 1:
        raise DataError(
            f"{len(users)} users are too few: test={test} takes {counts['test']}, "
            f"validation={validation} takes {counts['validation']}, and at least one must train"
        )
    # Hashes, not a shuffle: they need no promise of a generator to stay the same, and one user more or less
    # leaves most others where they were.
    known = set(trained) & set(users)
    drawn = sorted(set(users) - known, key=lambda user: (_draw(user, seed), user))
    first, second = counts["test"], counts["test"] + counts["validation"]
    if known and second > len(drawn):
        first, second = first * len(drawn) // max(second, 1), len(drawn)
        if (first < 1 and test) or (second - first < 1 and validation):
            raise DataError(
                f"{len(known)} of {len(users)} users have been trained on already: {len(drawn)} are too few for "
                "validation and test; hold more of them out of the pre-training"
            )
    return {
        "train": sorted([*known, *drawn[second:]]),
        "validation": sorted(drawn[first:second]),
        "test": sorted(drawn[:first]),
    }


def _draw(user: str, seed: int) -> bytes:
    """What stands for a random number of this user."""
    return hashlib.sha256(f"{seed}:{user}".encode("utf-8", "surrogatepass")).digest()
