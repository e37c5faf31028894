"""PPO for gates: stable-baselines3's algorithm with what a bandit over binary gates needs around it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from gymnasium import Env
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor, nn

from dsa_gym import storage
from dsa_gym.agents.base import LogitAgent, Observation, OnUpdate


class TrainingView(VecEnvWrapper):
    """What PPO sees of its environments while it learns.

    - Rewards are relative to the running mean of the same input's rewards, so that how hard an input is does
      not swamp what the mask does. That is a baseline: it does not change which policy is best.
    - Optionally, Gaussian noise on the observations, so that the policy cannot memorise the training users.

    Attributes:
        baseline: Running mean of each input's rewards, grown as inputs are met.
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
        super().__init__(venv)
        self._relative, self._noise, self._memory = input_baseline, noise, memory
        self.seed_noise(seed)
        self.baseline = np.zeros(0)
        self.visits = np.zeros(0)

    def seed_noise(self, *seed: int) -> None:
        """Start the noise afresh."""
        self._generator = np.random.default_rng(seed)

    def reset(self) -> VecEnvObs:
        """Reset the environments."""
        return self._blur(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """Step the environments and make the rewards relative."""
        observation, rewards, dones, infos = self.venv.step_wait()
        if self._relative:
            if "input" not in infos[0]:
                raise ValueError("env: its infos name no 'input'; make the agent with input_baseline=False")
            inputs = np.fromiter((info["input"] for info in infos), np.int64, len(infos))
            rewards = self._relative_to_input(inputs, rewards)
        return self._blur(observation), rewards, dones, infos

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

    def _blur(self, observation: VecEnvObs) -> VecEnvObs:
        if not self._noise:
            return observation
        blurred = {}
        for name, value in cast(Observation, observation).items():
            noise = self._generator.normal(0.0, self._noise, value.shape).astype(np.float32)
            box = cast(Any, self.observation_space)[name]
            blurred[name] = np.clip(value + noise, box.low, box.high)
        return blurred


class _Forward(KVWriter):
    """Hands what stable-baselines3 logs to ``on_update``."""

    def __init__(self, on_update: OnUpdate) -> None:
        self._on_update = on_update

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        numbers = {k: float(v) for k, v in key_values.items() if isinstance(v, int | float | np.number)}
        self._on_update(step, numbers)

    def close(self) -> None:
        pass


class PPOAgent(LogitAgent):
    """Proximal policy optimisation (Schulman et al., 2017) over independent Bernoulli gates.

    A contextual bandit has ``gamma = 0``. The entropy bonus is per gate (its coefficient is ``entropy / G``,
    for the entropy of all gates is a sum), and the weights decay, since what matters are users that were
    never seen.
    """

    name = "ppo"
    minimum = {
        "batch_size": 2,
        "clip_range": 1e-12,
        "entropy": 0,
        "epochs": 1,
        "hidden": 1,
        "learning_rate": 1e-12,
        "n_steps": 1,
        "observation_noise": 0,
        "weight_decay": 0,
    }

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Build the policy.

        Args:
            env: A stable-baselines3 ``VecEnv``, or a Gymnasium environment.
            seed: Seeds initialisation, exploration and minibatches.
            **config: Overrides of ``agents/zoo/ppo.yaml``.

        Raises:
            ValueError: If a setting is unknown or out of range.
        """
        super().__init__(env, seed, **config)
        venv = env if isinstance(env, VecEnv) else DummyVecEnv([lambda: cast("Env[Any, Any]", env)])
        settings = self.config
        self.view = TrainingView(
            venv,
            input_baseline=settings["input_baseline"],
            noise=settings["observation_noise"],
            seed=self.seed,
        )
        rollout = venv.num_envs * settings["n_steps"]
        if rollout < 2:
            raise ValueError(f"ppo: n_steps={settings['n_steps']} with one environment, expected at least 2")
        self.model = PPO(
            "MultiInputPolicy",
            self.view,
            learning_rate=settings["learning_rate"],
            n_steps=settings["n_steps"],
            batch_size=min(settings["batch_size"], rollout),
            n_epochs=settings["epochs"],
            gamma=0.0,
            gae_lambda=0.0,
            clip_range=settings["clip_range"],
            ent_coef=settings["entropy"] / self.gates,
            policy_kwargs={
                "net_arch": {"pi": list(settings["hidden"]), "vf": list(settings["hidden"])},
                "activation_fn": nn.Tanh,
                "optimizer_class": torch.optim.AdamW,
                "optimizer_kwargs": {"weight_decay": settings["weight_decay"], "eps": 1e-5},
            },
            seed=self.seed,
            device="cpu",
        )
        self._offset = 0

    @property
    def steps(self) -> int:
        """Environment steps learned so far."""
        return self._offset + self.model.num_timesteps

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Learn for ``steps`` environment steps, rounded up to whole rollouts."""
        offset = self._offset = self.steps
        self.model.num_timesteps = 0
        writers: list[KVWriter] = []
        if on_update is not None:
            writers = [_Forward(lambda step, scalars: on_update(offset + step, scalars))]
        self.model.set_logger(Logger(folder=None, output_formats=writers))
        self.model.learn(steps, log_interval=1)
        self.model.logger.dump(self.model.num_timesteps)  # the last update, logged after its rollout was
        if not all(bool(torch.isfinite(p).all()) for p in self.model.policy.parameters()):
            raise FloatingPointError(f"ppo: weights are not finite after {self.steps} steps: lower learning_rate")

    @torch.inference_mode()
    def logits(self, observation: Observation) -> Tensor:
        """Logit of each gate (rows, G)."""
        policy = self.model.policy
        policy.set_training_mode(False)
        tensors = {name: torch.as_tensor(value) for name, value in observation.items()}
        distribution = cast(Any, policy.get_distribution(tensors)).distribution
        logits: Tensor = distribution.logits
        return logits

    def state(self) -> dict[str, Tensor]:
        """Policy, optimiser, baselines and step count."""
        tensors = {f"policy.{name}": value for name, value in self.model.policy.state_dict().items()}
        tensors |= storage.optimizer_tensors(self.model.policy.optimizer)
        tensors["baseline"] = torch.from_numpy(self.view.baseline.copy())
        tensors["visits"] = torch.from_numpy(self.view.visits.copy())
        return tensors | {"steps": torch.tensor(self.steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned; the generators start from seed and step count."""
        self.model.policy.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("policy.")})
        storage.load_optimizer_tensors(self.model.policy.optimizer, tensors)
        self.view.baseline, self.view.visits = (
            tensors["baseline"].numpy().copy(),
            tensors["visits"].numpy().copy(),
        )
        self._offset, self.model.num_timesteps = int(tensors["steps"]), 0
        self.model.set_random_seed(self.seed + 7919 * self._offset % 2**31)
        self.view.seed_noise(self.seed, self._offset)
