"""LinUCB over gates."""

from __future__ import annotations

import torch
from torch import Tensor

from dsa_gym.agents.bandit import BanditAgent


class LinUCBAgent(BanditAgent):
    """Optimism in the face of uncertainty (Li et al., 2010), gate by gate.

    Of the two values of a gate the one with the higher upper confidence bound is tried, ``exploration`` standard
    deviations above what it is worth; ties are broken at random. The features are a constant, user and context and,
    with ``interactions``, the products of each number of the user with each of the context.
    """

    name = "linucb"

    @property
    def feature_count(self) -> int:
        """Constant, user, context, products."""
        user, context = (self.env.observation_space[name].shape[0] for name in ("user", "context"))
        return int(1 + user + context + self.config["interactions"] * user * context)

    def features(self, user: Tensor, context: Tensor) -> Tensor:
        """``[1, user, context, user x context]``."""
        parts = [torch.ones(len(user), 1), user, context]
        if self.config["interactions"]:
            parts.append((user[:, :, None] * context[:, None]).flatten(1))
        return torch.cat(parts, dim=1)

    def choose(self, worth: Tensor, deviations: Tensor, generator: torch.Generator) -> Tensor:
        """The value with the higher bound."""
        ahead = worth + self.config["exploration"] * (deviations[1] - deviations[0])
        return torch.where(ahead == 0, torch.rand(ahead.shape, generator=generator) < 0.5, ahead > 0)
