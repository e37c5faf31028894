"""Quantile-regression Q-learning over numbered masks."""

from __future__ import annotations

from typing import Any, cast

from sb3_contrib import QRDQN
from sb3_contrib.qrdqn.policies import QRDQNPolicy, QuantileNetwork
from torch import nn

from dsa_gym.agents.numbered_masks import AdditiveValues, EpsilonGreedyAgent


class _AdditivePolicy(QRDQNPolicy):
    def make_quantile_net(self) -> QuantileNetwork:
        network = super().make_quantile_net()
        last, quantiles = cast(nn.Linear, network.quantile_net[-1]), network.n_quantiles
        gates = (last.out_features // quantiles).bit_length() - 1
        network.quantile_net[-1] = AdditiveValues(last.in_features, gates, quantiles)
        return network.to(self.device)


class QRDQNAgent(EpsilonGreedyAgent):
    """Quantile-regression DQN (Dabney et al., 2018): the reward's distribution under each of the 2^G masks."""

    name = "qr_dqn"
    algorithm_class = QRDQN
    additive_policy = _AdditivePolicy
    minimum = {**EpsilonGreedyAgent.minimum, "quantiles": 1}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of QR-DQN."""
        arguments = super().arguments
        arguments["policy_kwargs"]["n_quantiles"] = self.config["quantiles"]
        return arguments
