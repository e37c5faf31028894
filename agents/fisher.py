"""Gates by their Fisher information."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsa_gym.agents.scored import ScoredAgent, gate_gradients


class FisherAgent(ScoredAgent):
    """Fisher pruning (Theis et al., 2018): the gates with the largest mean squared gradient of an input's loss.

    The gradient is that of the gate itself, with everything on; its mean square is the diagonal of the empirical Fisher
    information, half of which approximates what the loss rises by when the gate is closed.
    """

    name = "fisher"

    def scores(self, problem: Any, inputs: NDArray[np.int64]) -> NDArray[Any]:
        """Mean squared gradient."""
        return gate_gradients(problem, inputs).square().mean(0).numpy()
