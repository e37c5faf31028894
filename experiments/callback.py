"""The policy analysis of :mod:`dsa_gym.experiments.tensorboard` as a callback of stable-baselines3."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import BernoulliDistribution

from dsa_gym.agents.base import ACTIONS, DESCRIPTIONS
from dsa_gym.agents.sb3 import Forward
from dsa_gym.experiments.monitor import Monitor
from dsa_gym.experiments.policy_analysis import Floats
from dsa_gym.experiments.tensorboard import PolicyLog
from dsa_gym.problem import Bits


class PolicyCallback(BaseCallback):
    """Writes for TensorBoard what a stable-baselines3 model that gates learns, and what it uses.

    The model may be any algorithm, trained on any environment of one mask per input: ``DSA-Text-v0``, ``-Rec``,
    ``-Image``, their ``Table`` and ``DSA-Planted-v0``, also through the wrappers for discrete and relaxed masks.

        import dsa_gym
        from dsa_gym.envs import make_sb3_vec_env
        from dsa_gym.experiments.callback import PolicyCallback
        from stable_baselines3 import PPO

        model = PPO("MultiInputPolicy", make_sb3_vec_env("DSA-Text-v0", 64), n_steps=32, gamma=0.0)
        callback = PolicyCallback("runs/my-ppo", "DSA-Text-v0", every=20_000)
        model.learn(200_000, callback=callback)  # then: tensorboard --logdir runs

    What the algorithm itself logs is written to the same run, so ``tensorboard_log`` is not needed.
    """

    def __init__(
        self, folder: str | Path, env: str | Monitor, *, every: int = 10_000, decode: bool = True, **arguments: Any
    ) -> None:
        """Open the inputs that the policy is watched on.

        Args:
            folder: The run, a folder of its own.
            env: Id of the environment, or a monitor over other problems.
            every: Environment steps between evaluations.
            decode: Whether the text panel shows what the model makes of the examples.
            **arguments: Arguments of the environment, such as ``bundle`` or ``l0_penalty``.

        Raises:
            ValueError: If an argument is wrong.
        """
        super().__init__()
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: expected a positive number of environment steps")
        self._folder, self._every, self._decode = Path(folder), every, decode
        self._monitor = env if isinstance(env, Monitor) else Monitor.of_env(env, **arguments)

    def _on_training_start(self) -> None:
        self._policy = ModelPolicy(self.model, self._monitor.problems["unseen"].gates)
        self._log = PolicyLog(self._folder, self._monitor, self._policy, decode=self._decode)
        self._evaluated = self.num_timesteps
        self._forward = Forward(self._log.scalars)
        self.logger.output_formats.append(self._forward)

    def _on_step(self) -> bool:
        if self.num_timesteps - self._evaluated >= self._every:
            self._evaluate(last=False)
        return True

    def _on_training_end(self) -> None:
        scores = self._evaluate(last=True)
        self.logger.dump(self.num_timesteps)  # the last update, logged after its rollout was
        self.logger.output_formats.remove(self._forward)
        self._log.hparams(_settings(self.model), scores)

    def _evaluate(self, *, last: bool) -> dict[str, float]:
        self._evaluated = self.num_timesteps
        scores, decisions = self._monitor(self._policy)
        self._log.evaluation(self._policy, scores, decisions, last=last)
        return scores


class ModelPolicy:
    """The policy of a stable-baselines3 model, as masks and probabilities."""

    def __init__(self, model: BaseAlgorithm, gates: int) -> None:
        """Find out how the model acts.

        Raises:
            ValueError: If its actions are no masks of that many gates.
        """
        self._model = model
        kinds = {kind: count(model.action_space) for kind, count in ACTIONS.items()}
        fitting = [kind for kind, count in kinds.items() if count == gates]
        if not fitting:
            expected = "; ".join(DESCRIPTIONS.values())
            raise ValueError(f"model: acts on {model.action_space}, expected masks of G={gates} gates: {expected}")
        self._kind = fitting[0]
        self._masks = np.arange(2**gates)[:, None] >> np.arange(gates) & 1 if self._kind == "discrete" else None

    @property
    def steps(self) -> int:
        """Environment steps learned so far."""
        return self._model.num_timesteps

    def masks(self, scorer: Any) -> Bits:
        """Deterministic decisions for all inputs of a split, (n, G)."""
        actions = self._model.predict(self._seen(scorer.observations), deterministic=True)[0]
        if self._masks is not None:
            numbered: Bits = self._masks[actions].astype(np.uint8)
            return numbered
        return np.asarray(actions > 0).astype(np.uint8)

    @torch.inference_mode()
    def probabilities(self, observation: dict[str, NDArray[np.float32]]) -> Floats | None:
        """Probability that each gate is on, (rows, G); None unless it is one of the observation alone, gate by gate."""
        policy: Any = self._model.policy
        gatewise = isinstance(getattr(policy, "action_dist", None), BernoulliDistribution)
        if not gatewise or hasattr(policy, "lstm_actor"):
            return None
        policy.set_training_mode(False)
        tensors = policy.obs_to_tensor(self._seen(observation))[0]
        probabilities: Floats = policy.get_distribution(tensors).distribution.probs.double().cpu().numpy()
        return probabilities

    def _seen(self, observation: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """What the model sees of observations, each (rows, dim).

        Raises:
            ValueError: If it observes something else.
        """
        space = self._model.observation_space
        shapes = {name: box.shape for name, box in space.items()} if isinstance(space, spaces.Dict) else None
        if shapes != {name: part.shape[1:] for name, part in observation.items()}:
            raise ValueError(f"model: observes {space}, expected a Dict of user and context as the environment has it")
        normalizer = self._model.get_vec_normalize_env()
        seen: Any = observation if normalizer is None else normalizer.normalize_obs(observation)
        return dict(seen)


def _settings(model: BaseAlgorithm) -> dict[str, Any]:
    """The plain settings of an algorithm."""
    names = set(inspect.signature(type(model).__init__).parameters) - {"verbose", "tensorboard_log"}
    found = {name: getattr(model, name, None) for name in sorted(names)}
    plain = {name: value for name, value in found.items() if isinstance(value, bool | int | float | str)}
    return {"algorithm": type(model).__name__, **plain}
