"""What the agents share that are algorithms of stable-baselines3 and sb3-contrib.

An algorithm sees the environment through :class:`TrainingView`. Of a contextual bandit nothing is worth looking ahead
for: ``gamma = 0`` throughout.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from gymnasium import Env, spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor, nn

from dsa_gym import storage
from dsa_gym.agents import agent_class
from dsa_gym.agents.base import Agent, Bits, LogitAgent, Observation, OnUpdate


class TrainingView(VecEnvWrapper):
    """What an algorithm sees of its environments while it learns.

    - Observations are one vector: all parts of the dictionary, by name, one after the other. Some algorithms take
      nothing else, and to a network of dense layers it is the same.
    - Rewards are relative to the running mean of the same input's rewards, so that how hard an input is does
      not swamp what the mask does. That is a baseline: it does not change which policy is best.
    - Optionally, Gaussian noise on the observations, so that the policy cannot memorise the training users.

    Attributes:
        baseline: Running mean of each input's rewards, grown as inputs are met.
        visits: How often each was met.
    """

    def __init__(self, venv: VecEnv, *, input_baseline: bool, noise: float, seed: int, memory: float = 0.95) -> None:
        """Wrap environments whose infos name their ``input``.

        Args:
            venv: The environments.
            input_baseline: Whether rewards are made relative.
            noise: Standard deviation of the noise.
            seed: Seeds the noise.
            memory: Weight of the past in the running mean, once an input has been met often enough.
        """
        boxes = cast(spaces.Dict, venv.observation_space).spaces
        self._names = sorted(boxes)
        low, high = (
            np.concatenate([getattr(boxes[name], end) for name in self._names]).astype(np.float32)
            for end in ("low", "high")
        )
        super().__init__(venv, observation_space=spaces.Box(low, high, dtype=np.float32))
        self._low, self._high = low, high
        self._relative, self._noise, self._memory = input_baseline, noise, memory
        self.seed_noise(seed)
        self.baseline = np.zeros(0)
        self.visits = np.zeros(0)

    def seed_noise(self, seed: int) -> None:
        """Start the noise afresh."""
        self._generator = np.random.default_rng(seed)

    def flat(self, observation: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        """Observations of the environment, each (rows, dim), as vectors (rows, all dims)."""
        return np.concatenate([observation[name] for name in self._names], axis=1, dtype=np.float32)

    def reset(self) -> VecEnvObs:
        """Reset the environments."""
        return self._seen(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """Step the environments and make the rewards relative."""
        observation, rewards, dones, infos = self.venv.step_wait()
        for info in infos:  # it is a dictionary still, and with gamma = 0 nobody needs it
            info.pop("terminal_observation", None)
        if self._relative:
            if "input" not in infos[0]:
                raise ValueError("env: its infos name no 'input'; make the agent with input_baseline=False")
            inputs = np.fromiter((info["input"] for info in infos), np.int64, len(infos))
            rewards = self._relative_to_input(inputs, rewards)
        return self._seen(observation), rewards, dones, infos

    def _relative_to_input(self, inputs: NDArray[np.int64], rewards: NDArray[np.float32]) -> NDArray[np.float32]:
        if inputs.max() >= len(self.baseline):
            grown = int(inputs.max()) + 1 - len(self.baseline)
            self.baseline = np.concatenate([self.baseline, np.zeros(grown)])
            self.visits = np.concatenate([self.visits, np.zeros(grown)])
        known = self.visits[inputs] > 0
        relative = np.where(known, rewards - self.baseline[inputs], 0.0)
        met, place, count = np.unique(inputs, return_inverse=True, return_counts=True)
        mean = np.bincount(place, rewards) / count  # of this step's rewards of each input
        self.visits[met] += count
        rate = np.maximum(count / self.visits[met], 1 - self._memory**count)
        self.baseline[met] += rate * (mean - self.baseline[met])
        return relative.astype(np.float32)

    def _seen(self, observation: VecEnvObs) -> NDArray[np.float32]:
        flat = self.flat(cast(Observation, observation))
        if not self._noise:
            return flat
        noise = self._generator.normal(0.0, self._noise, flat.shape).astype(np.float32)
        clipped: NDArray[np.float32] = np.clip(flat + noise, self._low, self._high)
        return clipped


class Forward(KVWriter):
    """Hands what stable-baselines3 logs to ``on_update``."""

    def __init__(self, on_update: OnUpdate) -> None:
        self._on_update = on_update

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Hand on the numbers."""
        numbers = {k: float(v) for k, v in key_values.items() if isinstance(v, int | float | np.number)}
        self._on_update(step, numbers)

    def close(self) -> None:
        """Nothing is open."""


class SB3Agent(Agent):
    """An agent that is an algorithm of stable-baselines3 over a :class:`TrainingView`.

    A call of :meth:`learn` depends on the state and the seed alone: it seeds all generators by seed and steps so far,
    and begins with new episodes. So a run that was saved between two calls and goes on elsewhere is the same run.

    Attributes:
        algorithm_class: The algorithm.
        view: What it sees of the environment.
        model: The algorithm with this agent's settings.
        log_interval: How often it logs, in the algorithm's own unit.
    """

    algorithm_class: ClassVar[type[BaseAlgorithm]]
    minimum = {"learning_rate": 1e-12, "observation_noise": 0}
    log_interval: ClassVar[int] = 1
    _counters: ClassVar[tuple[str, ...]] = ("_n_updates", "_n_calls")  # of updates: what is due every so many of them

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Build the algorithm.

        Args:
            env: A stable-baselines3 ``VecEnv``, or a Gymnasium environment.
            seed: Seeds initialisation, exploration and minibatches.
            **config: Overrides of ``agents/zoo/NAME.yaml``.

        Raises:
            ValueError: If a setting is unknown or out of range.
        """
        super().__init__(env, seed, **config)
        venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: cast("Env[Any, Any]", env)])
        self.view = TrainingView(
            venv,
            input_baseline=self.config["input_baseline"],
            noise=self.config["observation_noise"],
            seed=self.seed,
        )
        self.model: Any = self.algorithm_class(**self.arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that every algorithm takes, from the settings."""
        return {
            "policy": "MlpPolicy",
            "env": self.view,
            "learning_rate": self.config["learning_rate"],
            "seed": self.seed,
            "device": "cpu",
        }

    @property
    def steps(self) -> int:
        """Environment steps learned so far."""
        return int(self.model.num_timesteps)

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Learn for ``steps`` environment steps, rounded up to whole rollouts.

        Raises:
            FloatingPointError: If the weights are no longer finite.
        """
        seeded = np.random.SeedSequence((self.seed, self.steps)).generate_state(1)
        seed = int(seeded[0]) // 2  # generators differ in whether they take 32 bits
        self.model.set_random_seed(seed)
        self.view.seed_noise(seed)
        self.model._last_obs = None  # begin with a reset, which is when the environments' seed takes effect
        self.model._episode_num = self.steps  # says when to log
        self.model.set_logger(Logger(folder=None, output_formats=[Forward(on_update)] if on_update else []))
        self._run(steps)
        self.model.logger.dump(self.steps)  # the last update, logged after its rollout was
        if not all(bool(torch.isfinite(p).all()) for p in self.model.policy.parameters()):
            raise FloatingPointError(
                f"{self.name}: weights are not finite after {self.steps} steps: lower learning_rate"
            )

    def _run(self, steps: int, **settings: Any) -> None:
        self.model.learn(steps, log_interval=self.log_interval, reset_num_timesteps=False, **settings)

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """The deterministic action, as gates (rows, G)."""
        self.rows(observation)
        actions, _ = self.model.predict(self.view.flat(observation), deterministic=True)
        if self.acts_on == "discrete":
            actions = actions[:, None] >> np.arange(self.gates) & 1
        decided: Bits = (actions > 0).astype(np.uint8)
        return decided

    def state(self) -> dict[str, Tensor]:
        """Networks, optimisers, baselines, counters and step count."""
        tensors: dict[str, Tensor] = {}
        for part in self.model.get_parameters():  # such as policy, policy.optimizer
            held = recursive_getattr(self.model, part)
            if isinstance(held, torch.optim.Optimizer):
                found = storage.optimizer_tensors(held)
            else:
                found = held.state_dict()
            tensors |= {f"{part}/{name}": value for name, value in found.items()}
        for name in self._counters:
            if hasattr(self.model, name):
                tensors[name] = torch.tensor(getattr(self.model, name))
        tensors["baseline"] = torch.from_numpy(self.view.baseline.copy())
        tensors["visits"] = torch.from_numpy(self.view.visits.copy())
        return tensors | {"steps": torch.tensor(self.steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        for part in self.model.get_parameters():
            own = {k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")}
            held = recursive_getattr(self.model, part)
            if isinstance(held, torch.optim.Optimizer):
                storage.load_optimizer_tensors(held, own)
            else:
                held.load_state_dict(own)
        for name in self._counters:
            if hasattr(self.model, name):
                setattr(self.model, name, int(tensors[name]))
        self.view.baseline = tensors["baseline"].numpy().copy()
        self.view.visits = tensors["visits"].numpy().copy()
        self.model.num_timesteps = int(tensors["steps"])


class OnPolicyAgent(LogitAgent, SB3Agent):
    """An agent that learns from what its present policy, independent Bernoulli gates, has just done."""

    minimum = {**SB3Agent.minimum, "hidden": 1, "n_steps": 1, "weight_decay": 0}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that every on-policy algorithm takes.

        Raises:
            ValueError: If a rollout has but one step, of which advantages cannot be normalised.
        """
        settings = self.config
        if self.rollout < 2:
            raise ValueError(f"{self.name}: n_steps={settings['n_steps']} with one environment, expected at least 2")
        policy = {
            "net_arch": {"pi": list(settings["hidden"]), "vf": list(settings["hidden"])},
            "activation_fn": nn.Tanh,
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": settings["weight_decay"], "eps": 1e-5},
        }
        fixed = {"n_steps": settings["n_steps"], "gamma": 0.0, "gae_lambda": 0.0}
        return {**super().arguments, **fixed, "policy_kwargs": policy}

    @property
    def rollout(self) -> int:
        """Steps of a rollout."""
        return int(self.view.num_envs * self.config["n_steps"])

    @torch.inference_mode()
    def logits(self, observation: Observation) -> Tensor:
        """Logit of each gate (rows, G)."""
        self.model.policy.set_training_mode(False)
        return self._logits(torch.from_numpy(self.view.flat(observation)))

    def _logits(self, observed: Tensor) -> Tensor:
        """The policy's logits (rows, G) at observations (rows, dim)."""
        logits: Tensor = self.model.policy.get_distribution(observed).distribution.logits
        return logits


class PPOFamilyAgent(OnPolicyAgent):
    """Proximal policy optimisation and its relatives: epochs of minibatches of a rollout, clipped."""

    minimum = {
        **OnPolicyAgent.minimum,
        "batch_size": 2,
        "clip_range": 1e-12,
        "entropy": 0,
        "epochs": 1,
    }

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of PPO; the entropy coefficient is per gate, for the entropy of all gates is a sum."""
        settings = self.config
        return {
            **super().arguments,
            "batch_size": min(settings["batch_size"], self.rollout),
            "n_epochs": settings["epochs"],
            "clip_range": settings["clip_range"],
            "ent_coef": settings["entropy"] / self.gates,
        }


class BanditReplayBuffer(ReplayBuffer):
    """A replay buffer that keeps no next observations: with ``gamma = 0`` they are the observations themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the arrays."""
        super().__init__(*args, **kwargs)
        self.next_observations = self.observations

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: Any) -> None:
        """Add a step of all environments."""
        super().add(obs, obs, action, reward, done, infos)

    arrays = ("observations", "actions", "rewards", "dones")

    def state(self) -> dict[str, Tensor]:
        """The filled part, (rows, environments, ...), and the next place."""
        filled = self.size()
        tensors = {name: torch.from_numpy(getattr(self, name)[:filled].copy()) for name in self.arrays}
        return tensors | {"next": torch.tensor(self.pos)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state` returned.

        For another number of environments, or another size, the youngest steps are laid out anew.
        """
        rows, envs = tensors["rewards"].shape
        place = int(tensors["next"])
        fits = envs == self.n_envs and (rows == self.buffer_size or place == rows < self.buffer_size)
        keep = min(rows * envs // self.n_envs, self.buffer_size)
        for name in self.arrays:
            values = tensors[name].numpy()
            if not fits:
                aged = np.roll(values, -place, axis=0).reshape(rows * envs, *values.shape[2:])
                values = aged[len(aged) - keep * self.n_envs :].reshape(keep, self.n_envs, *values.shape[2:])
            getattr(self, name)[: len(values)] = values
        filled = rows if fits else keep
        self.full, self.pos = filled == self.buffer_size, place if fits else filled % self.buffer_size


class OffPolicyAgent(SB3Agent):
    """An agent that learns from all it has done so far, out of a replay buffer; its networks predict rewards."""

    log_interval = 4096  # episodes
    minimum = {
        **SB3Agent.minimum,
        "batch_size": 1,
        "buffer_size": 1,
        "gradient_steps": 1,
        "hidden": 1,
        "learning_starts": 0,
        "weight_decay": 0,
    }

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that every off-policy algorithm takes."""
        settings = self.config
        names = ("batch_size", "buffer_size", "gradient_steps", "learning_starts")
        policy = {
            "net_arch": list(settings["hidden"]),
            "optimizer_class": torch.optim.AdamW,
            "optimizer_kwargs": {"weight_decay": settings["weight_decay"]},
        }
        fixed = {"gamma": 0.0, "train_freq": 1, "replay_buffer_class": BanditReplayBuffer}
        return {**super().arguments, **fixed, **{name: settings[name] for name in names}, "policy_kwargs": policy}

    @property
    def buffer(self) -> BanditReplayBuffer:
        """What it remembers."""
        return cast(BanditReplayBuffer, self.model.replay_buffer)

    def state(self) -> dict[str, Tensor]:
        """What every algorithm's state is, and the replay buffer."""
        return super().state() | {f"buffer/{name}": value for name, value in self.buffer.state().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        super().load_state(tensors)
        self.buffer.load_state({k.removeprefix("buffer/"): v for k, v in tensors.items() if k.startswith("buffer/")})


class SoftActorCriticAgent(OffPolicyAgent):
    """Soft actor-critic and its relatives on relaxed masks."""

    acts_on = "relaxed"
    minimum = {**OffPolicyAgent.minimum, "entropy": 0}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of soft actor-critic; the entropy coefficient is per gate and fixed."""
        return {**super().arguments, "ent_coef": self.config["entropy"] / self.gates}


def load_sb3_zip(agent: str, path: Path, env: Any, *, trust: bool = False, seed: int = 0, **config: Any) -> SB3Agent:
    """Make an agent of a policy that stable-baselines3's own ``model.save`` wrote.

    Networks and step count are taken over; optimiser and replay buffer start anew.

    Args:
        agent: Name of the agent whose algorithm it is, such as ``ppo``.
        path: The zip file.
        env: The environment, with the spaces that the policy was trained on.
        trust: That the file may run code: it holds pickles.
        seed: Seeds the agent.
        **config: The agent's settings; the sizes of the layers are the file's.

    Raises:
        ValueError: If it is not trusted, no such file, or a policy that the agent could not have made.
    """
    found = agent_class(agent)
    if not issubclass(found, SB3Agent):
        raise ValueError(f"agent={agent!r}: not an algorithm of stable-baselines3")
    if not trust:
        raise ValueError(
            f"{path}: stable-baselines3 saves pickles, and loading them runs whatever code is in the file; "
            "if you know who made it, say so with trust=True (--trust)"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: expected a zip file that model.save of stable-baselines3 wrote")
    try:
        saved: Any = found.algorithm_class.load(path, device="cpu")
    except Exception as error:  # whatever its pickles raise
        raise ValueError(f"{path}: no {found.algorithm_class.__name__} could be loaded: {error}") from error
    layers = saved.policy.net_arch
    sizes = [list(size) for size in (layers.values() if isinstance(layers, dict) else [layers])]
    if any(size != sizes[0] for size in sizes):
        raise ValueError(f"{path}: net_arch={layers}, expected the same layers for all networks")
    made = found(env, seed, **{**config, "hidden": sizes[0]})
    if saved.observation_space not in (env.observation_space, made.view.observation_space):
        raise ValueError(f"{path}: observes {saved.observation_space}, the environment gives {env.observation_space}")
    own = made.model.policy
    if saved.policy.activation_fn is not own.activation_fn:
        names = saved.policy.activation_fn.__name__, own.activation_fn.__name__
        raise ValueError(f"{path}: activation_fn={names[0]}, the agent's is {names[1]}")
    weights = {f"policy/{name}": value for name, value in saved.policy.state_dict().items()}
    try:
        made.load_state(made.state() | weights | {"steps": torch.tensor(saved.num_timesteps)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a policy that agent {agent!r} could have made: {reason}") from error
    return made
