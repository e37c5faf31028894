"""Budget environments: masks grow gate by gate, never beyond the budget, and end with the one-step reward."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks

from dsa_gym.envs import make_sb3_vec_env


def make(bundle: Path, **kwargs: Any) -> Any:
    return gym.make("DSA-TextBudget-v0", bundle=str(bundle), **kwargs).unwrapped


@given(data=st.data())
def test_any_episode_ends_as_one_step_with_its_mask(bundle_folder: Path, data: st.DataObject) -> None:
    share = data.draw(st.sampled_from([0.25, 0.5, 0.75, 1.0]))
    env, one_step = make(bundle_folder, budget=share), gym.make("DSA-Text-v0", bundle=str(bundle_folder))
    index = data.draw(st.integers(0, 5))
    observation, _ = env.reset(options={"input": index})
    one_step.reset(options={"input": index})
    mask, ended, reward, info = np.zeros(4, np.int8), False, 0.0, {}
    while not ended:
        assert reward == 0
        allowed = env.action_masks()
        assert allowed[4] and (allowed[:4] == ((mask == 0) & (mask.sum() + 1 <= 4 * share))).all()
        np.testing.assert_array_equal(observation["mask"], mask)
        assert observation["budget"] == pytest.approx(1 - mask.sum() / (4 * share))
        assert observation in env.observation_space
        action = data.draw(st.integers(0, 4))
        if action < 4 and allowed[action]:
            mask[action] = 1
        observation, reward, ended, _, info = env.step(action)
    expected = one_step.step(mask)
    assert reward == expected[1] and info["loss"] == expected[4]["loss"]
    assert mask.sum() <= 4 * share and info["density"] == mask.sum() / 4


def test_regret_is_to_the_best_mask_within_the_budget(bundle_folder: Path) -> None:
    env, one_step = make(bundle_folder, budget=0.5), gym.make("DSA-Text-v0", bundle=str(bundle_folder))
    rewards = []
    for mask in itertools.product((0, 1), repeat=4):
        if sum(mask) <= 2:
            one_step.reset(options={"input": 2})
            rewards.append(float(one_step.step(np.array(mask, np.int8))[1]))
    env.reset(options={"input": 2})
    _, reward, ended, _, info = env.step(4)
    assert ended and info["regret"] == pytest.approx(max(rewards) - reward)
    env.reset(options={"input": 2})
    assert env.step(0)[4]["regret"] == 0, "before the end nothing is lost"


def test_maskable_ppo(bundle_folder: Path) -> None:
    envs = make_sb3_vec_env("DSA-TextBudget-v0", 8, bundle=str(bundle_folder))
    masks = get_action_masks(envs)
    assert masks.shape == (8, 5) and masks.all()
    agent = MaskablePPO("MultiInputPolicy", envs, n_steps=16, batch_size=64, seed=0, device="cpu")
    agent.learn(256)
    observation = envs.reset()
    for _ in range(3):
        allowed = get_action_masks(envs)
        actions, _ = agent.predict(observation, action_masks=allowed)
        assert allowed[np.arange(8), actions].all()
        observation = envs.step(actions)[0]


@pytest.mark.parametrize("budget", [0, -0.1, 1.1, float("nan"), True, "half"])
def test_bad_budgets(bundle_folder: Path, budget: Any) -> None:
    with pytest.raises(ValueError, match=r"budget=.*: expected a share of all adapter parameters"):
        make(bundle_folder, budget=budget)
