"""The gating environment, scalar and natively batched, over any domain's bundle."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from dsa_gym.bundle import Bundle
from dsa_gym.envs.episodes import Episodes
from dsa_gym.envs.rendering import Frame, ansi, rgb_array
from dsa_gym.masks import MaskSpace
from dsa_gym.observations import LIMIT
from dsa_gym.population import SPLITS
from dsa_gym.problem import GatingProblem, check_metric

Observation = dict[str, NDArray[np.float32]]
Info = dict[str, Any]


class _Gating:
    """What scalar and vector environment share: arguments, spaces, the problem, one batched step."""

    def __init__(
        self,
        *,
        num_envs: int,
        domain: str,
        bundle: str | Path | None,
        split: str,
        granularity: str,
        l0_penalty: float | None,
        reward_metric: str | None,
        episode_length: int,
        device: str,
        render_mode: str | None,
        cache_bytes: int,
    ) -> None:
        for name, count in (("num_envs", num_envs), ("episode_length", episode_length)):
            if not _is_integer(count) or count < 1:
                raise ValueError(f"{name}={count!r}: expected a positive integer")
        if not _is_integer(cache_bytes) or cache_bytes < 0:
            raise ValueError(f"cache_bytes={cache_bytes!r}: expected a number of bytes >= 0")
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        if render_mode not in (None, *GatingEnv.metadata["render_modes"]):
            raise ValueError(f"render_mode={render_mode!r}: expected None, 'ansi' or 'rgb_array'")
        priced = isinstance(l0_penalty, int | float | np.number) and 0 <= l0_penalty < float("inf")
        if l0_penalty is not None and not priced:
            raise ValueError(f"l0_penalty={l0_penalty!r}: expected None or a finite number >= 0, per active parameter")
        check_metric(reward_metric, domain)
        self.source = str(bundle) if bundle is not None else domain
        # checksums are compared at the first reset, when the data is read
        self._opened = Bundle.open(self.source, verify=False)
        if self._opened.domain != domain:
            raise ValueError(f"bundle={self.source!r}: is of domain {self._opened.domain!r}, expected {domain!r}")
        self.arguments: dict[str, Any] = {
            "split": split,
            "granularity": granularity,
            "l0_penalty": l0_penalty,
            "reward_metric": reward_metric,
            "device": device,
            "cache_bytes": cache_bytes,
        }
        self.num_envs, self.episode_length = int(num_envs), int(episode_length)
        gates = MaskSpace(self._opened.shape, granularity).gates
        sizes = self._opened.manifest["config"]
        self.observation_space = spaces.Dict(
            {
                "user": spaces.Box(-LIMIT, LIMIT, (sizes["user_dim"],), np.float32),
                "context": spaces.Box(-LIMIT, LIMIT, (sizes["context_dim"],), np.float32),
            }
        )
        self.action_space = spaces.MultiBinary(gates)
        self.last: dict[str, Any] | None = None

    @cached_property
    def problem(self) -> GatingProblem:
        """Scores masks; opened and checked at the first reset."""
        self._opened.verify()
        return GatingProblem(self._opened, **self.arguments)

    @cached_property
    def episodes(self) -> Episodes:
        return Episodes(self.problem.user.numpy(), self.num_envs, self.episode_length)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is loaded from the bundle: copies in other processes load it again."""
        state = self.__dict__.copy()
        for name in ("problem", "_domain", "_opened"):
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened = Bundle.open(self.source, verify=False)

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
        if not (fits and all(_is_integer(v) and int(v) in allowed for v in values)):
            what = "a user of this split (index or name)" if name == "user" else f"an input in 0 to {len(allowed) - 1}"
            raise ValueError(f"options[{name!r}]={value!r}: expected {what}, one or one per environment")
        return np.broadcast_to(values.astype(np.int64), (self.num_envs,))

    def _user_index(self, name: str) -> int:
        users = self._opened.users
        if name not in users:
            raise ValueError(f"options['user']={name!r}: no user of that name in the bundle")
        return users.index(name)

    def observe(self) -> Observation:
        """Observations of the current inputs, each (num_envs, dim)."""
        return {name: values[self.episodes.input] for name, values in self.problem.observations.items()}

    def identities(self) -> dict[str, NDArray[np.int64]]:
        """``user`` and ``input`` of the current decision."""
        return {"user": self.episodes.user.copy(), "input": self.episodes.input.copy()}

    def score(self, gates: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Score one mask for each environment (num_envs, G) on its current input."""
        if "episodes" not in self.__dict__:
            raise gym.error.ResetNeeded("call reset() before step()")
        losses = self.problem.losses(self.episodes.input, gates).astype(np.float64)
        active = self.problem.active_parameters(gates)
        scored = {
            "loss": losses,
            "active_parameters": active,
            "density": active / self._opened.shape.size,
            **self.identities(),
        }
        reward = -losses - self.problem.l0_penalty * active
        self.last = {name: value.copy() for name, value in scored.items()} | {"gates": gates}
        return {**scored, "reward": reward}

    def gates_of(self, action: Any, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Check an action and return it as uint8.

        Raises:
            ValueError: If its shape, type or values are not those of the action space.
        """
        try:
            array = np.asarray(action)
        except ValueError as error:
            raise ValueError(f"action: expected an array of shape {shape}, got something ragged") from error
        if array.shape != shape:
            raise ValueError(f"action: shape {array.shape}, expected {shape}, one binary entry per gate")
        if array.dtype.kind not in "buif":
            raise ValueError(f"action: dtype {array.dtype}, expected binary numbers (int8, bool, ...)")
        wrong = array[(array != 0) & (array != 1)]
        if wrong.size:
            raise ValueError(f"action: holds {wrong[0]}, expected 0 or 1 in every entry")
        return array.astype(np.uint8)

    def frame(self, index: int) -> Frame:
        """What there is to see of one environment."""
        shape, last = self._opened.shape, self.last
        row = int(self.episodes.input[index] if last is None else last["input"][index])
        user = int(self.episodes.user[index] if last is None else last["user"][index])
        gates = None if last is None else last["gates"][index]
        per_site = np.zeros((len(shape.sites), shape.pathways), dtype=np.float32)
        if gates is not None:
            per_site = _share_on(self.problem, gates)
        parts = self._domain.describe(self._opened.examples, int(self.problem.rows[row]))
        if gates is not None:
            *known, target = parts
            outcome = self.problem.outcome(row, gates)
            parts = {name: parts[name] for name in known} | outcome | {target: parts[target]}
        kinds = {"attention": "attn", "feed_forward": "ffn"}
        return Frame(
            user=self._opened.users[user],
            parts=parts,
            mask=per_site,
            site_labels=tuple(f"L{site.layer} {kinds.get(site.kind, site.kind)}" for site in shape.sites),
            layers=tuple(site.layer for site in shape.sites),
            loss=None if last is None else float(last["loss"][index]),
            penalty=None if last is None else float(last["active_parameters"][index] * self.problem.l0_penalty),
            unit=self.problem.unit,
            active_parameters=None if last is None else int(last["active_parameters"][index]),
            total_parameters=shape.size,
            gates=_gates_text(gates, self.problem.space.granularity),
        )

    @cached_property
    def _domain(self) -> Any:
        return self._opened.make_domain()

    def render(self, mode: str | None) -> list[Any]:
        """Pictures of every environment's last step."""
        if mode is None:
            raise ValueError("render_mode=None: make the environment with render_mode='ansi' or 'rgb_array'")
        if "episodes" not in self.__dict__:
            raise gym.error.ResetNeeded("call reset() before render()")
        draw = ansi if mode == "ansi" else rgb_array
        return [draw(self.frame(i)) for i in range(self.num_envs)]


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _seeds(values: Sequence[Any]) -> NDArray[np.uint64]:
    """Seeds as the 64 bits that the draws start from.

    Raises:
        ValueError: If one is not an integer >= 0.
    """
    wrong = [value for value in values if not _is_integer(value) or value < 0]
    if wrong:
        raise ValueError(f"seed={wrong[0]!r}: expected an integer >= 0")
    return np.asarray([int(value) % 2**64 for value in values], dtype=np.uint64)


def _share_on(problem: GatingProblem, gates: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Share of each pathway's parameters that is on at each site, (sites, pathways)."""
    import torch

    shape = problem.bundle.shape
    mask = problem.space.expand(torch.from_numpy(gates[None]).float())
    if problem.space.elementwise:
        component = shape.component_of()
        on = torch.zeros(len(shape.sites) * shape.rank).index_add_(0, component, mask[0])
        mask = (on / torch.bincount(component)).view(1, len(shape.sites), shape.rank)
    return mask[0].view(len(shape.sites), shape.pathways, -1).mean(-1).numpy()


def _gates_text(gates: NDArray[np.uint8] | None, granularity: str) -> str:
    if gates is None:
        return "no decision yet"
    if len(gates) <= 64:
        return "".join(map(str, gates))
    return f"{int(gates.sum())} of {len(gates)} {granularity} gates on"


class GatingEnv(gym.Env[Observation, NDArray[np.int8]]):
    """Choose which adapter pathways to switch on for a user and an input.

    ## Description

    A frozen transformer carries a library of adapter pathways that all users share and a tiny sparse change
    of each user's own. Before an input is processed the agent sees who the user is and how the input begins,
    and switches G gates. The gates expand to a binary mask m over the adapter parameters, and the model `M(x;
    theta, phi_u * m)` is scored on the rest of the input. With `episode_length=1` this is a contextual bandit
    (use `gamma=0`). What counts is how well a policy does for users that it has never seen.

    ## Action Space

    `MultiBinary(G)`: one bit per gate. What a gate switches depends on `granularity`, for the default bundle
    (4 layers, 8 sites of width 128, rank 32, 8 pathways):

    | granularity | a gate switches | G |
    |-------------|-----------------|---|
    | `pathway` | a pathway at every site | 8 |
    | `layer` | a pathway at the sites of a layer | 32 |
    | `site` | a pathway at one site | 64 |
    | `component` | a rank-1 unit of a site | 256 |
    | `element` | one parameter | 65,536 |

    ## Observation Space

    `Dict`, float32, whitened and clipped to [-5, 5]:

    | key | shape | what |
    |-----|-------|------|
    | `user` | (16,) | user embedding, from the user's support examples only |
    | `context` | (16,) | the frozen model's view of what is known of the input |

    ## Rewards

    `reward = -loss - l0_penalty * active_parameters`: the loss and the number of adapter parameters that the
    mask switches on. It is deterministic given user, input and mask.

    | domain | known of the input | loss | `reward_metric` |
    |--------|--------------------|------|-----------------|
    | text | prefix | cross-entropy per token of the continuation, nats | `rougeL`, `bleu` (greedy) |
    | recommendation | history, time | cross-entropy of the next items, nats | `ndcg@10`, `recall@10`, ... |
    | image | condition, noised image | squared error of the predicted noise | `psnr` (one step) |

    With a `reward_metric` the loss is minus that metric, which no gradient reaches. `info` holds `loss`,
    `active_parameters`, `density` (share of all adapter parameters), `user` and `input` (indices) of the step;
    after `reset`, `user` and `input` of the first decision.

    ## Starting State

    A user is drawn uniformly, then one of the user's inputs. `reset(options={"user": U, "input": I})` fixes
    either or both; a user is an index or a name, an input an index into the split.

    ## Episode End

    Terminates after `episode_length` steps; the user stays and every step draws another input of that user.
    The observation returned with the last step is the one that was acted on.

    ## Arguments

    ```python
    gym.make("DSA-Text-v0", bundle=None, split="train", granularity="pathway", l0_penalty=None,
             reward_metric=None, episode_length=1, device="auto", render_mode=None, cache_bytes=64 * 2**20)
    ```

    * `bundle`: folder written by `dsa-gym prepare`; None for the domain's shipped bundle.
    * `split`: `train` (training users' query inputs), `seen` (the same users, inputs never trained on),
      `validation` and `test` (users that nothing was trained on).
    * `granularity`: see above. Tables of measured losses serve the granularity that the library was trained
      under.
    * `l0_penalty`: lambda, the price of an active parameter in the unit of the loss, >= 0; None for the
      domain's, which is small beside what a good mask gains (0 with a `reward_metric`).
    * `reward_metric`: a task metric in the place of minus the loss, see above.
    * `episode_length`: inputs per episode.
    * `device`: `"auto"`, `"cpu"`, `"cuda"`.
    * `render_mode`: `"ansi"` or `"rgb_array"`.
    * `cache_bytes`: bound on remembered losses; 0 computes every loss through the model and ignores the
      bundle's tables.

    ## Version History

    * v0: Initial version
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 2}

    def __init__(
        self,
        *,
        domain: str,
        bundle: str | Path | None = None,
        split: str = "train",
        granularity: str = "pathway",
        l0_penalty: float | None = None,
        reward_metric: str | None = None,
        episode_length: int = 1,
        device: str = "auto",
        render_mode: str | None = None,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        """Read the bundle's manifest; everything heavier waits for the first reset.

        Raises:
            ValueError: If an argument is wrong; the message names it.
        """
        self._core = _Gating(
            num_envs=1,
            domain=domain,
            bundle=bundle,
            split=split,
            granularity=granularity,
            l0_penalty=l0_penalty,
            reward_metric=reward_metric,
            episode_length=episode_length,
            device=device,
            render_mode=render_mode,
            cache_bytes=cache_bytes,
        )
        self.observation_space = cast("spaces.Space[Observation]", self._core.observation_space)
        self.action_space = self._core.action_space
        self.render_mode = render_mode
        self._seeded = False

    @property
    def problem(self) -> GatingProblem:
        """The gating problem behind the environment: scores any masks of any inputs at once."""
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
        self._core.begin(where, options)
        self._core.last = None
        return self._observation(), {name: int(value[0]) for name, value in self._core.identities().items()}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, Info]:
        """Apply one mask to the current input."""
        gates = self._core.gates_of(action, self._core.action_space.shape)[None]
        info = {name: value[0].item() for name, value in self._core.score(gates).items()}
        reward = info.pop("reward")
        ended = bool(self._core.episodes.advance()[0])
        return self._observation(), reward, ended, False, info

    def render(self) -> Any:
        """The last step as text (``ansi``) or an image (H, W, 3) uint8 (``rgb_array``)."""
        return self._core.render(self.render_mode)[0]

    def _observation(self) -> Observation:
        return {name: value[0] for name, value in self._core.observe().items()}


class GatingVectorEnv(VectorEnv[Observation, NDArray[Any], NDArray[Any]]):
    """Natively batched :class:`GatingEnv`: one forward serves all, whatever their users and masks.

    Environment i draws what a scalar environment seeded with ``seed + i`` draws. Autoreset happens in the
    same step: ``infos["final_obs"]`` and ``infos["final_info"]`` hold what the ended episodes returned, the
    rest of ``infos`` the identities of the next decision; all of it is laid out as
    ``gymnasium.vector.SyncVectorEnv`` does. A ``user`` or ``input`` in the options of ``reset`` is one for
    all environments or an array (num_envs,).
    """

    metadata = {**GatingEnv.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        *,
        num_envs: int = 1,
        domain: str,
        bundle: str | Path | None = None,
        split: str = "train",
        granularity: str = "pathway",
        l0_penalty: float | None = None,
        reward_metric: str | None = None,
        episode_length: int = 1,
        device: str = "auto",
        render_mode: str | None = None,
        cache_bytes: int = 64 * 2**20,
    ) -> None:
        """Read the bundle's manifest; see :class:`GatingEnv` for the arguments.

        Raises:
            ValueError: If an argument is wrong; the message names it.
        """
        self._core = _Gating(
            num_envs=num_envs,
            domain=domain,
            bundle=bundle,
            split=split,
            granularity=granularity,
            l0_penalty=l0_penalty,
            reward_metric=reward_metric,
            episode_length=episode_length,
            device=device,
            render_mode=render_mode,
            cache_bytes=cache_bytes,
        )
        self.num_envs, self.render_mode = self._core.num_envs, render_mode
        self.single_observation_space = self._core.observation_space
        self.single_action_space = self._core.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._seeded = False

    @property
    def problem(self) -> GatingProblem:
        """The gating problem behind the environments."""
        return self._core.problem

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Begin episodes in all environments, or in those of ``options["reset_mask"]``."""
        options = dict(options or {})
        chosen = self._masked(options.pop("reset_mask", None))
        self._seed(seed, chosen)
        self._core.begin(np.flatnonzero(chosen), options)
        self._core.last = None
        return self._core.observe(), _with_masks(self._core.identities(), chosen)

    def step(self, actions: Any) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], Info]:
        """Apply one mask per environment (num_envs, G)."""
        gates = self._core.gates_of(actions, (self.num_envs, *self._core.action_space.shape))
        scored = self._core.score(gates)
        rewards = scored.pop("reward")
        ended = self._core.episodes.advance()
        infos: Info = {}
        if ended.any():
            final = self._core.observe()
            infos["final_obs"] = np.empty(self.num_envs, dtype=object)
            for i in np.flatnonzero(ended):
                infos["final_obs"][i] = {name: value[i] for name, value in final.items()}
            infos |= {
                "_final_obs": ended.copy(),
                "final_info": _with_masks(scored, ended),
                "_final_info": ended.copy(),
            }
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
        if seed is None or _is_integer(seed):
            seeds: list[Any] = [seed if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = list(seed) if isinstance(seed, Sequence | np.ndarray) else [seed] * self.num_envs
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed: {len(seeds)} seeds, expected one or {self.num_envs}")
        given = np.asarray([i for i in np.flatnonzero(chosen) if seeds[i] is not None], dtype=np.intp)
        starts = _seeds([seeds[i] for i in given])
        super().reset(seed=int(seed) if _is_integer(seed) else None)
        if not self._seeded:
            fresh = self.np_random.integers(2**63, size=self.num_envs, dtype=np.uint64)
            self._core.episodes.seed(fresh, np.arange(self.num_envs))
            self._seeded = True
        self._core.episodes.seed(starts, given)


def _with_masks(values: dict[str, NDArray[Any]], present: NDArray[np.bool_]) -> Info:
    """Gymnasium's batched info: each array, zero where it does not hold, and a ``_name`` that says where."""
    info: Info = {name: np.where(present, value, np.zeros_like(value)) for name, value in values.items()}
    return info | {f"_{name}": present.copy() for name in values}
