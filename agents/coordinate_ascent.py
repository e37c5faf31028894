"""Greedy coordinate ascent of a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_gym import search
from dsa_gym.agents.base import Bits
from dsa_gym.agents.searched import MaskAgent


class CoordinateAscentAgent(MaskAgent):
    """Starts with nothing on, and makes the best of some flips as long as that is an improvement.

    A local optimum, found in ``candidates`` scores a step, for any number of gates that a search ends for. Everybody's
    mask is scored on ``sample`` training inputs.
    """

    name = "coordinate_ascent"
    minimum = {"candidates": 1, "sample": 1}

    def search(self, problem: Any, group: NDArray[np.int64]) -> Bits:
        """Climb for all groups at once."""
        inputs = np.arange(len(group))
        if self.scope == "all":
            inputs = np.random.default_rng(self.seed).permutation(inputs)[: self.config["sample"]]
        return search.greedy(problem, inputs, group[inputs], candidates=self.config["candidates"], seed=self.seed)
