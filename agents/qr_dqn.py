"""Quantile-regression Q-learning over numbered masks."""

from __future__ import annotations

from typing import Any

from sb3_contrib import QRDQN

from dsa_gym.agents.sb3 import EpsilonGreedyAgent


class QRDQNAgent(EpsilonGreedyAgent):
    """Quantile-regression DQN (Dabney et al., 2018): the reward's distribution under each of the 2^G masks."""

    name = "qr_dqn"
    algorithm_class = QRDQN
    minimum = {**EpsilonGreedyAgent.minimum, "quantiles": 1}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of QR-DQN."""
        arguments = super().arguments
        arguments["policy_kwargs"]["n_quantiles"] = self.config["quantiles"]
        return arguments
