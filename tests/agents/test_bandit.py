"""Bandits over gates: the model against solved equations, exploration, and what they learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dsa_gym.agents import make_agent
from dsa_gym.agents.bandit import centred, conjugate_gradients, second_moments, with_one

every_bandit = pytest.mark.parametrize("name", ["linucb", "neural_linear"])


def test_conjugate_gradients_solve() -> None:
    root = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = root @ root.T + torch.eye(7)

    def operator(x: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        product = matrix @ torch.cat([x[0].flatten(), x[1]])
        return product[:4].view(2, 2), product[4:]

    target = torch.arange(1.0, 8.0, dtype=torch.float64)
    start = torch.ones(2, 2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    found = conjugate_gradients(operator, (target[:4].view(2, 2), target[4:]), start, 20)
    expected = torch.linalg.solve(matrix, target)
    torch.testing.assert_close(torch.cat([found[0].flatten(), found[1]]), expected)


def test_second_moments() -> None:
    z, gates = torch.randn(9, 3), torch.randint(0, 2, (9, 4))
    found = second_moments(z, with_one(gates))
    for gate in range(4):
        torch.testing.assert_close(found[gate].float(), z[gates[:, gate] == 1].T @ z[gates[:, gate] == 1])
    torch.testing.assert_close(found[4].float(), z.T @ z)


def test_fit_is_the_ridge_regression(planted: Any, planted_env: Any) -> None:
    """Weights and offsets against the normal equations written out, and deviations against inverses."""
    problem = planted(0, users=4, each=3, gates=3)
    settings = {"batch_size": 64, "iterations": 500, "interactions": False, "ridge": 1.0, "offset_ridge": 1.0}
    agent: Any = make_agent("linucb", planted_env(problem), 0, **settings)
    agent.learn(64)
    z = agent.features(*(torch.from_numpy(problem.observations[name]) for name in ("user", "context")))
    inputs, rewards = agent.tried["inputs"], agent.tried["rewards"].double()
    of_gates = (centred(agent.tried["gates"])[:, :, None] * z[inputs][:, None]).flatten(1)
    design = torch.cat([of_gates, torch.eye(len(problem))[inputs]], dim=1).double()
    expected = torch.linalg.solve(design.T @ design + torch.eye(design.shape[1]), design.T @ rewards)
    torch.testing.assert_close(agent.weights.flatten(), expected[: agent.weights.numel()].float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(agent.offsets, expected[agent.weights.numel() :].float(), rtol=0, atol=2e-3)
    unexplained = (rewards - design @ expected).square().mean().sqrt()
    torch.testing.assert_close(agent.noise, unexplained.float(), rtol=1e-2, atol=0)
    deviations = agent._deviations(z)
    for value in (0, 1):
        there = z[inputs][agent.tried["gates"][:, 1] == value]
        inverse = torch.linalg.inv(there.T @ there + torch.eye(z.shape[1]))
        by_hand = agent.noise * torch.einsum("nd,de,ne->n", z, inverse, z).sqrt()
        torch.testing.assert_close(deviations[value, :, 1], by_hand, rtol=1e-3, atol=1e-4)


def test_upper_confidence_bounds(planted: Any, planted_env: Any) -> None:
    agent: Any = make_agent("linucb", planted_env(planted(0, users=2)), 0, exploration=2.0)
    generator = torch.Generator().manual_seed(0)
    worth = torch.tensor([[0.5, 0.5, -0.5, -0.5]])
    off, on = torch.tensor([[0.1, 0.5, 0.1, 0.1]]), torch.tensor([[0.1, 0.1, 0.1, 0.5]])
    chosen = agent.choose(worth, torch.stack([off, on]), generator)
    assert chosen.tolist() == [[True, False, False, True]]  # the value that was tried less is tried if it may be better
    ties = agent.choose(torch.zeros(1, 1000), torch.ones(2, 1, 1000), generator)
    assert 0.4 < ties.float().mean() < 0.6


def test_thompson_sampling_draws_from_the_posterior(planted: Any, planted_env: Any) -> None:
    agent: Any = make_agent("neural_linear", planted_env(planted(0, users=2)), 0, exploration=2.0)
    worth, deviations = torch.full((20_000, 1), 0.5), torch.tensor([0.3, 0.4]).view(2, 1, 1).expand(2, 20_000, 1)
    on = agent.choose(worth, deviations, torch.Generator().manual_seed(0)).float().mean()
    expected = torch.distributions.Normal(0.5, 2.0 * 0.5).cdf(torch.tensor(0.0))  # 0.3 and 0.4 off and on: 0.5
    torch.testing.assert_close(on, 1 - expected, rtol=0, atol=0.015)


def test_memory_is_bounded(planted: Any, planted_env: Any) -> None:
    agent: Any = make_agent("linucb", planted_env(planted(0, users=5)), 0, batch_size=16, memory=40)
    agent.learn(64)
    assert {len(value) for value in agent.tried.values()} == {40}
    assert agent.gram[-1, 0, 0] == 64  # the constant's: all that was tried counts


@every_bandit
def test_learns_the_planted_problem(name: str, planted: Any, planted_env: Any) -> None:
    training, fresh = planted(0), planted(1)
    env = planted_env(training)
    agent, static = make_agent(name, env, 0), make_agent("static", env)
    agent.learn(8192)
    static.learn(0)
    share = fresh.share_of_gain(agent.masks(fresh), static.masks(fresh)[0])
    print(f"share of the gain {share:.3f}")
    assert share >= 0.96  # 0.97 to 0.98 were measured over seeds


@every_bandit
def test_rewards_that_are_not_finite(
    name: str, planted: Any, planted_env: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = planted(0, users=5)
    monkeypatch.setattr(problem, "rewards", lambda inputs, _gates: np.full(len(inputs), np.nan))
    with pytest.raises(FloatingPointError, match=f"{name}: a reward is not finite after 0 steps"):
        make_agent(name, planted_env(problem), 0).learn(10)


def test_no_hidden_layer(planted: Any, planted_env: Any) -> None:
    with pytest.raises(ValueError, match="hidden"):
        make_agent("neural_linear", planted_env(planted(0, users=2)), hidden=[])
