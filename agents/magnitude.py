"""Gates by the magnitude of what they switch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_gym.agents.scored import ScoredAgent


class MagnitudeAgent(ScoredAgent):
    """Magnitude pruning (Han et al., 2015): the gates whose shared parameters have the largest root mean square.

    It sees no loss but the one that says how many gates are on.
    """

    name = "magnitude"

    def scores(self, problem: Any, inputs: NDArray[np.int64]) -> NDArray[Any]:
        """The scorer's magnitudes."""
        return np.asarray(problem.gate_magnitudes())
