"""A planted gating problem: a contextual bandit whose best mask is known for every input."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from dsa_gym.envs.sb3 import GymnasiumVecEnv

DIM = 4


def every_mask(gates: int) -> NDArray[np.uint8]:
    """All masks, (2^G, G)."""
    return (np.arange(2**gates)[:, None] >> np.arange(gates) & 1).astype(np.uint8)


class Planted:
    """Implements the ``Scorer`` protocol.

    The loss is multilinear in the mask, ``difficulty + sum_i w_i m_i + coupling * sum_i m_i m_(i+1)``. The
    weights w are a fixed function of user and context, the same for all seeds, so that what is learned from
    some users holds for others.
    """

    def __init__(
        self,
        seed: int,
        users: int = 250,
        each: int = 8,
        gates: int = 6,
        coupling: float = 0.2,
        spread: float = 3.0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.gates, self.l0_penalty, self.coupling, self.table = gates, 0.01, coupling, None
        self.space = SimpleNamespace(gates=gates, granularity="planted")
        self.user = torch.arange(users).repeat_interleave(each)
        embedding = rng.standard_normal((users, DIM)).clip(-3, 3)
        context = rng.standard_normal((users * each, DIM)).clip(-3, 3)
        self.observations = {
            "user": embedding[self.user.numpy()].astype(np.float32),
            "context": context.astype(np.float32),
        }
        self.weights = self._weights()
        self.difficulty = rng.normal(10.0, spread, len(self))
        self._arguments = {
            "users": users,
            "each": each,
            "gates": gates,
            "coupling": coupling,
            "spread": spread,
        }

    def __len__(self) -> int:
        return len(self.user)

    def losses(self, inputs: NDArray[np.int64], gates: NDArray[np.uint8]) -> NDArray[np.float64]:
        m = gates.astype(np.float64)
        pairs = (m[:, 1:] * m[:, :-1]).sum(1)
        return self.difficulty[inputs] + (self.weights[inputs] * m).sum(1) + self.coupling * pairs

    def active_parameters(self, gates: NDArray[np.uint8]) -> NDArray[np.int64]:
        return gates.astype(np.int64) @ (1 + np.arange(self.gates) % 3)

    def rewards(self, inputs: NDArray[np.int64], gates: NDArray[np.uint8]) -> NDArray[np.float64]:
        return -self.losses(inputs, gates) - self.l0_penalty * self.active_parameters(gates)

    def relaxed_losses(self, inputs: Tensor, gates: Tensor) -> Tensor:
        pairs = (gates[:, 1:] * gates[:, :-1]).sum(1)
        weights, difficulty = torch.from_numpy(self.weights), torch.from_numpy(self.difficulty)
        return difficulty[inputs] + (weights[inputs] * gates).sum(1) + self.coupling * pairs

    @property
    def gate_features(self) -> NDArray[np.float32]:
        return np.eye(self.gates, 200, dtype=np.float32)

    def gate_magnitudes(self) -> NDArray[np.float64]:
        """As if a gate's parameters were as large as what it does on average."""
        return np.asarray(np.abs(self.weights.mean(0)))

    def support(self) -> Planted:
        """Other inputs of the same users, fewer of them."""
        other = Planted(1000, **self._arguments)
        other.observations["user"] = self.observations["user"]
        other.weights = other._weights()
        return other

    def _weights(self) -> NDArray[np.float64]:
        fixed, seen = np.random.default_rng(99), self.observations
        first, second = fixed.standard_normal((2, DIM, self.gates))
        varying = 0.5 * (seen["user"] @ first + seen["context"] @ second) / DIM**0.5
        return np.asarray(varying + fixed.normal(0.0, 0.4, self.gates) - self.coupling / 2)

    @cached_property
    def brute(self) -> NDArray[np.float64]:
        """Reward of every input under every mask, the slow way, (n, 2^G)."""
        masks, everything = every_mask(self.gates), np.arange(len(self))
        return np.stack([self.rewards(everything, np.tile(mask, (len(self), 1))) for mask in masks], axis=1)

    def share_of_gain(self, masks: NDArray[np.uint8], static: NDArray[np.uint8]) -> float:
        """How far a policy gets from the best static mask, 0, to the best mask of every input, 1."""
        everything = np.arange(len(self))
        low = self.rewards(everything, np.tile(static, (len(self), 1))).mean()
        return float((self.rewards(everything, masks).mean() - low) / (self.brute.max(1).mean() - low))


def _spaces(gates: int) -> tuple[spaces.Dict, spaces.MultiBinary]:
    boxes = {name: spaces.Box(-5, 5, (DIM,), np.float32) for name in ("user", "context")}
    return spaces.Dict(boxes), spaces.MultiBinary(gates)


class PlantedEnv(gym.Env[Any, Any]):
    """One step, one input."""

    def __init__(self, problem: Planted) -> None:
        self.problem = problem
        self.observation_space, self.action_space = _spaces(problem.gates)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.input = int(self.np_random.integers(len(self.problem)))
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = self.problem.rewards(np.array([self.input]), np.asarray(action, np.uint8)[None])[0]
        return self._observation(), float(reward), True, False, self._info()

    def _observation(self) -> Any:
        return {name: value[self.input] for name, value in self.problem.observations.items()}

    def _info(self) -> dict[str, Any]:
        return {"user": int(self.problem.user[self.input]), "input": self.input}


class PlantedVectorEnv(VectorEnv[Any, Any, Any]):
    """The same in a batch."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, problem: Planted, num_envs: int) -> None:
        self.problem, self.num_envs = problem, num_envs
        self.single_observation_space, self.single_action_space = _spaces(problem.gates)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed[0] if isinstance(seed, list) else seed)
        return self._draw()

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        final, final_info = self._observation(), self._info()
        rewards = self.problem.rewards(self.input, actions.astype(np.uint8))
        observation, info = self._draw()
        ended = np.ones(self.num_envs, dtype=bool)
        last = np.empty(self.num_envs, dtype=object)
        for i in range(self.num_envs):
            last[i] = {name: value[i] for name, value in final.items()}
        infos = {
            **info,
            "final_obs": last,
            "_final_obs": ended,
            "final_info": final_info,
            "_final_info": ended,
        }
        return observation, rewards, ended, np.zeros_like(ended), infos

    def _draw(self) -> tuple[Any, dict[str, Any]]:
        self.input = self.np_random.integers(len(self.problem), size=self.num_envs)
        return self._observation(), self._info()

    def _observation(self) -> Any:
        return {name: value[self.input] for name, value in self.problem.observations.items()}

    def _info(self) -> dict[str, Any]:
        return {"user": self.problem.user.numpy()[self.input], "input": self.input.copy()}


@pytest.fixture
def planted() -> Callable[..., Planted]:
    """Makes planted problems; another seed has other users."""
    return Planted


@pytest.fixture
def planted_env() -> Callable[[Planted], gym.Env[Any, Any]]:
    return PlantedEnv


@pytest.fixture
def planted_vec_env() -> Callable[[Planted, int], VecEnv]:
    return lambda problem, num_envs: GymnasiumVecEnv(PlantedVectorEnv(problem, num_envs))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """The learning tests' time is for one thread; small networks gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
