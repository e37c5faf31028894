"""What a run writes for TensorBoard: scalars, gate activations as images, hyperparameters with final scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

from dsa_gym.agents.base import Agent
from dsa_gym.problem import GatingProblem


class PolicyLog:
    """TensorBoard events of one run.

    Gate by gate, on fixed inputs of unseen (validation) users: how often it is on, its entropy, and the KL divergence
    from the policy at the previous evaluation. The image ``gates/users`` shows how often each gate (column) is on for
    each
    user (row).
    """

    def __init__(self, folder: Path, problem: GatingProblem, *, start: int = 0) -> None:
        """Open the event file.

        Args:
            folder: The run.
            problem: Inputs on which the policy is watched.
            start: Steps of a continued run; later events of the killed one are hidden.
        """
        # events at `start` itself were written before the checkpoint and stay
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
        self._problem = problem
        self._before: NDArray[np.float64] | None = None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def evaluation(self, agent: Agent, scalars: dict[str, float], decisions: NDArray[np.uint8]) -> None:
        """Write an evaluation's scalars, the policy gate by gate, and its image."""
        step = agent.steps
        self.scalars(step, scalars)
        users = self._problem.user.numpy()
        rate = np.stack([decisions[users == user].mean(0) for user in np.unique(users)])  # (users, G)
        self._writer.add_image("gates/users", _enlarged(rate), step, dataformats="HW")
        if agent.name in ("user_static", "oracle"):
            return
        probability = np.clip(agent.probabilities(self._problem.observations), 1e-6, 1 - 1e-6)
        entropy = bernoulli_entropy(probability).mean(0)
        before = probability if self._before is None else self._before
        divergence = bernoulli_kl(probability, before).mean(0)
        self._before = probability
        gates = min(self._problem.gates, 64)
        for gate in range(gates):
            self._writer.add_scalar(f"gate_activation/{gate}", decisions[:, gate].mean(), step)
            self._writer.add_scalar(f"gate_entropy/{gate}", entropy[gate], step)
            self._writer.add_scalar(f"gate_kl/{gate}", divergence[gate], step)
        self._writer.add_scalar("policy/entropy_per_gate", entropy.mean(), step)
        self._writer.add_scalar("policy/kl_per_gate", divergence.mean(), step)
        self._writer.flush()

    def hparams(self, settings: dict[str, Any], scores: dict[str, float]) -> None:
        """Write the hyperparameters with the final scores, and close."""
        plain = {
            name: value if isinstance(value, int | float | str | bool) else str(value)
            for name, value in settings.items()
        }
        self._writer.add_hparams(plain, {f"final/{name}": value for name, value in scores.items()}, run_name=".")
        self._writer.close()


def bernoulli_entropy(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of Bernoulli gates in nats, elementwise, for p in (0, 1)."""
    return -p * np.log(p) - (1 - p) * np.log(1 - p)


def bernoulli_kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """``KL(p || q)`` of Bernoulli gates in nats, elementwise, for p and q in (0, 1)."""
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return np.maximum(divergence, 0.0)  # rounding can take it below zero


def _enlarged(values: NDArray[np.float64], cell: int = 16) -> NDArray[np.uint8]:
    """Each entry of (rows, columns) in [0, 1] as a grey square, uint8."""
    grey = (255 * values).round().astype(np.uint8)
    return np.kron(grey, np.ones((cell, cell), dtype=np.uint8))
