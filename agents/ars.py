"""Augmented random search over gates."""

from __future__ import annotations

from typing import Any

from sb3_contrib import ARS
from torch import Tensor, nn

from dsa_gym.agents.sb3 import SB3Agent


class _ARS(ARS):
    """Counts a step of one environment as one."""

    def _trigger_callback(self, _locals: Any, _globals: Any, callback: Any, n_envs: int) -> None:
        super()._trigger_callback(_locals, _globals, callback, n_envs=1)  # it is called for each of them


class ARSAgent(SB3Agent):
    """Augmented random search (Mania et al., 2018): random directions of the policy's weights, the best are followed.

    It needs no gradient, and a policy without chance: it acts on relaxed masks. The better half of the directions is
    followed.
    """

    name = "ars"
    algorithm_class = _ARS
    acts_on = "relaxed"
    minimum = {**SB3Agent.minimum, "directions": 1, "episodes": 1, "hidden": 1, "weight_noise": 1e-12}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of ARS."""
        settings = self.config
        return {
            **super().arguments,
            "policy_kwargs": {"net_arch": list(settings["hidden"]), "activation_fn": nn.Tanh},
            "n_delta": settings["directions"],
            "n_top": (settings["directions"] + 1) // 2,
            "delta_std": settings["weight_noise"],
            "n_eval_episodes": settings["episodes"],
            "zero_policy": not settings["hidden"],  # hidden layers of zeros would stay there
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        super().load_state(tensors)
        self.model.weights = nn.utils.parameters_to_vector(self.model.policy.parameters()).detach()
