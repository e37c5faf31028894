"""Trust-region policy optimisation over gates."""

from __future__ import annotations

from typing import Any

from sb3_contrib import TRPO

from dsa_gym.agents.sb3 import OnPolicyAgent


class TRPOAgent(OnPolicyAgent):
    """Trust-region policy optimisation (Schulman et al., 2015): natural gradient steps of bounded KL divergence.

    The bound is per gate, for the divergence of all gates is a sum. Learning rate and weight decay are the critic's.
    """

    name = "trpo"
    algorithm_class = TRPO
    minimum = {**OnPolicyAgent.minimum, "batch_size": 2, "critic_updates": 1, "damping": 0, "gate_kl": 1e-12}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of TRPO."""
        return {
            **super().arguments,
            "batch_size": min(self.config["batch_size"], self.rollout),
            "n_critic_updates": self.config["critic_updates"],
            "cg_damping": self.config["damping"],
            "target_kl": self.config["gate_kl"] * self.gates,
        }
