"""The interface of all agents, and the protocol of environments that can score any mask."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
import yaml
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from dsa_gym import storage

Bits = NDArray[np.uint8]
Observation = dict[str, NDArray[np.float32]]
OnUpdate = Callable[[int, dict[str, float]], None]
"""``on_update(steps, scalars)``: called after updates with the steps so far and what was measured."""


def _binary(space: spaces.Space[Any]) -> int:
    fits = isinstance(space, spaces.MultiBinary) and isinstance(space.n, int | np.integer)
    return int(cast(Any, space).n) if fits else 0


def _relaxed(space: spaces.Space[Any]) -> int:
    fits = isinstance(space, spaces.Box) and len(space.shape) == 1 and (space.low == -1).all()
    return int(cast(Any, space).shape[0]) if fits and (cast(Any, space).high == 1).all() else 0


def _discrete(space: spaces.Space[Any]) -> int:
    count = int(space.n) if isinstance(space, spaces.Discrete) and space.start == 0 else 0
    return count.bit_length() - 1 if count > 1 and count & (count - 1) == 0 else 0


ACTIONS: dict[str, Callable[[spaces.Space[Any]], int]] = {
    "binary": _binary,
    "relaxed": _relaxed,
    "discrete": _discrete,
}
"""Kind of action space to a function that gives its number of gates G, 0 if the space is of another kind."""

DESCRIPTIONS = {
    "binary": "MultiBinary(G)",
    "relaxed": "Box(-1, 1, (G,)), of which a gate is on above 0",
    "discrete": "Discrete(2^G), gate i being bit i",
}


class Scorer(Protocol):
    """What an environment offers as its attribute ``problem`` to agents that need more than Gymnasium."""

    user: Tensor
    """User of each input, int64 (n,)."""
    l0_penalty: float
    """lambda, nats per active parameter."""
    space: Any
    """Has ``gates`` and ``granularity``, see :class:`dsa_gym.masks.MaskSpace`."""
    table: Any
    """Losses under all masks (n, 2^G) where they are known, gate i being bit i of the column; else None."""

    @property
    def gates(self) -> int:
        """Number of gates G."""
        ...

    @property
    def observations(self) -> Observation:
        """``user`` and ``context`` of all n inputs of the split, each (n, dim)."""
        ...

    def __len__(self) -> int:
        """Number of inputs n."""
        ...

    def losses(self, inputs: NDArray[np.int64], gates: Bits) -> NDArray[np.float32]:
        """Losses in nats of inputs (rows,) under gates (rows, G)."""
        ...

    def active_parameters(self, gates: Bits) -> NDArray[np.int64]:
        """Parameters that gates (rows, G) switch on, (rows,)."""
        ...

    def rewards(self, inputs: NDArray[np.int64], gates: Bits) -> NDArray[np.float64]:
        """``-loss - l0_penalty * active_parameters`` of inputs (rows,) under gates (rows, G)."""
        ...

    def relaxed_losses(self, inputs: Tensor, gates: Tensor) -> Tensor:
        """Losses in nats (rows,), differentiable with respect to gates (rows, G) in [0, 1]."""
        ...

    @property
    def gate_features(self) -> NDArray[np.float32]:
        """What is known of each gate (G, F); F is the same for every granularity."""
        ...

    def gate_magnitudes(self) -> NDArray[np.float32]:
        """Root mean square of the shared parameters that each gate switches, (G,)."""
        ...

    def support(self) -> Any:
        """The scorer over the support inputs of the same users."""
        ...


class Agent(ABC):
    """An agent that switches gates.

    Attributes:
        name: Its name in the registry.
        acts_on: Kind of action space, a key of :data:`ACTIONS`.
        env: The environment it was made for.
        gates: Number of gates G.
        seed: The seed it was made with.
        config: Its settings: the tuned defaults with the caller's overrides.
    """

    name: ClassVar[str]
    acts_on: ClassVar[str] = "binary"
    minimum: ClassVar[dict[str, float]] = {}
    """Least value of each numeric setting that has one."""
    _steps = 0

    def __init__(self, env: Any, seed: int = 0, **config: Any) -> None:
        """Check the spaces and merge ``config`` into the tuned defaults.

        Raises:
            ValueError: If a space or a setting does not fit.
        """
        action, observation = env.action_space, env.observation_space
        gates = ACTIONS[self.acts_on](action)
        if not gates:
            fitting = [kind for kind, count in ACTIONS.items() if count(action)]
            raise ValueError(
                f"env: {self.name!r} acts on {DESCRIPTIONS[self.acts_on]}, got {action}; see dsa_gym.envs.wrappers"
                + (f", or take an agent of {fitting[0]} actions" if fitting else "")
            )
        if not isinstance(observation, spaces.Dict) or not {"user", "context"} <= set(observation.spaces):
            raise ValueError(f"env: {self.name!r} observes a Dict of user and context, got {observation}")
        if not all(isinstance(box, spaces.Box) and len(box.shape) == 1 for box in observation.spaces.values()):
            raise ValueError(f"env: {self.name!r} observes vectors, Boxes of shape (dim,), got {observation}")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**31:
            raise ValueError(f"seed={seed!r}: expected an integer from 0 to 2^31 - 1")
        defaults = zoo_defaults(self.name)
        unknown = sorted(set(config) - set(defaults))
        if unknown:
            raise ValueError(
                f"{self.name}: unknown setting {unknown[0]!r}; expected one of {', '.join(sorted(defaults)) or 'none'}"
            )
        self.env, self.seed, self.gates = env, int(seed), gates
        self.config: dict[str, Any] = {**defaults, **config}
        for name, value in config.items():
            self._check_setting(name, value, defaults[name])

    def _check_setting(self, name: str, value: Any, default: Any) -> None:
        """Refuse a setting whose type or range is not that of its default."""
        kinds: dict[type, tuple[type, ...]] = {float: (int, float), list: (list, tuple)}
        fits = isinstance(value, kinds.get(type(default), (type(default),)))
        if not fits or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ValueError(f"{self.name}: {name}={value!r}, expected a value like the default, {default!r}")
        least = self.minimum.get(name)
        numbers = value if isinstance(value, list | tuple) else [value]
        if least is not None and not all(
            isinstance(number, int | float) and least <= number < float("inf") for number in numbers
        ):
            raise ValueError(f"{self.name}: {name}={value!r}, expected at least {least}")

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
            raise ValueError(
                f"env: agent {self.name!r} needs an environment that offers 'problem', a Scorer"
            ) from error

    def learn(self, steps: int, on_update: OnUpdate | None = None) -> None:  # noqa: B027 - most do not
        """Learn for a number of environment steps; agents that do not learn return at once."""

    @abstractmethod
    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """Deterministic decisions (rows, G) for observations, each (rows, dim).

        Args:
            observation: A batch of observations.
            info: What ``reset`` said of them, ``user`` and ``input`` (rows,); only agents that look users or
                inputs up need it.

        Raises:
            ValueError: If the observation is not a batch of the environment's, or ``info`` lacks what is
                needed.
        """

    def rows(self, observation: Observation) -> int:
        """Number of observations in a batch.

        Raises:
            ValueError: If it is not a batch of the environment's observations.
        """
        shapes = {name: np.shape(cast(Any, observation.get(name))) for name in self.env.observation_space.spaces}
        counts = {shape[0] if len(shape) == 2 else None for shape in shapes.values()}
        dims = {name: shape[1:] for name, shape in shapes.items()}
        expected = {name: box.shape for name, box in self.env.observation_space.spaces.items()}
        if len(counts) != 1 or dims != expected:
            raise ValueError(f"observation: shapes {shapes}, expected (rows, ...) of {expected} with equal rows")
        return int(next(iter(counts)) or 0)

    def masks(self, scorer: Any) -> Bits:
        """Decisions for all inputs of a split, (n, G)."""
        return self.predict(scorer.observations, {"user": scorer.user.numpy(), "input": np.arange(len(scorer))})

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        """Probability that each gate is on, (rows, G); the decisions themselves for deterministic agents."""
        return self.predict(observation).astype(np.float64)

    def state(self) -> dict[str, Tensor]:
        """Tensors that, with the settings, are the agent, its optimiser included."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 - nor have a state
        """Take over what :meth:`state` returned."""

    @property
    def steps(self) -> int:
        """Environment steps learned so far; a loss or a reward that was asked for beside them counts as one."""
        return self._steps

    def _generator(self) -> torch.Generator:
        """What draws in the next update, by seed and steps: a resumed run draws what the uninterrupted one does."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self._steps)

    def save(self, folder: Path) -> None:
        """Write ``agent.json`` and ``agent.safetensors``; neither can run code when it is loaded."""
        record = {
            "agent": self.name,
            "seed": self.seed,
            "gates": self.gates,
            "config": self.config,
            "steps": self.steps,
        }
        storage.write_tensors(Path(folder) / "agent.safetensors", self.state())
        storage.write_json(Path(folder) / "agent.json", record)

    def load(self, folder: Path) -> None:
        """Take over what :meth:`save` wrote.

        Raises:
            ValueError: If it is another agent's, for another number of gates, or has other settings.
        """
        record = storage.read_json(Path(folder) / "agent.json")
        if record["agent"] != self.name or record["gates"] != self.gates:
            raise ValueError(
                f"{folder}: holds agent {record['agent']!r} for {record['gates']} gates, "
                f"expected {self.name!r} for {self.gates}"
            )
        own = json.loads(json.dumps(self.config))
        differ = sorted(name for name in {*own, *record["config"]} if own.get(name) != record["config"].get(name))
        if differ:
            name = differ[0]
            raise ValueError(
                f"{folder}: was saved with {name}={record['config'].get(name)!r}, "
                f"this agent has {own.get(name)!r}; make it with the saved settings"
            )
        self.seed = int(record["seed"])
        self.load_state(storage.read_tensors(Path(folder) / "agent.safetensors"))


class LogitAgent(Agent):
    """An agent that gives every gate a logit: it is on if its probability is above one half."""

    @abstractmethod
    def logits(self, observation: Observation) -> Tensor:
        """Logit of each gate (rows, G), without a gradient."""

    def predict(self, observation: Observation, info: dict[str, Any] | None = None) -> Bits:
        """Gates whose probability is above one half."""
        self.rows(observation)
        decided: Bits = (self.logits(observation) > 0).to(torch.uint8).numpy()
        return decided

    def probabilities(self, observation: Observation) -> NDArray[np.float64]:
        """Probability that each gate is on, (rows, G)."""
        self.rows(observation)
        probabilities: NDArray[np.float64] = torch.sigmoid(self.logits(observation)).double().numpy()
        return probabilities


class NetworkAgent(LogitAgent):
    """An agent that is a network, its optimiser and a count of steps; its constructor makes the first two.

    Attributes:
        network: Gives the logits.
        optimizer: Trains it.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Tensor]:
        """Network, optimiser and step count."""
        tensors = {f"gate.{name}": value for name, value in self.network.state_dict().items()}
        return tensors | storage.optimizer_tensors(self.optimizer) | {"steps": torch.tensor(self._steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` returned."""
        self.network.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("gate.")})
        storage.load_optimizer_tensors(self.optimizer, tensors)
        self._steps = int(tensors["steps"])


def zoo(name: str) -> dict[str, Any]:
    """What ``agents/zoo/NAME.yaml`` says of an agent.

    Returns:
        ``settings`` for every environment, ``environments`` (id to what differs there), ``search`` (setting to its
        range, for ``dsa-gym tune``) and ``studies`` (id to what the settings come from); those that it has.
    """
    path = Path(__file__).parent / "zoo" / f"{name}.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def zoo_defaults(name: str, env_id: str | None = None) -> dict[str, Any]:
    """Tuned settings of an agent, those of an environment where it has its own; empty if the agent has none."""
    entry = zoo(name)
    return {**entry.get("settings", {}), **entry.get("environments", {}).get(env_id, {})}
