"""PPO over gates."""

from __future__ import annotations

from stable_baselines3 import PPO

from dsa_gym.agents.sb3 import PPOFamilyAgent


class PPOAgent(PPOFamilyAgent):
    """Proximal policy optimisation (Schulman et al., 2017) over independent Bernoulli gates.

    The entropy bonus is per gate, and the weights decay, since what matters are users that were never seen.
    """

    name = "ppo"
    algorithm_class = PPO
