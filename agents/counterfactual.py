"""Credit for each gate by what happens when it alone is switched the other way."""

from __future__ import annotations

import torch

from dsa_gym.agents.policy_gradient import Batch, PolicyGradientAgent, scaled


class CounterfactualAgent(PolicyGradientAgent):
    """Policy gradient from single flips (the local expectation gradient of Titsias and Lazaro-Gredilla, 2015).

    For a mask m drawn from the policy, the gradient with respect to a gate's logit is ``p (1 - p) (r(m, m_i = 1) - r(m,
    m_i = 0))``: no other gate's noise is in it. ``masks`` - 1 gates of each input, drawn anew, are flipped; of all
    gates, this estimates the gradient without bias.
    """

    name = "counterfactual"

    def update(self, batch: Batch) -> tuple[int, dict[str, float]]:
        """One gradient step."""
        flips = min(self.config["masks"] - 1, self.gates)
        logits = self.network(batch.observed)
        mask = batch.draw(logits, 1)  # (rows, 1, G)
        chosen = torch.rand(logits.shape, generator=batch.generator).topk(flips, dim=1).indices  # (rows, flips)
        flipped = mask.expand(-1, flips, -1).clone()
        at = chosen[..., None]
        flipped.scatter_(2, at, 1 - flipped.gather(2, at))
        rewards = batch.rewards(torch.cat([mask, flipped], dim=1))
        was_on = mask[:, 0].gather(1, chosen)  # (rows, flips)
        worth = (rewards[:, :1] - rewards[:, 1:]) * (2 * was_on - 1)  # of the gate on rather than off
        probability = torch.sigmoid(logits.detach()).gather(1, chosen)
        gradient = probability * (1 - probability) * worth
        self.improve((scaled(gradient) * logits.gather(1, chosen)).mean(), logits)
        return rewards.numel(), {
            "train/reward": rewards[:, 0].mean().item(),
            "train/density": mask.mean().item(),
        }
