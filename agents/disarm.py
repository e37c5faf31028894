"""The antithetic gradient of binary gates."""

from __future__ import annotations

import torch

from dsa_gym.agents.policy_gradient import Batch, PolicyGradientAgent, scaled


class DisARMAgent(PolicyGradientAgent):
    """Policy gradient from antithetic pairs of masks (DisARM: Dong et al., 2020; U2G: Yin et al., 2020).

    For uniforms u, ``b = 1[1 - u < p]`` and ``c = 1[u < p]``, the gradient of the expected reward with respect to a
    gate's logit is estimated by ``1/2 (r(b) - r(c)) (-1)^c 1[b != c] max(p, 1 - p)``: only gates in which the two
    masks differ get any. ``masks`` / 2 independent pairs are averaged.
    """

    name = "disarm"

    def update(self, batch: Batch) -> tuple[int, dict[str, float]]:
        """One gradient step."""
        pairs = self.config["masks"] // 2
        logits = self.network(batch.observed)
        gates = antithetic(logits.detach(), pairs, batch.generator)  # (rows, 2, pairs, G)
        rewards = batch.rewards(gates.flatten(1, 2)).unflatten(1, (2, pairs))  # (rows, 2, pairs)
        gradient = disarm(logits.detach(), gates, rewards).mean(1)  # (rows, G)
        self.improve((scaled(gradient) * logits).mean(), logits)
        return rewards.numel(), {"train/reward": rewards.mean().item(), "train/density": gates.mean().item()}


def antithetic(logits: torch.Tensor, pairs: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Antithetic masks of logits (rows, G): float (rows, 2, pairs, G), each Bernoulli with probability p."""
    probability = torch.sigmoid(logits)[:, None]
    uniform = torch.rand(len(logits), pairs, logits.shape[1], generator=generator)
    return torch.stack([1 - uniform < probability, uniform < probability], dim=1).float()


def disarm(logits: torch.Tensor, gates: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Estimates of the expected reward's gradient with respect to logits (rows, G), one for each pair.

    Args:
        logits: (rows, G).
        gates: What :func:`antithetic` drew, (rows, 2, pairs, G).
        rewards: Of these masks (rows, 2, pairs).

    Returns:
        (rows, pairs, G).
    """
    first, second = gates.unbind(1)
    half = 0.5 * (rewards[:, 0] - rewards[:, 1])[..., None]
    return half * (first - second) * torch.sigmoid(logits.abs())[:, None]
