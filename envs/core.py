"""A batch of episodes without Gymnasium's bookkeeping, and the scalar and the vector environment over any such batch.

A new environment is one subclass of :class:`Core` and two lines that make :class:`ScalarEnv` and :class:`BatchedEnv` of
it. A scalar environment is a batch of one, so both take every decision in the same code.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeGuard, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from dsa_gym.envs.episodes import Episodes
from dsa_gym.envs.rendering import Frame, ansi, rgb_array

Observation = dict[str, NDArray[np.float32]]
Info = dict[str, Any]
RENDER_MODES = ["ansi", "rgb_array"]


class Step(NamedTuple):
    """What a step of a batch returns.

    Attributes:
        reward: float64 (num_envs,).
        terminated: bool (num_envs,).
        info: Per-environment values, each (num_envs,).
    """

    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    info: dict[str, NDArray[Any]]


class Core(ABC):
    """A batch of episodes over a problem that scores masks.

    Attributes:
        num_envs: Environments in the batch.
        episode_length: Inputs per episode.
        observation_space: Of one environment.
        action_space: Of one environment.
        final_obs: Whether the vector environment hands out the observations with which episodes ended.
        last: What was decided last and what came of it, each (num_envs, ...); None before the first step.
    """

    observation_space: spaces.Dict
    action_space: spaces.Space[Any]
    final_obs = True

    def __init__(self, *, num_envs: int, episode_length: int, render_mode: str | None) -> None:
        """Check what all environments have.

        Raises:
            ValueError: If an argument is out of range; the message names it.
        """
        for name, count in (("num_envs", num_envs), ("episode_length", episode_length)):
            if not is_integer(count) or count < 1:
                raise ValueError(f"{name}={count!r}: expected a positive integer")
        if render_mode not in (None, *RENDER_MODES):
            raise ValueError(f"render_mode={render_mode!r}: expected None, 'ansi' or 'rgb_array'")
        self.num_envs, self.episode_length, self.render_mode = int(num_envs), int(episode_length), render_mode
        self.last: dict[str, Any] | None = None

    @property
    @abstractmethod
    def problem(self) -> Any:
        """Scores masks: a :class:`dsa_gym.problem.GatingProblem` or what offers the same."""

    @abstractmethod
    def frame(self, index: int) -> Frame:
        """What there is to see of one environment."""

    @abstractmethod
    def user_names(self) -> Sequence[str]:
        """Names of the users that ``options["user"]`` may give."""

    @cached_property
    def episodes(self) -> Episodes:
        """Whose turn it is, on which input; made at the first reset."""
        return Episodes(self.problem.user.numpy(), self.num_envs, self.episode_length)

    def begin(self, where: NDArray[np.intp], options: dict[str, Any] | None = None) -> None:
        """Begin episodes, with the user and input that ``options`` fix."""
        options = dict(options or {})
        unknown = sorted(str(name) for name in set(options) - {"user", "input"})
        if unknown:
            raise ValueError(f"options: unknown key {unknown[0]!r}; expected 'user', 'input' or both")
        user = self._option(options.get("user"), "user")[where]
        first = self._option(options.get("input"), "input")[where]
        owners = self.problem.user.numpy()
        clash = (user >= 0) & (first >= 0) & (owners[first] != user)
        if clash.any():
            i = int(np.flatnonzero(clash)[0])
            raise ValueError(f"options: input {first[i]} belongs to user {owners[first[i]]}, not {user[i]}")
        self.episodes.begin(where, user, first)

    def _option(self, value: Any, name: str) -> NDArray[np.int64]:
        """A user or input for each environment, -1 where it is to be drawn, int64 (num_envs,)."""
        if value is None:
            return np.full(self.num_envs, -1, dtype=np.int64)
        values = np.atleast_1d(np.asarray(value, dtype=object))
        if name == "user":
            values = np.asarray([self._user_index(v) if isinstance(v, str) else v for v in values.flat], dtype=object)
        allowed = set(self.problem.user.tolist()) if name == "user" else range(len(self.problem))
        fits = values.shape in ((1,), (self.num_envs,))
        if not (fits and all(is_integer(v) and int(v) in allowed for v in values)):
            what = "a user of this split (index or name)" if name == "user" else f"an input in 0 to {len(allowed) - 1}"
            raise ValueError(f"options[{name!r}]={value!r}: expected {what}, one or one per environment")
        return np.broadcast_to(values.astype(np.int64), (self.num_envs,))

    def _user_index(self, name: str) -> int:
        users = self.user_names()
        if name not in users:
            raise ValueError(f"options['user']={name!r}: no user of that name")
        return users.index(name)

    def observe(self) -> Observation:
        """Observations of the current decisions, each (num_envs, dim)."""
        inputs = self.episodes.input
        return {name: values.take(inputs, axis=0) for name, values in self.problem.observations.items()}

    def identities(self) -> dict[str, NDArray[np.int64]]:
        """``user`` and ``input`` of the current decision."""
        return {"user": self.episodes.user.copy(), "input": self.episodes.input.copy()}

    def step(self, actions: Any, batch: tuple[int, ...]) -> Step:
        """Apply one action to each environment: actions (*batch, ...), ``batch`` is () or (num_envs,)."""
        gates = binary(actions, batch, self.problem.gates)
        scored = self.score(gates)
        reward = scored.pop("reward")
        return Step(reward, self.episodes.advance(), scored)

    def score(
        self, gates: NDArray[np.uint8], where: NDArray[np.bool_] | None = None, budget: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """Score one mask for each environment (num_envs, G) on its current input.

        Args:
            gates: The masks.
            where: Environments whose mask is final; loss, reward and regret are 0 in the others. None for all.
            budget: Most active parameters of the masks that regret compares with; None for any number.
        """
        problem, inputs = self.problem, self.episodes.input
        rows = slice(None) if where is None else np.flatnonzero(where)
        active = problem.active_parameters(gates)
        losses, reward, regret = np.zeros((3, self.num_envs))
        losses[rows] = problem.losses(inputs[rows], gates[rows])
        reward[rows] = -losses[rows] - problem.l0_penalty * active[rows]
        scored = self.info(losses, active)
        if problem.optimum_known:
            limit = {} if budget is None else {"budget": budget}
            regret[rows] = problem.best_rewards(inputs[rows], **limit) - reward[rows]
            scored["regret"] = regret
        self.remember(scored, gates)
        return {**scored, "reward": reward}

    def info(self, losses: NDArray[np.float64], active: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """What ``info`` tells of masks that switch ``active`` parameters on, each (num_envs,)."""
        return {
            "loss": losses,
            "active_parameters": active,
            "density": active / self.total_parameters,
            **self.identities(),
        }

    def remember(self, info: dict[str, NDArray[Any]], gates: NDArray[np.uint8]) -> None:
        """Keep what was decided (num_envs, G) and what came of it, for pictures."""
        self.last = {name: value.copy() for name, value in info.items()} | {"gates": gates}

    def numbers(self, index: int) -> dict[str, Any]:
        """The numbers of a :class:`Frame` of one environment, None before the first step."""
        last, problem = self.last, self.problem
        return {
            "loss": None if last is None else float(last["loss"][index]),
            "penalty": None if last is None else float(last["active_parameters"][index] * problem.l0_penalty),
            "unit": problem.unit,
            "active_parameters": None if last is None else int(last["active_parameters"][index]),
            "total_parameters": self.total_parameters,
        }

    @property
    @abstractmethod
    def total_parameters(self) -> int:
        """Adapter parameters that there are to switch."""

    def render(self, mode: str | None) -> list[Any]:
        """Pictures of every environment's last step."""
        if mode is None:
            raise ValueError("render_mode=None: make the environment with render_mode='ansi' or 'rgb_array'")
        if "episodes" not in self.__dict__:
            raise gym.error.ResetNeeded("call reset() before render()")
        draw = ansi if mode == "ansi" else rgb_array
        return [draw(self.frame(i)) for i in range(self.num_envs)]


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an integer and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def binary(actions: Any, batch: tuple[int, ...], gates: int) -> NDArray[np.uint8]:
    """Check binary actions (*batch, gates) and return them as uint8 (environments, gates).

    Raises:
        ValueError: If shape, type or values are not those of the action space.
    """
    shape = (*batch, gates)
    array = _array(actions, shape)
    if array.shape != shape:
        raise ValueError(f"action: shape {array.shape}, expected {shape}, one binary entry per gate")
    if array.dtype.kind not in "buif":
        raise ValueError(f"action: dtype {array.dtype}, expected binary numbers (int8, bool, ...)")
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise ValueError(f"action: holds {wrong[0]}, expected 0 or 1 in every entry")
    return array.astype(np.uint8).reshape(-1, gates)


def discrete(actions: Any, batch: tuple[int, ...], count: int) -> NDArray[np.int64]:
    """Check actions in 0 to count - 1, of shape ``batch``, and return them as int64 (environments,).

    Raises:
        ValueError: If shape, type or values are not those of the action space.
    """
    array = _array(actions, batch)
    if array.shape != batch or array.dtype.kind not in "ui":
        raise ValueError(f"action: {array.dtype} of shape {array.shape}, expected integers of shape {batch}")
    wrong = array[(array < 0) | (array >= count)]
    if wrong.size:
        raise ValueError(f"action: holds {wrong[0]}, expected 0 to {count - 1}")
    return array.astype(np.int64).reshape(-1)


def _array(actions: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return np.asarray(actions)
    except ValueError as error:
        raise ValueError(f"action: expected an array of shape {shape}, got something ragged") from error


def _seeds(values: Sequence[Any]) -> NDArray[np.uint64]:
    """Seeds as the 64 bits that the draws start from.

    Raises:
        ValueError: If one is not an integer >= 0.
    """
    wrong = [value for value in values if not is_integer(value) or value < 0]
    if wrong:
        raise ValueError(f"seed={wrong[0]!r}: expected an integer >= 0")
    return np.asarray([int(value) % 2**64 for value in values], dtype=np.uint64)


def _signature(core: type[Core], own: set[str]) -> inspect.Signature:
    """The arguments of a core that a user gives, for ``help()``."""
    parameters = inspect.signature(core.__init__).parameters.values()
    return inspect.Signature([p for p in parameters if p.name not in own])


class ScalarEnv(gym.Env[Observation, Any]):
    """One environment over a batch of one; a subclass names its core and has the environment's page."""

    core_class: ClassVar[type[Core]]
    metadata = {"render_modes": RENDER_MODES, "render_fps": 2}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = _signature(cls.core_class, {"self", "num_envs"})  # type: ignore[attr-defined]

    def __init__(self, **arguments: Any) -> None:
        """Read what is light; everything heavier waits for the first reset.

        Raises:
            ValueError: If an argument is wrong; the message names it.
        """
        self._core = self.core_class(num_envs=1, **arguments)
        self.observation_space = cast("spaces.Space[Observation]", self._core.observation_space)
        self.action_space = self._core.action_space
        self.render_mode = self._core.render_mode
        self._seeded = False

    @property
    def problem(self) -> Any:
        """The problem behind the environment: scores any masks of any inputs at once."""
        return self._core.problem

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, Info]:
        """Begin an episode; see the class for ``options``."""
        start = None if seed is None else _seeds([seed])
        super().reset(seed=seed)
        where = np.zeros(1, dtype=np.intp)
        if start is None and not self._seeded:
            start = self.np_random.integers(2**63, size=1, dtype=np.uint64)
        if start is not None:
            self._core.episodes.seed(start, where)
            self._seeded = True
        self._core.last = None
        self._core.begin(where, options)
        return self._observation(), {name: int(value[0]) for name, value in self._core.identities().items()}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, Info]:
        """Take one decision."""
        if not self._seeded:
            raise gym.error.ResetNeeded("call reset() before step()")
        reward, terminated, info = self._core.step(action, ())
        ended = bool(terminated[0])
        return self._observation(), float(reward[0]), ended, False, {name: v[0].item() for name, v in info.items()}

    def render(self) -> Any:
        """The last step as text (``ansi``) or an image (H, W, 3) uint8 (``rgb_array``)."""
        return self._core.render(self.render_mode)[0]

    def _observation(self) -> Observation:
        return {name: value[0] for name, value in self._core.observe().items()}


class BatchedEnv(VectorEnv[Observation, Any, NDArray[Any]]):
    """A batch of a :class:`ScalarEnv`, natively: one forward serves all, whatever their users and masks.

    Environment i draws what a scalar environment seeded with ``seed + i`` draws. Autoreset happens in the
    same step: ``infos["final_obs"]`` and ``infos["final_info"]`` hold what the ended episodes returned, the
    rest of ``infos`` the identities of the next decision; all of it is laid out as
    ``gymnasium.vector.SyncVectorEnv`` does. A ``user`` or ``input`` in the options of ``reset`` is one for
    all environments or an array (num_envs,).
    """

    core_class: ClassVar[type[Core]]
    metadata = {**ScalarEnv.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__signature__ = _signature(cls.core_class, {"self"})  # type: ignore[attr-defined]

    def __init__(self, *, num_envs: int = 1, **arguments: Any) -> None:
        """Read what is light; see the scalar environment for the arguments."""
        self._core = self.core_class(num_envs=num_envs, **arguments)
        self.num_envs, self.render_mode = self._core.num_envs, self._core.render_mode
        self.single_observation_space = self._core.observation_space
        self.single_action_space = self._core.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._seeded = False

    @property
    def problem(self) -> Any:
        """The problem behind the environments."""
        return self._core.problem

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Begin episodes in all environments, or in those of ``options["reset_mask"]``."""
        options = dict(options or {})
        chosen = self._masked(options.pop("reset_mask", None))
        self._seed(seed, chosen)
        self._core.last = None
        self._core.begin(np.flatnonzero(chosen), options)
        return self._core.observe(), _with_masks(self._core.identities(), chosen)

    def step(self, actions: Any) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Info]:
        """Take one decision per environment."""
        if not self._seeded:
            raise gym.error.ResetNeeded("call reset() before step()")
        rewards, ended, scored = self._core.step(actions, (self.num_envs,))
        infos: Info = {}
        if ended.any():
            if self._core.final_obs:
                final = self._core.observe()
                infos["final_obs"] = np.empty(self.num_envs, dtype=object)
                for i in np.flatnonzero(ended):
                    infos["final_obs"][i] = {name: value[i] for name, value in final.items()}
                infos["_final_obs"] = ended.copy()
            infos |= {"final_info": _with_masks(scored, ended), "_final_info": ended.copy()}
            self._core.begin(np.flatnonzero(ended))
        if not ended.all():
            infos |= _with_masks(scored, ~ended)
        if ended.any():
            # those that ended stand before their next decision, the others report the one they made
            now = {name: np.where(ended, value, scored[name]) for name, value in self._core.identities().items()}
            infos |= _with_masks(now, np.ones(self.num_envs, dtype=bool))
        return self._core.observe(), rewards, ended, np.zeros(self.num_envs, dtype=bool), infos

    def render(self) -> tuple[Any, ...]:
        """The last step of every environment."""
        return tuple(self._core.render(self.render_mode))

    def _masked(self, mask: Any) -> NDArray[np.bool_]:
        """Which environments ``reset`` begins, bool (num_envs,)."""
        if mask is None:
            return np.ones(self.num_envs, dtype=bool)
        chosen: NDArray[np.bool_] = np.asarray(mask)
        if chosen.dtype != np.bool_ or chosen.shape != (self.num_envs,) or not chosen.any():
            raise ValueError(f"options['reset_mask']: expected a boolean ({self.num_envs},) with a True, got {mask!r}")
        if not self._seeded and not chosen.all():
            raise ValueError("options['reset_mask']: the first reset has to begin every environment")
        return chosen

    def _seed(self, seed: int | Sequence[int | None] | None, chosen: NDArray[np.bool_]) -> None:
        """Seed chosen environment i with ``seed + i`` or ``seed[i]``; all once from fresh entropy."""
        if seed is None or is_integer(seed):
            seeds: list[Any] = [seed if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = list(seed) if isinstance(seed, Sequence | np.ndarray) else [seed] * self.num_envs
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: {len(seeds)} seeds, expected one or {self.num_envs}")
        given = np.asarray([i for i in np.flatnonzero(chosen) if seeds[i] is not None], dtype=np.intp)
        starts = _seeds([seeds[i] for i in given])
        super().reset(seed=int(seed) if is_integer(seed) else None)
        if not self._seeded:
            fresh = self.np_random.integers(2**63, size=self.num_envs, dtype=np.uint64)
            self._core.episodes.seed(fresh, np.arange(self.num_envs))
            self._seeded = True
        self._core.episodes.seed(starts, given)


def _with_masks(values: dict[str, NDArray[Any]], present: NDArray[np.bool_]) -> Info:
    """Gymnasium's batched info: each array, zero where it does not hold, and a ``_name`` that says where."""
    everywhere = bool(present.all())
    info: Info = {
        name: value.copy() if everywhere else np.where(present, value, np.zeros_like(value))
        for name, value in values.items()
    }
    return info | {f"_{name}": present.copy() for name in values}
