"""SAC over relaxed masks."""

from __future__ import annotations

from stable_baselines3 import SAC

from dsa_gym.agents.sb3 import SoftActorCriticAgent


class SACAgent(SoftActorCriticAgent):
    """Soft actor-critic (Haarnoja et al., 2018) on relaxed masks."""

    name = "sac"
    algorithm_class = SAC
