"""Agents that search masks with the environment's scorer: static, user_static, oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_gym import search
from dsa_gym.agents.base import Agent, Bits, Observation, OnUpdate


class StaticAgent(Agent):
    """The one mask that is best on average over the training inputs."""

    name = "static"

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Start with nothing on."""
        super().__init__(env, seed, **config)
        self.mask: Bits = np.zeros(self.gates, dtype=np.uint8)

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Search the mask; ``steps`` does not matter."""
        self.mask = search.best_static(self.scorer, seed=self.seed)

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """The same mask for every observation."""
        return np.tile(self.mask, (len(observation["user"]), 1))

    def state(self) -> dict[str, Tensor]:
        """The mask."""
        return {"mask": torch.from_numpy(self.mask.copy())}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over a mask."""
        self.mask = tensors["mask"].numpy()


class UserStaticAgent(Agent):
    """For each user the mask that is best on that user's support."""

    name = "user_static"

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Search nothing yet."""
        super().__init__(env, seed, **config)
        self._best: dict[int, Bits] | None = None

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """The users' masks; needs ``info["user"]``."""
        if self._best is None:
            self._best = search.best_per_user(self.scorer.support())
        return np.stack([self._best[int(user)] for user in _needed(info, "user", self.name)])

    def masks(self, scorer: Any) -> Bits:
        """Search on the support of the scorer's users."""
        best = search.best_per_user(scorer.support())
        return np.stack([best[int(user)] for user in scorer.user])


class OracleAgent(Agent):
    """For each input its best mask: an upper bound that sees the labels."""

    name = "oracle"

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Search nothing yet."""
        super().__init__(env, seed, **config)
        self._best: Bits | None = None

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """The inputs' best masks; needs ``info["input"]``."""
        if self._best is None:
            self._best = search.oracle(self.scorer)
        return self._best[np.asarray(_needed(info, "input", self.name))]

    def masks(self, scorer: Any) -> Bits:
        """Search for every input of the scorer."""
        return search.oracle(scorer)


def _needed(info: dict[str, Any] | None, key: str, name: str) -> Any:
    if info is None or key not in info:
        raise ValueError(f"info: agent {name!r} needs the {key!r} that reset() returned")
    return np.atleast_1d(info[key])
