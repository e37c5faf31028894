"""Look-up environments give what the model gives, and know the optimum."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO

from dsa_gym.envs import make_sb3_vec_env


def make(bundle: Path, **kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make("DSA-TextTable-v0", bundle=str(bundle), **kwargs)


@pytest.mark.parametrize("split", ["train", "test"])
def test_rewards_are_those_of_the_model(bundle_folder: Path, split: str) -> None:
    table = gym.make_vec("DSA-TextTable-v0", num_envs=16, bundle=str(bundle_folder), split=split)
    other = gym.make_vec("DSA-Text-v0", num_envs=16, bundle=str(bundle_folder), split=split, cache_bytes=0)
    mine, theirs = table.reset(seed=0), other.reset(seed=0)
    for name in mine[0]:
        np.testing.assert_array_equal(mine[0][name], theirs[0][name])
    table.action_space.seed(0)
    for _ in range(3):
        actions = table.action_space.sample()
        first, second = table.step(actions), other.step(actions)
        np.testing.assert_allclose(first[1], second[1], atol=2e-4)
        assert "regret" not in second[4]["final_info"], "without the table, the optimum is not known"


def test_regret_is_what_the_best_mask_earns_more(bundle_folder: Path) -> None:
    env = make(bundle_folder, l0_penalty=1e-5)
    problem = env.get_wrapper_attr("problem")
    for index in (0, 3):
        rewards, regrets = [], []
        for mask in itertools.product((0, 1), repeat=problem.gates):
            env.reset(options={"input": index})
            _, reward, _, _, info = env.step(np.array(mask, np.int8))
            rewards.append(float(reward))
            regrets.append(info["regret"])
        np.testing.assert_allclose(regrets, max(rewards) - np.array(rewards), atol=1e-9)
        assert min(regrets) == 0


def test_numbered_masks(bundle_folder: Path) -> None:
    binary, numbered = make(bundle_folder), make(bundle_folder, actions="discrete")
    assert isinstance(numbered.action_space, gym.spaces.Discrete) and numbered.action_space.n == 16
    for code in range(16):
        binary.reset(options={"input": 1})
        numbered.reset(options={"input": 1})
        gates = np.array([code >> i & 1 for i in range(4)], np.int8)
        assert binary.step(gates)[1] == numbered.step(code)[1]


def test_stable_baselines_trains_over_look_ups(bundle_folder: Path) -> None:
    for actions in ("binary", "discrete"):
        envs = make_sb3_vec_env("DSA-TextTable-v0", 16, bundle=str(bundle_folder), actions=actions)
        PPO("MultiInputPolicy", envs, n_steps=8, batch_size=64, gamma=0.0, seed=0, device="cpu").learn(256)


def test_the_model_is_never_loaded(bundle_folder: Path) -> None:
    envs: Any = gym.make_vec("DSA-TextTable-v0", num_envs=64, bundle=str(bundle_folder))
    envs.reset(seed=0)
    for _ in range(10):
        envs.step(envs.action_space.sample())
    assert "model" not in envs.problem.__dict__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"actions": "ternary"}, "actions='ternary': expected one of binary, discrete"),
        ({"split": "future"}, "split='future'"),
        ({"l0_penalty": -1}, "l0_penalty=-1"),
    ],
)
def test_bad_arguments(bundle_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(bundle_folder, **arguments)


@pytest.mark.parametrize("action", [16, -1, 1.5, [1], "1"])
def test_bad_numbers(bundle_folder: Path, action: Any) -> None:
    env = make(bundle_folder, actions="discrete")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action: "):
        env.unwrapped.step(action)
