"""Layerwise environments: the sum of an episode's rewards is the one-step reward; only one layer is computed a step."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from dsa_gym.envs import DOMAINS

every_domain = pytest.mark.parametrize("name", DOMAINS)


def make_vec(name: str, bundle: Path, num_envs: int = 6, **kwargs: Any) -> Any:
    return gym.make_vec(f"DSA-{name}Layerwise-v0", num_envs=num_envs, bundle=str(bundle), **kwargs)


@every_domain
@pytest.mark.parametrize("granularity", ["layer", "site"])
def test_an_episode_earns_what_one_step_does(
    name: str, granularity: str, bundle_of: Callable[[str], Path], rng: np.random.Generator
) -> None:
    bundle = bundle_of(f"DSA-{name}-v0")
    settings = {"granularity": granularity, "l0_penalty": 1e-5, "split": "test"}
    envs = make_vec(name, bundle, **settings)
    one_step: Any = gym.make_vec(f"DSA-{name}-v0", num_envs=6, bundle=str(bundle), **settings)
    envs.reset(seed=3)
    one_step.reset(seed=3)
    layers = envs.single_observation_space["layer"].shape[0]
    actions = rng.integers(0, 2, (layers, *envs.action_space.shape)).astype(np.int8)
    total = np.zeros(6)
    for layer, action in enumerate(actions):
        _, rewards, ended, _, infos = envs.step(action)
        total += rewards
        assert ended.all() == (layer == layers - 1)
    expected = one_step.step(np.concatenate(list(actions), axis=1))
    np.testing.assert_allclose(total, expected[1], atol=1e-4)
    final, reference = infos["final_info"], expected[4]["final_info"]
    for key in ("user", "input", "active_parameters"):
        np.testing.assert_array_equal(final[key], reference[key])
    np.testing.assert_allclose(final["loss"], reference["loss"], atol=1e-4)


@every_domain
def test_the_state_tells_what_was_decided_and_not_what_is_to_come(name: str, bundle_of: Callable[[str], Path]) -> None:
    envs = make_vec(name, bundle_of(f"DSA-{name}-v0"), 2, split="train")
    first, _ = envs.reset(options={"input": [0, 0]})
    np.testing.assert_allclose(first["state"][0], first["state"][1], atol=1e-5)
    both = np.zeros(envs.action_space.shape, np.int8)
    both[1] = 1
    second, _, ended, _, _ = envs.step(both)
    if not ended.any():
        assert np.abs(second["state"][0] - second["state"][1]).max() > 1e-3
        assert second["layer"].argmax(1).tolist() == [1, 1]
        np.testing.assert_array_equal(second["mask"][1, : both.shape[1]], both[1])


def test_one_layer_a_step(bundle_folder: Path) -> None:
    envs = make_vec("Text", bundle_folder)
    envs.reset(seed=0)
    ran: list[int] = []
    for index, block in enumerate(envs._core._model._blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    ran.clear()
    for layer in range(4):
        assert ran == list(range(layer))
        envs.step(envs.action_space.sample())
    assert ran[:4] == [0, 1, 2, 3]


def test_environments_out_of_step(bundle_folder: Path) -> None:
    """Episodes that began at different times go on side by side, each as if it were alone."""
    envs, alone = make_vec("Text", bundle_folder, 4), make_vec("Text", bundle_folder, 1)
    envs.reset(seed=0)
    envs.step(np.ones((4, 4), np.int8))
    options = {"reset_mask": np.array([False, True, False, False]), "input": [3, 3, 3, 3]}
    envs.reset(options=options)
    alone.reset(options={"input": 3})
    rng = np.random.default_rng(0)
    for step in range(4):
        actions = rng.integers(0, 2, (4, 4)).astype(np.int8)
        observation, rewards, ended, _, _ = envs.step(actions)
        mine, reward, end, _, _ = alone.step(actions[1:2])
        assert ended[1] == end[0] == (step == 3) and ended[0] == (step == 2)
        assert rewards[1] == pytest.approx(reward[0], abs=1e-4)
        if not end[0]:
            np.testing.assert_allclose(observation["state"][1], mine["state"][0], atol=1e-4)


def test_a_copy_goes_on_in_the_middle_of_an_episode(bundle_folder: Path) -> None:
    envs = make_vec("Text", bundle_folder, 3)
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(envs.action_space.sample())
    copy = pickle.loads(pickle.dumps(envs))
    for _ in range(4):
        actions = envs.action_space.sample()
        first, second = envs.step(actions), copy.step(actions)
        np.testing.assert_allclose(first[1], second[1], atol=1e-5)
        np.testing.assert_allclose(first[0]["state"], second[0]["state"], atol=1e-4)


def test_granularities_without_layers(bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match="granularity='pathway': expected one of layer, site"):
        make_vec("Text", bundle_folder, granularity="pathway")
