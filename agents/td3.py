"""TD3 over relaxed masks."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3 import TD3
from stable_baselines3.common.noise import NormalActionNoise

from dsa_gym.agents.sb3 import OffPolicyAgent


class TD3Agent(OffPolicyAgent):
    """Twin delayed deterministic policy gradient (Fujimoto et al., 2018) on relaxed masks."""

    name = "td3"
    algorithm_class = TD3
    acts_on = "relaxed"
    minimum = {**OffPolicyAgent.minimum, "action_noise": 0}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of TD3."""
        noise = NormalActionNoise(np.zeros(self.gates), np.full(self.gates, self.config["action_noise"]))
        return {**super().arguments, "action_noise": noise}
