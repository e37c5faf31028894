"""A policy's scores between updates, on seen and on unseen users."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from dsa_gym.ladder import normalised_score
from dsa_gym.problem import Bits
from dsa_gym.search import Problem, best_static


class Decider(Protocol):
    """What decides on all inputs of a split: an :class:`dsa_gym.agents.base.Agent`, or another's policy."""

    def masks(self, scorer: Any) -> Bits:
        """Decisions for all inputs of a split, (n, G)."""
        ...


def open_problem(env_id: str, split: str, **arguments: Any) -> Problem:
    """The gating problem of one split of a registered environment.

    Args:
        env_id: A registered id.
        split: ``train``, ``seen``, ``validation`` or ``test``.
        **arguments: Arguments of the environment.
    """
    env = gym.make(env_id, split=split, **arguments)
    env.reset(seed=0)
    problem: Problem = env.get_wrapper_attr("problem")
    return problem


class Monitor:
    """Scores decisions between updates.

    Attributes:
        problems: ``seen`` and ``unseen`` users' inputs.
        ends: For each of them the mean reward of the best static mask and of the reference gate, between which scores
            are normalised.
        static: The best static mask of the training users (G,).
    """

    def __init__(self, static: Bits, problems: Mapping[str, Problem]) -> None:
        """Score the two ends of the normalised score."""
        self.problems, self.static = dict(problems), static
        self.ends = {
            name: (
                _mean_reward(problem, np.tile(self.static, (len(problem), 1))),
                _mean_reward(problem, problem.reference_gates()),
            )
            for name, problem in self.problems.items()
        }

    @classmethod
    def of_env(cls, env_id: str, *, static: Bits | None = None, **arguments: Any) -> Monitor:
        """The monitor of an environment: new inputs of its training users, and its validation users.

        Args:
            env_id: A registered id.
            static: The best static mask (G,), if it is known already.
            **arguments: Arguments of the environment.
        """
        splits = {"seen": "seen", "unseen": "validation"}
        problems = {name: open_problem(env_id, split, **arguments) for name, split in splits.items()}
        static = best_static(open_problem(env_id, "train", **arguments)) if static is None else static
        return cls(static, problems)

    def __call__(self, policy: Decider) -> tuple[dict[str, float], dict[str, Bits]]:
        """Scalars and decisions of a policy, by split; ``regret`` where the optimum is known."""
        scalars: dict[str, float] = {}
        decisions: dict[str, Bits] = {}
        for name, problem in self.problems.items():
            masks = policy.masks(problem)
            inputs = np.arange(len(problem))
            active = float(problem.active_parameters(masks).mean())
            reward = _mean_reward(problem, masks)
            scalars |= {
                f"{name}/loss": float(problem.losses(inputs, masks).mean()),
                f"{name}/penalty": problem.l0_penalty * active,
                f"{name}/reward": reward,
                f"{name}/active_parameters": active,
                f"{name}/density": active / float(problem.sizes.sum()),
                f"{name}/normalized_score": float(normalised_score(reward, *self.ends[name])),
            }
            if problem.optimum_known:
                scalars[f"{name}/regret"] = float(problem.best_rewards(inputs).mean()) - reward
            decisions[name] = masks
        return scalars, decisions


def _mean_reward(problem: Problem, masks: NDArray[np.uint8]) -> float:
    return float(problem.rewards(np.arange(len(problem)), masks).mean())
