"""The ladder: every rung by hand, intervals, controls and the cross-fitted oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dsa_gym.ladder import (
    Ladder,
    bootstrap,
    build_ladder,
    crossfitted_oracle,
    interval,
    normalised_score,
    shuffled,
    summarise,
)
from dsa_gym.problem import GatingProblem

Make = Callable[..., GatingProblem]

# Losses of two gates; columns: none, gate 0, gate 1, both. Every gate that is on costs 0.01 * 100 = 1 nat.
PRICE = 0.01
TRAIN = np.array([[5.0, 1.0, 9.0, 9.0], [5.0, 2.0, 9.0, 9.0]])  # best on average: gate 0
HELD_OUT = np.array([[9.0, 7.0, 5.0, 8.0], [4.0, 8.0, 9.0, 6.0], [6.0, 3.0, 2.0, 1.5]])
SUPPORT = np.array([[9.0, 9.0, 1.0, 9.0], [1.0, 9.0, 9.0, 9.0]])  # user 3: gate 1, user 7: nothing
REFERENCE = np.array([[0, 1], [1, 1], [1, 0]], dtype=np.uint8)


@pytest.fixture
def ladder(table_problem: Make) -> Ladder:
    support = table_problem(SUPPORT, np.array([3, 7]), l0_penalty=PRICE)
    held_out = table_problem(HELD_OUT, np.array([3, 7, 3]), l0_penalty=PRICE, reference=REFERENCE, support=support)
    train = table_problem(TRAIN, np.array([0, 1]), l0_penalty=PRICE)
    return build_ladder(held_out, train, density=0.5)


@pytest.mark.parametrize(
    ("rung", "rewards"),
    [
        ("none", [-9.0, -4.0, -6.0]),
        ("all", [-8.0 - 2, -6.0 - 2, -1.5 - 2]),
        ("static", [-7.0 - 1, -8.0 - 1, -3.0 - 1]),  # gate 0, chosen on the training inputs
        ("user_static", [-5.0 - 1, -4.0, -2.0 - 1]),  # chosen on each user's support
        ("reference", [-5.0 - 1, -6.0 - 2, -3.0 - 1]),
        ("oracle", [-5.0 - 1, -4.0, -2.0 - 1]),
    ],
)
def test_every_rung_by_hand(ladder: Ladder, rung: str, rewards: list[float]) -> None:
    np.testing.assert_allclose(ladder.rewards[rung], rewards)
    assert ladder.masks[rung].shape == (3, 2)
    assert ladder.oracle_kind == "exhaustive"
    assert ladder.users.tolist() == [3, 7, 3]


def test_random_masks_have_the_density(table_problem: Make, rng: np.random.Generator) -> None:
    problem = table_problem(rng.random((4000, 4)), np.arange(4000) % 5, reference=np.zeros((4000, 2), dtype=np.uint8))
    masks = build_ladder(problem, problem, density=0.25).masks["random"]
    assert masks.mean() == pytest.approx(0.25, abs=0.02)
    again = build_ladder(problem, problem, density=0.25).masks["random"]
    assert np.array_equal(masks, again)


def test_summary_by_hand(ladder: Ladder) -> None:
    agent = np.array([-6.0, -4.0, -3.5])
    result = summarise(ladder, agent=agent, samples=50)
    static, reference = -21 / 3, -18 / 3
    assert result["ladder"]["static"]["mean"] == pytest.approx(static)
    assert result["ladder"]["reference"]["mean"] == pytest.approx(reference)
    assert result["ladder"]["agent"]["mean"] == pytest.approx(-4.5)
    assert result["headroom"]["mean"] == pytest.approx(reference - static)
    assert result["gain_over_static"]["mean"] == pytest.approx(-4.5 - static)
    assert result["normalized_score"]["mean"] == pytest.approx((-4.5 - static) / (reference - static))
    assert (result["users"], result["inputs"], result["oracle_kind"]) == (2, 3, "exhaustive")
    for value in (*result["ladder"].values(), result["headroom"], result["normalized_score"]):
        assert set(value) == {"mean", "low", "high"}
        assert value["low"] <= value["high"]
    assert "normalized_score" not in summarise(ladder, samples=50)


@pytest.mark.parametrize(("rung", "score"), [("static", 0.0), ("reference", 1.0)])
def test_ends_of_the_normalised_score(table_problem: Make, rung: str, score: float) -> None:
    generator = np.random.default_rng(2)
    better = np.stack([np.full(40, 3.0), np.full(40, 2.5), np.full(40, 2.0), np.full(40, 4.0)], axis=1)
    better += generator.normal(0, 0.1, better.shape)
    reference = np.tile(np.array([0, 1], dtype=np.uint8), (40, 1))
    problem = table_problem(better, np.arange(40) // 4, reference=reference)
    train = table_problem(TRAIN, np.array([0, 1]))
    ladder = build_ladder(problem, train, density=0.5)
    result = summarise(ladder, agent=np.stack([ladder.rewards[rung]] * 3), samples=200)["normalized_score"]
    # paired: the score is exact in every resample, not only on average
    assert (result["mean"], result["low"], result["high"]) == pytest.approx((score, score, score))


def test_a_reference_that_is_not_better_does_not_divide_by_zero() -> None:
    assert normalised_score(-1.0, -1.0, -1.0) == 0.0
    assert np.isfinite(normalised_score(-0.5, -1.0, -2.0))


def test_bootstrap_is_over_users() -> None:
    # one value per user: inputs of a user move together, so many inputs do not narrow the interval
    users = np.repeat(np.arange(8), 50)
    of_user = np.random.default_rng(0).normal(size=8)
    drawn = bootstrap({"a": of_user[users]}, users, samples=4000)["a"]
    assert drawn.std() == pytest.approx(of_user.std() / np.sqrt(8), rel=0.06)


def test_a_user_weighs_as_much_as_it_has_inputs() -> None:
    users = np.array([4, 4, 4, 9])
    drawn = bootstrap({"a": np.array([0.0, 0.0, 0.0, 1.0])}, users, samples=2000)["a"]
    # user 9 twice, once, never among the two drawn
    assert set(np.round(drawn, 6)) == {0.0, 0.25, 1.0}


def test_bootstrap_is_paired_over_names() -> None:
    users = np.arange(30) // 3
    values = np.random.default_rng(0).normal(size=30)
    drawn = bootstrap({"a": values, "b": values + 0.25}, users, samples=100)
    np.testing.assert_allclose(drawn["b"] - drawn["a"], 0.25)


def test_bootstrap_is_over_seeds_too() -> None:
    users = np.arange(20)
    seeds = np.array([0.0, 3.0, 6.0])[:, None] + np.zeros((3, 20))
    drawn = bootstrap({"agent": seeds, "static": np.zeros(20)}, users, samples=4000)
    assert set(drawn["static"]) == {0.0}
    assert drawn["agent"].mean() == pytest.approx(3.0, abs=0.1)
    assert drawn["agent"].std() == pytest.approx(np.std([0, 3, 6]) / np.sqrt(3), rel=0.05)
    assert drawn["agent"].min() == 0.0 and drawn["agent"].max() == 6.0


def test_bootstrap_is_seeded() -> None:
    users, values = np.arange(10) // 2, np.random.default_rng(0).normal(size=10)
    first, again, other = (bootstrap({"a": values}, users, samples=20, seed=seed)["a"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_intervals_cover_the_truth() -> None:
    generator = np.random.default_rng(0)
    users, covered, trials = np.repeat(np.arange(40), 3), 0, 200
    for trial in range(trials):
        values = generator.normal(1.0, 1.0, 40)[users] + generator.normal(0, 1.0, 120)
        found = interval(values.mean(), bootstrap({"a": values}, users, samples=300, seed=trial)["a"])
        covered += found["low"] <= 1.0 <= found["high"]
    # a percentile interval over 40 users is a little narrow: about 93 % of 95 %
    assert 0.89 <= covered / trials <= 0.98


def _echo(table_problem: Make, users: np.ndarray) -> tuple[Any, np.ndarray]:
    """A problem that remembers the masks it is asked for, and masks that say which input they are of."""
    problem: Any = table_problem(np.zeros((len(users), 256)), users)
    problem.asked = []

    def rewards(inputs: np.ndarray, gates: np.ndarray) -> np.ndarray:
        problem.asked.append(gates @ (1 << np.arange(8)))
        return np.zeros(len(inputs))

    problem.rewards = rewards
    codes = np.arange(len(users))
    return problem, (codes[:, None] >> np.arange(8) & 1).astype(np.uint8)


def test_shuffling_users_never_gives_a_user_its_own_mask(table_problem: Make) -> None:
    users = np.array([5, 5, 5, 5, 1, 1, 1, 8, 8, 2])
    problem, masks = _echo(table_problem, users)
    shuffled(problem, masks, over="users", repeats=50)
    assert len(problem.asked) == 50
    partners = []
    for source in problem.asked:
        assert (users[source] != users).all()
        # all inputs of a user get masks of one other user, and every user serves one
        partner = {int(user): set(users[source[users == user]]) for user in np.unique(users)}
        assert all(len(found) == 1 for found in partner.values())
        assert set.union(*partner.values()) == set(users)
        for user, (other,) in partner.items():
            used = np.bincount(source[users == user], minlength=10)[users == other]
            assert used.max() - used.min() <= 1  # evenly
        partners.append(partner[5])
    assert len(set.union(*partners)) == 3


def test_shuffling_inputs_is_a_permutation(table_problem: Make) -> None:
    users = np.arange(12) // 4
    problem, masks = _echo(table_problem, users)
    shuffled(problem, masks, over="inputs", repeats=5)
    assert all(sorted(source) == list(range(12)) for source in problem.asked)
    assert len({tuple(source) for source in problem.asked}) == 5


def test_shuffling_hurts_where_masks_fit_their_user(table_problem: Make) -> None:
    users = np.arange(20) // 5
    losses = np.ones((20, 4))
    losses[np.arange(20), users] = 0.0  # user u wants the mask with number u
    masks = (users[:, None] >> np.arange(2) & 1).astype(np.uint8)
    problem = table_problem(losses, users)
    assert shuffled(problem, masks, over="users").mean() == -1.0
    # a permutation of inputs keeps some of a user's masks with that user
    assert -1.0 < shuffled(problem, masks, over="inputs").mean() < -0.5
    constant = np.zeros_like(masks)
    for over in ("users", "inputs"):
        expected = problem.rewards(np.arange(20), constant)
        np.testing.assert_array_equal(shuffled(problem, constant, over=over), expected)


def test_shuffling_needs_something_to_shuffle(table_problem: Make) -> None:
    problem = table_problem(np.zeros((3, 4)), np.zeros(3, dtype=np.int64))
    masks = np.zeros((3, 2), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"over='users'.*one user"):
        shuffled(problem, masks, over="users")
    with pytest.raises(ValueError, match="over='masks'"):
        shuffled(problem, masks, over="masks")


def test_crossfitted_oracle_by_hand(table_problem: Make) -> None:
    even = np.array([[3.0, 1.0, 2.0, 9.0]])  # chooses gate 0: 2 * 1 + 1 < 2 * 2 + 1
    odd = np.array([[4.0, 5.0, 0.5, 9.0]])  # chooses gate 1
    problem = table_problem(np.stack([even, odd], -1), np.array([0]), l0_penalty=PRICE)
    found = crossfitted_oracle(problem)
    assert found is not None
    # odd scored under gate 0, even under gate 1, each with half the price
    np.testing.assert_allclose(found, [-(5.0 + 0.5) - (2.0 + 0.5)])


def test_crossfitted_oracle_needs_the_halves(table_problem: Make) -> None:
    assert crossfitted_oracle(table_problem(HELD_OUT, np.arange(3))) is None


def test_crossfitted_oracle_is_at_most_the_oracle(table_problem: Make, rng: np.random.Generator) -> None:
    problem = table_problem(rng.random((200, 16, 2)), np.arange(200) // 10, l0_penalty=1e-3)
    problem._reference = np.zeros((200, 4), dtype=np.uint8)  # type: ignore[attr-defined]
    ladder = build_ladder(problem, problem, density=0.5)
    assert (ladder.rewards["oracle_crossfit"] <= ladder.rewards["oracle"] + 1e-6).all()
    assert "oracle_crossfit" not in ladder.masks


def test_crossfitting_gains_nothing_on_noise(table_problem: Make) -> None:
    generator = np.random.default_rng(7)
    losses = 2.0 + generator.normal(0, 0.5, (3000, 16, 2))  # every mask is as good as every other
    problem = table_problem(losses, np.arange(3000) // 10)
    oracle = -losses.sum(-1).min(1)
    crossfit = crossfitted_oracle(problem)
    assert crossfit is not None
    static = -losses.sum(-1)[:, 5]
    gain, error = (crossfit - static).mean(), (crossfit - static).std() / np.sqrt(3000)
    assert abs(gain) < 3 * error
    assert (oracle - static).mean() > 20 * error  # what the plain oracle would claim


def test_crossfitting_finds_what_is_there(table_problem: Make) -> None:
    generator = np.random.default_rng(7)
    truth = generator.normal(0, 0.5, (3000, 16, 1)).repeat(2, -1)
    problem = table_problem(truth + generator.normal(0, 0.05, truth.shape), np.arange(3000) // 10)
    best = -truth.sum(-1).min(1).mean()
    crossfit = crossfitted_oracle(problem)
    assert crossfit is not None
    assert 0.9 * best < crossfit.mean() < best
