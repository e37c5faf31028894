"""The hard-concrete gate of L0 regularisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsa_gym.agents.gradient_gate import GradientGateAgent


class HardConcreteAgent(GradientGateAgent):
    """Each gate is a stretched and clipped binary concrete variable (Louizos et al., 2018).

    With ``s = sigmoid((logit(u) + logits) / beta)``, u uniform, a gate is ``clip(s (zeta - gamma) + gamma, 0, 1)``:
    exactly 0 and exactly 1 with positive probability, and the loss is differentiable without rounding. What is paid for
    is the probability that it is not 0, ``sigmoid(logits - beta log(-gamma / zeta))``. The interval is stretched alike
    on both sides, ``gamma = -stretch`` and ``zeta = 1 + stretch``, so that the noiseless gate is above one half, and
    the decision on, where the logit is above 0.
    """

    name = "hard_concrete"
    minimum = {**GradientGateAgent.minimum, "stretch": 1e-6, "temperature": 1e-6}

    def relax(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Hard-concrete gates, and the probability that each is not 0."""
        beta, stretch = self.config["temperature"], self.config["stretch"]
        uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        concrete = torch.sigmoid((torch.logit(uniform) + logits) / beta)
        gates = (concrete * (1 + 2 * stretch) - stretch).clamp(0, 1)
        return gates, torch.sigmoid(logits - beta * math.log(stretch / (1 + stretch)))
