"""Agents over stable-baselines3: what they see, remember, log and load, and that they learn."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.vec_env import VecEnv

from dsa_gym.agents import make_agent
from dsa_gym.agents.sb3 import BanditReplayBuffer, TrainingView, load_sb3_zip
from dsa_gym.envs.sb3 import GymnasiumVecEnv
from dsa_gym.envs.wrappers import RelaxedMask, VectorDiscreteMask, VectorRelaxedMask

LIMIT = 1.0


class Script(VecEnv):
    """Plays prepared inputs, rewards and ends, (steps, num_envs)."""

    def __init__(self, inputs: NDArray[np.int64], rewards: NDArray[np.float32], ended: NDArray[np.bool_]) -> None:
        box = spaces.Box(-LIMIT, LIMIT, (3,), np.float32)
        self.render_mode = None
        super().__init__(inputs.shape[1], spaces.Dict({"user": box, "context": box}), spaces.MultiBinary(2))
        self.inputs, self.rewards, self.ended, self.time = inputs, rewards, ended, 0

    def _observation(self) -> dict[str, NDArray[np.float32]]:
        return {name: np.full((self.num_envs, 3), 0.5, np.float32) for name in ("user", "context")}

    def reset(self) -> Any:
        return self._observation()

    def step_async(self, actions: Any) -> None:
        self.time += 1

    def step_wait(self) -> Any:
        now = self.time - 1
        infos: list[dict[str, Any]] = [{"input": int(i), "terminal_observation": {}} for i in self.inputs[now]]
        return self._observation(), self.rewards[now].copy(), self.ended[now].copy(), infos

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


@pytest.fixture
def script(rng: np.random.Generator) -> Script:
    shape = (60, 8)
    inputs = rng.integers(0, 5 + np.arange(60)[:, None] // 10, shape)  # more of them are met as time goes on
    rewards = (inputs * 2.0 + rng.standard_normal(shape)).astype(np.float32)
    return Script(inputs, rewards, rng.random(shape) < 0.4)


def view(script: Script, **changes: Any) -> TrainingView:
    made = TrainingView(script, **{"input_baseline": True, "noise": 0.0, "seed": 0, **changes})
    made.reset()
    return made


def step(made: TrainingView) -> Any:
    return made.step(np.zeros((made.num_envs, 2), np.int8))


def test_baseline_is_the_running_mean_of_the_inputs_rewards(script: Script) -> None:
    memory = 0.8
    made, mean, visits = view(script, memory=memory), dict[int, float](), dict[int, int]()
    for inputs, rewards in zip(script.inputs.tolist(), script.rewards.astype(np.float64).tolist(), strict=True):
        expected = [reward - mean[i] if i in mean else 0.0 for i, reward in zip(inputs, rewards, strict=True)]
        np.testing.assert_allclose(step(made)[1], expected, atol=1e-5)
        for one in set(inputs):
            own = [reward for i, reward in zip(inputs, rewards, strict=True) if i == one]
            visits[one] = visits.get(one, 0) + len(own)
            rate = max(len(own) / visits[one], 1 - memory ** len(own))
            mean[one] = mean.get(one, 0.0) + rate * (sum(own) / len(own) - mean.get(one, 0.0))
    np.testing.assert_allclose(made.baseline, [mean[i] for i in range(len(mean))], atol=1e-9)
    np.testing.assert_array_equal(made.visits, [visits[i] for i in range(len(visits))])


def test_baseline_is_the_plain_mean_at_first(script: Script) -> None:
    made = view(script, memory=1.0)
    for _ in range(60):
        step(made)
    for i, mean in enumerate(made.baseline):
        assert mean == pytest.approx(script.rewards[script.inputs == i].mean(), rel=1e-5)


@pytest.mark.parametrize("relative", [False, True])
def test_what_is_not_the_reward_stays(script: Script, relative: bool) -> None:
    made = view(script, input_baseline=relative)
    for now in range(60):
        observation, rewards, dones, infos = step(made)
        np.testing.assert_array_equal(dones, script.ended[now])
        assert [info["input"] for info in infos] == script.inputs[now].tolist()
        assert rewards.dtype == np.float32
        if not relative:
            np.testing.assert_array_equal(rewards, script.rewards[now])
        np.testing.assert_array_equal(observation, np.full((8, 6), 0.5))
        assert "terminal_observation" not in infos[0]


def test_noise_is_seeded_and_stays_in_the_box(script: Script) -> None:
    def seen(seed: int) -> NDArray[np.float32]:
        script.time = 0
        made = view(script, noise=2.0, seed=seed)
        return np.stack([step(made)[0] for _ in range(20)])

    first = seen(0)
    assert first.dtype == np.float32
    assert np.abs(first).max() == LIMIT and first.std() > 0.5
    np.testing.assert_array_equal(first, seen(0))
    assert (first != seen(1)).any()


def test_infos_without_inputs(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    made = view(script)
    plain = script.step_wait
    monkeypatch.setattr(script, "step_wait", lambda: (*plain()[:3], [{}] * 8))
    with pytest.raises(ValueError, match="input_baseline=False"):
        step(made)


ON_POLICY = ("ppo", "a2c", "trpo", "maskable_ppo", "recurrent_ppo")
DISCRETE = ("dqn", "qr_dqn")
SOFT = ("sac", "tqc", "crossq")
SMALL: dict[str, Any] = {"hidden": [8], "batch_size": 16, "learning_starts": 8, "gradient_steps": 1, "buffer_size": 100}


def wrapped(name: str, env: VecEnv) -> VecEnv:
    """The environments with the actions that an agent acts on."""
    vectors = env.envs  # type: ignore[attr-defined]
    if name in ON_POLICY:
        return env
    return GymnasiumVecEnv(VectorDiscreteMask(vectors) if name in DISCRETE else VectorRelaxedMask(vectors))


def test_observations_are_one_vector_by_name(planted: Any, planted_vec_env: Any) -> None:
    problem = planted(0, users=5)
    made = TrainingView(planted_vec_env(problem, 4), input_baseline=False, noise=0.0, seed=0)
    assert made.observation_space.shape == (8,)
    expected = np.concatenate([problem.observations["context"], problem.observations["user"]], axis=1)
    np.testing.assert_array_equal(made.flat(problem.observations), expected)
    seen = made.reset()
    assert isinstance(seen, np.ndarray) and (seen[:, None] == expected[None]).all(2).any(1).all()


def test_ppo_learns_the_planted_problem(planted: Any, planted_vec_env: Any) -> None:
    training, fresh = planted(0), planted(1)
    agent = make_agent("ppo", planted_vec_env(training, 256), 0, observation_noise=0.0)
    agent.learn(200_000)
    static = make_agent("static", planted_vec_env(training, 1))
    static.learn(0)
    assert fresh.share_of_gain(agent.masks(fresh), static.masks(fresh)[0]) >= 0.97


def test_rollouts_are_whole_and_logged(planted: Any, planted_vec_env: Any) -> None:
    agent = make_agent("ppo", planted_vec_env(planted(0, users=5), 8), 0, n_steps=4, batch_size=16, hidden=[8])
    logged: list[tuple[int, dict[str, float]]] = []
    agent.learn(100, lambda steps, scalars: logged.append((steps, scalars)))
    assert agent.steps == 128
    agent.learn(64, lambda steps, scalars: logged.append((steps, scalars)))
    assert agent.steps == 192
    assert [steps for steps, _ in logged] == [32, 64, 96, 128, 128, 160, 192, 192], "and after the last update"
    assert "train/loss" in logged[-1][1]
    assert agent.state()["visits"].sum() == 192


@pytest.mark.parametrize("name", ["ppo", "a2c", "maskable_ppo", "recurrent_ppo", *SOFT])
def test_entropy_bonus_is_per_gate(name: str, planted: Any, planted_vec_env: Any) -> None:
    for gates in (2, 6):
        env = wrapped(name, planted_vec_env(planted(0, users=2, gates=gates), 2))
        agent: Any = make_agent(name, env, entropy=0.3)
        assert agent.model.ent_coef == pytest.approx(0.3 / gates)
        assert agent.model.gamma == 0.0


def test_bound_on_divergence_is_per_gate(planted: Any, planted_vec_env: Any) -> None:
    agent: Any = make_agent("trpo", planted_vec_env(planted(0, users=2), 2), gate_kl=0.01)
    assert agent.model.target_kl == pytest.approx(0.06)


def test_one_step_of_one_environment_is_no_rollout(planted: Any, planted_env: Any) -> None:
    with pytest.raises(ValueError, match="ppo: n_steps=1 with one environment"):
        make_agent("ppo", planted_env(planted(0, users=2)), n_steps=1)


def test_recurrent_predictions_begin_an_episode(planted: Any, planted_vec_env: Any) -> None:
    problem = planted(0, users=5)
    settings: dict[str, Any] = {"n_steps": 4, "batch_size": 16, "hidden": [8], "lstm": 8}
    agent: Any = make_agent("recurrent_ppo", planted_vec_env(problem, 4), 0, **settings)
    agent.learn(64)
    flat = agent.view.flat(problem.observations)
    expected = [agent.model.predict(row, state=None, deterministic=True)[0] for row in flat]
    np.testing.assert_array_equal(agent.masks(problem), expected)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_random_search_counts_steps_of_environments(num_envs: int, planted: Any, planted_vec_env: Any) -> None:
    problem = planted(0, users=5)
    env = wrapped("ars", planted_vec_env(problem, num_envs))
    agent = make_agent("ars", env, 0, directions=2, episodes=4)
    agent.learn(1)
    assert agent.steps == 2 * 2 * 4, "both ways along each direction"
    assert agent.state()["visits"].sum() == agent.steps


@pytest.mark.parametrize("name", DISCRETE)
def test_exploration_is_by_steps_so_far(name: str, planted: Any, planted_vec_env: Any) -> None:
    env = wrapped(name, planted_vec_env(planted(0, users=5), 4))
    agent: Any = make_agent(name, env, 0, **SMALL, exploration_steps=80, final_exploration=0.1)
    rates = []
    for _ in range(3):
        agent.learn(40)
        rates.append(agent.model.exploration_rate)
    assert rates == pytest.approx([0.55, 0.1, 0.1])


def test_numbered_masks_are_gates(planted: Any, planted_vec_env: Any) -> None:
    problem = planted(0, users=5)
    agent: Any = make_agent("dqn", wrapped("dqn", planted_vec_env(problem, 4)), 0, **SMALL)
    actions, _ = agent.model.predict(agent.view.flat(problem.observations), deterministic=True)
    masks = agent.masks(problem)
    assert masks.shape == (len(problem), 6) and len(np.unique(actions)) > 1
    np.testing.assert_array_equal(masks @ (1 << np.arange(6)), actions)


def remembering(rows: int, steps: int, envs: int) -> BanditReplayBuffer:
    """A buffer after some steps; what was done in them is numbered."""
    box = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    made = BanditReplayBuffer(rows * envs, box, spaces.Box(-1, 1, (3,), np.float32), "cpu", n_envs=envs)
    for step in range(steps):
        number = np.arange(envs, dtype=np.float32) + step * envs
        action = np.tile(number[:, None], 3)
        made.add(np.tile(number[:, None], 2), None, action, number, np.ones(envs), [{} for _ in range(envs)])
    return made


@pytest.mark.parametrize("steps", [0, 3, 5, 8])
def test_replay_buffer_goes_on_where_it_was(steps: int) -> None:
    saved, fresh = remembering(5, steps, 2), remembering(5, 0, 2)
    tensors = saved.state()
    assert len(tensors["rewards"]) == min(steps, 5), "the filled part only"
    fresh.load_state(tensors)
    assert fresh.pos == saved.pos and fresh.full == saved.full
    for name in saved.arrays:
        np.testing.assert_array_equal(getattr(fresh, name), getattr(saved, name))
    if steps:
        np.random.seed(0)
        first = saved.sample(32)
        np.random.seed(0)
        second = fresh.sample(32)
        assert all(torch.equal(one, other) for one, other in zip(first[:5], second[:5], strict=True))
        assert torch.equal(first.observations, first.next_observations)


@pytest.mark.parametrize(("rows", "envs"), [(5, 1), (10, 1), (20, 1), (3, 3), (5, 4), (2, 2), (9, 2)])
@pytest.mark.parametrize("steps", [3, 5, 8])
def test_replay_buffer_of_another_shape(steps: int, rows: int, envs: int) -> None:
    """It keeps the youngest steps, in their order."""
    saved, other = remembering(5, steps, 2), remembering(rows, 0, envs)
    other.load_state(saved.state())
    kept = min(min(steps, 5) * 2 // envs, rows)
    assert other.size() == kept
    aged = np.roll(other.rewards[:kept], -other.pos if other.full else 0, axis=0).reshape(-1)
    np.testing.assert_array_equal(aged, np.arange(2 * steps)[2 * steps - kept * envs :])
    other.add(
        np.zeros((envs, 2)), None, np.zeros((envs, 3)), np.full(envs, -1), np.ones(envs), [{} for _ in range(envs)]
    )
    assert (other.rewards == -1).sum() == envs
    assert other.rewards[other.rewards >= 0].min(initial=99) >= (aged[envs] if kept == rows and kept > 1 else 0)


def saved_by_sb3(model: Any, env: Any, path: Path, **settings: Any) -> Any:
    made = model("MultiInputPolicy", env, seed=3, device="cpu", **settings)
    made.learn(64)
    made.save(path)
    return made


@pytest.mark.parametrize(("name", "model"), [("ppo", PPO), ("a2c", A2C), ("sac", SAC)])
def test_policy_of_stable_baselines(name: str, model: Any, planted: Any, planted_env: Any, tmp_path: Path) -> None:
    problem = planted(0, users=10)
    env: Any = planted_env(problem)
    arch: Any = {"pi": [16, 8], "vf": [16, 8]}
    settings: dict[str, Any] = {"n_steps": 32} if name == "a2c" else {"n_steps": 32, "batch_size": 32}
    if name == "sac":
        env, arch, settings = RelaxedMask(env), [16, 8], {"learning_starts": 16}
    theirs = saved_by_sb3(model, env, tmp_path / "model.zip", policy_kwargs={"net_arch": arch}, **settings)
    ours = load_sb3_zip(name, tmp_path / "model.zip", env, trust=True)
    assert ours.config["hidden"] == [16, 8] and ours.steps == 64
    expected, _ = theirs.predict(problem.observations, deterministic=True)
    np.testing.assert_array_equal(ours.masks(problem), expected > 0)
    ours.save(tmp_path / "own")
    ours.learn(64)
    assert ours.steps >= 128


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_loading_needs_trust(planted: Any, planted_env: Any, tmp_path: Path) -> None:
    env, path, exploded = planted_env(planted(0, users=4)), tmp_path / "model.zip", tmp_path / "exploded"
    model = PPO("MultiInputPolicy", env, n_steps=32, batch_size=32, device="cpu")
    model.bomb = Bomb(exploded)  # type: ignore[attr-defined]
    model.save(path)
    with pytest.raises(ValueError, match=r"runs whatever code is in the file.*trust=True"):
        load_sb3_zip("ppo", path, env)
    assert not exploded.exists()
    load_sb3_zip("ppo", path, env, trust=True)
    assert exploded.exists(), "which is why"


def test_files_that_are_no_such_policy(planted: Any, planted_env: Any, tmp_path: Path) -> None:
    env = planted_env(planted(0, users=4))
    with pytest.raises(ValueError, match="agent='rloo': not an algorithm of stable-baselines3"):
        load_sb3_zip("rloo", tmp_path / "none.zip", env, trust=True)
    with pytest.raises(ValueError, match=r"none\.zip: expected a zip file"):
        load_sb3_zip("ppo", tmp_path / "none.zip", env, trust=True)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("data", json.dumps({}))
    with pytest.raises(ValueError, match=r"other\.zip: no PPO could be loaded"):
        load_sb3_zip("ppo", tmp_path / "other.zip", env, trust=True)
    for settings, message in (
        ({"policy_kwargs": {"net_arch": {"pi": [8], "vf": [4]}}}, "net_arch=.*the same layers"),
        ({"policy_kwargs": {"activation_fn": torch.nn.ReLU}}, "activation_fn=ReLU, the agent's is Tanh"),
    ):
        saved_by_sb3(PPO, env, tmp_path / "model.zip", n_steps=32, batch_size=32, **settings)
        with pytest.raises(ValueError, match=message):
            load_sb3_zip("ppo", tmp_path / "model.zip", env, trust=True)
    saved_by_sb3(PPO, env, tmp_path / "model.zip", n_steps=32, batch_size=32)
    with pytest.raises(ValueError, match=r"not a policy that agent 'ppo' could have made: .*size mismatch"):
        load_sb3_zip("ppo", tmp_path / "model.zip", planted_env(planted(0, users=4, gates=5)), trust=True)
    other = planted_env(planted(0, users=4))
    other.observation_space = spaces.Dict({name: spaces.Box(-9, 9, (4,), np.float32) for name in ("user", "context")})
    with pytest.raises(ValueError, match=r"observes Dict.*, the environment gives Dict"):
        load_sb3_zip("ppo", tmp_path / "model.zip", other, trust=True)
