"""Searched and scored masks: the cross-entropy method, coordinate ascent, magnitude, Fisher information, SNIP."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsa_gym.agents import make_agent
from dsa_gym.agents.scored import gate_gradients

SCORED = ("magnitude", "fisher", "snip")


def mean_reward(problem: Any, masks: np.ndarray) -> float:
    return float(problem.rewards(np.arange(len(problem)), masks).mean())


def best_mean(problem: Any) -> float:
    """Mean reward of the best single mask."""
    return float(problem.brute.mean(0).max())


@pytest.mark.parametrize("name", ["cross_entropy", "coordinate_ascent"])
@pytest.mark.parametrize("seed", [0, 1])
def test_finds_the_best_mask_for_everybody(name: str, seed: int, planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=30, coupling=0.1)
    agent = make_agent(name, planted_env(problem), seed)
    agent.learn(100_000)
    assert mean_reward(problem, agent.masks(problem)) >= best_mean(problem) - 1e-3


@pytest.mark.parametrize("name", ["cross_entropy", "coordinate_ascent"])
def test_finds_each_users_best_mask(name: str, planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=20, coupling=0.1)
    support, users = problem.support(), problem.user.numpy()
    agent = make_agent(name, planted_env(problem), scope="user")
    agent.learn(100)
    assert agent.steps == 0
    masks = agent.masks(problem)
    info = {"user": users, "input": np.arange(len(problem))}
    np.testing.assert_array_equal(agent.predict(problem.observations, info), masks)
    of_user = {int(user): mask for user, mask in zip(users, masks, strict=True)}
    found = np.stack([of_user[int(user)] for user in support.user])
    bests = [support.brute[support.user.numpy() == user].mean(0).max() for user in range(20)]
    lost = np.mean(bests) - mean_reward(support, found)
    assert lost + 1e-9 >= 0 and lost < 0.005
    assert len(np.unique(masks, axis=0)) > 3


def test_cross_entropy_iteration_by_hand(planted: Any, planted_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elites are those of each group's own inputs; probabilities move by 1 - smoothing towards their mean."""
    problem = planted(0, users=4, each=2)
    agent: Any = make_agent("cross_entropy", planted_env(problem), population=8, elite=0.25, smoothing=0.6)
    asked: list[Any] = []
    rewards = problem.rewards
    monkeypatch.setattr(problem, "rewards", lambda i, m: asked.append((i, m)) or rewards(i, m))
    inputs, group = np.array([0, 5, 3, 1]), np.array([0, 1, 0, 1])
    before = np.tile([0.2, 0.4, 0.5, 0.6, 0.7, 0.9], (2, 1))
    after, mean = agent._iterate(problem, inputs, group, before, np.random.default_rng(0))
    scored, masks = asked[0][0].reshape(8, 4), asked[0][1].reshape(8, 4, 6)
    scores = rewards(asked[0][0], asked[0][1]).reshape(8, 4)
    assert mean == pytest.approx(scores.mean())
    np.testing.assert_array_equal(scored, np.tile(inputs, (8, 1)))
    for one in (0, 1):
        mine = group == one
        assert (masks[:, mine] == masks[:, mine][:, :1]).all()
        elites = np.argsort(-scores[:, mine].mean(1))[:2]
        np.testing.assert_allclose(after[one], 0.6 * before[one] + 0.4 * masks[elites][:, mine][:, 0].mean(0))


@pytest.mark.parametrize("name", SCORED)
def test_density_is_chosen_by_reward(name: str, planted: Any, planted_env: Any) -> None:
    """The chosen mask is the best of the nested ones; a given share is kept."""
    problem = planted(0, users=20)
    agent: Any = make_agent(name, planted_env(problem), sample=1000)
    agent.learn(0)
    order = np.argsort(-agent.scores(problem, np.arange(len(problem))), kind="stable")
    nested = [np.isin(np.arange(6), order[:count]).astype(np.uint8) for count in range(7)]
    rewards = [mean_reward(problem, np.tile(mask, (len(problem), 1))) for mask in nested]
    np.testing.assert_array_equal(agent.mask, nested[int(np.argmax(rewards))])
    half = make_agent(name, planted_env(problem), density=0.5)
    half.learn(0)
    assert half.masks(problem).sum(1).tolist() == [3] * len(problem)


def test_scores_are_those_of_the_papers(planted: Any, planted_env: Any) -> None:
    """Against finite differences of the loss at the open mask; the planted loss is linear in each gate."""
    problem = planted(0, users=10)
    inputs = np.arange(len(problem))
    on = np.ones((len(problem), 6), np.uint8)
    differences = []
    for gate in range(6):
        off = on.copy()
        off[:, gate] = 0
        differences.append(problem.losses(inputs, on) - problem.losses(inputs, off))
    by_hand = np.stack(differences, axis=1)
    np.testing.assert_allclose(gate_gradients(problem, inputs, batch_size=7).numpy(), by_hand, atol=1e-5)
    fisher, snip = (make_agent(name, planted_env(problem)) for name in ("fisher", "snip"))
    np.testing.assert_allclose(fisher.scores(problem, inputs), (by_hand**2).mean(0), atol=1e-5)  # type: ignore[attr-defined]
    np.testing.assert_allclose(snip.scores(problem, inputs), np.abs(by_hand.mean(0)), atol=1e-5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["fisher", "snip"])
def test_gradients_that_are_not_finite(name: str, planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=3)
    problem.weights[:] = np.nan
    with pytest.raises(FloatingPointError, match=f"{name}: a score is not finite"):
        make_agent(name, planted_env(problem)).learn(0)


def test_rewards_that_are_not_finite(planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=3)
    problem.difficulty[:] = np.nan
    with pytest.raises(FloatingPointError, match="cross_entropy: a reward is not finite after 0 steps"):
        make_agent("cross_entropy", planted_env(problem)).learn(1)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("cross_entropy", "scope", "users"),
        ("coordinate_ascent", "scope", "inputs"),
        ("cross_entropy", "elite", 0.0),
        ("cross_entropy", "smoothing", 1.0),
        ("cross_entropy", "population", 1),
        *((name, "density", 1.5) for name in SCORED),
    ],
)
def test_bad_setting(name: str, setting: str, value: Any, planted: Any, planted_env: Any) -> None:
    with pytest.raises(ValueError, match=setting):
        make_agent(name, planted_env(planted(0, users=2)), **{setting: value})
