"""The policy gradient without sampling: every mask of an input is scored."""

from __future__ import annotations

from typing import Any

import torch

from dsa_gym.agents.policy_gradient import Batch, PolicyGradientAgent, bernoulli_log_prob, scaled

ENUMERATED = 10
"""Most gates whose masks are all scored."""


class ExactGradientAgent(PolicyGradientAgent):
    """Ascends the expected reward ``sum_m pi(m | x, u) r(m)`` itself, by enumeration of all 2^G masks.

    What agents that sample masks would do with infinitely many: a score below its one is noise of theirs, a score that
    it does not reach either is a matter of the policy, the observations or the number of users to learn from.
    """

    name = "exact_gradient"
    minimum = {name: least for name, least in PolicyGradientAgent.minimum.items() if name != "masks"}

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Build the policy.

        Raises:
            ValueError: If there are too many gates to enumerate their masks.
        """
        super().__init__(env, seed, **config)
        if self.gates > ENUMERATED:
            raise ValueError(f"env: {self.gates} gates, {self.name!r} enumerates the masks of at most {ENUMERATED}")
        self._masks = (torch.arange(2**self.gates)[:, None] >> torch.arange(self.gates) & 1).float()  # (2^G, G)

    def update(self, batch: Batch) -> tuple[int, dict[str, float]]:
        """One gradient step."""
        logits = self.network(batch.observed)
        rewards = batch.rewards(self._masks.expand(len(logits), -1, -1))  # (rows, 2^G)
        chance = bernoulli_log_prob(logits[:, None], self._masks).sum(-1).exp()  # (rows, 2^G)
        advantages = scaled(rewards - (chance.detach() * rewards).sum(1, keepdim=True))
        self.improve((chance * advantages).sum(1).mean() / self.gates, logits)
        return rewards.numel(), {
            "train/reward": (chance * rewards).sum(1).mean().item(),
            "train/density": torch.sigmoid(logits).mean().item(),
        }
