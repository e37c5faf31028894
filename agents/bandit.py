"""What the contextual bandits share: a model of the reward that is linear in the gates, from whole masks' rewards."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_gym.agents.base import LogitAgent, Observation, OnUpdate


class BanditAgent(LogitAgent):
    """A linear bandit whose action is G gates, and which sees the reward of the whole mask only.

    With features z(x) of an input x and centred gates ``c_i = m_i - 1/2``, the reward of mask m is modelled as

        r(m, x) = a_x + w . z(x) + sum_i c_i theta_i . z(x)

    where a_x is how hard the input itself is. All weights solve one ridge regression on the last ``memory`` rewards, by
    conjugate gradients from the last solution, so that a gate is credited with what the other gates leave unexplained.
    ``theta_i . z(x)`` is what it is worth to switch gate i on. How well that is known depends on how often either value
    of the gate was tried for inputs like x: with ``A_iv = ridge + sum of z z' where m_i = v``, the standard deviation
    of what value v is worth is ``noise * sqrt(z' A_iv^-1 z)``.

    A step is one scored mask.

    Attributes:
        weights: theta_1 to theta_G and, last, w: (G + 1, d).
        gram: Sum of z z' where each gate was on and, last, of all: float64 (G + 1, d, d).
        offsets: a_x of the n inputs, (n,).
        noise: Root mean square of what the model leaves unexplained.
        tried: What is remembered: ``inputs`` (rows,), ``gates`` (rows, G) and ``rewards`` (rows,).
    """

    minimum = {
        "batch_size": 1,
        "exploration": 0,
        "iterations": 1,
        "memory": 1,
        "offset_ridge": 1e-6,
        "ridge": 1e-6,
    }

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Know nothing."""
        super().__init__(env, seed, **config)
        size = self.feature_count
        self.weights = torch.zeros(self.gates + 1, size)
        self.gram = torch.zeros(self.gates + 1, size, size, dtype=torch.float64)
        self.offsets = torch.zeros(0)
        self.noise = torch.tensor(1.0)
        self.tried = {
            "inputs": torch.zeros(0, dtype=torch.int64),
            "gates": torch.zeros(0, self.gates, dtype=torch.uint8),
            "rewards": torch.zeros(0),
        }

    @property
    @abstractmethod
    def feature_count(self) -> int:
        """Number of features d."""

    @abstractmethod
    def features(self, user: Tensor, context: Tensor) -> Tensor:
        """z(x) of inputs, (rows, d)."""

    @abstractmethod
    def choose(self, worth: Tensor, deviations: Tensor, generator: torch.Generator) -> Tensor:
        """Gates to try, bool (rows, G).

        Args:
            worth: What it is worth to switch each gate on, (rows, G).
            deviations: Standard deviation of what it is worth to have it off and on, (2, rows, G).
            generator: Draws everything random.
        """

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Try masks and refit until ``steps`` more have been scored.

        Raises:
            FloatingPointError: If a reward is not finite.
        """
        scorer, last = self.scorer, self._steps + steps
        observed = [torch.from_numpy(scorer.observations[name]) for name in ("user", "context")]
        if not len(self.offsets):
            self.offsets = torch.zeros(len(scorer))
        while self._steps < last:
            generator = self._generator()
            inputs = torch.randint(len(scorer), (self.config["batch_size"],), generator=generator)
            with torch.no_grad():
                z = self.features(*(values[inputs] for values in observed))
                gates = self.choose(z @ self.weights[:-1].T, self._deviations(z), generator).to(torch.uint8)
            rewards = torch.from_numpy(np.asarray(scorer.rewards(inputs.numpy(), gates.numpy()))).float()
            if not torch.isfinite(rewards).all():
                raise FloatingPointError(f"{self.name}: a reward is not finite after {self._steps} steps")
            new = {"inputs": inputs, "gates": gates, "rewards": rewards}
            self.tried = {k: torch.cat([self.tried[k], new[k]])[-self.config["memory"] :] for k in new}
            self._steps += len(inputs)
            self.update(observed, z, gates, generator)
            if on_update is not None:
                scalars = {"reward": rewards.mean(), "density": gates.float().mean(), "noise": self.noise}
                on_update(self._steps, {f"train/{key}": value.item() for key, value in scalars.items()})

    def update(self, observed: list[Tensor], z: Tensor, gates: Tensor, generator: torch.Generator) -> None:
        """Learn from what is remembered.

        Args:
            observed: Users and contexts of all n inputs, each (n, dim).
            z: Features of the inputs that were tried last, (rows, d).
            gates: Their gates, (rows, G).
            generator: Draws everything random.
        """
        self.gram += second_moments(z, with_one(gates))
        self.refit(self.features(*observed))

    @torch.no_grad()
    def refit(self, z: Tensor) -> None:
        """Solve the regression on what is remembered, with the features (n, d) of all inputs."""
        inputs, rewards = self.tried["inputs"], self.tried["rewards"]
        factors = centred(self.tried["gates"])  # (rows, G + 1)

        def predict(weights: Tensor, offsets: Tensor) -> Tensor:
            return ((z @ weights.T)[inputs] * factors).sum(1) + offsets[inputs]

        def normal(parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            """Penalty and curvature of the squared error, applied to weights and offsets."""
            weights, offsets = adjoint(predict(*parts))
            return weights + self.config["ridge"] * parts[0], offsets + self.config["offset_ridge"] * parts[1]

        def adjoint(errors: Tensor) -> tuple[Tensor, Tensor]:
            cells = torch.zeros(len(z), factors.shape[1]).index_add_(0, inputs, factors * errors[:, None])
            return cells.T @ z, torch.zeros(len(z)).index_add_(0, inputs, errors)

        start = self.weights, self.offsets
        self.weights, self.offsets = conjugate_gradients(normal, adjoint(rewards), start, self.config["iterations"])
        self.noise = (rewards - predict(self.weights, self.offsets)).square().mean().sqrt().clamp_min(1e-8)

    def _deviations(self, z: Tensor) -> Tensor:
        """Standard deviation of what each gate is worth off and on, for features (rows, d): (2, rows, G)."""
        on, everything = self.gram[:-1], self.gram[-1]
        ridge = self.config["ridge"] * torch.eye(z.shape[1], dtype=torch.float64)
        found = []
        for tried in (everything - on, on):
            factor = torch.linalg.cholesky(tried + ridge).to(z.dtype)  # (G, d, d)
            half = torch.linalg.solve_triangular(factor, z.T.expand(len(on), -1, -1), upper=False)  # (G, d, rows)
            found.append(half.square().sum(1).sqrt().T)
        return self.noise * torch.stack(found)

    @torch.no_grad()
    def logits(self, observation: Observation) -> Tensor:
        """What it is worth to switch each gate on, in units of what the model leaves unexplained, (rows, G)."""
        z = self.features(*(torch.as_tensor(observation[name]) for name in ("user", "context")))
        return z @ self.weights[:-1].T / self.noise

    def state(self) -> dict[str, Tensor]:
        """The model, what is remembered and the step count."""
        model = {"weights": self.weights, "gram": self.gram, "offsets": self.offsets, "noise": self.noise}
        return {**model, **{f"tried.{k}": v for k, v in self.tried.items()}, "steps": torch.tensor(self._steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        for name in ("weights", "gram", "offsets", "noise"):
            setattr(self, name, tensors[name].clone())
        self.tried = {name: tensors[f"tried.{name}"].clone() for name in self.tried}
        self._steps = int(tensors["steps"])


def with_one(gates: Tensor) -> Tensor:
    """Gates (rows, G) and a one, whose weights do not depend on the gates: float (rows, G + 1)."""
    return torch.cat([gates.float(), torch.ones(len(gates), 1)], dim=1)


def centred(gates: Tensor) -> Tensor:
    """Gates (rows, G) as -1/2 and 1/2, and a one: (rows, G + 1)."""
    return with_one(gates.float() - 0.5)


PRODUCTS = 2**22
"""Products of features that are held at once, 32 MiB."""


def second_moments(z: Tensor, times: Tensor) -> Tensor:
    """Sum of z z' over features (rows, d), each row taken ``times`` (rows, G + 1): float64 (G + 1, d, d)."""
    size = z.shape[1]
    total, rows = torch.zeros(times.shape[1], size * size, dtype=torch.float64), max(1, PRODUCTS // size**2)
    for part, count in zip(z.double().split(rows), times.double().split(rows), strict=True):
        total.addmm_(count.T, (part[:, :, None] * part[:, None]).flatten(1))
    return total.view(-1, size, size)


Parts = tuple[Tensor, Tensor]


def conjugate_gradients(operator: Any, target: Parts, start: Parts, iterations: int) -> Parts:
    """Solve ``operator(x) = target`` for a symmetric positive definite operator on pairs of tensors.

    Hestenes and Stiefel, 1952; stops early where the residual has vanished.
    """

    def combine(x: Parts, scale: Tensor, y: Parts) -> Parts:
        return x[0] + scale * y[0], x[1] + scale * y[1]

    def dot(x: Parts, y: Parts) -> Tensor:
        return (x[0] * y[0]).sum() + (x[1] * y[1]).sum()

    x = start
    residual = combine(target, torch.tensor(-1.0), operator(x))
    direction, size = residual, dot(residual, residual)
    enough = 1e-10 * dot(target, target)
    for _ in range(iterations):
        if size <= enough:
            break
        curved = operator(direction)
        step = size / dot(direction, curved)
        x, residual = combine(x, step, direction), combine(residual, -step, curved)
        before, size = size, dot(residual, residual)
        direction = combine(residual, size / before, direction)
    return x
