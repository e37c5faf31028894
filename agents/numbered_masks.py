"""What the Q-learning agents share, whose actions are numbers of masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsa_gym.agents.sb3 import OffPolicyAgent


class AdditiveValues(nn.Module):
    """A last layer whose value of a mask is a sum over its gates, so that a mask's reward teaches all masks.

    Of features z it gives all ``2^G`` values ``Q(m) = w . z + sum_i (m_i - 1/2) theta_i . z``, gate i being bit i:
    G + 1 weight vectors in the place of 2^G. Value decomposition (Sunehag et al., 2018) of one agent's action.
    """

    masks: Tensor

    def __init__(self, inputs: int, gates: int, values: int = 1) -> None:
        """Make the layer for features (rows, inputs).

        Args:
            inputs: Size of the features.
            gates: G.
            values: Values of each mask, such as quantiles; the result is (rows, values * 2^G), mask by mask.
        """
        super().__init__()
        self.shape = (values, gates + 1)
        self.linear = nn.Linear(inputs, values * (gates + 1))
        bits = torch.arange(2**gates)[None] >> torch.arange(gates)[:, None] & 1
        self.register_buffer("masks", torch.cat([bits - 0.5, torch.ones(1, 2**gates)]), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Values (rows, values * 2^G) of features (rows, inputs)."""
        values: Tensor = self.linear(features).unflatten(1, self.shape) @ self.masks
        return values.flatten(1)


class EpsilonGreedyAgent(OffPolicyAgent):
    """An off-policy agent of numbered masks that explores by random ones, ever fewer of them.

    All environments explore at the same steps, as stable-baselines3 does it. With the setting ``additive`` the network
    ends in :class:`AdditiveValues`; without, in an output for each of the 2^G masks.
    """

    acts_on = "discrete"
    minimum = {**OffPolicyAgent.minimum, "exploration_steps": 1, "final_exploration": 0}
    additive_policy: type[Any]

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Build the algorithm; raises as :class:`~dsa_gym.agents.sb3.SB3Agent` does."""
        super().__init__(env, seed, **config)
        # by steps so far: by progress, as it is there, the share would rise again with every call of learn
        self.model.exploration_schedule = lambda _: self._exploration()

    def _exploration(self) -> float:
        final, over = self.config["final_exploration"], self.config["exploration_steps"]
        return float(max(final, 1 - (1 - final) * self.steps / over))

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of Q-learning."""
        arguments = super().arguments
        return {**arguments, "policy": self.additive_policy} if self.config["additive"] else arguments
