"""Gates by their connection sensitivity."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_gym.agents.scored import ScoredAgent, gate_gradients


class SNIPAgent(ScoredAgent):
    """SNIP (Lee et al., 2019): the gates with the largest ``|dL/dm_i m_i|``, L the mean loss and everything on."""

    name = "snip"

    def scores(self, problem: Any, inputs: NDArray[np.int64]) -> NDArray[Any]:
        """Magnitude of the mean gradient, as m is 1."""
        return gate_gradients(problem, inputs).mean(0).abs().numpy()
