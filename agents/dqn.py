"""Deep Q-learning over numbered masks."""

from __future__ import annotations

from typing import cast

from stable_baselines3 import DQN
from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
from torch import nn

from dsa_gym.agents.numbered_masks import AdditiveValues, EpsilonGreedyAgent


class _AdditivePolicy(DQNPolicy):
    def make_q_net(self) -> QNetwork:
        network = super().make_q_net()
        last = cast(nn.Linear, network.q_net[-1])
        network.q_net[-1] = AdditiveValues(last.in_features, last.out_features.bit_length() - 1)
        return network.to(self.device)


class DQNAgent(EpsilonGreedyAgent):
    """Deep Q-network (Mnih et al., 2015) over the 2^G masks, so it is for few gates."""

    name = "dqn"
    algorithm_class = DQN
    additive_policy = _AdditivePolicy
