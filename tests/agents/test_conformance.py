"""Every registered agent keeps the interface."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from dsa_gym.agents import AGENTS, agent_class, make_agent
from dsa_gym.agents.base import DESCRIPTIONS, Agent, zoo_defaults
from dsa_gym.agents.sb3 import SB3Agent
from dsa_gym.envs import make_sb3_vec_env
from dsa_gym.envs.sb3 import GymnasiumVecEnv
from dsa_gym.envs.wrappers import DiscreteMask, RelaxedMask, VectorDiscreteMask, VectorRelaxedMask

every_agent = pytest.mark.parametrize("name", AGENTS)
POLICY_GRADIENT = ("rloo", "factored_ppo", "disarm", "counterfactual")
ON_POLICY = ("ppo", "a2c", "trpo", "maskable_ppo", "recurrent_ppo")
OFF_POLICY = ("dqn", "qr_dqn", "sac", "td3", "tqc", "crossq")
LEARNERS = (
    *ON_POLICY,
    "ars",
    *OFF_POLICY,
    "gumbel",
    "hard_concrete",
    "linucb",
    "neural_linear",
    "cross_entropy",
    "exact_gradient",
    *POLICY_GRADIENT,
)
SMALL: dict[str, dict[str, Any]] = {
    **{name: {"hidden": [8], "n_steps": 2, "batch_size": 16, "epochs": 1} for name in ("ppo", "maskable_ppo")},
    "a2c": {"hidden": [8], "n_steps": 2},
    "trpo": {"hidden": [8], "n_steps": 2, "batch_size": 16, "critic_updates": 1},
    "recurrent_ppo": {"hidden": [8], "n_steps": 2, "batch_size": 16, "epochs": 1, "lstm": 4},
    "ars": {"directions": 2, "episodes": 4},
    **{
        name: {"hidden": [8], "batch_size": 8, "buffer_size": 96, "learning_starts": 8, "gradient_steps": 1}
        for name in OFF_POLICY
    },
    "gumbel": {"hidden": 8, "batch_size": 8},
    "hard_concrete": {"hidden": 8, "batch_size": 8},
    "linucb": {"batch_size": 8, "memory": 24},
    "neural_linear": {"batch_size": 8, "memory": 24, "hidden": [8], "updates": 1},
    "cross_entropy": {"batch_size": 2, "population": 4},
    "exact_gradient": {"hidden": [8], "batch_size": 1},
    **{name: {"hidden": [8], "batch_size": 4, "masks": 4} for name in POLICY_GRADIENT},
}


WRAPPERS: dict[str, Any] = {"relaxed": (RelaxedMask, VectorRelaxedMask), "discrete": (DiscreteMask, VectorDiscreteMask)}


def wrapped(name: str, env: Any) -> Any:
    """The environment with the actions that an agent acts on."""
    acts_on = agent_class(name).acts_on
    if acts_on == "binary":
        return env
    scalar, vector = WRAPPERS[acts_on]
    return GymnasiumVecEnv(vector(env.envs)) if isinstance(env, GymnasiumVecEnv) else scalar(env)


def make(name: str, env: Any, seed: int = 0, **settings: Any) -> Agent:
    return make_agent(name, wrapped(name, env), seed, **{**SMALL.get(name, {}), **settings})


def decisions(agent: Agent, scorer: Any) -> np.ndarray:
    info = {"user": scorer.user.numpy(), "input": np.arange(len(scorer))}
    return agent.predict(scorer.observations, info)


@every_agent
def test_on_the_real_environment(name: str, bundle_folder: Path) -> None:
    arguments: dict[str, Any] = {"bundle": str(bundle_folder)}
    for env in (gym.make("DSA-Text-v0", **arguments), make_sb3_vec_env("DSA-Text-v0", 4, **arguments)):
        agent = make(name, env)
        assert agent.name == name and agent.gates == 4 and agent.steps == 0
        updates: list[tuple[int, dict[str, float]]] = []
        agent.learn(16, lambda steps, scalars, seen=updates: seen.append((steps, scalars)))  # type: ignore[misc]
        if name in LEARNERS:
            assert agent.steps == 16
            assert [steps for steps, _ in updates] == sorted(steps for steps, _ in updates)
            assert updates[-1][0] == 16
            assert all(isinstance(value, float) for _, scalars in updates for value in scalars.values())
        for split in ("train", "test"):
            other = gym.make("DSA-Text-v0", split=split, **arguments)
            other.reset(seed=0)
            masks = agent.masks(other.get_wrapper_attr("problem"))
            assert masks.shape == (len(other.get_wrapper_attr("problem")), 4)
            assert masks.dtype == np.uint8 and np.isin(masks, (0, 1)).all()
        observation, info = other.reset(seed=0)
        if name in (*LEARNERS, "static", "none", "all", "random"):
            batch = {key: value[None] for key, value in observation.items()}
            decision = agent.predict(batch, info)
            other.step(decision[0])
            probability = agent.probabilities(batch)
            assert probability.shape == (1, 4) and probability.dtype == np.float64
            assert ((probability >= 0) & (probability <= 1)).all()
            if name != "random":
                np.testing.assert_array_equal(decision, probability > 0.5)


@every_agent
def test_same_seed_same_agent(name: str, planted: Any, planted_vec_env: Any) -> None:
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(results))  # the global generator must not matter
        env = planted_vec_env(planted(0, users=10), 4)
        env.seed(seed)
        agent = make(name, env, seed)
        agent.learn(32)
        results.append((decisions(agent, agent.scorer), agent.state()))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())
    if name in LEARNERS:
        assert any(not torch.equal(value, results[2][1][key]) for key, value in results[0][1].items())
    if name == "random":
        assert (results[0][0] != results[2][0]).any()


@every_agent
def test_save_and_load(name: str, planted: Any, planted_vec_env: Any, tmp_path: Path) -> None:
    problem = planted(0, users=10)
    agent = make(name, planted_vec_env(problem, 4), 5)
    agent.learn(32)
    agent.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.json", "agent.safetensors"]
    assert json.loads((tmp_path / "agent.json").read_text())["agent"] == name
    fresh = make(name, planted_vec_env(planted(0, users=10), 2), 6)
    fresh.load(tmp_path)
    assert fresh.steps == agent.steps and fresh.seed == 5
    np.testing.assert_array_equal(decisions(fresh, problem), decisions(agent, problem))
    fresh.learn(32)
    assert fresh.steps in (agent.steps, 2 * agent.steps)


@pytest.mark.parametrize("name", LEARNERS)
def test_resumed_run_is_the_uninterrupted_one(name: str, planted: Any, planted_vec_env: Any, tmp_path: Path) -> None:
    whole, half, rest = (make(name, planted_vec_env(planted(0, users=5), 4), seed) for seed in (0, 0, 1))
    if isinstance(whole, SB3Agent):  # its calls begin with new episodes
        whole.learn(128)
        torch.manual_seed(5)  # nor does it matter what others draw in between
        np.random.seed(5)
        whole.learn(128)
    else:
        whole.learn(256)
    half.learn(128)
    half.save(tmp_path)
    rest.load(tmp_path)
    for key, value in half.state().items():
        torch.testing.assert_close(rest.state()[key], value, rtol=0, atol=0)
    rest.learn(128)
    assert rest.steps == whole.steps == 256
    assert rest.state().keys() == whole.state().keys()
    for key, value in whole.state().items():
        torch.testing.assert_close(rest.state()[key], value, rtol=0, atol=0)
    learned = [key for key in rest.state() if key.endswith(("weight", "weights", "probability"))]
    assert any((half.state()[key] != rest.state()[key]).any() for key in learned)


@every_agent
def test_another_agents_files(name: str, planted: Any, planted_vec_env: Any, tmp_path: Path) -> None:
    env = planted_vec_env(planted(0, users=4), 4)
    other = "all" if name != "all" else "none"
    make(other, env).save(tmp_path / "other")
    with pytest.raises(ValueError, match=f"holds agent '{other}'.*expected '{name}'"):
        make(name, env).load(tmp_path / "other")
    make(name, planted_vec_env(planted(0, users=4, gates=5), 4)).save(tmp_path / "five")
    with pytest.raises(ValueError, match=r"for 5 gates, expected .* for 6"):
        make(name, env).load(tmp_path / "five")


@pytest.mark.parametrize(
    ("name", "saved", "asked"),
    [("ppo", {"hidden": [4]}, {}), ("gumbel", {"hidden": 4}, {}), ("random", {"density": 0.5}, {})],
)
def test_other_settings_than_saved(
    name: str,
    saved: dict[str, Any],
    asked: dict[str, Any],
    planted: Any,
    planted_vec_env: Any,
    tmp_path: Path,
) -> None:
    env = planted_vec_env(planted(0, users=4), 4)
    make(name, env, **saved).save(tmp_path)
    with pytest.raises(ValueError, match=f"was saved with {next(iter(saved))}"):
        make(name, env, **asked).load(tmp_path)


@pytest.mark.parametrize(("typo", "meant"), [("pppo", "ppo"), ("gumbl", "gumbel"), ("user-static", "user_static")])
def test_unknown_name_suggests_the_closest(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"agent=.{typo}.*did you mean .{meant}."):
        agent_class(typo)


@every_agent
def test_unknown_setting(name: str, planted: Any, planted_env: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: unknown setting 'learning_rat'"):
        make(name, planted_env(planted(0, users=2)), learning_rat=1)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("ppo", "learning_rate", 0),
        ("ppo", "learning_rate", "fast"),
        ("ppo", "learning_rate", float("nan")),
        ("ppo", "n_steps", 0),
        ("ppo", "n_steps", 2.5),
        ("ppo", "epochs", 0),
        ("ppo", "hidden", [64, 0]),
        ("ppo", "hidden", 64),
        ("ppo", "input_baseline", "yes"),
        ("ppo", "observation_noise", -0.1),
        ("gumbel", "batch_size", 0),
        ("gumbel", "dropout", 1.0),
        ("gumbel", "temperature", 0.0),
        ("random", "density", 1.5),
    ],
)
def test_bad_setting(name: str, setting: str, value: Any, planted: Any, planted_env: Any) -> None:
    with pytest.raises(ValueError, match=setting):
        make(name, planted_env(planted(0, users=2)), **{setting: value})


@pytest.mark.parametrize("seed", [-1, 2**31, 1.5, "0", True])
def test_bad_seed(seed: Any, planted: Any, planted_env: Any) -> None:
    with pytest.raises(ValueError, match="seed="):
        make("none", planted_env(planted(0, users=2)), seed)


@every_agent
@pytest.mark.parametrize(
    ("space", "wrong", "message"),
    [
        ("action_space", spaces.Discrete(6), "MultiBinary"),
        ("action_space", spaces.MultiBinary((2, 3)), "MultiBinary"),
        ("observation_space", spaces.Box(-1, 1, (4,), np.float32), "Dict"),
        ("observation_space", spaces.Dict({"user": spaces.Box(-1, 1, (4,), np.float32)}), "context"),
        (
            "observation_space",
            spaces.Dict({"user": spaces.Discrete(3), "context": spaces.Box(-1, 1, (4,), np.float32)}),
            "Boxes",
        ),
    ],
)
def test_wrong_spaces(
    name: str, space: str, wrong: Any, message: str, planted: Any, planted_env: Callable[..., Any]
) -> None:
    env = wrapped(name, planted_env(planted(0, users=2)))
    setattr(env, space, wrong)
    if space == "action_space":
        message = re.escape(DESCRIPTIONS[agent_class(name).acts_on])
    with pytest.raises(ValueError, match=f"env: .*{message}"):
        make_agent(name, env)


@every_agent
def test_observation_that_is_no_batch(name: str, planted: Any, planted_env: Any) -> None:
    agent = make(name, planted_env(planted(0, users=2)))
    observation, info = agent.env.reset(seed=0)
    for wrong in (
        observation,
        {"user": observation["user"][None]},
        {"user": observation["user"][None], "context": np.zeros((2, 4), np.float32)},
        {"user": observation["user"][None], "context": np.zeros((1, 3), np.float32)},
    ):
        with pytest.raises(ValueError, match="observation: shapes"):
            agent.predict(wrong, info)


@pytest.mark.parametrize("name", ["gumbel", "static", "user_static", "oracle"])
def test_environment_without_a_scorer(name: str, planted: Any, planted_env: Any) -> None:
    env = planted_env(planted(0, users=2))
    observation, _ = env.reset(seed=0)
    del env.problem
    agent = make(name, env)
    with pytest.raises(ValueError, match=f"env: agent '{name}' needs .*'problem'"):
        agent.learn(8)
        agent.predict({key: value[None] for key, value in observation.items()}, {"user": 0, "input": 0})


@every_agent
def test_defaults_are_settings(name: str) -> None:
    least = agent_class(name).minimum
    assert set(least) <= set(zoo_defaults(name))
