"""The gates that are trained by a gradient: what hard-concrete ones are distributed like, and what both kinds learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dsa_gym.agents import make_agent

every_gate = pytest.mark.parametrize("name", ["gumbel", "hard_concrete"])


@every_gate
@pytest.mark.parametrize("coupling", [0.0, 0.1], ids=["linear", "multilinear"])
def test_learns_the_planted_problem(name: str, coupling: float, planted: Any, planted_env: Any) -> None:
    training, fresh = planted(0, coupling=coupling), planted(1, coupling=coupling)
    env = planted_env(training)
    agent, static = make_agent(name, env, 0), make_agent("static", env)
    agent.learn(60_000)
    static.learn(0)
    share = fresh.share_of_gain(agent.masks(fresh), static.masks(fresh)[0])
    print(f"share of the gain {share:.3f}")
    assert share >= 0.97  # 0.984 to 0.992 were measured over four seeds


@every_gate
def test_price_closes_gates(name: str, planted: Any, planted_env: Any) -> None:
    densities = []
    for penalty in (0.0, 0.1, 10.0):
        problem = planted(0, users=50)
        problem.l0_penalty = penalty
        agent = make_agent(name, planted_env(problem), 0)
        agent.learn(6_400)
        densities.append(agent.masks(problem).mean())
    assert densities[0] > densities[1] > densities[2] == 0


def test_hard_concrete_distribution(planted: Any, planted_env: Any) -> None:
    """Gates are exactly 0 and exactly 1 as often as the distribution function of the paper says."""
    agent: Any = make_agent("hard_concrete", planted_env(planted(0, users=2)), 0, temperature=0.5, stretch=0.2)
    logits = torch.tensor([-2.0, 0.0, 1.5]).expand(200_000, -1).clone().requires_grad_()
    gates, paid = agent.relax(logits, torch.Generator().manual_seed(0))

    def below(value: float) -> torch.Tensor:
        """Chance that the stretched variable, before it is clipped, is below a value: their equation 24."""
        share = torch.tensor((value + 0.2) / 1.4)
        return torch.sigmoid(0.5 * torch.logit(share) - logits[0])

    torch.testing.assert_close((gates == 0).float().mean(0), below(0.0), rtol=0, atol=0.005)
    torch.testing.assert_close((gates < 0.7).float().mean(0), below(0.7), rtol=0, atol=0.005)
    torch.testing.assert_close((gates < 1).float().mean(0), below(1.0), rtol=0, atol=0.005)
    torch.testing.assert_close(paid[0], 1 - below(0.0))
    gates.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    within = (gates > 0) & (gates < 1)
    assert (logits.grad[within] > 0).all() and (logits.grad[~within] == 0).all()


@every_gate
def test_global_generator_is_left_alone(name: str, planted: Any, planted_env: Any) -> None:
    agent = make_agent(name, planted_env(planted(0, users=5)), 0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    agent.learn(256)
    assert torch.equal(torch.get_rng_state(), before)


@every_gate
def test_loss_that_is_not_finite(name: str, planted: Any, planted_env: Any) -> None:
    problem = planted(0, users=5)
    problem.difficulty[:] = np.nan
    with pytest.raises(FloatingPointError, match=f"{name}: loss is nan after 0 steps"):
        make_agent(name, planted_env(problem), 0).learn(128)
