"""What the gates share that are trained by a gradient through relaxed decisions, over a frozen bundle."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsa_gym.agents.base import NetworkAgent, Observation, OnUpdate
from dsa_gym.agents.policy_gradient import bernoulli_entropy
from dsa_gym.gating import GateConfig, GatingNetwork


class GradientGateAgent(NetworkAgent):
    """Minimises ``loss + l0_penalty * active_parameters`` by the gradient through relaxed gates.

    It needs a loss that is differentiable in the mask, which the reward's other forms (ROUGE, NDCG, bytes) are not.
    """

    network: GatingNetwork
    minimum = {"batch_size": 1, "learning_rate": 1e-12, "weight_decay": 0}

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Build the gate and its optimiser."""
        super().__init__(env, seed, **config)
        names = ("hidden", "dropout", "temperature", "final_temperature")
        gate = GateConfig(relaxation="binary", **{name: self.config[name] for name in names if name in self.config})
        sizes = {name: space.shape[0] for name, space in env.observation_space.spaces.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = GatingNetwork(sizes["user"], sizes["context"], self.gates, self.gates, gate)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.config["learning_rate"], weight_decay=self.config["weight_decay"]
        )

    @abstractmethod
    def relax(self, logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Relaxed gates that the loss sees, and the gates that are paid for, both (rows, G) in [0, 1]."""

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Take gradient steps until ``steps`` more inputs have been used.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
            self._learn(steps, on_update)

    def _learn(self, steps: int, on_update: OnUpdate | None) -> None:
        scorer, size = self.scorer, self.config["batch_size"]
        last = self._steps + steps
        prices = torch.as_tensor(scorer.l0_penalty * scorer.active_parameters(np.eye(self.gates, dtype=np.uint8)))
        observed = {name: torch.from_numpy(value) for name, value in scorer.observations.items()}
        while self._steps < last:
            generator = self._generator()
            torch.manual_seed(generator.initial_seed())
            inputs = torch.randint(len(scorer), (size,), generator=generator)
            self.network.train()
            logits = self.network(observed["user"][inputs], observed["context"][inputs])
            gates, paid = self.relax(logits, generator)
            loss = scorer.relaxed_losses(inputs, gates).mean()
            objective = loss + (paid * prices.float()).sum(1).mean()
            objective = objective - self.config["entropy"] * bernoulli_entropy(logits).mean()
            if not torch.isfinite(objective):
                raise FloatingPointError(f"{self.name}: loss is {objective.item()} after {self._steps} steps")
            self.optimizer.zero_grad()
            objective.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self._steps += size
            if on_update is not None:
                on_update(self._steps, {"train/loss": loss.item(), "train/density": gates.mean().item()})

    @torch.inference_mode()
    def logits(self, observation: Observation) -> Tensor:
        """Logit of each gate (rows, G)."""
        self.network.eval()
        logits: Tensor = self.network(torch.as_tensor(observation["user"]), torch.as_tensor(observation["context"]))
        return logits
