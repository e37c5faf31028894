"""Agents that look at nothing: none, all, random."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsa_gym.agents.base import Agent, Bits, Observation


class NoneAgent(Agent):
    """Switches nothing on: the frozen backbone alone."""

    name = "none"

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """All gates off."""
        return np.zeros((len(observation["user"]), self.gates), dtype=np.uint8)


class AllAgent(Agent):
    """Switches everything on."""

    name = "all"

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """All gates on."""
        return np.ones((len(observation["user"]), self.gates), dtype=np.uint8)


class RandomAgent(Agent):
    """Switches each gate on with probability ``density``, independently."""

    name = "random"

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Check the density.

        Raises:
            ValueError: If it is not in [0, 1].
        """
        super().__init__(env, seed, **config)
        if not 0 <= self.config["density"] <= 1:
            raise ValueError(f"density={self.config['density']}: expected a probability in [0, 1]")
        self._generator = np.random.default_rng(seed)

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """A fresh draw."""
        rows = len(observation["user"])
        return (self._generator.random((rows, self.gates)) < self.config["density"]).astype(np.uint8)
