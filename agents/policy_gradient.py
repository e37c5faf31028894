"""What the agents share that draw several masks for an input and ask the environment's scorer for all their rewards."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dsa_gym.agents.base import NetworkAgent, Observation, OnUpdate
from dsa_gym.agents.gate_policy import make_policy


@dataclass
class Batch:
    """Inputs that masks are to be drawn for.

    Attributes:
        scorer: Gives rewards, a :class:`dsa_gym.agents.base.Scorer`.
        inputs: Indices into its split, int64 (rows,).
        observed: What the policy sees of them, concatenated (rows, dim).
        generator: Draws everything random.
    """

    scorer: Any
    inputs: Tensor
    observed: Tensor
    generator: torch.Generator

    def draw(self, logits: Tensor, masks: int) -> Tensor:
        """Bernoulli gates of logits (rows, G), float (rows, masks, G)."""
        shape = (len(logits), masks, logits.shape[1])
        return (torch.rand(shape, generator=self.generator) < torch.sigmoid(logits.detach())[:, None]).float()

    def rewards(self, gates: Tensor) -> Tensor:
        """Rewards (rows, masks) of gates (rows, masks, G)."""
        rows, masks, _ = gates.shape
        inputs = self.inputs.repeat_interleave(masks).numpy()
        found = self.scorer.rewards(inputs, gates.flatten(0, 1).to(torch.uint8).numpy())
        return torch.from_numpy(np.asarray(found)).float().view(rows, masks)


class PolicyGradientAgent(NetworkAgent):
    """An agent whose policy is independent Bernoulli gates, trained on rewards of masks that it chooses itself.

    A contextual bandit allows what an environment's step does not: several masks for one input. They go to the
    environment's ``problem`` (:class:`dsa_gym.agents.base.Scorer`) in one call. A step is one scored mask.
    """

    minimum = {
        "batch_size": 1,
        "entropy": 0,
        "hidden": 1,
        "learning_rate": 1e-12,
        "masks": 2,
        "observation_noise": 0,
        "weight_decay": 0,
    }

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Build the policy and its optimiser."""
        super().__init__(env, seed, **config)
        self._names = sorted(env.observation_space.spaces)
        observed = sum(env.observation_space[name].shape[0] for name in self._names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = make_policy(
                self.config["policy"], observed, self.gates, self.config["hidden"], lambda: self.scorer.gate_features
            )
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.config["learning_rate"],
            weight_decay=self.config["weight_decay"],
            eps=1e-5,
        )

    @abstractmethod
    def update(self, batch: Batch) -> tuple[int, dict[str, float]]:
        """Improve the policy on a batch; returns the masks that were scored, and what was measured."""

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Update until ``steps`` more masks have been scored.

        Raises:
            FloatingPointError: If a reward or a weight is not finite.
        """
        scorer, last = self.scorer, self._steps + steps
        everything = torch.cat([torch.from_numpy(scorer.observations[name]) for name in self._names], dim=1)
        while self._steps < last:
            generator = self._generator()
            inputs = torch.randint(len(scorer), (self.config["batch_size"],), generator=generator)
            noise = self.config["observation_noise"] * torch.randn(
                len(inputs), everything.shape[1], generator=generator
            )
            scored, scalars = self.update(Batch(scorer, inputs, everything[inputs] + noise, generator))
            self._steps += scored
            if not all(bool(torch.isfinite(p).all()) for p in self.network.parameters()):
                raise FloatingPointError(f"{self.name}: weights are not finite after {self._steps} steps")
            if on_update is not None:
                on_update(self._steps, scalars)

    def improve(self, objective: Tensor, logits: Tensor) -> None:
        """One step of the optimiser up an objective, a scalar, and the mean entropy of a gate, weighed by ``entropy``.

        Advantages are scaled to one, so of G gates each can explain ``1 / sqrt(G)`` of them: so is the weight. A bonus
        that is too small for that freezes gates of little weight before they are right.

        Raises:
            FloatingPointError: If the objective is not finite.
        """
        if not torch.isfinite(objective):
            raise FloatingPointError(f"{self.name}: objective is {objective.item()} after {self._steps} steps")
        bonus = self.config["entropy"] / self.gates**0.5 * bernoulli_entropy(logits).mean()
        self.optimizer.zero_grad()
        (-(objective + bonus)).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 0.5)
        self.optimizer.step()

    @torch.inference_mode()
    def logits(self, observation: Observation) -> Tensor:
        """Logit of each gate (rows, G)."""
        rows: Tensor = self.network(torch.cat([torch.as_tensor(observation[name]) for name in self._names], dim=1))
        return rows


def bernoulli_log_prob(logits: Tensor, gates: Tensor) -> Tensor:
    """Log-probability of each gate, the shape of ``gates``: ``b theta - softplus(theta)``."""
    return gates * logits - nn.functional.softplus(logits)


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Entropy of each gate in nats: ``softplus(theta) - theta sigmoid(theta)``."""
    return nn.functional.softplus(logits) - logits * torch.sigmoid(logits)


def bernoulli_kl(old: Tensor, new: Tensor) -> Tensor:
    """KL divergence of each gate's old distribution from its new one, in nats; both are logits."""
    return (old - new) * torch.sigmoid(old) + nn.functional.softplus(new) - nn.functional.softplus(old)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Each reward less the mean of the other masks' of the same input: (rows, masks), masks >= 2."""
    masks = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (masks / (masks - 1))


def scaled(advantages: Tensor) -> Tensor:
    """Advantages over their root mean square: their scale is the loss's, which is none of the policy's business."""
    return advantages / advantages.square().mean().sqrt().clamp_min(1e-8)
