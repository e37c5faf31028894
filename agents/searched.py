"""Agents that search masks with the environment's scorer: static, user_static, oracle."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
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
        return np.tile(self.mask, (self.rows(observation), 1))

    def state(self) -> dict[str, Tensor]:
        """The mask."""
        return {"mask": torch.from_numpy(self.mask.copy())}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over a mask."""
        self.mask = tensors["mask"].numpy().copy()


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
        users = _needed(info, "user", self.name, self.rows(observation), self._best)
        return np.stack([self._best[int(user)] for user in users])

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
        inputs = _needed(info, "input", self.name, self.rows(observation), range(len(self._best)))
        return self._best[inputs]

    def masks(self, scorer: Any) -> Bits:
        """Search for every input of the scorer."""
        return search.oracle(scorer)


def _needed(info: dict[str, Any] | None, key: str, name: str, rows: int, known: Container[int]) -> NDArray[np.int64]:
    """Users or inputs of the observations, int64 (rows,).

    Raises:
        ValueError: If ``info`` lacks them, or has others than the environment's.
    """
    if info is None or key not in info:
        raise ValueError(f"info: agent {name!r} needs the {key!r} that reset() returned")
    values = np.atleast_1d(np.asarray(info[key], dtype=np.int64))
    if len(values) != rows:
        raise ValueError(f"info[{key!r}]: {len(values)} values for {rows} observations")
    unknown = [value for value in values.tolist() if value not in known]
    if unknown:
        raise ValueError(f"info[{key!r}]: {unknown[0]} is not in the agent's environment; use masks() for other splits")
    return values
