"""Who comes next: uniform over users, then over their inputs, and every draw follows from the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dsa_gym.envs.episodes import Episodes

OWNERS = np.array([4, 4, 4, 0, 0, 9, 9, 9, 9, 9, 7, 4])
USERS = np.unique(OWNERS)


def begun(num_envs: int, length: int = 1, seed: int = 0, owners: NDArray[np.int64] = OWNERS) -> Episodes:
    episodes = Episodes(owners, num_envs, length)
    everyone = np.arange(num_envs)
    episodes.seed(np.arange(seed, seed + num_envs).astype(np.uint64), everyone)
    free = np.full(num_envs, -1)
    episodes.begin(everyone, free, free)
    return episodes


def chi_square(counts: NDArray[np.int64], expected: float) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# 0.1 % quantiles' complements of chi-square with 3 and with 4 degrees of freedom
@pytest.mark.parametrize("one_env_many_draws", [False, True])
def test_uniform_over_users_then_over_inputs(one_env_many_draws: bool) -> None:
    n = 8000
    if one_env_many_draws:
        episodes, free = begun(1), np.full(1, -1)
        pairs = []
        for _ in range(n):
            pairs.append((int(episodes.user[0]), int(episodes.input[0])))
            episodes.begin(np.zeros(1, np.intp), free, free)
        user, drawn = np.array(pairs).T
    else:
        many = begun(n)  # neighbouring seeds must be as independent as draws
        user, drawn = many.user, many.input
    np.testing.assert_array_equal(OWNERS[drawn], user)
    counts = np.array([(user == one).sum() for one in USERS])
    assert chi_square(counts, n / 4) < 16.3
    of_nine = np.array([(drawn == i).sum() for i in np.flatnonzero(OWNERS == 9)])
    assert chi_square(of_nine, of_nine.sum() / 5) < 18.5


def test_neighbouring_draws_are_independent() -> None:
    episodes, n = begun(1, length=10**9, owners=np.zeros(4, np.int64)), 8000
    drawn = []
    for _ in range(n):
        drawn.append(int(episodes.input[0]))
        episodes.advance()
    pairs = np.bincount(np.array(drawn[:-1]) * 4 + np.array(drawn[1:]), minlength=16)
    assert chi_square(pairs, (n - 1) / 16) < 37.7  # 0.1 %, 15 degrees of freedom


@settings(max_examples=30)
@given(
    num_envs=st.integers(1, 6),
    length=st.integers(1, 4),
    seed=st.integers(0, 2**63),
    steps=st.integers(0, 12),
)
def test_environment_i_is_the_scalar_seeded_with_seed_plus_i(num_envs: int, length: int, seed: int, steps: int) -> None:
    batch = begun(num_envs, length, seed)
    alone = [begun(1, length, seed + i) for i in range(num_envs)]
    for _ in range(steps):
        ended = batch.advance()
        np.testing.assert_array_equal(ended, [one.advance()[0] for one in alone])
        batch.begin(np.flatnonzero(ended), *(np.full(ended.sum(), -1),) * 2)
        for one, over in zip(alone, ended, strict=True):
            if over:
                one.begin(np.zeros(1, np.intp), np.full(1, -1), np.full(1, -1))
        np.testing.assert_array_equal(batch.user, [one.user[0] for one in alone])
        np.testing.assert_array_equal(batch.input, [one.input[0] for one in alone])


def test_episode_keeps_its_user_and_ends_on_time() -> None:
    episodes = begun(50, length=4)
    user = episodes.user.copy()
    for step in range(4):
        np.testing.assert_array_equal(episodes.user, user)
        np.testing.assert_array_equal(OWNERS[episodes.input], user)
        assert (episodes.advance() == (step == 3)).all()
    np.testing.assert_array_equal(episodes.user, user)


def test_fixed_user_and_input() -> None:
    episodes = begun(4)
    episodes.begin(np.array([1, 3]), np.array([7, -1]), np.array([-1, 5]))
    assert episodes.user[1] == 7 and episodes.input[1] == 10
    assert episodes.user[3] == 9 and episodes.input[3] == 5


def test_fixing_does_not_shift_later_draws() -> None:
    first, second = begun(1, seed=3), begun(1, seed=3)
    where, free = np.zeros(1, np.intp), np.full(1, -1)
    first.begin(where, free, free)
    second.begin(where, np.array([7]), np.array([10]))
    for _ in range(10):
        first.begin(where, free, free)
        second.begin(where, free, free)
        assert first.input[0] == second.input[0]
