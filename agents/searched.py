"""Agents that search masks with the environment's scorer: static, user_static, oracle."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsa_gym import search
from dsa_gym.agents.base import Agent, Bits, Observation, OnUpdate

SCOPES = ("all", "user")


class MaskAgent(Agent):
    """One mask for everybody, found in training, or, with ``scope="user"``, one for each user, found on their support.

    Attributes:
        scope: Who has a mask of their own, one of :data:`SCOPES`; the setting of that name where an agent has one.
        mask: Everybody's, (G,).
    """

    scope: str = "all"

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Start with nothing on.

        Raises:
            ValueError: If ``scope`` is not one of :data:`SCOPES`.
        """
        super().__init__(env, seed, **config)
        self.scope = self.config.get("scope", self.scope)
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r}: expected one of {', '.join(SCOPES)}")
        self.mask: Bits = np.zeros(self.gates, dtype=np.uint8)
        self._best: dict[int, Bits] | None = None

    @abstractmethod
    def search(self, problem: Any, group: NDArray[np.int64]) -> Bits:
        """The best mask found for each group of a problem's inputs, (groups, G).

        Args:
            problem: A :class:`dsa_gym.agents.base.Scorer`.
            group: Group of each of its inputs, int64 (n,).
        """

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Search everybody's mask; ``steps`` does not matter."""
        if self.scope == "all":
            self.mask = self.search(self.scorer, np.zeros(len(self.scorer), dtype=np.int64))[0]

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """The same mask for every observation, or the users' own, which needs ``info["user"]``."""
        rows = self.rows(observation)
        if self.scope == "all":
            return np.tile(self.mask, (rows, 1))
        if self._best is None:
            self._best = self._per_user(self.scorer)
        users = _needed(info, "user", self.name, rows, self._best)
        return np.stack([self._best[int(user)] for user in users])

    def masks(self, scorer: Any) -> Bits:
        """Everybody's mask, or what is found on the support of the scorer's users."""
        if self.scope == "all":
            return super().masks(scorer)
        best = self._per_user(scorer)
        return np.stack([best[int(user)] for user in scorer.user])

    def _per_user(self, scorer: Any) -> dict[int, Bits]:
        support = scorer.support()
        users, group = np.unique(support.user.numpy(), return_inverse=True)
        return dict(zip(users.tolist(), self.search(support, group), strict=True))

    def state(self) -> dict[str, Tensor]:
        """Everybody's mask."""
        return {"mask": torch.from_numpy(self.mask.copy())}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over a mask."""
        self.mask = tensors["mask"].numpy().copy()


class StaticAgent(MaskAgent):
    """The one mask that is best on average over the training inputs."""

    name = "static"

    def search(self, problem: Any, group: NDArray[np.int64]) -> Bits:
        """Exhaustive where that is possible, else greedy."""
        return search.best_static(problem, seed=self.seed)[None]


class UserStaticAgent(MaskAgent):
    """For each user the mask that is best on that user's support."""

    name = "user_static"
    scope = "user"

    def search(self, problem: Any, group: NDArray[np.int64]) -> Bits:
        """Exhaustive where that is possible, else greedy."""
        return np.stack(list(search.best_per_user(problem).values()))


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
