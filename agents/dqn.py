"""Deep Q-learning over numbered masks."""

from __future__ import annotations

from stable_baselines3 import DQN

from dsa_gym.agents.sb3 import EpsilonGreedyAgent


class DQNAgent(EpsilonGreedyAgent):
    """Deep Q-network (Mnih et al., 2015): one output for each of the 2^G masks, so it is for few gates."""

    name = "dqn"
    algorithm_class = DQN
