"""Neural-linear Thompson sampling over gates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsa_gym import storage
from dsa_gym.agents.bandit import BanditAgent, centred, second_moments, with_one
from dsa_gym.agents.gate_policy import perceptron


class NeuralLinearAgent(BanditAgent):
    """Thompson sampling from a Bayesian linear model over learned features (Riquelme et al., 2018).

    The features are a constant and the last hidden layer of a network that is trained on what is remembered, together
    with the linear weights, ``updates`` gradient steps for each batch of tried masks; after that the linear model alone
    is fitted again. Each gate of each input is tried as a draw from the posterior of what it is worth says.
    """

    name = "neural_linear"
    minimum = {**BanditAgent.minimum, "hidden": 1, "learning_rate": 1e-12, "updates": 0, "weight_decay": 0}

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Build the network and its optimiser.

        Raises:
            ValueError: If it has no hidden layer.
        """
        super().__init__(env, seed, **config)
        observed = sum(env.observation_space[name].shape[0] for name in ("user", "context"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = perceptron([observed, *self.config["hidden"]])
        self.head = torch.nn.Parameter(self.weights.clone())
        self.optimizer = torch.optim.AdamW(
            [*self.network.parameters(), self.head],
            lr=self.config["learning_rate"],
            weight_decay=self.config["weight_decay"],
        )

    @property
    def feature_count(self) -> int:
        """Constant and last hidden layer."""
        if not self.config["hidden"]:
            raise ValueError("hidden=[]: the features are a hidden layer")
        return int(1 + self.config["hidden"][-1])

    def features(self, user: Tensor, context: Tensor) -> Tensor:
        """``[1, tanh(network)]``."""
        hidden: Tensor = torch.tanh(self.network(torch.cat([user, context], dim=1)))
        return torch.cat([torch.ones(len(user), 1), hidden], dim=1)

    def choose(self, worth: Tensor, deviations: Tensor, generator: torch.Generator) -> Tensor:
        """The sign of a draw from the posterior."""
        spread = self.config["exploration"] * deviations.square().sum(0).sqrt()
        drawn: Tensor = worth + spread * torch.randn(worth.shape, generator=generator)
        return drawn > 0

    def update(self, observed: list[Tensor], z: Tensor, gates: Tensor, generator: torch.Generator) -> None:
        """Train the network, and fit the linear model to its new features."""
        with torch.no_grad():
            self.head.copy_(self.weights)
        for _ in range(self.config["updates"]):
            rows = torch.randint(len(self.tried["inputs"]), (self.config["batch_size"],), generator=generator)
            inputs, masks, rewards = (self.tried[name][rows] for name in ("inputs", "gates", "rewards"))
            found = ((self.features(*(v[inputs] for v in observed)) @ self.head.T) * centred(masks)).sum(1)
            loss = (found + self.offsets[inputs] - rewards).square().mean() / self.noise.square()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*self.network.parameters(), self.head], 1.0)
            self.optimizer.step()
        with torch.no_grad():
            self.weights = self.head.detach().clone()
            everything = self.features(*observed)
            self.refit(everything)
            tried = with_one(self.tried["gates"])
            times = torch.zeros(len(everything), tried.shape[1]).index_add_(0, self.tried["inputs"], tried)
            self.gram = second_moments(everything, times)

    def state(self) -> dict[str, Tensor]:
        """The linear model, the network and its optimiser."""
        network = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        return {**super().state(), **network, **storage.optimizer_tensors(self.optimizer)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        super().load_state(tensors)
        self.network.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("network.")})
        storage.load_optimizer_tensors(self.optimizer, tensors)
