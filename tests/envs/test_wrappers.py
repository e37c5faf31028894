"""Wrappers do to a batch what they do to one environment, and what their docstrings say."""

from __future__ import annotations

import itertools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from dsa_gym.envs import wrappers
from dsa_gym.envs.sb3 import GymnasiumVecEnv

PLANTED: dict[str, Any] = {"users": 6, "inputs": 4}
NAMES = ["RelativeReward", "NormalizeUserReward", "RelaxedMask", "DiscreteMask", "BudgetProjection", "AllowedGates"]
SETTINGS: dict[str, dict[str, Any]] = {"BudgetProjection": {"budget": 0.25}, "AllowedGates": {"allowed": [1, 6]}}
REWARDS, ACTIONS = NAMES[:2], NAMES[2:]


def wrap(env: Any, *names: str) -> Any:
    prefix = "Vector" if hasattr(env, "num_envs") else ""
    for name in names:
        env = getattr(wrappers, prefix + name)(env, **SETTINGS.get(name, {}))
    return env


def scalar(*names: str, **kwargs: Any) -> Any:
    return wrap(gym.make("DSA-Planted-v0", **PLANTED, **kwargs), *names)


def batch(*names: str, num_envs: int = 4, **kwargs: Any) -> Any:
    return wrap(gym.make_vec("DSA-Planted-v0", num_envs=num_envs, **PLANTED, **kwargs), *names)


@pytest.mark.parametrize(
    "names",
    [(name,) for name in NAMES]
    + list(itertools.permutations(["RelativeReward", "RelaxedMask", "NormalizeUserReward"])),
)
@pytest.mark.parametrize("length", [1, 3])
def test_a_batch_of_one_is_the_scalar_one(names: tuple[str, ...], length: int) -> None:
    one, many = scalar(*names, episode_length=length), batch(*names, num_envs=1, episode_length=length)
    assert one.action_space == many.single_action_space
    one.reset(seed=5)
    many.reset(seed=5)
    one.action_space.seed(0)
    for _ in range(12):
        action = one.action_space.sample()
        _, reward, ended, _, _ = one.step(action)
        _, rewards, ends, _, _ = many.step(np.asarray(action)[None])
        assert rewards[0] == reward and ends[0] == ended
        if ended:
            one.reset()


@pytest.mark.parametrize("name", NAMES)
def test_checker(name: str, recwarn: pytest.WarningsRecorder) -> None:
    # a standardised reward depends on those before it: the same seed does not give it again on a used environment
    env = scalar(name)
    if name != "NormalizeUserReward":
        check_env(env, skip_render_check=True)
    assert not [w for w in recwarn if "different from the unwrapped" not in str(w.message)]


def test_relative_reward_is_zero_for_the_empty_mask() -> None:
    envs = batch("RelativeReward", num_envs=32, l0_penalty=0.02)
    envs.reset(seed=0)
    assert (envs.step(np.zeros((32, 8), np.int8))[1] == 0).all()
    problem = envs.unwrapped.problem
    gates = np.ones((32, 8), np.int8)
    _, rewards, _, _, infos = envs.step(gates)
    inputs = infos["final_info"]["input"]
    expected = problem.rewards(inputs, gates.astype(np.uint8)) - problem.rewards(inputs, 0 * gates.astype(np.uint8))
    np.testing.assert_allclose(rewards, expected)


def test_standardised_rewards() -> None:
    envs = batch("NormalizeUserReward", num_envs=64)
    plain = batch(num_envs=64)
    envs.reset(seed=0)
    plain.reset(seed=0)
    seen: dict[int, list[float]] = {}
    envs.action_space.seed(0)
    for _ in range(30):
        actions = envs.action_space.sample()
        _, changed, _, _, infos = envs.step(actions)
        raw = plain.step(actions)[1]
        for user, value in zip(infos["final_info"]["user"].tolist(), raw.tolist(), strict=True):
            seen.setdefault(user, []).append(value)
    own = [
        (value - np.mean(seen[u])) / np.std(seen[u], ddof=1)
        for u, value in zip(infos["final_info"]["user"].tolist(), raw.tolist(), strict=True)
    ]
    np.testing.assert_allclose(changed, own, atol=1e-9)


@given(actions=hnp.arrays(np.float32, (4, 8), elements=st.floats(-1, 1, width=32)))
def test_budget_projection(actions: np.ndarray) -> None:
    envs = batch("BudgetProjection")
    envs.reset(seed=0)
    final = envs.step(actions)[4]["final_info"]
    assert (final["active_parameters"] <= 2).all()
    np.testing.assert_array_equal(final["active_parameters"], np.minimum((actions > 0).sum(1), 2))
    gates = envs._change(actions)
    for row, scores in zip(gates, actions, strict=True):
        left_out = scores[(row == 0) & (scores > 0)]
        assert not len(left_out) or not row.any() or scores[row == 1].min() >= left_out.max()


@given(code=st.integers(0, 255))
def test_numbered_masks(code: int) -> None:
    mask = scalar("DiscreteMask")._change(np.asarray(code))
    assert mask.tolist() == [int(bit) for bit in reversed(f"{code:08b}")]


def test_relaxed_masks() -> None:
    assert scalar("RelaxedMask")._change(np.linspace(-1, 1, 8)).tolist() == [0] * 4 + [1] * 4


@given(actions=hnp.arrays(np.int8, (4, 8), elements=st.integers(0, 1)))
def test_gates_that_are_not_allowed(actions: np.ndarray) -> None:
    envs = batch("AllowedGates")
    envs.reset(seed=0)
    masks = envs.action_masks()
    assert masks.shape == (4, 8) and (masks == [0, 1, 0, 0, 0, 0, 1, 0]).all()
    np.testing.assert_array_equal(scalar("AllowedGates").action_masks(), masks[0])
    final = envs.step(actions)[4]["final_info"]
    np.testing.assert_array_equal(final["active_parameters"], actions[:, 1] + actions[:, 6])
    np.testing.assert_array_equal(envs._change(actions), actions * masks)


@pytest.mark.parametrize("allowed", [[], [8], [-1], [1, 1], [0.5], 3, [[1]], [True]])
def test_gates_that_there_are_not(allowed: Any) -> None:
    with pytest.raises(ValueError, match="allowed="):
        wrappers.AllowedGates(gym.make("DSA-Planted-v0"), allowed=allowed)


def test_stable_baselines_trains_over_them() -> None:
    relaxed = VecMonitor(GymnasiumVecEnv(batch("RelativeReward", "RelaxedMask", num_envs=8)))
    SAC("MultiInputPolicy", relaxed, learning_starts=16, batch_size=16, gamma=0.0, seed=0, device="cpu").learn(64)
    numbered = VecNormalize(GymnasiumVecEnv(batch("DiscreteMask", num_envs=8)), norm_obs=False)
    DQN("MultiInputPolicy", numbered, learning_starts=16, batch_size=16, gamma=0.0, seed=0, device="cpu").learn(64)


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_that_cannot_be_meant(name: str) -> None:
    env = scalar(name)
    env.reset(seed=0)
    wrong: list[Any] = [256, -1, 0.5] if name == "DiscreteMask" else [np.zeros(7), np.full(8, np.nan)]
    for action in wrong:
        with pytest.raises(ValueError, match="action: "):
            env.step(action)


def test_environments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"acts on Box.*, expected MultiBinary"):
        scalar("RelaxedMask", "DiscreteMask")
    with pytest.raises(ValueError, match="32 gates make 2\\^32 actions"):
        wrap(gym.make("DSA-Planted-v0", gates=32), "DiscreteMask")
    for budget in (0, 1.5, True):
        with pytest.raises(ValueError, match="budget="):
            wrappers.BudgetProjection(gym.make("DSA-Planted-v0"), budget=budget)
