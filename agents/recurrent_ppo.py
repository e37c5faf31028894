"""PPO with a recurrent policy over gates."""

from __future__ import annotations

from typing import Any

import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from torch import Tensor

from dsa_gym.agents.sb3 import PPOFamilyAgent


class _Policy(RecurrentActorCriticPolicy):
    """Takes gates as the recurrent rollout buffer hands them out, as integers."""

    def evaluate_actions(self, obs: Any, actions: Tensor, *states: Any) -> Any:
        return super().evaluate_actions(obs, actions.float(), *states)


class RecurrentPPOAgent(PPOFamilyAgent):
    """PPO whose policy and critic are LSTMs over the inputs of an episode.

    Where a user comes with several inputs, it may learn from the first ones who that is. Every input that
    :meth:`predict` is given is the first of an episode.
    """

    name = "recurrent_ppo"
    algorithm_class = RecurrentPPO
    minimum = {**PPOFamilyAgent.minimum, "lstm": 1}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of RecurrentPPO."""
        arguments = {**super().arguments, "policy": _Policy}
        arguments["policy_kwargs"]["lstm_hidden_size"] = self.config["lstm"]
        return arguments

    def _logits(self, observed: Tensor) -> Tensor:
        lstm, rows = self.model.policy.lstm_actor, len(observed)
        nothing = torch.zeros(lstm.num_layers, rows, lstm.hidden_size)
        distribution, _ = self.model.policy.get_distribution(observed, (nothing, nothing), torch.ones(rows))
        logits: Tensor = distribution.distribution.logits
        return logits
