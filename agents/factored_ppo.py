"""PPO whose trust region is each gate's own."""

from __future__ import annotations

import torch

from dsa_gym.agents.policy_gradient import (
    Batch,
    PolicyGradientAgent,
    bernoulli_kl,
    bernoulli_log_prob,
    leave_one_out,
    scaled,
)


class FactoredPPOAgent(PolicyGradientAgent):
    """PPO (Schulman et al., 2017) over G independent gates, clipped gate by gate.

    The probability ratio of a mask is a product of G ratios: with many gates it leaves ``[1 - epsilon, 1 + epsilon]``
    though no gate has moved, and the mask's sample is lost to all. Here each gate has its own ratio ``rho_i``, and the
    objective is ``mean_i min(rho_i A, clip(rho_i, 1 - epsilon, 1 + epsilon) A)``. A gate whose KL divergence from the
    old policy exceeds ``gate_kl`` on average over the batch learns no more from it. Advantages are relative to the
    other masks of the same input.
    """

    name = "factored_ppo"
    minimum = {**PolicyGradientAgent.minimum, "clip_range": 1e-12, "epochs": 1, "minibatches": 1, "gate_kl": 1e-12}

    def update(self, batch: Batch) -> tuple[int, dict[str, float]]:
        """Some epochs over the masks of a batch."""
        with torch.no_grad():
            old = self.network(batch.observed)
            gates = batch.draw(old, self.config["masks"])
            rewards = batch.rewards(gates)
            advantages = scaled(leave_one_out(rewards))
            before = bernoulli_log_prob(old[:, None], gates)
        allowed = torch.ones(self.gates)
        divergence = torch.zeros(self.gates)
        for _ in range(self.config["epochs"]):
            order = torch.randperm(len(batch.inputs), generator=batch.generator)
            for rows in order.chunk(self.config["minibatches"]):
                logits = self.network(batch.observed[rows])
                ratio = (bernoulli_log_prob(logits[:, None], gates[rows]) - before[rows]).exp()
                objective = clipped(ratio, advantages[rows], self.config["clip_range"])  # (rows, masks, G)
                self.improve((objective * allowed).mean(), logits)
            with torch.no_grad():
                divergence = bernoulli_kl(old, self.network(batch.observed)).mean(0)
            allowed = (divergence < self.config["gate_kl"]).float()
        return rewards.numel(), {
            "train/reward": rewards.mean().item(),
            "train/density": gates.mean().item(),
            "train/gate_kl": divergence.max().item(),
        }


def clipped(ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float) -> torch.Tensor:
    """PPO's clipped objective of each gate: of ratios (rows, masks, G) and the masks' advantages (rows, masks)."""
    gain = advantages[..., None]
    return torch.minimum(ratio * gain, ratio.clamp(1 - clip_range, 1 + clip_range) * gain)
