"""The interface of all agents, and the protocol of environments that can score any mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import yaml
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from dsa_gym import storage

Bits = NDArray[np.uint8]
Observation = dict[str, NDArray[np.float32]]
OnUpdate = Callable[[int, dict[str, float]], None]
"""``on_update(steps, scalars)``: called after every update with the environment steps so far and what was measured."""


class Scorer(Protocol):
    """What an environment offers, as its attribute ``problem``, to agents that need more than the Gymnasium API."""

    user: Tensor
    l0_penalty: float

    @property
    def gates(self) -> int:
        """Number of gates G."""
        ...

    @property
    def observations(self) -> Observation:
        """Observations of all n inputs of the split."""
        ...

    def __len__(self) -> int:
        """Number of inputs n."""
        ...

    def rewards(self, inputs: NDArray[np.int64], gates: Bits) -> NDArray[np.float64]:
        """Rewards of inputs (rows,) under gates (rows, G)."""
        ...

    def relaxed_losses(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """Losses in nats (rows,), differentiable with respect to gates (rows, G) in [0, 1]."""
        ...

    def support(self) -> Any:
        """The scorer over the support inputs of the same users."""
        ...


class Agent(ABC):
    """An agent that switches gates.

    Attributes:
        name: Its name in the registry.
        env: The environment it was made for.
        gates: Number of gates G.
        seed: The seed it was made with.
        config: Its settings: the tuned defaults with the caller's overrides.
    """

    name: ClassVar[str]

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Check the spaces and merge ``config`` into the tuned defaults.

        Raises:
            ValueError: If a space or a setting does not fit.
        """
        action, observation = env.action_space, env.observation_space
        if not isinstance(action, spaces.MultiBinary) or not isinstance(action.n, int | np.integer):
            raise ValueError(f"env: {self.name!r} acts on MultiBinary(G), got {action}")
        if not isinstance(observation, spaces.Dict):
            raise ValueError(f"env: {self.name!r} observes a Dict of user and context, got {observation}")
        defaults = zoo_defaults(self.name)
        unknown = sorted(set(config) - set(defaults))
        if unknown:
            raise ValueError(
                f"{self.name}: unknown setting {unknown[0]!r}; expected one of {', '.join(sorted(defaults)) or 'none'}"
            )
        self.env, self.seed, self.gates = env, int(seed), int(action.n)
        self.config: dict[str, Any] = {**defaults, **config}

    @property
    def scorer(self) -> Any:
        """The environment's :class:`Scorer`.

        Raises:
            ValueError: If the environment does not offer one.
        """
        try:
            if hasattr(self.env, "get_attr"):
                return self.env.get_attr("problem")[0]
            return self.env.get_wrapper_attr("problem")
        except AttributeError as error:
            raise ValueError(f"env: agent {self.name!r} needs an environment that offers 'problem', a Scorer") from error

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:
        """Learn for a number of environment steps; agents that do not learn return at once."""

    @abstractmethod
    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """Deterministic decisions (rows, G) for observations, each (rows, dim).

        Args:
            observation: A batch of observations.
            info: What ``reset`` said of them, ``user`` and ``input`` (rows,); only agents that look users or inputs up need it.
        """

    def masks(self, scorer: Any) -> Bits:
        """Decisions for all inputs of a split, (n, G)."""
        return self.predict(scorer.observations, {"user": scorer.user.numpy(), "input": np.arange(len(scorer))})

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        """Probability that each gate is on, (rows, G); the decisions themselves for deterministic agents."""
        return self.predict(observation).astype(np.float64)

    def state(self) -> dict[str, Tensor]:
        """Tensors that, with the settings, are the agent, its optimiser included; saved and restored by name."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""

    @property
    def steps(self) -> int:
        """Environment steps learned so far."""
        return 0

    def save(self, folder: Path) -> None:
        """Write ``agent.json`` and ``agent.safetensors`` into a folder; neither can run code when it is loaded."""
        record = {"agent": self.name, "seed": self.seed, "gates": self.gates, "config": self.config, "steps": self.steps}
        storage.write_tensors(Path(folder) / "agent.safetensors", self.state())
        storage.write_json(Path(folder) / "agent.json", record)

    def load(self, folder: Path) -> None:
        """Take over what :meth:`save` wrote.

        Raises:
            ValueError: If it is another agent's or for another number of gates.
        """
        record = storage.read_json(Path(folder) / "agent.json")
        if record["agent"] != self.name or record["gates"] != self.gates:
            raise ValueError(
                f"{folder}: holds agent {record['agent']!r} for {record['gates']} gates, expected {self.name!r} for "
                f"{self.gates}"
            )
        self.load_state(storage.read_tensors(Path(folder) / "agent.safetensors"))


def zoo_defaults(name: str) -> dict[str, Any]:
    """Tuned settings of an agent, from ``agents/zoo/NAME.yaml``; empty if it has none."""
    path = Path(__file__).parent / "zoo" / f"{name}.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}
