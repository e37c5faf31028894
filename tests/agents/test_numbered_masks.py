"""Values of numbered masks that are sums over gates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dsa_gym.agents import make_agent
from dsa_gym.agents.numbered_masks import AdditiveValues
from dsa_gym.envs.sb3 import GymnasiumVecEnv
from dsa_gym.envs.wrappers import VectorDiscreteMask


@pytest.mark.parametrize("values", [1, 3])
def test_additive_values_are_the_sums_over_gates(values: int) -> None:
    torch.manual_seed(0)
    layer, features = AdditiveValues(5, 4, values), torch.randn(2, 5)
    theta = layer.linear(features).reshape(2, values, 5)  # four gates and the rest
    found = layer(features).reshape(2, values, 16)
    for code in range(16):
        on = torch.tensor([code >> gate & 1 for gate in range(4)]) - 0.5
        torch.testing.assert_close(found[:, :, code], (theta[..., :4] * on).sum(-1) + theta[..., 4])


def test_masks_are_no_part_of_what_is_saved() -> None:
    assert set(AdditiveValues(5, 4).state_dict()) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("name", ["dqn", "qr_dqn"])
def test_networks_and_what_is_decided_by_either_form(name: str, planted: Any, planted_vec_env: Any) -> None:
    scorer = planted(0, users=3)
    weights = {}
    for additive in (True, False):
        env = GymnasiumVecEnv(VectorDiscreteMask(planted_vec_env(scorer, 2).envs))
        agent: Any = make_agent(name, env, hidden=[8], additive=additive)
        weights[additive] = sum(p.numel() for p in agent.model.policy.parameters() if p.requires_grad)
        seen = torch.from_numpy(agent.view.flat(scorer.observations))
        network = agent.model.q_net if name == "dqn" else agent.model.quantile_net
        with torch.no_grad():
            values = network(seen) if name == "dqn" else network(seen).mean(1)
        codes = values.argmax(1).numpy()
        assert values.shape == (len(scorer), 64)
        assert np.array_equal(agent.masks(scorer), codes[:, None] >> np.arange(6) & 1)
    assert weights[True] < weights[False]
