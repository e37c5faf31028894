"""PPO over gates of which some can't be on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from torch import Tensor

from dsa_gym.agents.masked_bernoulli import MaskedBernoulliPolicy, MaskedRolloutBuffer
from dsa_gym.agents.sb3 import PPOFamilyAgent


class MaskablePPOAgent(PPOFamilyAgent):
    """PPO with invalid action masking (Huang and Ontanon, 2022).

    Where the environment has a method ``action_masks``, gates that it rules out are never on, in training or after it:
    the masks are part of the agent's state. They have to be the same for all inputs, for whoever predicts has
    observations only.

    Attributes:
        allowed: The environment's masks, (n,) or (2n,); None without.
    """

    name = "maskable_ppo"
    algorithm_class = MaskablePPO

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Build the algorithm and ask the environment for its masks.

        Raises:
            ValueError: If a setting is unknown or out of range, or the environments' masks differ.
        """
        super().__init__(env, seed, **config)
        self.allowed: Tensor | None = None
        self._masked = is_masking_supported(self.view)
        if self._masked:
            masks = torch.as_tensor(np.asarray(get_action_masks(self.view))).bool()
            if not bool((masks == masks[0]).all()):
                raise ValueError("env: its action masks differ between environments, expected the same for all inputs")
            self.allowed = masks[0]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of MaskablePPO."""
        masked = {"policy": MaskedBernoulliPolicy, "rollout_buffer_class": MaskedRolloutBuffer}
        return {**super().arguments, **masked}

    def _run(self, steps: int, **settings: Any) -> None:
        super()._run(steps, use_masking=self._masked)

    def _logits(self, observed: Tensor) -> Tensor:
        logits: Tensor = self.model.policy.get_distribution(observed, self.allowed).logits
        return logits

    def state(self) -> dict[str, Tensor]:
        """What every algorithm's state is, and the masks."""
        return super().state() | ({} if self.allowed is None else {"allowed": self.allowed})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        super().load_state(tensors)
        self.allowed = tensors.get("allowed")
