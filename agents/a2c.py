"""Advantage actor-critic over gates."""

from __future__ import annotations

from typing import Any

from stable_baselines3 import A2C

from dsa_gym.agents.sb3 import OnPolicyAgent


class A2CAgent(OnPolicyAgent):
    """Synchronous advantage actor-critic (Mnih et al., 2016): one step of the optimiser on each rollout.

    Advantages are normalised, for their scale is the loss's.
    """

    name = "a2c"
    algorithm_class = A2C
    minimum = {**OnPolicyAgent.minimum, "entropy": 0}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of A2C; the entropy coefficient is per gate."""
        return {**super().arguments, "ent_coef": self.config["entropy"] / self.gates, "normalize_advantage": True}
