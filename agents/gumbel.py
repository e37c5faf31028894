"""The straight-through Gumbel-Softmax gate."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_gym.agents.gradient_gate import GradientGateAgent


class GumbelAgent(GradientGateAgent):
    """Each gate is a binary concrete variable, rounded (Maddison et al., 2017; Jang et al., 2017).

    The loss sees binary gates, and the gradient is that of the relaxed ones, whose temperature falls.
    """

    name = "gumbel"

    def relax(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Binary gates with the gradient of the relaxed ones, which are also paid for."""
        temperature = self.network.config.temperature_at(self._steps / self.config["anneal_steps"])
        gates = self.network.sample(logits, temperature, generator)
        return gates, gates
