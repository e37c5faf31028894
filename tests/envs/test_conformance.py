"""Every registered environment, scalar and batched, keeps Gymnasium's and stable-baselines3's contracts."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import dsa_gym
from dsa_gym.envs import ENVIRONMENTS, register

every_id = pytest.mark.parametrize("env_id", ENVIRONMENTS)
every_kind = pytest.mark.parametrize(
    "env_id",
    [
        name if "Text" in name or "Planted" in name else pytest.param(name, marks=pytest.mark.slow)
        for name in ENVIRONMENTS
    ],
)
"""Every id, but only one of each kind in a quick run: for tests that take seconds."""
SAME_STEP = {"autoreset_mode": AutoresetMode.SAME_STEP}
STEP_INFO = {"loss", "active_parameters", "density", "user", "input"}


def over(*problems: str) -> list[str]:
    return [name for name, entry in ENVIRONMENTS.items() if entry.classes.split(":")[1] in problems]


MASKS = over("Gating", "Table", "Planted", "Drift")
"""Where an action is the mask of one input."""
BANDITS = over("Gating", "Table", "Planted")
"""Where what is observed belongs to the input alone."""


@pytest.fixture
def bundle(env_id: str, bundle_of: Callable[[str], Path]) -> Path | None:
    """The small bundle of the environment's domain, if it has one."""
    return bundle_of(env_id) if ENVIRONMENTS[env_id].domain else None


def given(env_id: str, bundle: Path | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of some arguments those that the environment takes, and its bundle."""
    module, prefix = ENVIRONMENTS[env_id].classes.split(":")
    takes = inspect.signature(getattr(import_module(f"dsa_gym.envs.{module}"), f"{prefix}Env")).parameters
    own = ("vectorization_mode", "vector_kwargs", "max_episode_steps")
    kept = {name: value for name, value in kwargs.items() if name in takes or name in own}
    return kept if bundle is None else kept | {"bundle": str(bundle)}


def make(env_id: str, bundle: Path | None, **kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(env_id, **given(env_id, bundle, kwargs))


def make_vec(env_id: str, bundle: Path | None, num_envs: int = 4, **kwargs: Any) -> Any:
    return gym.make_vec(env_id, num_envs=num_envs, **given(env_id, bundle, kwargs))


def rollout(env: Any, seed: int, steps: int = 6) -> list[Any]:
    """Everything a scalar or vector environment returns for seeded actions."""
    env.action_space.seed(seed)
    seen: list[Any] = [env.reset(seed=seed)]
    vector = hasattr(env, "num_envs")
    for _ in range(steps):
        seen.append(env.step(env.action_space.sample()))
        if not vector and seen[-1][2]:
            seen.append(env.reset())
    return seen


def without_final_obs(infos: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in infos.items() if name not in ("final_obs", "_final_obs")}


def same(first: Any, second: Any, tolerance: float = 0.0) -> bool:
    """Equal in structure, types and bits, or up to a tolerance; arrays of objects entry by entry."""
    if isinstance(first, np.ndarray) and first.dtype == object:
        return len(first) == len(second) and all(same(*pair, tolerance) for pair in zip(first, second, strict=True))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key], tolerance) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(*pair, tolerance) for pair in zip(first, second, strict=True))
    if tolerance and isinstance(first, np.ndarray) and first.dtype.kind == "f":
        return first.dtype == second.dtype and np.allclose(first, second, rtol=0, atol=tolerance)
    return data_equivalence(first, second, exact=True)


def tolerance_of(env_id: str) -> float:
    """Where losses are computed and not looked up, a batch differs from single rows in the last bits."""
    return 1e-3 if env_id in over("Layerwise") else 0.0


def test_importing_the_package_registers_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, gymnasium, dsa_gym; assert 'torch' not in sys.modules, 'torch'; "
        f"assert all(name in gymnasium.registry for name in {list(ENVIRONMENTS)!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registering_twice_is_allowed() -> None:
    register()
    assert dsa_gym.__version__


@every_id
def test_id_with_its_module(env_id: str, bundle: Path | None) -> None:
    env = gym.make(f"dsa_gym:{env_id}", **given(env_id, bundle, {}))
    assert env.spec is not None and env.spec.id == env_id


@every_id
def test_gymnasium_checker(env_id: str, bundle: Path | None, recwarn: pytest.WarningsRecorder) -> None:
    for kwargs in ({}, {"episode_length": 3}, {"render_mode": "ansi"}):
        check_env(make(env_id, bundle, **kwargs).unwrapped)
    assert not recwarn.list


@every_kind
def test_sb3_checker(env_id: str, bundle: Path | None, recwarn: pytest.WarningsRecorder) -> None:
    sb3_check_env(make(env_id, bundle, render_mode="rgb_array"), warn=True, skip_render_check=False)
    assert not recwarn.list


@pytest.mark.parametrize("env_id", BANDITS)
@pytest.mark.parametrize("split", ["train", "seen", "validation", "test"])
def test_step(env_id: str, split: str, bundle: Path | None) -> None:
    env = make(env_id, bundle, split=split, l0_penalty=1e-5, episode_length=2)
    observation, info = env.reset(seed=0)
    problem = env.get_wrapper_attr("problem")
    env.action_space.seed(0)
    for _ in range(6):
        assert set(info) >= {"user", "input"}
        assert observation in env.observation_space
        for name, value in observation.items():
            assert value.dtype == np.float32 and np.isfinite(value).all()
            np.testing.assert_array_equal(value, problem.observations[name][info["input"]])
        action = env.action_space.sample()
        next_observation, reward, terminated, truncated, step_info = env.step(action)
        assert set(step_info) == {*STEP_INFO, "regret"}
        assert {type(value) for value in step_info.values()} == {int, float}
        assert type(reward) is float and type(terminated) is bool and truncated is False
        assert step_info["user"] == info["user"] and step_info["input"] == info["input"]
        assert step_info["user"] == problem.user[step_info["input"]]
        assert reward == pytest.approx(-step_info["loss"] - 1e-5 * step_info["active_parameters"], abs=1e-12)
        assert step_info["active_parameters"] == int(problem.sizes @ action)
        assert step_info["density"] == step_info["active_parameters"] / problem.sizes.sum()
        assert step_info["regret"] >= -1e-6
        if terminated:
            observation, info = env.reset()
        else:
            observation = next_observation
            place = (problem.observations["context"] == observation["context"]).all(1).nonzero()[0]
            info = {"user": step_info["user"], "input": int(place[0])}


@every_id
@pytest.mark.parametrize("vector", [False, True])
def test_seeds_decide_the_trajectory(env_id: str, vector: bool, bundle: Path | None) -> None:
    build = make_vec if vector else make
    first, second = (build(env_id, bundle, episode_length=2) for _ in range(2))
    assert same(rollout(first, 3), rollout(second, 3))
    assert same(rollout(first, 3), rollout(second, 3)), "a second time on the same environments"
    assert not same(rollout(first, 3), rollout(second, 4))


@every_id
@pytest.mark.parametrize("vector", [False, True])
def test_unseeded_resets_differ(env_id: str, vector: bool, bundle: Path | None) -> None:
    build = make_vec if vector else make

    def inputs() -> list[Any]:
        env = build(env_id, bundle)
        return [np.asarray(env.reset()[1]["input"]).tolist() for _ in range(20)]

    assert inputs() != inputs()


@every_id
def test_partly_seeded_batch_differs_where_it_is_not(env_id: str, bundle: Path | None) -> None:
    env = make_vec(env_id, bundle, num_envs=3)
    draws = [env.reset(seed=[None, 5, None])[1]["input"]]
    draws += [env.reset()[1]["input"] for _ in range(20)]
    columns = np.array(draws).T.tolist()
    assert columns[0] != columns[2]
    again = make_vec(env_id, bundle, num_envs=3)
    assert again.reset(seed=[None, 5, None])[1]["input"][1] == columns[1][0]


@every_id
@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("vector", [False, True])
def test_pickling(env_id: str, vector: bool, pickler: Any, bundle: Path | None) -> None:
    kwargs: dict[str, Any] = {"episode_length": 3, "render_mode": "ansi"}
    env = make_vec(env_id, bundle, **kwargs) if vector else make(env_id, bundle, **kwargs).unwrapped
    expected = rollout(pickler.loads(pickler.dumps(env)), 1)  # before reset
    begun = rollout(env, 1, 4)
    assert same(begun, expected[: len(begun)])
    env.render()
    if ENVIRONMENTS[env_id].domain:
        env.problem.compute_losses(np.zeros(1, np.int64), np.ones((1, env.problem.gates), np.uint8))  # loads the model
    data = pickler.dumps(env)
    assert len(data) < 50_000
    other = pickler.loads(data)
    assert "problem" not in other._core.__dict__
    action = env.action_space.sample()
    assert same(other.step(action), env.step(action)), "goes on in the middle of an episode"


@every_id
@pytest.mark.parametrize("vector", [False, True])
def test_constructing_loads_nothing(env_id: str, vector: bool, bundle: Path | None) -> None:
    env = make_vec(env_id, bundle) if vector else make(env_id, bundle).unwrapped
    assert "problem" not in env._core.__dict__
    env.reset(seed=0)
    env.step(env.action_space.sample())
    if env_id not in over("Layerwise"):
        assert "model" not in env.problem.__dict__, "rewards come from the bundle's table"


@every_id
def test_spec_survives_json(env_id: str, bundle: Path | None) -> None:
    env = make(env_id, bundle, split="test", l0_penalty=1e-5, episode_length=2)
    assert env.spec is not None
    spec = EnvSpec.from_json(env.spec.to_json())
    assert spec.kwargs == env.spec.kwargs
    again = gym.make(spec)
    assert again.action_space == env.action_space and again.observation_space == env.observation_space
    assert same(again.reset(seed=0), env.reset(seed=0))
    vector = make_vec(env_id, bundle, num_envs=3)
    assert gym.make_vec(vector.spec).num_envs == 3


@every_id
@pytest.mark.parametrize("length", [1, 3])
def test_native_batch_is_the_synchronous_one(env_id: str, length: int, bundle: Path | None) -> None:
    kwargs = {"episode_length": length, "l0_penalty": 1e-5}
    native = make_vec(env_id, bundle, **kwargs)
    other = make_vec(env_id, bundle, vectorization_mode="sync", vector_kwargs=SAME_STEP, **kwargs)
    assert native.metadata["autoreset_mode"] == other.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert native.observation_space == other.observation_space
    assert native.action_space == other.action_space
    assert same(native.reset(seed=7), other.reset(seed=7), tolerance_of(env_id))
    native.action_space.seed(7)
    for step in range(8):
        action = native.action_space.sample()
        mine, theirs = native.step(action), other.step(action)
        if not native._core.final_obs:
            theirs = (*theirs[:4], without_final_obs(theirs[4]))
        assert same(mine, theirs, tolerance_of(env_id)), f"step {step}"
        assert mine[0] in native.observation_space
        if step == 1:  # from here on the episodes of environments 1 and 3 end out of step with the others
            options = {"reset_mask": np.array([False, True, False, True])}
            ours, reference = native.reset(options=dict(options)), other.reset(options=dict(options))
            assert same(ours[0], reference[0], tolerance_of(env_id))
            for name in ("user", "input"):
                np.testing.assert_array_equal(ours[1][name], reference[1][name])
                np.testing.assert_array_equal(ours[1][f"_{name}"], reference[1][f"_{name}"])


@every_kind
def test_asynchronous_batch(env_id: str, bundle: Path | None) -> None:
    # spawned, not forked: torch has threads, and a fork of a threaded process may hang
    env = make_vec(
        env_id,
        bundle,
        num_envs=2,
        vectorization_mode="async",
        vector_kwargs={**SAME_STEP, "context": "spawn"},
        episode_length=2,
    )
    try:
        native = make_vec(env_id, bundle, num_envs=2, episode_length=2)
        theirs = rollout(env, 5)
        if not native._core.final_obs:
            theirs = [theirs[0], *((*step[:4], without_final_obs(step[4])) for step in theirs[1:])]
        assert same(theirs, rollout(native, 5), tolerance_of(env_id))
    finally:
        env.close()


@every_id
def test_returned_arrays_are_the_callers(env_id: str, bundle: Path | None) -> None:
    env, untouched = (make_vec(env_id, bundle, episode_length=2) for _ in range(2))
    env.reset(seed=0)
    untouched.reset(seed=0)
    for _ in range(4):
        action = np.ones(env.action_space.shape, env.action_space.dtype)
        returned, expected = env.step(action), untouched.step(action)
        assert same(returned, expected)
        observation, rewards, ended, truncated, infos = returned
        ended[:], truncated[:], rewards[:] = True, True, np.nan
        for value in [*observation.values(), *(v for v in infos.values() if isinstance(v, np.ndarray))]:
            if value.dtype != object:
                value[:] = 0
        if "final_info" in infos:
            assert infos["final_info"]["_loss"].any() and expected[4]["final_info"]["loss"].any()
            np.testing.assert_array_equal(infos["final_info"]["loss"], expected[4]["final_info"]["loss"])


@every_id
@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_rendering(env_id: str, mode: str, bundle: Path | None) -> None:
    scalar, vector = (
        make(env_id, bundle, render_mode=mode),
        make_vec(env_id, bundle, 2, render_mode=mode),
    )
    scalar.reset(seed=0)
    vector.reset(seed=0)
    before = scalar.render()
    assert len(vector.render()) == 2
    gates = scalar.get_wrapper_attr("problem").gates
    action = np.tile(np.arange(gates) % 2, (2, 1)).astype(np.int8)
    if env_id not in MASKS:
        action = np.ones_like(vector.action_space.sample())
    scalar.step(action[0])
    vector.step(action)
    picture, pictures = scalar.render(), vector.render()
    assert isinstance(pictures, tuple) and len(pictures) == 2
    if mode == "ansi":
        assert isinstance(picture, str) and picture != before
        assert pictures[0] == picture != pictures[1]
        assert {"Layerwise": "1111000", "Budget": "0100"}.get(
            ENVIRONMENTS[env_id].classes.split(":")[1], "0101"
        ) in picture
    else:
        assert picture.dtype == np.uint8 and picture.shape == (540, 960, 3)
        np.testing.assert_array_equal(pictures[0], picture)


@every_id
def test_wrappers(env_id: str, bundle: Path | None, tmp_path: Path) -> None:
    env = gym.wrappers.FlattenObservation(make(env_id, bundle))
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space and observation.ndim == 1

    recorded = gym.wrappers.RecordEpisodeStatistics(make(env_id, bundle, episode_length=2))
    recorded.reset(seed=0)
    rewards, info, ended = [], {}, False
    while not ended:
        _, reward, ended, _, info = recorded.step(recorded.action_space.sample())
        rewards.append(float(reward))
    assert info["episode"]["l"] == len(rewards) and info["episode"]["r"] == pytest.approx(sum(rewards))
    if env_id in MASKS:
        assert len(rewards) == 2

        limited = make(env_id, bundle, episode_length=5, max_episode_steps=2)
        limited.reset(seed=0)
        assert limited.step(limited.action_space.sample())[2:4] == (False, False)
        assert limited.step(limited.action_space.sample())[2:4] == (False, True)

    vector = gym.wrappers.vector.RecordEpisodeStatistics(make_vec(env_id, bundle))
    vector.reset(seed=0)
    listed = gym.wrappers.vector.DictInfoToList(make_vec(env_id, bundle))
    listed.reset(seed=0)
    while True:
        infos = vector.step(actions := vector.action_space.sample())[4]
        ended = listed.step(actions)
        if ended[2][0]:
            break
    assert infos["_episode"][0] and set(ended[4][0]["final_info"]) - {"regret"} == STEP_INFO


@every_kind
def test_video(env_id: str, bundle: Path | None, tmp_path: Path) -> None:
    env = gym.wrappers.RecordVideo(
        make(env_id, bundle, render_mode="rgb_array"), str(tmp_path / "video"), disable_logger=True
    )
    env.reset(seed=0)
    env.step(env.action_space.sample())
    env.close()
    assert [path.suffix for path in (tmp_path / "video").iterdir()] == [".mp4"]


@every_id
def test_step_and_render_need_a_reset(env_id: str, bundle: Path | None) -> None:
    for env in (
        make_vec(env_id, bundle, render_mode="ansi"),
        make(env_id, bundle, render_mode="ansi").unwrapped,
    ):
        with pytest.raises(gym.error.ResetNeeded, match="reset"):
            env.step(env.action_space.sample())
        with pytest.raises(gym.error.ResetNeeded, match="reset"):
            env.render()
