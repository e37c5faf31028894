"""The policy analysis of models that stable-baselines3 trains by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dsa_gym.envs import make_sb3_vec_env
from dsa_gym.envs.wrappers import VectorDiscreteMask, VectorRelaxedMask
from dsa_gym.experiments.callback import ModelPolicy, PolicyCallback
from dsa_gym.experiments.monitor import Monitor

INSTANCE = {"users": 6, "inputs": 3, "gates": 4}


@pytest.fixture(scope="module")
def monitor() -> Monitor:
    return Monitor.of_env("DSA-Planted-v0", **INSTANCE)


def model_of(kind: Any, *, wrapper: Any = None, normalized: bool = False, **settings: Any) -> Any:
    env: Any = make_sb3_vec_env("DSA-Planted-v0", 8, wrapper=wrapper, **INSTANCE)
    return kind("MultiInputPolicy", VecNormalize(env) if normalized else env, gamma=0.0, seed=0, **settings)


def read(folder: Path) -> Any:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_what_a_user_of_stable_baselines3_gets(monitor: Monitor, tmp_path: Path) -> None:
    model = model_of(PPO, n_steps=8, batch_size=32, n_epochs=1)
    model.learn(256, callback=PolicyCallback(tmp_path / "mine", "DSA-Planted-v0", every=64, **INSTANCE))
    events = read(tmp_path / "mine")
    shown = events.Scalars("unseen/reward")
    assert [event.step for event in shown] == [64, 128, 192, 256, 256]  # the last is after the last update
    problem = monitor.problems["unseen"]
    masks = ModelPolicy(model, 4).masks(problem)
    assert shown[-1].value == pytest.approx(problem.rewards(np.arange(len(problem)), masks).mean(), rel=1e-5)
    tags = events.Tags()
    assert {"uses/user_information", "gate_kl/3", "oracle/recall", "train/loss", "time/fps"} <= set(tags["scalars"])
    assert {"gates/users", "gates/sites"} <= set(tags["images"])
    assert {"custom_scalars__config__", "examples/text_summary"} <= set(tags["tensors"])
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["algorithm"].string_value == "PPO"
    assert (settings["gamma"].number_value, settings["n_steps"].number_value) == (0, 8)
    # what the algorithm logs is ours to forward during the training only
    assert not model.logger.output_formats


def test_training_is_the_same_with_and_without(monitor: Monitor, tmp_path: Path) -> None:
    policies = []
    for callback in (None, PolicyCallback(tmp_path, monitor, every=64)):
        model = model_of(PPO, n_steps=8, batch_size=32, n_epochs=1)  # seeds the global generators
        policies.append(model.learn(192, callback=callback).policy.parameters())
    for one, other in zip(*policies, strict=True):
        assert one.equal(other)


def test_training_goes_on_in_the_same_run(monitor: Monitor, tmp_path: Path) -> None:
    model = model_of(PPO, n_steps=8, batch_size=32, n_epochs=1)
    callback = PolicyCallback(tmp_path, monitor, every=64)
    model.learn(64, callback=callback)
    model.learn(64, callback=callback, reset_num_timesteps=False)
    assert [event.step for event in read(tmp_path).Scalars("unseen/reward")] == [64, 64, 128, 128]


@pytest.mark.parametrize(
    ("kind", "wrapper", "settings"),
    [(DQN, VectorDiscreteMask, {"learning_starts": 8}), (SAC, VectorRelaxedMask, {"learning_starts": 8})],
)
def test_discrete_and_relaxed_masks(
    monitor: Monitor, tmp_path: Path, kind: Any, wrapper: Any, settings: dict[str, Any]
) -> None:
    model = model_of(kind, wrapper=wrapper, train_freq=1, batch_size=8, **settings)
    model.learn(32, callback=PolicyCallback(tmp_path, monitor, every=16))
    policy, problem = ModelPolicy(model, 4), monitor.problems["unseen"]
    actions = model.predict(problem.observations, deterministic=True)[0]
    masks = policy.masks(problem)
    assert masks.shape == (len(problem), 4)
    for action, mask in zip(actions, masks, strict=True):
        expected = [int(action) >> gate & 1 for gate in range(4)] if kind is DQN else (action > 0).astype(int).tolist()
        assert mask.tolist() == expected
    assert policy.probabilities(problem.observations) is None
    assert "policy/kl_per_gate" not in read(tmp_path).Tags()["scalars"]


def test_observations_are_normalised_as_in_training(monitor: Monitor) -> None:
    model = model_of(PPO, normalized=True, n_steps=8, batch_size=32, n_epochs=1)
    model.learn(128)
    policy, problem = ModelPolicy(model, 4), monitor.problems["unseen"]
    seen = model.get_vec_normalize_env().normalize_obs(problem.observations)
    assert not np.allclose(seen["user"], problem.observations["user"])
    logits = model.policy.get_distribution(model.policy.obs_to_tensor(seen)[0]).distribution.logits
    expected = 1 / (1 + np.exp(-logits.detach().double().numpy()))
    probabilities = policy.probabilities(problem.observations)
    assert probabilities is not None
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    np.testing.assert_array_equal(policy.masks(problem), probabilities > 0.5)


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_bad_intervals(monitor: Monitor, tmp_path: Path, every: Any) -> None:
    with pytest.raises(ValueError, match="every="):
        PolicyCallback(tmp_path, monitor, every=every)


def test_a_model_for_other_gates(tmp_path: Path) -> None:
    other = Monitor.of_env("DSA-Planted-v0", **{**INSTANCE, "gates": 8})
    model = model_of(PPO, n_steps=8, batch_size=32)
    with pytest.raises(ValueError, match=r"model: acts on MultiBinary\(4\), expected masks of G=8 gates"):
        model.learn(64, callback=PolicyCallback(tmp_path, other))


def test_a_model_of_other_observations(monitor: Monitor) -> None:
    model = model_of(PPO, n_steps=8, batch_size=32)
    model.observation_space = spaces.Box(-1, 1, (3,), np.float32)
    with pytest.raises(ValueError, match="model: observes Box"):
        ModelPolicy(model, 4).masks(monitor.problems["unseen"])
