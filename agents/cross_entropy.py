"""The cross-entropy method over masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsa_gym.agents.base import Bits, OnUpdate
from dsa_gym.agents.searched import MaskAgent

Probabilities = NDArray[np.float64]


class CrossEntropyAgent(MaskAgent):
    """Draws masks of independent gates and moves their probabilities to those of the best masks.

    De Boer et al., 2005: of ``population`` masks the share ``elite`` with the best mean reward gives the new
    probabilities, ``p <- smoothing * p + (1 - smoothing) * mean(elites)``. Everybody's mask is scored on minibatches of
    training inputs, all masks of an iteration on the same; a user's on the user's support. A step is one input under
    one mask.
    """

    name = "cross_entropy"
    minimum = {"batch_size": 1, "iterations": 1, "population": 2}

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Start with every gate at one half.

        Raises:
            ValueError: If a setting is out of range.
        """
        super().__init__(env, seed, **config)
        if not 0 < self.config["elite"] <= 1:
            raise ValueError(f"elite={self.config['elite']}: expected a share in (0, 1]")
        if not 0 <= self.config["smoothing"] < 1:
            raise ValueError(f"smoothing={self.config['smoothing']}: expected a weight in [0, 1)")
        self.probability: Probabilities = np.full(self.gates, 0.5)

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Iterate until ``steps`` more rewards have been asked for; there is nothing to learn if users have their own.

        Raises:
            FloatingPointError: If a reward is not finite.
        """
        scorer, size, population = self.scorer, self.config["batch_size"], self.config["population"]
        last = self._steps + steps
        while self.scope == "all" and self._steps < last:
            rng = np.random.default_rng((self.seed, self._steps))  # one per iteration: a run can be resumed
            inputs = rng.integers(len(scorer), size=size)
            improved, reward = self._iterate(scorer, inputs, np.zeros_like(inputs), self.probability[None], rng)
            self.probability = improved[0]
            self.mask = (self.probability > 0.5).astype(np.uint8)
            self._steps += size * population
            if on_update is not None:
                on_update(self._steps, {"train/reward": reward, "train/density": float(self.probability.mean())})

    def search(self, problem: Any, group: NDArray[np.int64]) -> Bits:
        """Iterate a fixed number of times for all groups at once."""
        rng = np.random.default_rng(self.seed)
        probability = np.full((int(group.max()) + 1, self.gates), 0.5)
        for _ in range(self.config["iterations"]):
            probability, _ = self._iterate(problem, np.arange(len(group)), group, probability, rng)
        return (probability > 0.5).astype(np.uint8)

    def _iterate(
        self,
        problem: Any,
        inputs: NDArray[np.int64],
        group: NDArray[np.int64],
        probability: Probabilities,
        rng: np.random.Generator,
    ) -> tuple[Probabilities, float]:
        """New probabilities (groups, G) from scores on inputs (rows,) of groups (rows,), and the mean reward."""
        population, groups = self.config["population"], len(probability)
        masks = (rng.random((population, groups, self.gates)) < probability).astype(np.uint8)
        rewards = problem.rewards(np.tile(inputs, population), masks[:, group].reshape(-1, self.gates))
        if not np.isfinite(rewards).all():
            raise FloatingPointError(f"{self.name}: a reward is not finite after {self._steps} steps")
        cell = (np.arange(population)[:, None] * groups + group).ravel()
        total = np.bincount(cell, rewards, population * groups).reshape(population, groups)
        score = total / np.bincount(group, minlength=groups)
        elites = np.argsort(-score, axis=0, kind="stable")[: max(1, round(self.config["elite"] * population))]
        best = np.take_along_axis(masks, elites[..., None], axis=0).mean(0)  # (groups, G)
        smoothing = self.config["smoothing"]
        return smoothing * probability + (1 - smoothing) * best, float(rewards.mean())

    def state(self) -> dict[str, Tensor]:
        """Probabilities and step count."""
        return {**super().state(), "probability": torch.tensor(self.probability), "steps": torch.tensor(self._steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        super().load_state(tensors)
        self.probability, self._steps = tensors["probability"].numpy().copy(), int(tensors["steps"])
