"""Searched masks are the best there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsa_gym.agents import make_agent
from dsa_gym.search import greedy


def masks_of(codes: np.ndarray, gates: int) -> np.ndarray:
    return (codes[..., None] >> np.arange(gates) & 1).astype(np.uint8)


def observed(problem: Any) -> tuple[Any, dict[str, Any]]:
    return problem.observations, {"user": problem.user.numpy(), "input": np.arange(len(problem))}


def test_static_is_the_best_mask_on_average(planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=20)
    agent = make_agent("static", planted_env(problem))
    agent.learn(0)
    best = masks_of(problem.brute.mean(0).argmax(), 6)
    np.testing.assert_array_equal(agent.predict(*observed(problem)), np.tile(best, (len(problem), 1)))
    fresh = planted(1, users=20)
    np.testing.assert_array_equal(agent.masks(fresh), np.tile(best, (len(fresh), 1)))


def test_user_static_is_each_users_best_mask_on_the_support(planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=20)
    agent, support, users = (
        make_agent("user_static", planted_env(problem)),
        problem.support(),
        problem.user.numpy(),
    )
    means = np.stack([support.brute[support.user.numpy() == user].mean(0) for user in users])
    best = masks_of(means.argmax(1), 6)
    np.testing.assert_array_equal(agent.predict(*observed(problem)), best)
    np.testing.assert_array_equal(agent.masks(problem), best)
    assert len(np.unique(best, axis=0)) > 3


def test_oracle_is_each_inputs_best_mask(planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=20)
    agent = make_agent("oracle", planted_env(problem))
    best = masks_of(problem.brute.argmax(1), 6)
    np.testing.assert_array_equal(agent.predict(*observed(problem)), best)
    np.testing.assert_array_equal(agent.masks(problem), best)
    assert problem.share_of_gain(best, best[0]) == pytest.approx(1.0)


def test_ladder_of_the_searched_agents(planted: Any, planted_env: Any) -> None:
    problem = planted(0)
    rewards = {}
    for name in ("static", "user_static", "oracle"):
        agent = make_agent(name, planted_env(problem))
        agent.learn(0)
        rewards[name] = problem.rewards(np.arange(len(problem)), agent.masks(problem)).mean()
    assert rewards["static"] < rewards["user_static"] < rewards["oracle"]


@pytest.mark.parametrize("gates", [9, 150])
def test_greedy_search_solves_separable_problems(gates: int, planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=6, each=4, gates=gates, coupling=0.0)
    price = problem.l0_penalty * problem.active_parameters(np.eye(gates, dtype=np.uint8))
    oracle, static = (make_agent(name, planted_env(problem)) for name in ("oracle", "static"))
    static.learn(0)
    np.testing.assert_array_equal(oracle.masks(problem), problem.weights + price < 0)
    np.testing.assert_array_equal(static.masks(problem)[0], problem.weights.mean(0) + price < 0)
    support = problem.support()
    means = np.stack([support.weights[support.user == user].mean(0) for user in range(6)])
    chosen = make_agent("user_static", planted_env(problem)).masks(problem)
    np.testing.assert_array_equal(chosen, (means + price < 0)[problem.user.numpy()])


def test_greedy_never_loses_to_nothing_and_never_beats_the_best(planted: Any) -> None:
    problem = planted(0, users=10)
    everything = np.arange(len(problem))
    found = problem.rewards(everything, greedy(problem, everything, everything))
    assert (found <= problem.brute.max(1) + 1e-9).all()
    assert (found >= problem.brute[:, 0]).all()
    assert (found == pytest.approx(problem.brute.max(1))) or found.mean() > problem.brute[:, 0].mean()


def test_what_the_looking_up_agents_need(planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=3)
    observation, info = observed(problem)
    for name, key in (("user_static", "user"), ("oracle", "input")):
        agent = make_agent(name, planted_env(problem))
        with pytest.raises(ValueError, match=f"needs the '{key}'"):
            agent.predict(observation)
        with pytest.raises(ValueError, match=f"'{key}'.*99.*masks"):
            agent.predict(observation, {**info, key: np.full(len(problem), 99)})
        with pytest.raises(ValueError, match=f"'{key}'.*1 values for {len(problem)}"):
            agent.predict(observation, {**info, key: 0})
