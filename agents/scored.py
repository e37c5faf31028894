"""What the heuristics share that score each gate and switch on the best-scored."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsa_gym.agents.base import Bits
from dsa_gym.agents.searched import MaskAgent

SHARES = 64
"""At most this many shares of gates are compared."""


class ScoredAgent(MaskAgent):
    """One mask: the gates with the highest scores.

    How many is said by ``density``, a share of the gates; at 0 it is the share with the best mean reward on ``sample``
    training inputs.
    """

    minimum = {"sample": 1}

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Check the share.

        Raises:
            ValueError: If ``density`` is not in [0, 1].
        """
        super().__init__(env, seed, **config)
        if not 0 <= self.config["density"] <= 1:
            raise ValueError(f"density={self.config['density']}: expected a share in [0, 1], 0 to choose it")

    @abstractmethod
    def scores(self, problem: Any, inputs: NDArray[np.int64]) -> NDArray[Any]:
        """How much each gate matters, (G,), judged on inputs (rows,) of a problem where that takes inputs."""

    def search(self, problem: Any, group: NDArray[np.int64]) -> Bits:
        """Switch on the best-scored share."""
        inputs = np.random.default_rng(self.seed).permutation(len(problem))[: self.config["sample"]]
        scores = np.asarray(self.scores(problem, inputs), dtype=np.float64)
        if not np.isfinite(scores).all():
            raise FloatingPointError(f"{self.name}: a score is not finite")
        place = np.empty(self.gates, dtype=np.int64)
        place[np.argsort(-scores, kind="stable")] = np.arange(self.gates)
        counts = np.unique(np.linspace(0, self.gates, SHARES + 1).round().astype(np.int64))
        if self.config["density"]:
            counts = np.array([round(self.config["density"] * self.gates)])
        masks = (place < counts[:, None]).astype(np.uint8)  # (shares, G)
        if len(masks) == 1:
            return masks
        rewards = problem.rewards(np.tile(inputs, len(masks)), masks.repeat(len(inputs), axis=0))
        return masks[[rewards.reshape(len(masks), -1).mean(1).argmax()]]


def gate_gradients(problem: Any, inputs: NDArray[np.int64], batch_size: int = 64) -> Tensor:
    """Gradient of the loss of each input with respect to its gates, all of them on: (rows, G)."""
    pieces = []
    for batch in torch.from_numpy(inputs).split(batch_size):
        gates = torch.ones(len(batch), problem.gates, requires_grad=True)
        pieces.append(torch.autograd.grad(problem.relaxed_losses(batch, gates).sum(), gates)[0])
    return torch.cat(pieces)
