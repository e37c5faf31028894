"""Wrappers of rewards and actions, each for one environment and for a batch.

A vector wrapper has the name of the scalar one with ``Vector`` before it. All need an environment of this package at
the bottom, whose ``problem`` scores masks; they stack in any order that their spaces allow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from dsa_gym.envs.core import binary, discrete

Rewards = NDArray[np.float64]


class _Reward:
    """A change of rewards that depends on who was served on what."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem

    def __call__(self, reward: Rewards, info: dict[str, NDArray[Any]]) -> Rewards:
        raise NotImplementedError


class _Relative(_Reward):
    """Reward less that of the empty mask on the same input."""

    def __call__(self, reward: Rewards, info: dict[str, NDArray[Any]]) -> Rewards:
        inputs = info["input"]
        nothing: Rewards = self.problem.rewards(inputs, np.zeros((len(inputs), self.problem.gates), np.uint8))
        return reward - nothing


class _PerUser(_Reward):
    """Reward standardised by the running mean and deviation of the user's own rewards (Welford, 1962)."""

    def __init__(self, problem: Any) -> None:
        super().__init__(problem)
        users = int(problem.user.max()) + 1
        self.count, self.mean, self.square = np.zeros((3, users))

    def __call__(self, reward: Rewards, info: dict[str, NDArray[Any]]) -> Rewards:
        users = info["user"]
        for user, value in zip(users.tolist(), reward.tolist(), strict=True):  # a user may come twice in a batch
            self.count[user] += 1
            step = value - self.mean[user]
            self.mean[user] += step / self.count[user]
            self.square[user] += step * (value - self.mean[user])
        deviation = np.sqrt(self.square[users] / np.maximum(self.count[users] - 1, 1))
        return np.where(deviation > 0, (reward - self.mean[users]) / np.maximum(deviation, 1e-8), 0.0)


class _RewardWrapper(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    change_class: ClassVar[type[_Reward]]

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        """Wrap ``env``."""
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self._change: _Reward | None = None

    def step(self, action: Any) -> Any:
        """Take one decision; the reward is changed."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._change = self._change or self.change_class(self.env.get_wrapper_attr("problem"))
        changed = self._change(
            np.array([reward], dtype=np.float64), {k: np.array([info[k]]) for k in ("user", "input")}
        )
        return observation, float(changed[0]), terminated, truncated, info


class _VectorRewardWrapper(VectorWrapper):
    change_class: ClassVar[type[_Reward]]

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        """Wrap ``env``."""
        super().__init__(env)
        self._change: _Reward | None = None

    def step(self, actions: Any) -> Any:
        """Take one decision per environment; the rewards are changed."""
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        self._change = self._change or self.change_class(self.env.unwrapped.problem)  # type: ignore[attr-defined]
        ended, final = terminated | truncated, infos.get("final_info", infos)
        served = {name: np.where(ended, final[name], infos[name]) for name in ("user", "input")}
        return observation, self._change(rewards, served), terminated, truncated, infos


class RelativeReward(_RewardWrapper):
    """Reward less that of the empty mask: how hard an input is no longer swamps what the mask does."""

    change_class = _Relative


class VectorRelativeReward(_VectorRewardWrapper):
    """:class:`RelativeReward` of a batch."""

    change_class = _Relative


class NormalizeUserReward(_RewardWrapper):
    """Reward standardised per user: a user whose inputs are all hard counts as much as another.

    The statistics run along; the first reward of a user is 0.
    """

    change_class = _PerUser


class VectorNormalizeUserReward(_VectorRewardWrapper):
    """:class:`NormalizeUserReward` of a batch, with one set of statistics."""

    change_class = _PerUser


class _Action:
    """A change of actions: another space, and what an action in it means."""

    def __init__(self, inner: spaces.Space[Any], sizes: Callable[[], NDArray[np.float64]]) -> None:
        if not isinstance(inner, spaces.MultiBinary) or not isinstance(inner.n, int | np.integer):
            raise ValueError(f"env: acts on {inner}, expected MultiBinary(G)")
        self.gates, self.sizes = int(inner.n), sizes
        self.space: spaces.Space[Any] = inner

    def __call__(self, actions: NDArray[Any]) -> NDArray[Any]:
        raise NotImplementedError


class _Scored(_Action):
    """``Box(-1, 1)``: a score for each gate."""

    def __init__(self, inner: spaces.Space[Any], sizes: Callable[[], NDArray[np.float64]]) -> None:
        super().__init__(inner, sizes)
        self.space = spaces.Box(-1.0, 1.0, (self.gates,), np.float32)

    def scores(self, actions: NDArray[Any]) -> NDArray[Any]:
        scores = np.asarray(actions)
        if scores.shape[-1:] != (self.gates,) or not np.isfinite(scores).all():
            raise ValueError(f"action: shape {scores.shape}, expected finite scores, {self.gates} for each environment")
        return scores


class _Relaxed(_Scored):
    """A gate is on where its score is above 0."""

    def __call__(self, actions: NDArray[Any]) -> NDArray[Any]:
        return (self.scores(actions) > 0).astype(np.int8)


class _Numbered(_Action):
    """``Discrete(2^G)``; gate i is bit i."""

    def __init__(self, inner: spaces.Space[Any], sizes: Callable[[], NDArray[np.float64]]) -> None:
        super().__init__(inner, sizes)
        if self.gates > 16:
            raise ValueError(f"env: {self.gates} gates make 2^{self.gates} actions, expected at most 16 gates")
        self.space = spaces.Discrete(2**self.gates)

    def __call__(self, actions: NDArray[Any]) -> NDArray[Any]:
        shape = np.shape(actions)
        codes = discrete(actions, shape, 2**self.gates).reshape(shape)
        return (codes[..., None] >> np.arange(self.gates) & 1).astype(np.int8)


class _Projected(_Scored):
    """The best-scored gates above 0 that fit the budget one after the other are on."""

    def __init__(self, inner: spaces.Space[Any], sizes: Callable[[], NDArray[np.float64]], *, budget: float) -> None:
        super().__init__(inner, sizes)
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise ValueError(f"budget={budget!r}: expected a share of all adapter parameters in (0, 1]")
        self.budget = budget

    def __call__(self, actions: NDArray[Any]) -> NDArray[Any]:
        scores, sizes = self.scores(actions), self.sizes()
        order = np.argsort(-scores, axis=-1, kind="stable")
        wanted = np.take_along_axis(scores > 0, order, -1)
        spent = np.cumsum(np.where(wanted, sizes[order], 0.0), axis=-1)
        on = wanted & (spent <= self.budget * sizes.sum() * (1 + 1e-9))
        gates = np.zeros(scores.shape, np.int8)
        np.put_along_axis(gates, order, on.astype(np.int8), -1)
        return gates


class _Allowed(_Action):
    """Gates that are not allowed are off, whatever the action says."""

    def __init__(
        self, inner: spaces.Space[Any], sizes: Callable[[], NDArray[np.float64]], *, allowed: Sequence[int]
    ) -> None:
        super().__init__(inner, sizes)
        indices = np.asarray(allowed)
        fits = indices.ndim == 1 and indices.size and indices.dtype.kind in "ui"
        if not fits or indices.min() < 0 or indices.max() >= self.gates or len(np.unique(indices)) < len(indices):
            raise ValueError(f"allowed={allowed!r}: expected different indices of gates, 0 to {self.gates - 1}")
        self.mask = np.zeros(self.gates, np.bool_)
        self.mask[indices] = True

    def __call__(self, actions: NDArray[Any]) -> NDArray[Any]:
        shape = np.shape(actions)
        return binary(actions, shape[:-1], self.gates).reshape(shape) * self.mask


class _ActionWrapper(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    change_class: ClassVar[type[_Action]]

    def __init__(self, env: gym.Env[Any, Any], **settings: Any) -> None:
        """Wrap ``env``.

        Raises:
            ValueError: If it does not act on ``MultiBinary``, or a setting is out of range.
        """
        gym.utils.RecordConstructorArgs.__init__(self, **settings)
        gym.Wrapper.__init__(self, env)
        self._change = self.change_class(env.action_space, self._sizes, **settings)
        self.action_space = self._change.space

    def _sizes(self) -> NDArray[np.float64]:
        sizes: NDArray[np.float64] = self.env.get_wrapper_attr("problem").sizes
        return sizes

    def step(self, action: Any) -> Any:
        """Take one decision."""
        return self.env.step(self._change(action))


class _VectorActionWrapper(VectorWrapper):
    change_class: ClassVar[type[_Action]]

    def __init__(self, env: VectorEnv[Any, Any, Any], **settings: Any) -> None:
        """Wrap ``env``; raises as the scalar wrapper does."""
        super().__init__(env)
        self._change = self.change_class(env.single_action_space, self._sizes, **settings)
        self.single_action_space = self._change.space
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _sizes(self) -> NDArray[np.float64]:
        sizes: NDArray[np.float64] = self.env.unwrapped.problem.sizes  # type: ignore[attr-defined]
        return sizes

    def step(self, actions: Any) -> Any:
        """Take one decision per environment."""
        return self.env.step(self._change(actions))


class RelaxedMask(_ActionWrapper):
    """``Box(-1, 1, (G,))`` in the place of a mask, for SAC, TD3 and TQC: a gate is on where the action is above 0."""

    change_class = _Relaxed


class VectorRelaxedMask(_VectorActionWrapper):
    """:class:`RelaxedMask` of a batch."""

    change_class = _Relaxed


class DiscreteMask(_ActionWrapper):
    """``Discrete(2^G)`` in the place of a mask of at most 16 gates, for DQN: bit i of the action is gate i."""

    change_class = _Numbered


class VectorDiscreteMask(_VectorActionWrapper):
    """:class:`DiscreteMask` of a batch."""

    change_class = _Numbered


class BudgetProjection(_ActionWrapper):
    """``Box(-1, 1, (G,))`` of scores under a hard budget: of those above 0 the best that fit are on.

    ``BudgetProjection(env, budget=0.25)`` never lets more than that share of the adapter parameters be active: gates
    are taken in the order of their scores until one does not fit.
    """

    change_class = _Projected


class VectorBudgetProjection(_VectorActionWrapper):
    """:class:`BudgetProjection` of a batch."""

    change_class = _Projected


class AllowedGates(_ActionWrapper):
    """Some gates can never be on, such as those of pathways that a deployment does not carry.

    ``AllowedGates(env, allowed=[0, 2, 5])`` forces all gates but these off, and tells agents of action masks which they
    are.
    """

    change_class = _Allowed
    _change: _Allowed

    def action_masks(self) -> NDArray[np.bool_]:
        """Whether each gate may be on (G,), as sb3-contrib's MaskablePPO asks."""
        return self._change.mask.copy()


class VectorAllowedGates(_VectorActionWrapper):
    """:class:`AllowedGates` of a batch."""

    change_class = _Allowed
    _change: _Allowed

    def action_masks(self) -> NDArray[np.bool_]:
        """Whether each gate may be on, of each environment (environments, G)."""
        return np.tile(self._change.mask, (self.num_envs, 1))
