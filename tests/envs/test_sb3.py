"""The native stable-baselines3 ``VecEnv``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecMonitor, VecNormalize
from torch import nn

from dsa_gym.envs import make_sb3_vec_env
from dsa_gym.envs.sb3 import GymnasiumVecEnv

ID = "DSA-Text-v0"


def make(bundle: Path, num_envs: int = 4, **kwargs: Any) -> GymnasiumVecEnv:
    return make_sb3_vec_env(ID, num_envs, bundle=str(bundle), **kwargs)


def actions(env: Any, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, (env.num_envs, env.action_space.n), dtype=np.int8)


@pytest.mark.parametrize("length", [1, 3])
def test_is_stable_baselines3s_own_batch(bundle_folder: Path, rng: np.random.Generator, length: int) -> None:
    native = make(bundle_folder, episode_length=length)
    other = DummyVecEnv([lambda: gym.make(ID, bundle=str(bundle_folder), episode_length=length)] * 4)
    for env in (native, other):
        env.seed(11)
    mine, theirs = native.reset(), other.reset()
    assert native.reset_infos == other.reset_infos
    for _ in range(7):
        for name in ("user", "context"):
            np.testing.assert_array_equal(mine[name], theirs[name])  # type: ignore[index,call-overload]
        chosen = actions(native, rng)
        mine, rewards, dones, infos = native.step(chosen)
        theirs, their_rewards, their_dones, their_infos = other.step(chosen)
        assert rewards.dtype == np.float32
        np.testing.assert_array_equal(rewards, their_rewards)
        np.testing.assert_array_equal(dones, their_dones)
        for done, info, their_info in zip(dones, infos, their_infos, strict=True):
            last, their_last = (
                info.pop("terminal_observation", {}),
                their_info.pop("terminal_observation", {}),
            )
            assert bool(done) == bool(last) and last.keys() == their_last.keys()
            for name in last:
                np.testing.assert_array_equal(last[name], their_last[name])
            assert info == {key: value for key, value in their_info.items() if key in info}
            assert their_info.keys() - info.keys() <= {"TimeLimit.truncated"}


def test_infos_of_a_partly_ended_synchronous_batch(bundle_folder: Path, rng: np.random.Generator) -> None:
    kwargs: dict[str, Any] = {"bundle": str(bundle_folder), "num_envs": 3, "episode_length": 2}
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    sync = gym.make_vec(ID, vectorization_mode="sync", vector_kwargs=same_step, **kwargs)
    env = GymnasiumVecEnv(sync)
    env.reset()
    sync.envs[1].reset()  # type: ignore[attr-defined]
    env.step(actions(env, rng))
    sync.envs[1].reset()  # type: ignore[attr-defined]
    _, rewards, dones, infos = env.step(actions(env, rng))
    assert dones.tolist() == [True, False, True]
    for reward, info in zip(rewards, infos, strict=True):
        assert info["loss"] > 0 and reward == pytest.approx(-info["loss"] - 1.5e-6 * info["active_parameters"])


def test_vec_wrappers(bundle_folder: Path, rng: np.random.Generator) -> None:
    env = VecNormalize(VecMonitor(VecCheckNan(make(bundle_folder, num_envs=8))), norm_obs_keys=["user", "context"])
    env.reset()
    for _ in range(5):
        observation, rewards, dones, infos = env.step(actions(env, rng))
        assert dones.all() and np.isfinite(rewards).all()
        assert observation["user"].shape == (8, 16)  # type: ignore[index,call-overload]
        assert all(info["episode"]["l"] == 1 for info in infos)
        assert all(info["terminal_observation"]["user"].shape == (16,) for info in infos)


def test_ppo_learns_on_it_with_one_call_per_step(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(bundle_folder, num_envs=8, episode_length=2)
    calls, step = [], env.envs.step
    monkeypatch.setattr(env.envs, "step", lambda action: calls.append(len(action)) or step(action))
    policy = {"net_arch": [8], "activation_fn": nn.Tanh}
    PPO("MultiInputPolicy", env, n_steps=4, batch_size=32, seed=0, policy_kwargs=policy, device="cpu").learn(64)
    assert calls == [8] * 8


def test_seeds_last_for_one_reset(bundle_folder: Path) -> None:
    env = make(bundle_folder)
    drawn = []
    for _ in range(2):
        env.seed(3)
        env.reset()
        first = env.reset_infos
        env.reset()
        drawn.append((first, env.reset_infos))
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
    env.seed(4)
    env.reset()
    assert [info["input"] for info in env.reset_infos[:3]] == [info["input"] for info in drawn[0][0][1:]]


def test_options(bundle_folder: Path) -> None:
    env = make(bundle_folder, num_envs=3)
    users = env.get_attr("problem")[0].bundle.users
    allowed = sorted(set(env.get_attr("problem")[0].user.tolist()))[:3]
    env.set_options([{"user": allowed[0]}, {"user": users[allowed[1]]}, {"user": allowed[2]}])
    env.reset()
    assert [info["user"] for info in env.reset_infos] == allowed
    env.set_options({"input": 2})
    env.reset()
    assert [info["input"] for info in env.reset_infos] == [2, 2, 2]
    env.set_options([{"user": allowed[0]}, {}, {}])
    with pytest.raises(ValueError, match="'user' is set for some environments only"):
        env.reset()


def test_attributes_and_methods(bundle_folder: Path) -> None:
    env = make(bundle_folder, num_envs=3, render_mode="rgb_array")
    env.reset()
    assert env.get_attr("num_envs") == [3, 3, 3]
    assert len(env.get_attr("problem", indices=[0, 2])) == 2
    assert env.has_attr("problem") and not env.has_attr("nothing_of_that_name")
    env.set_attr("note", "x")
    assert env.get_attr("note", indices=1) == ["x"]
    with pytest.raises(ValueError, match=r"indices=\[0\]"):
        env.set_attr("note", "y", indices=[0])
    assert len(env.env_method("render", indices=0)[0]) == 3
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3
    assert env.render_mode == "rgb_array" and len(env.get_images()) == 3
    picture = env.render()
    assert picture is not None and picture.dtype == np.uint8 and picture.ndim == 3
    env.close()


def test_errors(bundle_folder: Path) -> None:
    with pytest.raises(ValueError, match="num_envs=0"):
        make(bundle_folder, num_envs=0)
    sync = gym.make_vec(ID, num_envs=1, vectorization_mode="sync", bundle=str(bundle_folder))
    with pytest.raises(ValueError, match="SAME_STEP"):
        GymnasiumVecEnv(sync)
    env = make(bundle_folder)
    env.reset()
    with pytest.raises(ValueError, match="action"):
        env.step(np.zeros((4, 99), dtype=np.int8))
