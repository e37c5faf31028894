"""Agents that look at nothing: none, all, random."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsa_gym.agents.base import Agent, Bits, Observation


class NoneAgent(Agent):
    """Switches nothing on: the frozen backbone alone."""

    name = "none"

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """All gates off."""
        return np.zeros((self.rows(observation), self.gates), dtype=np.uint8)


class AllAgent(Agent):
    """Switches everything on."""

    name = "all"

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """All gates on."""
        return np.ones((self.rows(observation), self.gates), dtype=np.uint8)


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
        self._draws = 0

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """A fresh draw: the t-th call of two agents with the same seed draws the same."""
        generator = np.random.default_rng((self.seed, self._draws))
        self._draws += 1
        on = generator.random((self.rows(observation), self.gates)) < float(self.config["density"])
        return on.astype(np.uint8)

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        """The density."""
        return np.full((self.rows(observation), self.gates), float(self.config["density"]))

    def state(self) -> dict[str, Tensor]:
        """Number of draws made."""
        return {"draws": torch.tensor(self._draws)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on with the draw after the last."""
        self._draws = int(tensors["draws"])
